"""What apply_lora puts in, and what switching it off or merging it leaves: hazards 3, 6, 12, 19 of the design.

pytest tests/layers/test_adapters.py
"""

from __future__ import annotations

import adapted
import pytest
import reference
import torch
import torch.distributed as dist
from harness import Layout, WorkerError
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig, adapters_disabled, apply_lora, merged
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.ends.export import gather_projections
from slime_plugins.lora.layers import hide_adapters
from slime_plugins.lora.rehearsal.model import build_chunks

TOKENS = reference.batch(128)


def logits_of(model):
    return adapted.run_schedule(model, TOKENS, forward_only=True, collect_logits=True)


# What is put in ---------------------------------------------------------------------------------------------------


def initial_adapters(layout: Layout, hf_dir, config):
    chunks = adapted.adapted_chunks(hf_dir, config, sp=layout.sp, vpp=layout.vpp)
    return gather_projections(chunks)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("lora_layout", ["fused", "split"])
def test_the_same_full_A_at_every_parallelism(pool1, pool2, tmp_path_factory, rank, lora_layout):
    """Rank 1 at TP=2 included: the rank is never sharded."""
    path, config = tiny(tmp_path_factory), LoRAConfig(rank=rank, layout=lora_layout, seed=5)
    expected = pool1.run(initial_adapters, path, config)[0]
    assert len(expected) == 4 * len(reference.LEAVES)
    for sizes in ({"tp": 2}, {"pp": 2, "vpp": 2}):
        actual = next(result for result in pool2.run(initial_adapters, path, config, **sizes) if result)
        for one, other in zip(expected, actual, strict=True):
            assert one.name == other.name and torch.equal(one.A, other.A)
            assert one.A.shape[0] == rank and not other.B.any()
    by_name = {p.name: p.A for p in expected}
    q, k = (by_name[f"model.layers.0.self_attn.{leaf}"] for leaf in ("q_proj", "k_proj"))
    assert torch.equal(q, k) == (lora_layout == "fused")
    assert not torch.equal(q, by_name["model.layers.1.self_attn.q_proj"])
    bound = 1 / q.shape[1] ** 0.5  # PEFT's: kaiming_uniform_(a=sqrt(5)) over the full input width
    assert q.abs().max() <= bound and (rank < 8 or q.std() == pytest.approx(bound / 3**0.5, rel=0.1))


