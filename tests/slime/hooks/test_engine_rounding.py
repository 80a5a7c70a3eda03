"""What an engine's quantisation leaves of a merged update. pytest tests/slime/hooks/test_engine_rounding.py

slime's quantisers are GPU kernels but for FP8 per tensor; here are theirs in plain torch, in their layout of tensors.
"""

from __future__ import annotations

import types

import pytest
import torch

from slime_plugins.lora.layers import LoRALinear
from slime_plugins.lora.layout import Part
from slime_plugins.lora.slime.hooks import merged_sync
from slime_plugins.lora.slime.hooks.engine_rounding import EngineRounding, dequantised, quantiser_of

NAME = "module.module.decoder.layers.0.mlp.linear_fc1.weight"
HF = "model.layers.0.mlp.gate_proj.weight"
FP8_MAX = 448.0
BLOCK = {"quant_method": "fp8", "weight_block_size": [4, 8]}
TENSOR = {"quant_method": "fp8"}


def int4(symmetric: bool) -> dict:
    weights = {"group_size": 8, "symmetric": symmetric}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


CONFIGS = {"block": BLOCK, "tensor": TENSOR, "int4": int4(True), "int4-asymmetric": int4(False)}


def to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    scale = x.abs().max().item() / FP8_MAX
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def quantise(name: str, weight: torch.Tensor, config: dict) -> tuple[list[tuple[str, torch.Tensor]], torch.Tensor]:
    """What slime would send, and what it stands for, block by block."""
    weight, whole = weight.float(), torch.empty(weight.shape)
    stem = name.removesuffix("weight")
    if config["quant_method"] == "fp8":
        rows, columns = config.get("weight_block_size") or weight.shape
        sent = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                where = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                sent[where], scale = to_fp8(weight[where])
                scales[i, j], whole[where] = scale, sent[where].float() * scale
        key = "weight_scale_inv" if "weight_block_size" in config else "weight_scale"
        return [(name, sent), (f"{stem}{key}", scales if "weight_block_size" in config else scales.view(1))], whole
    scheme = config["config_groups"]["group_0"]["weights"]
    size, symmetric = scheme["group_size"], scheme["symmetric"]
    codes, zeros = torch.empty(weight.shape, dtype=torch.int64), torch.empty(weight.shape[0], weight.shape[1] // size)
    scales = torch.empty_like(zeros)
    for row in range(weight.shape[0]):
        for group in range(zeros.shape[1]):
            where = slice(group * size, (group + 1) * size)
            values = weight[row, where]
            low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
            scale = values.abs().max().item() / 7 if symmetric else (high - low) / 15
            zero = 8 if symmetric else round(-low / scale)
            codes[row, where] = (torch.round(values / scale) + zero).clamp(0, 15).long()
            scales[row, group], zeros[row, group] = scale, zero
            whole[row, where] = (codes[row, where] - zero) * scale
    found = [(f"{stem}weight_packed", words(codes, range(8))), (f"{stem}weight_scale", scales)]
    found.append((f"{stem}weight_shape", torch.tensor(weight.shape, dtype=torch.int32)))
    if not symmetric:
        found.append((f"{stem}weight_zero_point", words(zeros.long().t(), (0, 4, 1, 5, 2, 6, 3, 7))))
    return found, whole


def words(values: torch.Tensor, order) -> torch.Tensor:
    """Eight four-bit values to an int32, value i at the ``order[i]``-th four bits."""
    out = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for i, place in enumerate(order):
        out += values[:, i::8] << (4 * place)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


class Linear(LoRALinear):
    """fc1 with an adapter whose update is given."""

    def __init__(self, update: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        half = update.shape[0] // 2
        parts = tuple(Part(leaf, i * half, half, 0, 1) for i, leaf in enumerate(("gate_proj", "up_proj")))
        self.lora = types.SimpleNamespace(name="decoder.layers.0.mlp.linear_fc1", parts=parts, experts=None)
        self.update = update

    def lora_update(self, index: int = 0) -> torch.Tensor:
        return self.update


def weights(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 24, generator=generator), scale * torch.randn(16, 24, generator=generator)


def rounding(config: dict) -> EngineRounding:
    return EngineRounding(lambda _, named: quantise(*named[0], config)[0], config, frozenset())


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_sent_is_read_as_the_scheme_says(kind):
    weight, _ = weights(0.0)
    named, whole = quantise(HF, weight[:, :24], CONFIGS[kind])
    assert torch.allclose(dequantised(named, HF, CONFIGS[kind]), whole, rtol=1e-6, atol=0)
    assert 0 < (whole - weight).norm() < 0.15 * weight.norm()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.3])
