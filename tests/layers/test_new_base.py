"""The frozen linear is a real seam: a base whose weights are stored as int8 codes and a scale, whole in this file.

It is adapted, trained, merged, fingerprinted, counted, saved and exported by the package as it is, with the bits that
a dense model of the same (dequantised) weights has.

pytest tests/layers/test_new_base.py
"""

from __future__ import annotations

import contextlib

import adapted
import pytest
import reference
import torch
from harness import Layout
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig, apply_lora, export_peft, load_adapter, merged, save_adapter
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.fingerprint import fingerprint_of_hf
from slime_plugins.lora.checkpoint.model import fingerprint_of_model
from slime_plugins.lora.layers import KINDS, FrozenLinear, Kind, LoRALinear
from slime_plugins.lora.rehearsal.model import build_chunks

SCALE = 2.0**-6
TOKENS = reference.batch(128)
LAYOUTS = {"tp1": {}, "tp2": dict(tp=2), "tp2-sp": dict(tp=2, sp=True)}


def rounded(weight: torch.Tensor) -> torch.Tensor:
    return (weight / SCALE).round().clamp(-127, 127) + 0.0  # codes have no -0.0


class Coded:
    """Mixin: ``codes`` (int8) in place of ``weight``; dense for the time of a forward."""

    override = None

    def dense(self):
        return self.override if self.override is not None else self.codes.float() * SCALE

    def forward(self, input_, *args, **kwargs):
        self.__dict__["weight"] = self.dense()
        try:
            return super().forward(input_, *args, **kwargs)
        finally:
            del self.__dict__["weight"]


class CodedColumn(Coded, ColumnParallelLinear):
    pass


class CodedRow(Coded, RowParallelLinear):
    pass


class LoRACodedColumn(LoRALinear, CodedColumn):
    pass


class LoRACodedRow(LoRALinear, CodedRow):
    pass


class FrozenCoded(FrozenLinear):
    """The kind."""

    @property
    def parameters(self):
        return [self.module.codes]

    @property
    def dtype(self):
        return torch.float32

    def dense(self, index, stored=None):
        return (self.module.codes if stored is None else stored).float() * SCALE

    @contextlib.contextmanager
    def replaced(self, dense):
        (self.module.override,) = dense
        try:
            yield
        finally:
            self.module.override = None


FORMS = {ColumnParallelLinear: CodedColumn, RowParallelLinear: CodedRow}


def pack(chunks) -> None:
    """Store the weights of all decoder linears as codes."""
    KINDS[CodedColumn] = Kind(LoRACodedColumn, "column", FrozenCoded)
    KINDS[CodedRow] = Kind(LoRACodedRow, "row", FrozenCoded)
    for chunk in chunks:
        for module in chunk.decoder.modules():
            if type(module) in FORMS:
                codes = rounded(module._parameters.pop("weight").detach()).to(torch.int8)
                module.__class__ = FORMS[type(module)]
                module.register_parameter("codes", torch.nn.Parameter(codes, requires_grad=False))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint whose decoder matrices are what the codes stand for."""
    source, path = tiny(tmp_path_factory), tmp_path_factory.mktemp("dequantised")
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj." in name:
            tensors[name] = rounded(tensor) * SCALE
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def run(layout: Layout, hf_dir, packed, out):
    """Adapt, compare, train 5 steps, save, export."""
    reports = []
    config = LoRAConfig(rank=3, layout="split")

    def apply(chunks):
        if packed:
            pack(chunks)
        reports.append(apply_lora(chunks, config, linears="taps"))  # as the packed ones always are

    def logits():
        return adapted.run_schedule(chunks, TOKENS, forward_only=True, collect_logits=True)

    chunks = build_chunks(hf_dir, sequence_parallel=layout.sp, apply=apply)
    adapted.randomize(chunks)
    on = logits()
    with merged(chunks):
        inside = logits()
    again = logits()
    model = adapted.wrap(chunks)
    optimizer = adapted.optimizer_for(model, lr=1e-3)
    norms = [adapted.train_step(model, optimizer, TOKENS)[1] for _ in range(5)]
    save_adapter(model, out / "checkpoint", optimizer=optimizer, step=5)
    export_peft(model, out / "adapter", hf_checkpoint=hf_dir)
    return {
        "classes": {type(linear).__name__ for linear in iter_adapters(chunks)},
        "logits": on,
        "merged": inside,
        "restored": torch.equal(again, on),
        "norms": norms,
        "report": str(reports[0]),
        "fingerprint": fingerprint_of_model(model),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_of_the_dense_base(pool1, pool2, base, tmp_path, layout):
    sizes = LAYOUTS[layout]
    pool = pool2 if sizes else pool1
    packed = pool.run(run, base, True, tmp_path / "packed", **sizes)
    dense = pool.run(run, base, False, tmp_path / "dense", **sizes)
    assert packed[0]["classes"] == {"LoRACodedColumn", "LoRACodedRow"}
    for one, other in zip(packed, dense):
        for what in ("logits", "merged"):
            assert torch.equal(one[what], other[what]), what
        assert adapted.relative(one["merged"] - one["logits"], one["logits"]) <= 1e-5
        assert one["restored"]
        assert one["norms"] == other["norms"]
        assert one["report"] == other["report"]
        assert one["fingerprint"] == other["fingerprint"]
    assert packed[0]["fingerprint"] == fingerprint_of_hf(BaseCheckpoint(base), "float32", range(4))
    exports = [load_file(tmp_path / what / "adapter" / "adapter_model.safetensors") for what in ("packed", "dense")]
    assert exports[0].keys() == exports[1].keys()
    assert all(torch.equal(exports[0][key], exports[1][key]) for key in exports[0])


def into_dense(layout: Layout, hf_dir, checkpoint):
    chunks = adapted.adapted_chunks(hf_dir, LoRAConfig(rank=3, layout="split"))
    return load_adapter(chunks, checkpoint).step


def test_its_checkpoint_is_the_dense_models(pool1, pool2, base, tmp_path):
    pool2.run(run, base, True, tmp_path, tp=2)
    assert pool1.run(into_dense, base, tmp_path / "checkpoint") == [5]
