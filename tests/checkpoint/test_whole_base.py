"""What names a base has compared all of it: import, export, export --merge, verify --full. One plain process each.

pytest tests/checkpoint/test_whole_base.py
"""

from __future__ import annotations

import json
import shutil

import adapter_dirs
import pytest
import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.cli import main
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.rehearsal.tiny import make_tiny


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def adapter_for(base, out, leaf="q_proj", noted=None):
    shapes = {name: BaseCheckpoint(base).linear_shape(name) for name in BaseCheckpoint(base).linears}
    write_adapter(out, *adapter_dirs.adapter({n: s for n, s in shapes.items() if n.endswith(leaf)}), base=noted)
    return out


def run(capsys, *argv) -> tuple[int, str]:
    """Exit code and what was printed; an error is one line."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    printed = capsys.readouterr()
    assert printed.err.count("\n") == (code == 2 or (code == 1 and argv[0] != "verify"))
    return code, printed.err or printed.out


def flip(base, name):
    """One bit in the last bytes of a weight: far from what a sample sees of a large one."""
    weight = BaseCheckpoint(base).weights[name]
    with open(weight.file, "r+b") as file:
        file.seek(weight.end - 2)
        byte = file.read(1)[0]
        file.seek(weight.end - 2)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_bit_anywhere_is_another_base(tmp_path, capsys):
    base = make_tiny(tmp_path / "base", tokenizer=False, tied=False, ffn=96)
    hf = ("--hf-checkpoint", base)
    adapter_for(base, tmp_path / "sampled", noted=base)
    assert run(capsys, "import", "--adapter", tmp_path / "sampled", *hf, "--out", tmp_path / "run")[0] == 0
    code, text = run(capsys, "export", "--checkpoint", tmp_path / "run", *hf, "--out", tmp_path / "adapter")
    assert code == 0 and "base compared: 2 of 2 layers and all else" in text
    code, text = run(capsys, "verify", tmp_path / "adapter", *hf, "--full")
    assert code == 0 and "every byte of 25 tensors" in text
    verbs = {
        "import": ["import", "--adapter", tmp_path / "adapter"],
        "export": ["export", "--checkpoint", tmp_path / "run"],
        "merge": ["export", "--merge", "--checkpoint", tmp_path / "run"],
    }
    for name in BaseCheckpoint(base).weights:
        flip(base, name)
        for verb, argv in verbs.items():
            code, text = run(capsys, *argv, *hf, "--out", tmp_path / "out")
            assert code == 1 and ("other weights" in text or "is not the base of" in text), (name, verb, text)
            assert not (tmp_path / "out").exists()
        code, text = run(capsys, "verify", tmp_path / "adapter", *hf, "--full")
        assert code == 1 and "other weights" in text
        flip(base, name)
    large = "model.layers.1.mlp.up_proj.weight"
    flip(base, large)
    code, text = run(capsys, "verify", tmp_path / "adapter", *hf)
    assert code == 0 and "first 4 KiB of each of 25 tensors" in text  # says what it looked at, and no more
    code, text = run(capsys, "verify", tmp_path / "sampled", *hf, "--full")
    assert code == 0 and "first 4 KiB of each of 25 tensors (of the others the adapter notes nothing)" in text
    flip(base, large)
    assert run(capsys, *verbs["merge"], *hf, "--out", tmp_path / "out")[0] == 0
    assert run(capsys, "verify", tmp_path / "adapter", "--full")[0] == 2


def test_an_adapter_on_another_base_is_not_imported(tmp_path, capsys):
    base = make_tiny(tmp_path / "base", tokenizer=False)
    other = make_tiny(tmp_path / "other", tokenizer=False, seed=1)
    adapter_for(base, tmp_path / "adapter", noted=base)
    argv = ["import", "--adapter", tmp_path / "adapter", "--hf-checkpoint", other, "--out", tmp_path / "run"]
    code, text = run(capsys, *argv)
    assert code == 1 and "made for a base with other weights" in text and not (tmp_path / "run").exists()
    adapter_for(base, tmp_path / "adapter")  # one that says nothing of its base
    code, text = run(capsys, *argv)
    assert code == 0 and "does not say which base" in text


def test_a_checkpoint_that_knows_few_layers_says_so(tmp_path, capsys):
    """As `import` wrote them before: the first and the last layer."""
    base = make_tiny(tmp_path / "base", tokenizer=False, num_layers=4)
    adapter_for(base, tmp_path / "adapter")
    from slime_plugins.lora.checkpoint import from_peft, manifest

    _, made, _ = from_peft.import_checkpoint(tmp_path / "adapter", base, tmp_path / "run")
    place = tmp_path / "run" / "release"
    fingerprint = {key: value for key, value in made.base.items() if key != "rest"}
    fingerprint["layers"] = {n: made.base["layers"][n] for n in ("0", "3")}
    (place / "adapter.json").unlink()
    manifest.Manifest(**{**vars(made), "base": fingerprint}).write(place)
    hf = ("--hf-checkpoint", base)
    code, text = run(capsys, "export", "--checkpoint", tmp_path / "run", *hf, "--out", tmp_path / "out")
    assert code == 0 and "base compared: 2 of 4 layers\n" in text
    flip(base, "model.layers.3.mlp.up_proj.weight")
    code, text = run(capsys, "export", "--checkpoint", tmp_path / "run", *hf, "--out", tmp_path / "out2")
    assert code == 1 and "differ in 1 of 2 layers compared, from layer 3" in text


@pytest.mark.parametrize("mla", [True, False])
def test_q_proj_of_latent_attention_is_a_linear_of_its_own(tmp_path, capsys, mla):
    """Moonlight: no low rank for the query, so the base has a q_proj, and Megatron's model a linear_q_proj."""
    linears = {f"model.layers.{n}.self_attn.{leaf}": shape for n in (0, 1) for leaf, shape in (
        ("q_proj", (12, 8)), ("kv_b_proj", (10, 6)))}  # fmt: skip
    config = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2} | (
        {"kv_lora_rank": 6} if mla else {}
    )
    base = adapter_dirs.base_checkpoint(tmp_path / "base", linears, config=json.dumps(config))
    adapter_for(base, tmp_path / "adapter", "q_proj", noted=base)
    argv = ["--hf-checkpoint", base, "--out", tmp_path / "run"]
    assert run(capsys, "import", "--adapter", tmp_path / "adapter", *argv)[0] == 0
    written = json.loads((tmp_path / "run" / "release" / "adapter.json").read_text())["adapters"]
    name = "linear_q_proj" if mla else "linear_qkv"
    assert list(written) == [f"decoder.layers.{n}.self_attention.{name}" for n in (0, 1)]
    argv = ["--hf-checkpoint", base, "--out", tmp_path / "back"]
    assert run(capsys, "export", "--checkpoint", tmp_path / "run", *argv)[0] == 0
    assert run(capsys, "verify", tmp_path / "back", "--hf-checkpoint", base, "--full")[0] == 0


def test_names_of_a_model_that_sees_images_are_imported(tmp_path, capsys):
    """Layer prefix and text_config are the base's."""
    linears = {
        f"model.language_model.layers.{n}.mlp.{leaf}": (12, 8) for n in (0, 1) for leaf in ("gate_proj", "up_proj")
    }
    text = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    base = adapter_dirs.base_checkpoint(tmp_path / "base", linears, config=json.dumps({"text_config": text}))
    adapter_for(base, tmp_path / "adapter", "up_proj", noted=base)
    argv = ["--hf-checkpoint", base, "--out", tmp_path / "run"]
    assert run(capsys, "import", "--adapter", tmp_path / "adapter", *argv)[0] == 0
    argv = ["--hf-checkpoint", base, "--out", tmp_path / "back"]
    assert run(capsys, "export", "--checkpoint", tmp_path / "run", *argv)[0] == 0
    from safetensors.torch import load_file

    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    shutil.rmtree(tmp_path / "back")
