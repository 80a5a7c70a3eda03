"""A language model beside a vision tower (Qwen3.5): an image through training, against transformers + PEFT.

pytest tests/layers/test_vision_tower.py
"""

from __future__ import annotations

import adapted
import moe_models
import moe_reference
import moe_runs
import pytest
import torch
import vision_model
from harness import WorkerError
from moe_runs import ALPHA, RANK

from slime_plugins.lora import LoRAConfig, adapters_disabled, export_peft, import_peft

TOKENS = vision_model.batch()
SPLITS = {"tp1": {}, "tp2": dict(tp=2), "tp2-sp": dict(tp=2, sp=True), "pp2": dict(pp=2)}
SPLITS_OF_EXPERTS = {"tp1": {}, "ep2": dict(ep=2, etp=1), "tp2-sp": dict(tp=2, sp=True, etp=1)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return made(tmp_path_factory.mktemp("qwen3_5"), "qwen3_5")


@pytest.fixture(scope="module")
def reference_of_experts(tmp_path_factory):
    return made(tmp_path_factory.mktemp("qwen3_5_moe"), "qwen3_5_moe")


def made(path, family):
    """Directory, values by the names of modules, logits, gradients; and the base's logits."""
    from peft import PeftModel

    # Seed 0 has a key of nearly no length, whose normalisation makes transformers' own fp32 gradients 2e-4 wrong
    # (against its fp64 ones); with seed 1 they are right to 3e-6.
    moe_models.make_checkpoint(path, family, seed=1)
    values = moe_reference.values_of(path, RANK, "split")
    adapter = moe_reference.write_adapter(path / "adapter", path, values, rank=RANK, alpha=ALPHA)
    base = load(path)
    with torch.no_grad():
        without = base(**vision_model.inputs(TOKENS[:, :-1])).logits
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    logits, grads = moe_reference.logits_and_grads(model, TOKENS, RANK, vision_model.inputs)
    values, grads = ({n.replace("language_model.", ""): pair for n, pair in d.items()} for d in (values, grads))
    assert values.keys() == grads.keys(), "PEFT has an adapter for each of ours"
    return path, values, logits, grads, without


def load(path):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def chunks_of(layout, path, config, values=None):
    return moe_runs.chunks_of(layout, path, True, config, values)


def logits_of(layout, chunks):
    logits = adapted.run_schedule(chunks, TOKENS, microbatches=layout.pp, forward_only=True, collect_logits=True)
    return adapted.gather_logits(logits, moe_models.VOCAB)


def parity(layout, path, config, values, ref_logits, ref_grads, without):
    from megatron.core import parallel_state as mpu

    chunks = chunks_of(layout, path, config, values)
    logits = logits_of(layout, chunks)
    with adapters_disabled(chunks):
        off = logits_of(layout, chunks)
    model = adapted.wrap(chunks, distributed_optimizer=False)
    adapted.train_step(model, None, TOKENS, microbatches=layout.pp)
    errors = adapted.gradient_errors(model, ref_grads)
    errors["tower"] = [
        p.grad is None and not p.requires_grad for n, p in chunks[0].named_parameters() if "visual" in n
    ]
    if logits is not None:
        dp_rank, dp = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        for name, found, expected in (("logits", logits, ref_logits), ("off", off, without)):
            expected = expected.chunk(dp)[dp_rank]
            errors[name] = adapted.relative(found - expected, expected)
    return errors


def check(pool, reference, **sizes):
    path, values, logits, grads, without = reference
    assert adapted.relative(logits - without, without) > 0.1
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout="split")
    results = pool.run(parity, path, config, values, logits, grads, without, **sizes)
    assert any("logits" in r for r in results) and any(r["tower"] for r in results)
    for r in results:
        assert r.get("logits", 0) <= 1e-5 and r.get("off", 0) <= 1e-5
        assert r["A"] <= 1e-4 and r["B"] <= 1e-4 and r["adapters"] > 0, r
        assert all(r["tower"])


@pytest.mark.parametrize("split", SPLITS)
def test_an_image_in_the_prompt(te_pool4, reference, split):
    check(te_pool4, reference, **SPLITS[split])


@pytest.mark.parametrize("split", ["tp1", "ep2", pytest.param("tp2-sp", marks=pytest.mark.slow)])
def test_an_image_before_experts(te_pool4, reference_of_experts, split):
    """Qwen3.5-MoE, experts adapted too: PEFT reads them in its stacked form (``moe_reference``)."""
    grads = reference_of_experts[3]
    assert sum(bool(pair[1].any()) for name, pair in grads.items() if ".experts." in name) > moe_models.EXPERTS
    check(te_pool4, reference_of_experts, **SPLITS_OF_EXPERTS[split])


def report(layout, path, config):
    return str(moe_runs.adapted_paths(layout, path, config)[1])


def test_the_tower_is_counted_and_refused_by_name(te_pool4, reference):
    path = reference[0]
    size = sum(p.numel() for n, p in load(path).named_parameters() if ".visual." in n)
    config = LoRAConfig(rank=RANK, alpha=ALPHA)
    for sizes in (dict(tp=2), dict(pp=2)):
        for text in te_pool4.run(report, path, config, **sizes):
            assert f"frozen: model.visual ({size:,} parameters)" in text and "not adapted" not in text
    for target in ("qkv", "model.visual", "visual.blocks.1.attn.proj", "*.visual.*", "patch_embed.proj"):
        config = LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=("linear_qkv", target))
        with pytest.raises(WorkerError, match=r"names model\.visual.*: model\.visual stays frozen") as caught:
            te_pool4.run(report, path, config, pp=2)
        assert {kind for kind, _ in caught.value.errors.values()} == {"UsageError"}


def there_and_back(layout, path, config, values, out, moe_format):
    export_peft(chunks_of(layout, path, config, values), out, hf_checkpoint=path, moe_format=moe_format)
    chunks = chunks_of(layout, path, config)
    import_peft(chunks, out)
    return logits_of(layout, chunks)


def check_files(pool, reference, out, *, dp, moe_format="per-expert", **sizes):
    """Module names on disk; PEFT, with the image, computes what the trainer did; and back."""
    from peft import PeftModel

    from slime_plugins.lora.peft.verify import verify_adapter

    path, values, logits, _, _ = reference
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout="split")
    found = pool.run(there_and_back, path, config, values, out, moe_format, **sizes)
    for i, mine in enumerate(found):
        expected = logits.chunk(dp)[i * dp // len(found)]
        assert adapted.relative(mine - expected, expected) <= 1e-5
    checked = verify_adapter(out, path)
    assert checked.ok and checked.names == "module", checked.problems
    model = PeftModel.from_pretrained(load(path), out)
    with torch.no_grad():
        through = model(**vision_model.inputs(TOKENS[:, :-1])).logits
    assert adapted.relative(through - logits, logits) <= 1e-5


def test_export_and_import(te_pool4, reference, tmp_path):
    check_files(te_pool4, reference, tmp_path / "adapter", dp=2, tp=2, sp=True)


def test_export_and_import_of_experts(te_pool4, reference_of_experts, tmp_path):
    """PEFT reads no others of this family than fused ones."""
    check_files(te_pool4, reference_of_experts, tmp_path / "adapter", dp=4, moe_format="fused", ep=2, etp=1)
