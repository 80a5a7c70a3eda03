"""More tensor-parallel ranks than key/value heads: a rank's shard of linear_qkv is a piece of one query group.

pytest tests/layers/test_few_kv_heads.py
"""

from __future__ import annotations

import adapted
import moe_models
import moe_reference
import moe_runs
import pytest
import torch
from harness import WorkerError
from moe_runs import ALPHA, RANK, TOKENS
from views import iter_linears

from slime_plugins.lora import LoRAConfig, export_peft, import_peft, load_adapter, save_adapter
from slime_plugins.lora.layout import Part, parts_of_group_piece, qkv_parts

GROUPS, HEADS, D = moe_models.GROUPS, moe_models.HEADS, moe_models.HEAD_DIM
TP4 = dict(tp=4, sp=True, etp=1)


class Sizes:
    num_attention_heads, num_query_groups, kv_channels = 8, 2, 3


@pytest.mark.parametrize("shards", [4, 6, 12])
def test_pieces_of_groups_are_the_projections(shards):
    """Put together, the rows of all shards are q, k and v, in order, each once."""
    total = (8 + 4) * 3
    weight = torch.arange(total)[:, None]
    whole = {part.name: part.take(weight) for part in qkv_parts(8, 2, 3)}
    found: dict[str, list] = {name: [] for name in whole}
    for shard, local in enumerate(weight.chunk(shards)):
        parts = parts_of_group_piece("qkv", tuple(whole), total // shards, Sizes, shards, shard)
        assert sum(part.size for part in parts) == len(local)
        for part in parts:
            assert part.spans[shard] == (sum(len(rows) for rows in found[part.name]), part.size)
            found[part.name].append(part.take(local))
    for name, rows in found.items():
        assert torch.equal(torch.cat(rows), whole[name])


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Rows of q, k and v as Megatron has them, group by group."""
    return torch.cat([t.reshape(GROUPS, -1, t.shape[-1]) for t in (q, k, v)], 1).flatten(0, 1)


def shard_of_qkv(linear, pairs) -> torch.Tensor:
    """This rank's rows of a whole B of q, k and v."""
    prefix = f"model.layers.{linear.lora.name.split('.')[2]}.self_attn"
    B = fused(*(pairs[f"{prefix}.{leaf}_proj"][1] for leaf in "qkv"))
    return B.chunk(linear.lora_tp_size)[linear.lora_tp_group.rank()]


@torch.no_grad()
def set_values(chunks, values) -> None:
    for linear in iter_linears(chunks):
        if not linear.lora.name.endswith("linear_qkv"):
            adapted.set_values_of(linear, values)
            continue
        prefix = f"model.layers.{linear.lora.name.split('.')[2]}.self_attn"
        linear.lora_A.copy_(values[f"{prefix}.q_proj"][0])
        linear.lora_B.copy_(shard_of_qkv(linear, values))


def chunks_of(layout, path, config, values=None):
    chunks = moe_runs.chunks_of(layout, path, True, config)
    if values is not None:
        set_values(chunks, values)
    return chunks


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = moe_models.make_checkpoint(tmp_path_factory.mktemp("qwen3_moe"), "qwen3_moe")
    values = moe_reference.values_of(path, RANK, "fused")
    adapter = moe_reference.write_adapter(path / "adapter", path, values, rank=RANK, alpha=ALPHA)
    model = moe_reference.peft_model(path, adapter)
    return path, values, *moe_reference.logits_and_grads(model, TOKENS, RANK)


def parity(layout, path, config, values, ref_logits, ref_grads):
    chunks = chunks_of(layout, path, config, values)
    logits = moe_runs.logits_of(layout, chunks)
    model = adapted.wrap(chunks, distributed_optimizer=False)
    adapted.train_step(model, None, TOKENS)
    errors = [adapted.relative(logits - ref_logits, ref_logits)]
    seen = 0
    for linear in iter_linears(model):
        if linear.lora.name.endswith("linear_qkv"):
            dA, dB = adapted.main_grads(linear)
            prefix = f"model.layers.{linear.lora.name.split('.')[2]}.self_attn"
            expected = sum(ref_grads[f"{prefix}.{leaf}_proj"][0] for leaf in "qkv")
            errors += [adapted.relative(dA - expected, expected)]
            expected = shard_of_qkv(linear, ref_grads)
            errors += [adapted.relative(dB - expected, expected)]
            seen += 1
    return errors, seen


CONFIG = LoRAConfig(rank=RANK, alpha=ALPHA, layout="fused")


def test_fused_targets(te_pool4, reference):
    for (logits, *grads), seen in te_pool4.run(parity, reference[0], CONFIG, *reference[1:], **TP4):
        assert logits <= 1e-5 and max(grads) <= 1e-4 and seen == 2


def away(layout, path, config, values, out):
    chunks = chunks_of(layout, path, config, values)
    save_adapter(chunks, out / "checkpoint", step=1)
    export_peft(chunks, out / "adapter", hf_checkpoint=path)


def back(layout, path, config, out, start):
    chunks = chunks_of(layout, path, config)
    if start == "checkpoint":
        load_adapter(chunks, out / "checkpoint")
    else:
        import_peft(chunks, out / "adapter")
    return moe_runs.logits_of(layout, chunks)


@pytest.mark.parametrize("there, here", [(TP4, dict(tp=2, sp=True, etp=1)), (dict(ep=2, etp=1), TP4)], ids=str)
def test_checkpoints_and_exports_fit_every_size(te_pool4, reference, tmp_path, there, here):
    path, values, logits, _ = reference
    te_pool4.run(away, path, CONFIG, values, tmp_path, **there)
    for start in ("checkpoint", "adapter"):
        found = te_pool4.run(back, path, CONFIG, tmp_path, start, **here)
        dp = 4 // here.get("tp", 1)
        for rank, mine in enumerate(found):
            expected = logits.chunk(dp)[rank // here["tp"]]
            assert adapted.relative(mine - expected, expected) <= 1e-5, start


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(layout="split"), "--lora-layout split: with more tensor-parallel ranks than key/value heads"),
        (dict(target_modules=("q_proj", "v_proj")), "q_proj, v_proj alone: with more tensor-parallel ranks"),
        (dict(alpha_pattern={"k_proj": 2.0}), "scalings .*: with more tensor-parallel ranks"),
    ],
    ids=["split", "partial", "scalings"],
)
def test_what_a_piece_cannot_hold(te_pool4, reference, options, reason):
    config = LoRAConfig(**{"rank": RANK, "alpha": ALPHA, "layout": "fused"} | options)
    with pytest.raises(WorkerError, match=reason) as caught:
        te_pool4.run(moe_runs.adapted_paths, reference[0], config, **TP4)
    assert {kind for kind, _ in caught.value.errors.values()} == {"UsageError"}


def test_gated_attention_is_refused():
    sizes = type("Gated", (Sizes,), {"attention_output_gate": True})
    with pytest.raises(ValueError, match="has an output gate; use one that divides 2"):
        parts_of_group_piece("linear_qkv", ("q_proj", "k_proj", "v_proj"), 15, sizes, 4, 0)


def test_a_part_of_nothing():
    part = Part("k_proj", 0, 0, 6, 1, spans=((0, 0),))
    assert part.size == 0 and part.index().numel() == 0