def test_lost_is_what_the_two_copies_do_not_differ_by(kind, scale):
    """Against the definition, half by half: gate and up are quantised apart, as slime sends them."""
    weight, update = weights(scale)
    found = rounding(CONFIGS[kind])
    found.add(NAME, Linear(update), 0, weight, weight + update)
    halves = [quantise(HF, half, CONFIGS[kind])[1] for matrix in (weight, weight + update) for half in matrix.chunk(2)]
    change = torch.cat(halves[2:]) - torch.cat(halves[:2])
    assert float(found.update) == pytest.approx(update.double().square().sum().item(), rel=1e-6)
    assert float(found.lost) == pytest.approx((change - update).double().square().sum().item(), rel=1e-3)
    lost = (float(found.lost) / float(found.update)) ** 0.5
    assert lost > 0.9 if scale < 1e-4 else lost < 0.7 if scale == 0.3 else True


def test_weights_that_are_sent_as_they_are_lose_nothing():
    weight, update = weights(1e-3)
    found = EngineRounding(lambda _, named: named, BLOCK, frozenset())
    found.add(NAME, Linear(update), 0, weight, weight + update)
    assert float(found.lost) < 1e-6 * float(found.update)


def test_names_and_shards_are_slimes():
    """Megatron's name, by which slime's FP8 quantiser chooses, and Hugging Face's, by which its INT4 one ignores."""
    asked = []
    weight, update = weights(1e-3)
    found = EngineRounding(lambda name, named: asked.append((name, named[0][0], named[0][1].shape)) or named, BLOCK,
                           frozenset())  # fmt: skip
    found.add(NAME, Linear(update), 0, weight, weight + update)
    leaves = [f"model.layers.0.mlp.{leaf}.weight" for leaf in ("gate_proj", "up_proj") for _ in range(2)]
    assert asked == [(NAME, leaf, (8, 24)) for leaf in leaves]


def test_a_shard_that_cuts_a_group_is_left_out():
    weight, update = weights(1e-3)
    found = rounding(int4(True))
    found.add(NAME, Linear(update[:, :20]), 0, weight[:, :20], (weight + update)[:, :20])
    assert found.update == 0.0


def test_a_form_that_is_not_read_is_named():
    packed = [
        (HF, torch.zeros(4, 8).to(torch.float8_e4m3fn)),
        (f"{HF}_scale_inv", torch.zeros(1, 1, dtype=torch.int32)),
    ]
    with pytest.raises(ValueError, match=f"{HF}: slime sends weight, weight_scale_inv, a form .* not read"):
        dequantised(packed, HF, BLOCK)


def test_only_what_slime_quantises():
    adapted = {id(linear): (linear, 0) for linear in [Linear(torch.zeros(2, 2)) for _ in range(40)]}
    assert quantiser_of(None, None) is None and quantiser_of(None, {"quant_method": "mxfp4"}) is None
    assert EngineRounding.of(None, None, adapted) is None
    for _ in range(2):  # a fixed set
        found = EngineRounding.of(None, BLOCK, adapted)
        assert found.sampled == frozenset(list(adapted)[::5])


class Merging(Linear):
    def __init__(self, weight: torch.nn.Parameter, update: torch.Tensor) -> None:
        super().__init__(update)
        self.lora_base = types.SimpleNamespace(parameters=[weight], dense=lambda index, stored=None: stored)

    def lora_merged(self, index, base, rounding=None):
        return base + self.update


@pytest.fixture
def sync(monkeypatch):
    """A weight sync into an FP8 engine of one adapted weight, and what it came to."""

    def run(quantiser):
        weight, update = weights(1e-3)
        parameter, state = torch.nn.Parameter(weight, requires_grad=False), types.SimpleNamespace()
        linear = Merging(parameter, update)
        monkeypatch.setattr(merged_sync, "has_adapters", lambda model: True)
        monkeypatch.setattr(merged_sync, "adapted_parameters", lambda model: {id(parameter): (linear, 0)})
        monkeypatch.setattr(merged_sync, "state_of", lambda model: state)
        monkeypatch.setattr("slime_plugins.lora.slime.hooks.engine_rounding.quantiser_of", quantiser)

        def update_weights(actor):
            merged_sync.merge(linear, 0, parameter, name=NAME)
            merged_sync.count_bytes(1.0)

        updater = types.SimpleNamespace(quantization_config=BLOCK)
        actor = types.SimpleNamespace(model=object(), weights_backuper=None, args=None, weight_updater=updater)
        merged_sync.syncing(update_weights)(actor)
        return state.last_sync

    return run


def test_a_sync_measures_what_it_sends(sync):
    found = sync(lambda args, config: lambda name, named: quantise(*named[0], config)[0])
    assert float(found.engine.update) > 0 and float(found.engine.lost) > 0.1 * float(found.engine.update)


def test_a_sync_says_what_it_cannot_measure(sync, caplog):
    found = sync(lambda args, config: lambda name, named: [(f"{named[0][0]}_packed_somehow", named[0][1])])
    assert "sync_lost_engine is not measured" in caplog.text and not found.engine.sampled
