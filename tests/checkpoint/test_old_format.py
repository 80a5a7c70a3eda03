"""A checkpoint that slime-lora 0.1.0 wrote before the package was rearranged: it loads, resumes and exports as then.

tests/data/adapter-0.1.0 holds a base of 2 layers (bf16), a checkpoint after three Adam steps at TP 2 with sequence
parallelism, the PEFT export of it, and the export one step later.

pytest tests/checkpoint/test_old_format.py
"""

from __future__ import annotations

from pathlib import Path

import adapted
import pytest
import torch
from harness import Layout
from safetensors.torch import load_file

from slime_plugins.lora import LoRAConfig, export_peft, load_adapter
from slime_plugins.lora.cli import main

DATA = Path(__file__).parents[1] / "data" / "adapter-0.1.0"
CONFIG = LoRAConfig(
    rank=2, alpha=4.0, layout="split", target_modules=("q_proj", "v_proj", "linear_fc1", "down_proj"), seed=7
)


def resume(layout: Layout, out):
    """Load, export, one more step, export. Returns the step number and its gradient norm."""
    # By taps, as it was trained: another order of the products is another last bit.
    how = dict(sp=layout.sp, dtype=torch.bfloat16, linears="taps")
    model = adapted.wrap(adapted.adapted_chunks(DATA / "base", CONFIG, **how))
    optimizer = adapted.optimizer_for(model, bf16=True)
    loaded = load_adapter(model, DATA / "checkpoint", optimizer=optimizer)
    assert loaded.optimizer and loaded.rng == (layout.tp == 2)
    export_peft(model, out / "adapter", hf_checkpoint=DATA / "base")
    tokens = torch.randint(0, 40, (4, 17), generator=torch.Generator().manual_seed(1))
    _, norm = adapted.train_step(model, optimizer, tokens)
    export_peft(model, out / "next", hf_checkpoint=DATA / "base")
    return loaded.step, norm


def differing(a: Path, b: Path) -> list[str]:
    one, other = (load_file(path / "adapter_model.safetensors") for path in (a, b))
    assert one.keys() == other.keys() and one
    return [key for key in one if not torch.equal(one[key], other[key])]


def test_resumed_at_the_same_parallelism_to_the_last_bit(pool2, tmp_path):
    for step, norm in pool2.run(resume, tmp_path, tp=2, sp=True):
        assert (step, norm) == (3, 0.6500294687853643)
    assert differing(tmp_path / "adapter", DATA / "adapter") == []
    assert differing(tmp_path / "next", DATA / "next") == []
    assert len(differing(DATA / "adapter", DATA / "next")) > 0


def test_resharded(pool1, tmp_path):
    assert pool1.run(resume, tmp_path)[0] == (3, pytest.approx(0.65003, rel=5e-3))  # bf16 sums of another order
    assert differing(tmp_path / "adapter", DATA / "adapter") == []


def test_exported_without_megatron(tmp_path):
    source, base = str(DATA / "checkpoint"), str(DATA / "base")
    assert main(["export", "--checkpoint", source, "--hf-checkpoint", base, "--out", str(tmp_path / "out")]) == 0
    assert differing(tmp_path / "out", DATA / "adapter") == []