def report_of(layout: Layout, hf_dir, config):
    reports = []
    chunks = build_chunks(hf_dir, vpp=layout.vpp, apply=lambda c: reports.append(apply_lora(c, config)))
    local = sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad)
    return reports[0], local, str(reports[0])


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_report_counts_whole_matrices_once(pool2, tmp_path_factory, family):
    """Against PEFT's own count, tied embeddings and untied, at every parallelism."""
    path = tiny(tmp_path_factory, family)
    model = reference.peft_model(path, rank=3, alpha=3)
    trainable, total = model.get_nb_trainable_parameters()
    config = LoRAConfig(rank=3, layout="split")
    for sizes in ({"tp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}, {}):
        for report, local, text in pool2.run(report_of, path, config, **sizes):
            assert (report.trainable_parameters, report.total_parameters) == (trainable, total)
            assert report.adapter_bytes == 4 * trainable
            assert len(report.modules) == 16 and len({m.name for m in report.modules}) == 16
            assert local == trainable if not sizes else local < trainable
            assert (
                f"trainable params: {trainable:,} || all params: {total:,}" in text
                and "q_proj, k_proj, v_proj" in text
            )


def test_patterns(pool2, tmp_path_factory):
    """Per-module rank and alpha, rsLoRA: shapes and scalings as the config says, padding rows zero."""
    config = LoRAConfig(
        rank=4,
        alpha=8,
        layout="split",
        use_rslora=True,
        rank_pattern={"linear_fc1": 6, "q_proj": 2, "*.layers.0.*.down_proj": 9},
        alpha_pattern={"up_proj": 5},
    )
    projections = {p.name: p for p in pool2.run(initial_adapters, tiny(tmp_path_factory), config, tp=2)[0]}
    for name, rank, alpha in (
        ("model.layers.1.self_attn.q_proj", 2, 8),
        ("model.layers.1.self_attn.k_proj", 4, 8),
        ("model.layers.1.mlp.up_proj", 6, 5),
        ("model.layers.0.mlp.down_proj", 9, 8),
        ("model.layers.1.mlp.down_proj", 4, 8),
    ):
        assert projections[name].A.shape[0] == rank and projections[name].B.shape[1] == rank
        assert projections[name].scaling == pytest.approx(alpha / rank**0.5)


def dtypes_of(layout: Layout, hf_dir, dtype):
    from megatron.core.transformer.module import Float16Module
    from megatron.core.utils import get_model_config

    chunks = adapted.adapted_chunks(hf_dir, LoRAConfig(dtype=dtype), dtype=torch.bfloat16)
    config = get_model_config(chunks[0])
    before = [linear.lora_A.detach().clone() for linear in iter_adapters(chunks)]
    model = Float16Module(config, chunks[0])  # casts every parameter, as Megatron's get_model does
    linears = list(iter_adapters(model))
    kept = all(torch.equal(linear.lora_A, A) for linear, A in zip(linears, before))
    adapted.randomize([model])
    out = adapted.run_schedule(adapted.wrap([model]), TOKENS)
    return (
        {p.dtype for linear in linears for p in (linear.lora_A, linear.lora_B)},
        kept,
        out.item(),
        linears[0].weight.dtype,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_the_adapter_keeps_the_dtype_that_was_asked_for(pool1, tmp_path_factory, dtype):
    """Also through Float16Module, which casts the whole model after the provider has returned."""
    dtypes, kept, loss, base = pool1.run(dtypes_of, tiny(tmp_path_factory), dtype)[0]
    assert dtypes == {getattr(torch, dtype or "bfloat16")} and kept and base == torch.bfloat16
    assert loss == pytest.approx(loss) and loss > 0


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ("qkv_proj",)}, r"qkv_proj.*linear_qkv.*q_proj.*all-linear"),
        ({"target_modules": ("q_proj", "*.layers.7.*")}, r"\*\.layers\.7\.\*"),
        ({"exclude_modules": ("lm_head",)}, "lm_head"),
        ({"rank": 65}, r"rank 65 is larger than decoder\.layers\.\d\.\S+ \[\w+\], a \d+ x \d+ matrix"),
        ({"rank_pattern": {"q_proj": 2}}, "share one A; use --lora-layout split"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(pool2, tmp_path_factory, config, message):
    with pytest.raises(WorkerError) as caught:
        pool2.run(initial_adapters, tiny(tmp_path_factory), LoRAConfig(**config), pp=2)
    assert set(caught.value.errors) == {0, 1}
    for kind, text in caught.value.errors.values():
        assert kind == "UsageError" and "\n" not in text
        assert __import__("re").search(message, text)


def test_a_target_on_another_stage_is_no_error(pool2, tmp_path_factory):
    config = LoRAConfig(rank=2, target_modules=("*.layers.3.*.linear_fc2",))
    (first, second) = pool2.run(initial_adapters, tiny(tmp_path_factory), config, pp=2)
    assert [p.name for p in first] == ["model.layers.3.mlp.down_proj"] and second is None


def misuse(layout: Layout, hf_dir, how):
    chunks = build_chunks(hf_dir)
    config = LoRAConfig(rank=2)
    if how == "disable":
        with adapters_disabled(chunks):
            return
    if how == "wrapped":
        chunks = adapted.wrap(chunks)
    apply_lora(chunks, config)
    apply_lora(chunks, config)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("twice", "carries an adapter already"),
        ("wrapped", "DDP has wrapped"),
        ("disable", "no adapters; call apply_lora"),
    ],
)
def test_misuse(pool1, tmp_path_factory, how, message):
    with pytest.raises(WorkerError, match=message):
        pool1.run(misuse, tiny(tmp_path_factory), how)


# Off, merged, hidden ----------------------------------------------------------------------------------------------


