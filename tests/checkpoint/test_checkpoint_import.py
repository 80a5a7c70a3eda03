"""``slime-lora import``: a PEFT adapter becomes a checkpoint that loads at any parallelism, and exports as it was.

pytest tests/checkpoint/test_checkpoint_import.py
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import adapted
import checkpoint_runs as runs
import pytest
import reference
import torch
from checkpoint_runs import Run
from harness import Layout
from safetensors.torch import load_file
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.arguments import add_lora_arguments
from slime_plugins.lora.checkpoint.load import load_adapter
from slime_plugins.lora.cli import main

TOKENS = reference.batch(128)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return tiny(tmp_path_factory)


def load(layout: Layout, hf_dir, config, path):
    """Logits of a model with the imported adapter, and the adapter."""
    run = Run(layout, hf_dir, config)
    loaded = load_adapter(run.model, path, optimizer=run.optimizer, fresh_optimizer=True)
    assert loaded.step is None and not loaded.rng
    chunks = [chunk.module for chunk in run.model]
    logits = adapted.run_schedule(chunks, TOKENS, forward_only=True, collect_logits=True, microbatches=2)
    moved = run.train(0, 2)[0] != run.train(0, 1)[0]
    return adapted.gather_logits(logits, 128), moved


CASES = {
    "split": ("split", {"rank": 4, "alpha": 12}),
    "shared A": ("fused", {"rank": 4, "alpha": 12}),
    "patterns": (
        "split",
        {"rank": 4, "alpha": 12, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
    ),
    "partial": ("split", {"rank": 4, "alpha": 12, "targets": ("q_proj", "v_proj")}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [{"tp": 2, "sp": True}, {"pp": 2}], ids=["tp2sp", "pp2"])
def test_import_then_load(pool2, hf_dir, tmp_path, capsys, case, sizes):
    layout, options = CASES[case]
    model = reference.peft_model(hf_dir, layout=layout, **options)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(TOKENS[:, :-1]).logits
    argv = ["import", "--adapter", str(tmp_path / "adapter"), "--hf-checkpoint", str(hf_dir)]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(tmp_path / "run" / "release")
    config = LoRAConfig.from_peft(tmp_path / "adapter")
    assert config.layout == layout
    assert flags_of(printed[-2]) == config

    results = pool2.run(load, hf_dir, config, tmp_path / "run", **sizes)
    logits = next(logits for logits, _ in results if logits is not None)
    assert adapted.relative(logits - expected, expected) <= 1e-5
    assert all(moved for _, moved in results)

    argv = ["export", "--checkpoint", str(tmp_path / "run"), "--hf-checkpoint", str(hf_dir), "--peft-patterns"]
    assert main([*argv, "--out", str(tmp_path / "back")]) == 0
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def flags_of(line: str) -> LoRAConfig:
    """The config of a run that is given the printed flags."""
    import argparse

    parser = argparse.ArgumentParser()
    add_lora_arguments(parser)
    args = parser.parse_args(["--use-lora", *shlex.split(line.partition("train on with: ")[2])])
    args.seed = 1234
    config = LoRAConfig.from_args(args)
    return LoRAConfig(**{**config.to_dict(), "dtype": "float32"})


def test_needs_no_megatron(hf_dir, tmp_path):
    reference.peft_model(hf_dir, rank=4, alpha=8).save_pretrained(tmp_path / "adapter")
    script = f"""
import sys
for name in ("megatron", "transformers", "peft", "ray"):
    sys.modules[name] = None
from slime_plugins.lora.cli import main
sys.exit(main(["import", "--adapter", {str(tmp_path / "adapter")!r}, "--hf-checkpoint", {str(hf_dir)!r},
               "--out", {str(tmp_path / "run")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run" / "release" / "adapter.json").read_text())
    assert manifest["step"] is None and sorted(manifest["base"]["layers"]) == ["0", "1", "2", "3"]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "release\n"


def test_refusals(hf_dir, tmp_path, capsys):
    """Not an adapter; a base of another size; nothing half-written."""
    reference.peft_model(hf_dir, rank=4, alpha=8).save_pretrained(tmp_path / "adapter")
    from slime_plugins.lora.rehearsal.tiny import make_tiny

    wide = make_tiny(tmp_path / "wide", num_layers=4, num_heads=8, num_kv_heads=2, head_dim=12, ffn=96)
    capsys.readouterr()
    for adapter, base, code, message in (
        (tmp_path / "adapter", wide, 1, "is adapted as a [80, 64] matrix"),
        (tmp_path, hf_dir, 1, "adapter_config.json"),
        (tmp_path / "adapter", tmp_path, 2, "no config.json"),
    ):
        argv = ["import", "--adapter", str(adapter), "--hf-checkpoint", str(base), "--out", str(tmp_path / "run")]
        assert main(argv) == code
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "run").exists()


def other_base(layout: Layout, hf_dir, config, path):
    try:
        load_adapter(Run(layout, hf_dir, config).model, path)
    except ValueError as error:
        return str(error)
    return None


def test_imported_for_another_base(pool2, hf_dir, tmp_path):
    """Equal shapes: told from the checksums that an import notes."""
    reference.peft_model(hf_dir, rank=4, alpha=8).save_pretrained(tmp_path / "adapter")
    from slime_plugins.lora.rehearsal.tiny import make_tiny

    other = make_tiny(tmp_path / "other", num_layers=4, num_heads=8, num_kv_heads=2, head_dim=12, ffn=80, seed=3)
    argv = ["import", "--adapter", str(tmp_path / "adapter"), "--hf-checkpoint", str(hf_dir)]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    config = LoRAConfig.from_peft(tmp_path / "adapter")
    for error in pool2.run(other_base, other, config, tmp_path / "run", tp=2):
        assert "base weights differ in 4 of 4 layers compared" in error
    assert runs.SAVED_AT
