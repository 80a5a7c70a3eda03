"""The TransformerEngine forms: logits and adapter gradients against transformers + PEFT, and each linear alone.

Megatron's real wrapper classes over the stand-in of ``transformer_engine`` in tests/te_stub; ``-m gpu`` runs real TE.

    pytest tests/layers/test_te.py
"""

from __future__ import annotations

import pytest
import reference
import torch
from harness import Layout
from nf4_runs import chunks_of
from te_models import grouped_alone, linear_alone, parity_te, te_layer_spec
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig, merged

RANK, ALPHA = 4, 12.0


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """family, layout -> (directory, tokens, logits, gradients), computed once."""
    cache = {}

    def get(family, layout):
        if (family, layout) not in cache:
            path = tiny(tmp_path_factory, family)
            model = reference.peft_model(path, rank=RANK, alpha=ALPHA, layout=layout)
            tokens = reference.batch(model.config.vocab_size)
            logits, _, grads = reference.logits_loss_grads(model, tokens)
            cache[family, layout] = path, tokens, logits, grads
        return cache[family, layout]

    return get


BOTH = pytest.mark.parametrize("linears", ["fused", "taps"])


@BOTH
@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize(
    "sizes",
    [dict(), dict(tp=2), dict(tp=2, sp=True), dict(pp=2)],
    ids=["dp2", "tp2", "tp2-sp", "pp2"],
)
def test_parity(te_pool2, references, layout, sizes, linears):
    path, tokens, logits, grads = references("qwen3", layout)
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout=layout)
    results = te_pool2.run(parity_te, path, config, logits, grads, tokens, None, linears, **sizes)
    check(results, adapters=4 * 4 * 2 // sizes.get("pp", 1))


@BOTH
def test_bias_and_recompute(te_pool2, references, linears):
    """Qwen2 has a bias on q, k, v: TE adds it in its product, or Megatron asks for it to be returned."""
    path, tokens, logits, grads = references("qwen2", "fused")
    config = LoRAConfig(rank=RANK, alpha=ALPHA)
    results = te_pool2.run(parity_te, path, config, logits, grads, tokens, "full", linears, tp=2, sp=True)
    check(results, adapters=4 * 4 * 2)


def check(results, adapters):
    assert sum(r["adapters"] for r in results) == adapters
    assert any("logits" in r for r in results)
    for r in results:
        assert r["classes"] == ["LoRATELayerNormColumnParallelLinear", "LoRATERowParallelLinear"]
        assert r.get("logits", 0) <= 1e-5
        assert r["A"] <= 1e-4 and r["B"] <= 1e-4


LINEARS = ("norm_column", "column", "row", "duplicated")


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("linears", ["auto", "taps"])
def test_linear_alone(te_pool2, kind, sp, linears):
    """Output, input gradient and adapter gradients of one linear against one product on whole tensors.

    With and without a returned bias, frozen and trained base, gradient accumulation fused and not: none of them may
    change a number.
    """
    for errors in te_pool2.run(linear_alone, kind, linears, tp=2, sp=sp):
        assert len(errors) == 8
        for case, worst in errors.items():
            assert worst <= 1e-6, f"{case}: {worst:.2e}"


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("leaf", ["linear_fc1", "linear_fc2"])
def test_linear_of_experts_alone(te_pool2, leaf, rank):
    """Whole models with experts: test_experts.py."""
    for errors in te_pool2.run(grouped_alone, leaf, rank):
        assert max(errors.values()) <= 1e-5, errors


def package_without_te(layout: Layout):
    import sys

    import slime_plugins.lora.layers  # noqa: F401

    return [name for name in sys.modules if name.startswith("transformer_engine")]


def test_import_needs_no_te(pool1):
    assert pool1.run(package_without_te) == [[]]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LINEARS)
def test_real_te(kind):
    """The same comparison with the TransformerEngine that is installed, in this process, TP 1."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine")
    from one_linear import single_process_groups

    with single_process_groups("nccl"):
        for case, worst in linear_alone(Layout(), kind, device=torch.device("cuda")).items():
            assert worst <= 1e-4, f"{case}: {worst:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("leaf", ["linear_fc1", "linear_fc2"])
def test_real_te_of_experts(leaf, rank):
    pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine")
    from one_linear import single_process_groups

    with single_process_groups("nccl"):
        errors = grouped_alone(Layout(), leaf, rank, device=torch.device("cuda"))
        assert max(errors.values()) <= 1e-4, errors


@pytest.mark.gpu
def test_grouped_products_on_a_gpu():
    """torch's grouped product, which takes bf16 alone there, against a loop over experts; two have no token."""
    from slime_plugins.lora.layers.grouped import Segments, takes_grouped_mm

    splits, rank, size = [0, 24, 8, 0, 40], 8, 64
    draw = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((72, size), (72, rank))]
    x, dh = (t.bfloat16().cuda() for t in draw)
    A = torch.randn(5, rank, size, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    assert takes_grouped_mm(x, A.transpose(1, 2)) and takes_grouped_mm(dh, A)
    products = Segments(splits, x.device)
    rows, dhs = x.float().split(splits), dh.float().split(splits)
    for got, want in (
        (products.down(x, A), torch.cat([r @ a.float().t() for r, a in zip(rows, A)])),
        (products.dx(dh, A), torch.cat([d @ a.float() for d, a in zip(dhs, A)])),
        (products.dA(dh, x), torch.stack([d.t() @ r for d, r in zip(dhs, rows)])),
    ):
        assert (got.float() - want).abs().max() <= 2**-7 * want.abs().max()  # bf16 has 8 bits; sums are in float32


def first_microbatches(layout: Layout, hf_dir):
    """Which linears are told to cast their weights anew, inside ``merged`` and after it."""
    (chunk,), _ = chunks_of(layout, hf_dir, quant=None, layer_spec=te_layer_spec)
    linears = [module for module in chunk.modules() if hasattr(module, "is_first_microbatch")]
    for linear in linears:
        linear.is_first_microbatch = False  # as a forward leaves it: its FP8 weights are kept for the next one
    with merged(chunk):
        inside = [linear.is_first_microbatch for linear in linears]
        for linear in linears:
            linear.is_first_microbatch = False
    return inside, [linear.is_first_microbatch for linear in linears]


def test_fp8_weights_are_cast_anew_around_merging(te_pool2, references):
    """TE keeps what it has cast until it is told that weights are new (servers.md 23)."""
    path, *_ = references("qwen3", "fused")
    for inside, after in te_pool2.run(first_microbatches, path):
        assert inside and all(inside) and all(after)
