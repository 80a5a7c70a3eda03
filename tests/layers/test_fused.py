"""A linear and its adapter as one autograd function: against the taps, and the parts that parity does not reach.

Logits and gradients against transformers + PEFT: test_parity.py, test_te.py.

    pytest tests/layers/test_fused.py
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import adapted
import pytest
import reference
import torch
from harness import Layout, WorkerError
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from te_models import te_layer_spec
from tiny_checkpoints import tiny
from torch.nn.functional import silu

from slime_plugins.lora import LoRAConfig, apply_lora
from slime_plugins.lora.adapters import adapters_disabled, iter_adapters
from slime_plugins.lora.layers import grouped
from slime_plugins.lora.layers.fused import Norm
from slime_plugins.lora.layers.grouped import Segments
from slime_plugins.lora.layers.remade import remade
from slime_plugins.lora.rehearsal.model import build_chunks

TOKENS = reference.batch(128)
CONFIG = LoRAConfig(rank=4, alpha=12.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory)


def ways(layout: Layout, hf_dir, config, dtype, te, size):
    """Error of the fused form against the taps, and against the taps in float32: (logits, A, B) of each; the ways.

    Args:
        size: how large a difference is, beside what it is to be.
    """
    spec = te_layer_spec if te else None
    found = {}
    for linears, of in (("taps", torch.float32), ("taps", dtype), ("fused", dtype)):
        chunks = adapted.adapted_chunks(
            hf_dir, config, sp=layout.sp, dtype=of, layer_spec=spec, linears=linears, recompute=None
        )
        adapted.randomize(chunks)
        logits = adapted.run_schedule(chunks, TOKENS, forward_only=True, collect_logits=True)
        model = adapted.wrap(chunks, distributed_optimizer=False)
        adapted.train_step(model, None, TOKENS)
        grads = [(p.main_grad.clone() for p in (x.lora_A, x.lora_B)) for x in iter_adapters(model)]
        found[linears, of] = logits.float(), *(torch.cat([g.flatten() for g in half]) for half in zip(*grads))
    exact = found["taps", torch.float32]
    return [
        tuple(size(one.double() - two.double(), two.double()) for one, two in zip(found[way, dtype], exact))
        for way in ("fused", "taps")
    ]


def by_norm(error, reference):
    """Of all entries together: the largest of a few thousand roundings is a matter of luck."""
    return (error.norm() / reference.norm()).item()


SCALINGS = LoRAConfig(rank=4, alpha=12.0, layout="split", alpha_pattern={"k_proj": 3.0, "up_proj": 5.0})
RANKS = LoRAConfig(rank=4, alpha=12.0, layout="split", rank_pattern={"v_proj": 2})
WIDE = LoRAConfig(rank=4, alpha=12.0, dtype="float32")


@pytest.mark.parametrize("te", [False, True], ids=["local", "te"])
@pytest.mark.parametrize("config", [SCALINGS, RANKS], ids=["scalings", "ranks"])
@pytest.mark.parametrize("sp", [False, True])
def test_equals_the_taps(te_pool2, base, config, te, sp):
    for fused, _ in te_pool2.run(ways, base, config, torch.float32, te, adapted.relative, tp=2, sp=sp):
        assert max(fused) <= 1e-5


@pytest.mark.parametrize("te", [False, True], ids=["local", "te"])
@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["bf16", "float32 adapters"])
def test_is_as_exact_as_the_taps_in_bf16(te_pool2, base, config, te):
    """bf16 has 8 bits, and neither way may lose more of them than the other: errors against float32."""
    for fused, taps in te_pool2.run(ways, base, config, torch.bfloat16, te, by_norm, tp=2, sp=True):
        assert all(one <= 1.1 * two for one, two in zip(fused, taps)), (fused, taps)
        assert max(taps) <= 0.1


def through_megatrons_swiglu(layout: Layout, hf_dir, te):
    """Difference of A's and B's gradients, fused against taps; how often each has run SwiGLU."""
    found, calls = {}, {}
    for linears in ("taps", "fused"):
        chunks = adapted.adapted_chunks(
            hf_dir, CONFIG, sp=layout.sp, layer_spec=te_layer_spec if te else None, linears=linears, recompute=None
        )
        chunks[0].config.bias_activation_fusion = True
        adapted.randomize(chunks)
        backward = mock.patch.object(fused_bias_swiglu, "swiglu_back", uncompiled(fused_bias_swiglu.swiglu_back))
        with (
            backward,
            mock.patch.object(fused_bias_swiglu, "swiglu", wraps=uncompiled(fused_bias_swiglu.swiglu)) as one,
        ):
            model = adapted.wrap(chunks, distributed_optimizer=False)
            adapted.train_step(model, None, TOKENS)
        calls[linears] = one.call_count
        found[linears] = torch.cat([p.main_grad.flatten() for x in iter_adapters(model) for p in (x.lora_A, x.lora_B)])
    return adapted.relative(found["fused"] - found["taps"], found["taps"]), calls["taps"], calls["fused"]


def uncompiled(function):
    """Megatron's, before it is compiled."""
    return getattr(function, "_torchdynamo_orig_callable", function)


