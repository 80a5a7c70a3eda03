"""Merging into a base checkpoint, and what rounding costs. Command: pytest tests/base/test_merge.py"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_plugins.lora.base.merge import merge_checkpoint, merge_weight
from slime_plugins.lora.projections import Projection, Rounding
from slime_plugins.lora.rehearsal.tiny import make_tiny

NAME = "model.layers.1.mlp.up_proj"


def projection(scale=1.0, name=NAME, rows=96, columns=64):
    generator = torch.Generator().manual_seed(3)
    A, B = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
    return Projection(name, A, scale * B, 0.5)


def test_rounding_is_counted():
    """Weights of 1 move in steps of 2^-7 upwards and 2^-8 downwards in bf16; half a step is lost."""
    weight = torch.ones(1, 4, dtype=torch.bfloat16)
    A = torch.tensor([[2**-9, 2**-6, 0.0, -(2**-11)]])
    rounding = Rounding()
    merged = merge_weight(weight, Projection("x", A, torch.ones(1, 1), 1.0), rounding)
    assert merged.tolist() == [[1.0, 1 + 2**-6, 1.0, 1.0]]
    assert (rounding.entries, rounding.unchanged) == (4, 2)
    assert rounding.lost_share == pytest.approx((2**-9 + 2**-11) / (2**-9 + 2**-6 + 2**-11))


def test_nothing_is_lost_in_float32():
    rounding = Rounding()
    merge_weight(torch.randn(96, 64), projection(), rounding)
    assert rounding.lost_share == 0.0


def test_rounded_once():
    """In bf16 arithmetic the product alone would be off by up to 2^-9 of itself."""
    weight, p = torch.randn(96, 64).bfloat16(), projection()
    expected = (weight.double() + 0.5 * (p.B.double() @ p.A.double())).bfloat16()
    merged = merge_weight(weight, p)
    # Ties at float32's own precision aside, the correctly rounded sum.
    assert (merged != expected).sum() <= 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_other_bytes_are_the_base(tmp_path, tied, shard_size):
    """Only adapted matrices change; files, names, dtypes, index and tokenizer stay."""
    base = make_tiny(tmp_path / "base", tied=tied, dtype=torch.bfloat16, max_shard_size=shard_size)
    (base / "adapter_config.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"unmerged")
    out = tmp_path / "out"
    merge_checkpoint([projection()], base, out)
    assert {p.name for p in base.iterdir()} - {p.name for p in out.iterdir()} == {
        "adapter_config.json",
        "pytorch_model.bin",
    }
    for file in out.iterdir():
        if file.suffix != ".safetensors":
            assert file.read_bytes() == (base / file.name).read_bytes()
            continue
        old, new = load_file(base / file.name), load_file(file)
        assert old.keys() == new.keys()
        for name in old:
            expected = merge_weight(old[name], projection()) if name == f"{NAME}.weight" else old[name]
            assert torch.equal(new[name], expected)


def test_refusals(tmp_path):
    base, out = make_tiny(tmp_path / "base", tokenizer=False), tmp_path / "out"
    with pytest.raises(ValueError, match=r"for a \[8, 64\] matrix, but .* has \[96, 64\]"):
        merge_checkpoint([projection(rows=8)], base, out)
    with pytest.raises(ValueError, match="has none of that name"):
        merge_checkpoint([projection(name="model.layers.7.mlp.up_proj")], base, out)
    with pytest.raises(ValueError, match="not finite after merging"):
        merge_checkpoint([projection(scale=float("inf"))], base, out)
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="F8_E4M3"):
        merge_checkpoint([projection()], base, out)
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["base"]
