"""``slime-lora export`` from checkpoints of sharded runs: the same logits in transformers as in Megatron.

pytest tests/checkpoint/test_checkpoint_export.py
"""

from __future__ import annotations

import json
import subprocess
import sys

import adapted
import pytest
import reference
import torch
from checkpoint_runs import Run
from harness import Layout
from safetensors.torch import load_file

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.checkpoint.save import save_adapter
from slime_plugins.lora.cli import main
from slime_plugins.lora.ends.export import export_peft
from slime_plugins.lora.rehearsal.tiny import make_tiny

FUSED = LoRAConfig(rank=4, alpha=12)
MIXED = LoRAConfig(
    rank=4,
    alpha=12,
    layout="split",
    use_rslora=True,
    rank_pattern={"k_proj": 2, "linear_fc2": 3},
    alpha_pattern={"v_proj": 5},
)


def checkpoint(layout: Layout, hf_dir, config, out, tokens, bf16):
    """Save, and export the live model. Returns Megatron's logits."""
    run = Run(layout, hf_dir, config, bf16=bf16)
    run.start()
    run.train(0, 2)
    save_adapter(run.model, out / "run", optimizer=run.optimizer, step=2)
    export_peft(run.model, out / "live", hf_checkpoint=hf_dir)
    logits = adapted.run_schedule(
        [c.module for c in run.model], tokens, forward_only=True, collect_logits=True, microbatches=2
    )
    return adapted.gather_logits(logits, 128)


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    """family, config -> directory with ``base``, ``run`` and ``live``, and Megatron's logits; made once."""
    cache = {}

    def get(family, config, dtype=torch.float32, **sizes):
        key = family, repr(config), dtype
        if key not in cache:
            out = tmp_path_factory.mktemp(family)
            base = make_tiny(
                out / "base", family, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=12, ffn=80, dtype=dtype,
                max_shard_size="60KB",
            )  # fmt: skip
            pool = request.getfixturevalue("pool2")
            tokens = reference.batch(128)
            ranks = pool.run(checkpoint, base, config, out, tokens, dtype == torch.bfloat16, **sizes)
            cache[key] = out, next(logits for logits in ranks if logits is not None)
        return cache[key]

    return get


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(reference.batch(128)[:, :-1]).logits


def hf_model(path, adapter=None, dtype=torch.float32):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return PeftModel.from_pretrained(model, adapter) if adapter else model


def same_adapter(a, b) -> bool:
    one, other = (load_file(path / "adapter_model.safetensors") for path in (a, b))
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (a, b)]
    equal = all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
    return one.keys() == other.keys() and equal and configs[0] == configs[1]


@pytest.mark.parametrize(
    "family, config, sizes",
    [("qwen3", FUSED, {"tp": 2, "sp": True}), ("llama", MIXED, {"pp": 2}), ("qwen2", MIXED, {"tp": 2})],
    ids=["qwen3", "llama", "qwen2"],
)
def test_checkpoint_exports_as_the_live_model_does(made, tmp_path, family, config, sizes, capsys):
    out, logits = made(family, config, **sizes)
    argv = ["export", "--checkpoint", str(out / "run"), "--hf-checkpoint", str(out / "base")]
    assert main([*argv, "--out", str(tmp_path / "adapter"), "--serve-dir", str(tmp_path / "serve")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(tmp_path / "serve")
    assert same_adapter(tmp_path / "adapter", out / "live")
    peft = logits_of(hf_model(out / "base", tmp_path / "adapter"))
    assert adapted.relative(peft - logits, logits) <= 1e-5
    assert torch.equal(logits_of(hf_model(tmp_path / "serve")), peft)

    assert main([*argv, "--out", str(tmp_path / "patterns"), "--peft-patterns"]) == 0
    patterned = logits_of(hf_model(out / "base", tmp_path / "patterns"))
    assert adapted.relative(patterned - logits, logits) <= 1e-5
    if config is MIXED:
        assert json.loads((tmp_path / "patterns" / "adapter_config.json").read_text())["rank_pattern"]

    assert main([*argv, "--out", str(tmp_path / "merged"), "--merge"]) == 0
    assert "lost to rounding: 0.00%" in capsys.readouterr().out
    merged = hf_model(tmp_path / "merged")
    assert adapted.relative(logits_of(merged) - logits, logits) <= 1e-5
    base = hf_model(out / "base")
    assert merged.config.tie_word_embeddings == base.config.tie_word_embeddings
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert torch.equal(merged.get_output_embeddings().weight, base.get_output_embeddings().weight)


def test_merge_in_bf16_is_rounded_once(made, tmp_path, capsys):
    """Equal, bit for bit, to PEFT's merge done in float32 and cast."""
    out, _ = made("qwen3", FUSED, torch.bfloat16, tp=2)
    argv = ["export", "--checkpoint", str(out / "run"), "--hf-checkpoint", str(out / "base"), "--merge"]
    assert main([*argv, "--out", str(tmp_path / "merged")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lost to rounding"))
    assert 0 < float(line.split()[3].rstrip("%")) < 50
    tensors = {}
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 1 and (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    for file in files:
        tensors |= load_file(file)
    expected = hf_model(out / "base", out / "live").merge_and_unload().state_dict()
    changed = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name
        changed += not torch.equal(tensor, load_base(out / "base")[name])
    assert changed == 4 * 7


def load_base(path):
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def test_needs_no_megatron(made, tmp_path):
    """One plain process without Megatron, transformers or a process group."""
    out, _ = made("qwen3", FUSED, tp=2, sp=True)
    script = f"""
import sys
for name in ("megatron", "transformers", "peft", "ray"):
    sys.modules[name] = None
from slime_plugins.lora.cli import main
code = main(["export", "--checkpoint", {str(out / "run")!r}, "--hf-checkpoint", {str(out / "base")!r},
             "--out", {str(tmp_path / "adapter")!r}])
import torch.distributed
assert not torch.distributed.is_initialized()
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same_adapter(tmp_path / "adapter", out / "live")


def test_refusals(made, tmp_path, capsys):
    """Another base, another size, no checkpoint, a place that is taken: one line, nothing written."""
    out, _ = made("qwen3", FUSED, tp=2, sp=True)
    sizes = {"num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "head_dim": 12}
    other = make_tiny(tmp_path / "other", "qwen3", ffn=80, seed=1, **sizes)
    wider = make_tiny(tmp_path / "wider", "qwen3", ffn=96, **sizes)
    run, base = str(out / "run"), str(out / "base")
    cases = [
        (run, str(other), [], 1, "base weights differ in 4 of 4 layers"),
        (run, str(other), ["--merge"], 1, "base weights differ"),
        (run, str(wider), [], 1, "ffn_hidden_size 80 in the checkpoint, 96 here"),
        (str(tmp_path), base, [], 2, "is no adapter checkpoint"),
        (run, str(tmp_path), [], 2, "no config.json"),
        (run, base, ["--merge", "--peft-patterns"], 2, "has no meaning"),
    ]
    capsys.readouterr()
    for source, hf, flags, code, message in cases:
        argv = ["export", "--checkpoint", source, "--hf-checkpoint", hf, "--out", str(tmp_path / "out")]
        assert main([*argv, *flags]) == code, (message, capsys.readouterr())
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    argv = ["export", "--checkpoint", run, "--hf-checkpoint", base, "--out", str(tmp_path / "out")]
    assert main([*argv, "--merge"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(argv) == 1