def on_and_off(layout: Layout, hf_dir, dtype):
    base = logits_of(build_chunks(hf_dir, sequence_parallel=layout.sp, dtype=dtype))
    chunks = adapted.adapted_chunks(hf_dir, LoRAConfig(rank=4), sp=layout.sp, dtype=dtype)
    fresh = logits_of(chunks)
    adapted.randomize(chunks)
    on = logits_of(chunks)
    with adapters_disabled(chunks):
        off = logits_of(chunks)
        try:
            with adapters_disabled(chunks):
                raise KeyError
        except KeyError:
            still_off = logits_of(chunks)
    back = logits_of(chunks)
    return {
        "fresh": torch.equal(base, fresh),
        "moved": adapted.relative(on - base, base),
        "off": torch.equal(base, off) and torch.equal(base, still_off),
        "back": torch.equal(on, back),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sp", [False, True])
def test_switched_off_is_the_base_bit_for_bit(pool2, tmp_path_factory, dtype, sp):
    """Hazard 19: the reference policy; nested, after an exception, and before any training."""
    for result in pool2.run(on_and_off, tiny(tmp_path_factory), dtype, tp=2, sp=sp):
        assert result["fresh"] and result["off"] and result["back"]
        assert result["moved"] > 0.01


def merge_and_back(layout: Layout, hf_dir, dtype, lora_layout):
    chunks = adapted.adapted_chunks(hf_dir, LoRAConfig(rank=4, layout=lora_layout), sp=layout.sp, dtype=dtype)
    adapted.randomize(chunks)
    before = [linear.weight.detach().clone() for linear in iter_adapters(chunks)]
    on, differ, rounded = logits_of(chunks), [], True
    try:
        with merged(chunks):
            inside = logits_of(chunks)
            for linear, weight in zip(iter_adapters(chunks), before):
                differ.append(not torch.equal(linear.weight, weight))
                expected = (weight.double() + linear.lora_update().double()).to(dtype)
                rounded = rounded and (linear.weight.double() - expected.double()).abs().max() <= 2e-7 * (
                    1 if dtype == torch.float32 else 0
                )
            grad_enabled = torch.is_grad_enabled()
            raise KeyError
    except KeyError:
        pass
    after = [linear.weight for linear in iter_adapters(chunks)]
    return {
        "inside": adapted.relative(inside - on, on),
        "differ": all(differ),
        "rounded once": bool(rounded),
        "grad mode kept": grad_enabled,
        "restored": all(torch.equal(a, b) for a, b in zip(after, before)),
        "on again": torch.equal(logits_of(chunks), on),
    }


@pytest.mark.parametrize("lora_layout", ["fused", "split"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_merged_is_the_adapted_model_and_leaves_the_old_bits(pool2, tmp_path_factory, dtype, tolerance, lora_layout):
    """Hazard 12: W + BA is summed in fp32 and rounded once; W + BA - BA would not be W in bf16."""
    for result in pool2.run(merge_and_back, tiny(tmp_path_factory), dtype, lora_layout, tp=2, sp=True):
        assert result.pop("inside") <= tolerance  # bf16: the merged weight is rounded, the two products were not
        assert all(result.values()), result


def hidden_names(layout: Layout, hf_dir):
    base = build_chunks(hf_dir)[0]
    chunk = adapted.adapted_chunks(hf_dir, LoRAConfig(rank=2))[0]
    plain = [name for name, _ in base.named_parameters()], list(base.state_dict())
    with hide_adapters(chunk):
        hidden = [name for name, _ in chunk.named_parameters()], list(chunk.state_dict())
        chunk.load_state_dict(base.state_dict(), strict=True)
    shown = [name for name, _ in chunk.named_parameters()]
    return plain == hidden, [n for n in shown if n not in plain[0]], [n for n in plain[0] if n not in shown]


def test_base_names_are_untouched_and_adapters_can_hide(pool1, tmp_path_factory):
    """Hazard 8, the naming half: a strict loader of the base works, and every base name is the one it was."""
    same, new, lost = pool1.run(hidden_names, tiny(tmp_path_factory))[0]
    assert same and not lost and len(new) == 2 * 16 and all(".lora_" in name for name in new)


# Dropout ----------------------------------------------------------------------------------------------------------


def dropout_masks(layout: Layout, hf_dir):
    chunks = adapted.adapted_chunks(hf_dir, LoRAConfig(rank=2, dropout=0.5), sp=layout.sp)
    masks = {}
    for linear in list(iter_adapters(chunks))[:2]:
        ones = torch.ones(8, 2, 32)
        masks[linear.lora.parallel] = linear._lora_dropout(ones)
    chunks[0].eval()
    quiet = torch.equal(logits_of(chunks), logits_of(chunks))
    chunks[0].train()
    adapted.randomize(chunks)
    noisy = not torch.equal(logits_of(chunks), logits_of(chunks))
    return masks, quiet, noisy


@pytest.mark.parametrize("sp", [False, True])
def test_dropout_masks(pool2, tmp_path_factory, sp):
    """Hazard 6: replicated inputs are masked alike on all ranks, shards each in their own way; none in eval."""
    (one, *_), (other, *_) = results = pool2.run(dropout_masks, tiny(tmp_path_factory), tp=2, sp=sp)
    assert torch.equal(one["column"], other["column"]) != sp
    assert not torch.equal(one["row"], other["row"])
    assert all(set(mask.unique().tolist()) == {0.0, 2.0} for masks, *_ in results for mask in masks.values())
    assert all(quiet and noisy for _, quiet, noisy in results)


def dropout_grads(layout: Layout, hf_dir, recompute):
    from megatron.core import tensor_parallel

    chunks = adapted.adapted_chunks(hf_dir, LoRAConfig(rank=2, dropout=0.4), sp=layout.sp, recompute=recompute)
    adapted.randomize(chunks)
    model = adapted.wrap(chunks, distributed_optimizer=False)
    tensor_parallel.model_parallel_cuda_manual_seed(99)
    torch.manual_seed(99)
    adapted.train_step(model, None, TOKENS)
    same = True
    for linear in iter_adapters(model):
        grad = (linear.lora_A if linear.lora.parallel == "column" else linear.lora_B).main_grad
        others = [torch.empty_like(grad) for _ in range(linear.tp_group.size())]
        dist.all_gather(others, grad.contiguous(), group=linear.tp_group)
        same = same and all(torch.equal(grad, other) for other in others)
    return [p.main_grad.clone() for linear in iter_adapters(model) for p in (linear.lora_A, linear.lora_B)], same


@pytest.mark.parametrize("sp", [False, True])
def test_recompute_replays_dropout(pool2, tmp_path_factory, sp):
    """Hazard 6: the second forward of a recomputed layer draws the masks of the first; replicas stay replicas."""
    path = tiny(tmp_path_factory)
    plain = pool2.run(dropout_grads, path, None, tp=2, sp=sp)
    again = pool2.run(dropout_grads, path, "full", tp=2, sp=sp)
    for (grads, same), (recomputed, same_again) in zip(plain, again):
        assert same and same_again
        assert all(torch.equal(a, b) for a, b in zip(grads, recomputed))
        assert all(grad.abs().max() > 0 for grad in grads)