@pytest.mark.parametrize("te", [False, True], ids=["local", "te"])
@pytest.mark.parametrize("sp", [False, True])
def test_an_input_of_megatrons_swiglu(te_pool2, base, te, sp):
    """Made again, one more call a layer, and the same gradients."""
    for error, by_taps, fused in te_pool2.run(through_megatrons_swiglu, base, te, tp=2, sp=sp):
        assert error <= 1e-5 and by_taps > 0 and fused == 2 * by_taps


def remade_under(layout: Layout, hf_dir, fields):
    """How many inputs were looked at, to be made again, in a forward and backward."""
    chunks = adapted.adapted_chunks(hf_dir, CONFIG, linears="fused", recompute=None)
    for name, value in fields.items():
        setattr(chunks[0].config, name, value)
    with mock.patch("slime_plugins.lora.layers.fused.remade", wraps=remade) as looked:
        adapted.run_schedule(chunks, TOKENS)
    return looked.call_count


@pytest.mark.parametrize(
    "fields, looks",
    [
        ({}, True),
        (dict(recompute_granularity="selective", recompute_modules=["core_attn"]), True),
        (dict(recompute_granularity="selective", recompute_modules=["mlp"]), False),
        (dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1), False),
        (dict(fine_grained_activation_offloading=True), False),
    ],
    ids=str,
)
def test_what_is_recomputed_anyway_is_kept(pool1, base, fields, looks):
    [count] = pool1.run(remade_under, base, fields)
    assert (count > 0) == looks


def off(layout: Layout, hf_dir):
    """Largest difference between a TE model without adapters and the fused one with them off; and with B at zero."""
    plain = build_chunks(hf_dir, sequence_parallel=layout.sp, layer_spec=te_layer_spec)
    chunks = adapted.adapted_chunks(hf_dir, CONFIG, sp=layout.sp, layer_spec=te_layer_spec, linears="fused")

    def logits(model):
        return adapted.run_schedule(model, TOKENS, forward_only=True, collect_logits=True)

    at_zero = logits(chunks)
    adapted.randomize(chunks)
    with adapters_disabled(chunks), mock.patch("transformer_engine.pytorch.module._forward_gemm") as of_te:
        without = logits(chunks)
    assert not of_te.called
    base = logits(plain)
    return adapted.relative(without - base, base), torch.equal(without, at_zero), torch.equal(logits(chunks), without)


@pytest.mark.parametrize("sp", [False, True])
def test_off_is_the_base(te_pool2, base, sp):
    """The reference and a teacher are the model with adapters off: no rounding may be between them and B at zero."""
    for error, same_at_zero, same_when_on in te_pool2.run(off, base, tp=2, sp=sp):
        assert error <= 1e-6 and same_at_zero and not same_when_on


def accumulated(layout: Layout, hf_dir):
    """Two backward passes into ``main_grad``; what DDP's hook saw; the sum of two plain gradients."""
    chunks = adapted.adapted_chunks(hf_dir, CONFIG, linears="fused")
    adapted.randomize(chunks)
    plain, batches = {}, (TOKENS, TOKENS.flip(0).flip(1))
    for tokens in batches:
        adapted.run_schedule(chunks, tokens)
    for name, parameter in chunks[0].named_parameters():
        if parameter.requires_grad:
            plain[name], parameter.grad = parameter.grad.clone(), None
    model = adapted.wrap(chunks, distributed_optimizer=False)
    marks, sums = set(), {}
    for tokens in batches:
        adapted.run_schedule(model, tokens)
    for name, parameter in chunks[0].named_parameters():
        if parameter.requires_grad:
            marks.add((parameter.grad_added_to_main_grad, parameter.grad is None))
            sums[name] = parameter.main_grad
    assert plain.keys() == sums.keys() and len(plain) > 8
    return marks, max(adapted.relative(sums[name] - plain[name], plain[name]) for name in plain)


def test_gradients_go_into_main_grad(pool1, base):
    ((marks, error),) = pool1.run(accumulated, base)
    assert marks == {(True, True)} and error <= 1e-6


def reports(layout: Layout, hf_dir, config, linears):
    found = []
    build_chunks(hf_dir, apply=lambda chunks: found.append(apply_lora(chunks, config, linears=linears)))
    return found[0].by_taps, str(found[0]).splitlines()[-1].strip()


def test_the_report_says_which(pool2, base):
    dropout = dataclasses.replace(CONFIG, dropout=0.1)
    for sizes in ({}, dict(pp=2)):
        for by_taps, line in pool2.run(reports, base, CONFIG, "auto", **sizes):
            assert by_taps == (("", 16),) and line == "fused with the base: 16 linears"
        for by_taps, line in pool2.run(reports, base, dropout, "auto", **sizes):
            assert by_taps == (("LoRA dropout", 16),)
            assert line == "by taps around the base: 16 linears (LoRA dropout)"
    for by_taps, _ in pool2.run(reports, base, CONFIG, "taps"):
        assert by_taps == (("asked for", 16),)
    with pytest.raises(WorkerError, match=r"--lora-linears fused: 16 linears cannot \(LoRA dropout\)"):
        pool2.run(reports, base, dropout, "fused", pp=2)


ACTIVATIONS = {
    "megatron's": lambda y, scale: bias_swiglu_impl(y, None),
    "megatron's, in float8": lambda y, scale: bias_swiglu_impl(y, None, True),
    "one by one": lambda y, scale: silu(y[..., :12]) * (y[..., 12:] + 0),
    "scaled": lambda y, scale: bias_swiglu_impl(y, None) * scale,
    "by a constant": lambda y, scale: bias_swiglu_impl(y, None) * 2.0,
    "none": lambda y, scale: y[..., :12],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_input_is_made_again(name, monkeypatch):
    """Bit for bit, from what the graph keeps anyway; and not at all where that is another number or not kept."""
    monkeypatch.setattr(fused_bias_swiglu, "swiglu", uncompiled(fused_bias_swiglu.swiglu))
    y = torch.randn(5, 2, 24, dtype=torch.bfloat16, requires_grad=True)
    scale = torch.randn(5, 2, 1, dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = ACTIVATIONS[name](y, scale)
    again = remade(x)
    if name not in ("megatron's", "one by one"):
        assert again is None
        return
    assert all(source.untyped_storage().data_ptr() in kept for source in again.sources)
    assert torch.equal(again.make(*again.sources).view_as(x), x)


def test_norm_is_torchs():
    x, gamma, dy = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 16), (16,), (6, 16)))
    x.requires_grad_()
    expected = torch.nn.functional.rms_norm(x, (16,), gamma, 1e-5)
    expected.backward(dy)
    norm = Norm(gamma.float(), 1e-5)
    ln, rho = norm(x.detach().float())
    assert (ln - expected).abs().max() <= 1e-6
    assert (norm.backward(dy.float(), x.detach().float(), rho) - x.grad).abs().max() <= 1e-5


@pytest.mark.parametrize("rank", [4, 3], ids=["grouped", "padded"])
@pytest.mark.parametrize("large, chunk", [(1, 10), (8, 10), (10, 10), (100, 100)], ids=str)
def test_experts_add_in_place(monkeypatch, rank, large, chunk):
    """Large experts alone, small ones together, some without a token: as a loop over them, in the same memory."""
    monkeypatch.setattr(grouped, "LARGE", large)
    monkeypatch.setattr(grouped, "CHUNK", chunk)
    splits = [3, 0, 9, 2, 0, 0, 12, 4]
    product, size = Segments(splits, torch.device("cpu")), 16
    h, B, A = torch.randn(30, rank), torch.randn(8, size, rank), torch.randn(8, rank, size)
    y, dx = torch.randn(30, size), torch.randn(30, size)
    expected_y = y + torch.cat([2.0 * part @ B[e].t() for e, part in enumerate(h.split(splits))])
    expected_dx = dx + torch.cat([part @ A[e] for e, part in enumerate(h.split(splits))])
    before = y.data_ptr(), dx.data_ptr()
    product.add_y(y, h, B, 2.0)
    product.add_dx(dx, h, A)
    assert (y.data_ptr(), dx.data_ptr()) == before
    assert (y - expected_y).abs().max() <= 1e-5 and (dx - expected_dx).abs().max() <= 1e-5
    widest = [0 if part is None else rows.stop - rows.start for _, rows, part in product._parts]
    assert max(widest) <= chunk and sum(rows.stop - rows.start for _, rows, _ in product._parts) == 30
