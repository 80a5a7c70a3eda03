"""Trained vocabulary rows against PEFT's ``trainable_token_indices`` in one process: gradients, steps, gradient norms.

pytest tests/layers/test_token_rows.py            # tied and untied, TP 1, TP 2 + SP, PP 2, CP 2
pytest tests/layers/test_token_rows.py -m ""      # and TP 2, DP 2, interleaved PP
"""

from __future__ import annotations

from functools import partial

import adapted
import context_parallel
import pytest
import reference
import row_runs
import torch
from harness import Layout, WorkerError
from row_runs import STEPS, batches, check, of_peft
from safetensors.torch import load_file

from slime_plugins.lora import (
    LoRAConfig,
    adapters_disabled,
    export_peft,
    import_peft,
    merged,
    save_adapter,
    summing_stages,
)
from slime_plugins.lora.adapters import iter_token_rows
from slime_plugins.lora.cli import main
from slime_plugins.lora.peft.verify import verify_adapter
from slime_plugins.lora.rehearsal.tiny import make_tiny

IDS = (5, 17, 63, 64, 70, 126)
"""On both ranks of TP 2; some in every batch."""
LORA = LoRAConfig(rank=4, alpha=8, layout="split", trainable_token_indices=IDS)
ALONE = LoRAConfig(target_modules=(), trainable_token_indices=IDS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """tied -> directory; 128 tokens, padded to nothing at TP 2."""
    return {
        tied: make_tiny(tmp_path_factory.mktemp("rows"), "qwen3", num_layers=4, tied=tied) for tied in (True, False)
    }


def peft_with_rows(base, tied, alone):
    from peft import TrainableTokensConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    ids = list(IDS) if tied else {"embed_tokens": list(IDS), "lm_head": list(IDS)}
    if not alone:
        return reference.peft_model(base, rank=4, alpha=8, layout="split", trainable_token_indices=ids)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    targets = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    return get_peft_model(model, TrainableTokensConfig(token_indices=list(IDS), target_modules=targets))


def train_rows(layout: Layout, base, config, *args, **kwargs):
    """``row_runs.train`` of this base."""
    spec = context_parallel.spec if layout.cp > 1 else None
    chunks = adapted.adapted_chunks(base, config, sp=layout.sp, vpp=layout.vpp, layer_spec=spec)
    if config.target_modules:
        adapted.set_adapters(chunks, "split", 4)
    return row_runs.train(chunks, batches(128), *args, **kwargs)


@pytest.fixture(scope="module")
def expected(bases):
    known = {}

    def find(tied, alone):
        if (tied, alone) not in known:
            known[tied, alone] = of_peft(peft_with_rows(bases[tied], tied, alone), batches(128))
        return known[tied, alone]

    return find


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_one_process(pool1, bases, expected, tied):
    check(pool1.run(train_rows, bases[tied], LORA), expected(tied, False))
    check(pool1.run(train_rows, bases[tied], ALONE), expected(tied, True))


SIZES = [
    pytest.param({"tp": 2, "sp": True}, id="tp2-sp"),
    pytest.param({"pp": 2}, id="pp2"),
    pytest.param({"tp": 2}, id="tp2", marks=pytest.mark.slow),
    pytest.param({"pp": 2, "vpp": 2}, id="pp2-vpp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sizes", SIZES)
def test_two_processes(pool2, bases, expected, sizes, tied):
    check(pool2.run(train_rows, bases[tied], LORA, **sizes), expected(tied, False))


REPLICAS = [pytest.param({"cp": 2}, id="cp2"), pytest.param({}, id="dp2", marks=pytest.mark.slow)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sizes", REPLICAS)
def test_ranks_with_a_part_of_the_tokens(pool2, bases, expected, sizes, tied):
    """The distributed optimizer leaves each rank a part of the summed gradient, Megatron's plain one all of it."""
    for distributed in (False, True):
        train = partial(train_rows, distributed_optimizer=distributed)
        results = pool2.run(train, bases[tied], LORA, **sizes)
        check(results, expected(tied, False), whole_gradients=not distributed)


def test_tied_rows_of_two_stages_need_their_sum(pool2, bases):
    with pytest.raises(WorkerError) as caught:
        pool2.run(train_rows, bases[True], LORA, as_it_is, pp=2)
    assert "slime_plugins.lora.summing_stages" in str(caught.value)


def as_it_is(finalize):
    return finalize


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resumed_at_another_parallelism(pool2, bases, expected, tied, tmp_path):
    """Rows, masters and moments: three steps at TP 2 with SP and two at PP 2 are five."""
    grads, rows, norms = expected(tied, False)
    pool2.run(train_rows, bases[tied], LORA, summing_stages, 0, 3, None, tmp_path, tp=2, sp=True)
    resumed = pool2.run(train_rows, bases[tied], LORA, summing_stages, 3, STEPS, tmp_path, pp=2)
    check(resumed, (grads, rows, norms[3:]), whole_gradients=False)


def test_other_rows_than_the_checkpoint_has(pool1, bases, tmp_path):
    pool1.run(train_rows, bases[True], LORA, summing_stages, 0, 1, None, tmp_path)
    other = LoRAConfig(rank=4, alpha=8, layout="split", trainable_token_indices=IDS[1:])
    with pytest.raises(WorkerError) as caught:
        pool1.run(train_rows, bases[True], other, summing_stages, 1, 2, tmp_path)
    assert "6 vocabulary rows trained in the checkpoint, 5 here (token 5 in one alone)" in str(caught.value)


def give_and_take(layout: Layout, base, config, out):
    """Export, import into a model of its own; logits of both."""
    chunks = adapted.adapted_chunks(base, config, sp=layout.sp)
    if config.target_modules:
        adapted.set_adapters(chunks, "split", 4)
    draw_rows(chunks)
    export_peft(chunks, out, hf_checkpoint=base)
    other = adapted.adapted_chunks(base, LoRAConfig.from_peft(out), sp=layout.sp)
    import_peft(other, out)
    with torch.no_grad():
        return [whole_logits(model) for model in (chunks, other)]


@torch.no_grad()
def draw_rows(chunks):
    for carrier in iter_token_rows(chunks):
        if carrier.lora_table:
            carrier.lora_rows.copy_(reference.draw(carrier.lora_name, *carrier.lora_rows.shape))


def whole_logits(chunks):
    tokens = reference.batch(128)
    return adapted.gather_logits(adapted.run_schedule(chunks, tokens, forward_only=True, collect_logits=True), 128)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("config", [LORA, ALONE], ids=["beside-lora", "alone"])
def test_peft_reads_what_is_exported(pool2, bases, tied, config, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    results = pool2.run(give_and_take, bases[tied], config, tmp_path / "adapter", tp=2)
    model = AutoModelForCausalLM.from_pretrained(bases[tied], dtype=torch.float32, attn_implementation="eager")
    tokens = reference.batch(128)[:, :-1]
    with torch.no_grad():
        before = model(tokens).logits
        model = PeftModel.from_pretrained(model, tmp_path / "adapter")
        expected = model(tokens).logits
    assert (expected - before).abs().max() > 0.1
    for mine, imported in results:
        assert adapted.relative(mine - expected, expected) < 1e-5
        assert adapted.relative(imported - expected, expected) < 1e-5


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("config", [LORA, ALONE], ids=["beside-lora", "alone"])
def test_the_commands_carry_rows(pool1, bases, tied, config, tmp_path, capsys):
    """A checkpoint exported, merged, and the export imported and merged again: one model."""
    from transformers import AutoModelForCausalLM

    def run(*words):
        assert main([str(word) for word in words]) == 0, capsys.readouterr()

    base, saved, out = bases[tied], tmp_path / "saved", tmp_path
    expected = pool1.run(save_and_logits, base, config, saved)[0]
    run("export", "--checkpoint", saved, "--hf-checkpoint", base, "--out", out / "adapter")
    said = capsys.readouterr().out
    assert ("6 trained rows of lm_head" in said) is not tied
    way = "--bake-tokens DIR" if config.target_modules else "--merge"
    assert f"vLLM refuses an adapter with trained rows, SGLang passes over them: for those servers add {way}" in said
    stored = load_file(out / "adapter" / "adapter_model.safetensors")
    report = verify_adapter(out / "adapter", base)
    assert report.ok and report.checksums == len(stored), "every tensor is read once, and counted once"
    run("export", "--merge", "--checkpoint", saved, "--hf-checkpoint", base, "--out", out / "merged")
    run("merge", out / "adapter", "--hf-checkpoint", base, "--out", out / "merged again")
    run("import", "--adapter", out / "adapter", "--hf-checkpoint", base, "--out", out / "imported")
    run("export", "--merge", "--checkpoint", out / "imported", "--hf-checkpoint", base, "--out", out / "third")
    for merged_dir in ("merged", "merged again", "third"):
        model = AutoModelForCausalLM.from_pretrained(
            out / merged_dir, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            logits = model(reference.batch(128)[:, :-1]).logits
        assert adapted.relative(logits - expected, expected) < 1e-5, merged_dir


def test_a_baked_base_takes_a_plain_adapter(pool1, bases, tmp_path, capsys):
    """What vLLM and SGLang are given: no field of theirs that they would refuse or pass over."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, out = bases[False], tmp_path
    expected = pool1.run(save_and_logits, base, LORA, out / "saved")[0]
    words = ["--checkpoint", out / "saved", "--hf-checkpoint", base, "--out", out / "adapter"]
    assert main(["export", *map(str, words), "--bake-tokens", str(out / "baked")]) == 0, capsys.readouterr()
    assert main(["verify", str(out / "adapter"), "--hf-checkpoint", str(out / "baked")]) == 0
    assert "token" not in (out / "adapter" / "adapter_config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(out / "baked", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = PeftModel.from_pretrained(model, out / "adapter")(reference.batch(128)[:, :-1]).logits
    assert adapted.relative(logits - expected, expected) < 1e-5
    assert main(["export", *map(str, words), "--bake-tokens", str(out / "x"), "--merge"]) == 2


def save_and_logits(layout: Layout, base, config, out):
    chunks = adapted.adapted_chunks(base, config)
    if config.target_modules:
        adapted.set_adapters(chunks, "split", 4)
    draw_rows(chunks)
    save_adapter(chunks, out, step=1)
    with torch.no_grad():
        return whole_logits(chunks)


def logits_of(layout: Layout, base, tied):
    chunks = adapted.adapted_chunks(base, ALONE, sp=layout.sp)
    with torch.no_grad():
        before = whole_logits(chunks)
        draw_rows(chunks)
        on = whole_logits(chunks)
        with merged(chunks):
            as_merged = whole_logits(chunks)
        with adapters_disabled(chunks):
            off = whole_logits(chunks)
    return before, on, as_merged, off


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_off_is_the_base_and_merged_is_on(pool2, bases, tied):
    for before, on, as_merged, off in pool2.run(logits_of, bases[tied], tied, tp=2, sp=True):
        assert torch.equal(before, off)
        assert (on - before).abs().max() > 0.1
        assert adapted.relative(on - as_merged, as_merged) < 1e-5


@pytest.mark.parametrize(
    "ids, words", [((-1,), "-1; expected whole"), ((3, 3), "3 twice"), ((True,), "expected whole")]
)
def test_ids_that_cannot_be(ids, words):
    with pytest.raises(ValueError, match=words):
        LoRAConfig(trainable_token_indices=ids)


def test_ids_outside_of_the_model(pool1, bases):
    with pytest.raises(WorkerError) as caught:
        pool1.run(train_rows, bases[True], LoRAConfig(trainable_token_indices=(127, 128)))
    assert "128 is outside of the model's 128 rows" in str(caught.value)


def a_head_of_another_class(layout: Layout, base):
    from functools import partial

    from megatron.core.tensor_parallel import ColumnParallelLinear

    from slime_plugins.lora import apply_lora
    from slime_plugins.lora.rehearsal.model import build_chunks

    class Fused(ColumnParallelLinear):
        """It might not call ``forward`` of the class below: nobody knows."""

    def apply(chunks, config):
        chunks[0].output_layer.__class__ = Fused
        return apply_lora(chunks, config)

    build_chunks(base, dtype=torch.float32, apply=partial(apply, config=ALONE))


def test_a_head_that_would_not_see_the_rows_is_refused(pool1, bases):
    """slime's Megatron has an output layer of a class of its own: its rows stayed as they were, in silence."""
    with pytest.raises(WorkerError) as caught:
        pool1.run(a_head_of_another_class, bases[True])
    assert "output_layer is a Fused, for which trained rows have no form" in str(caught.value)


def without_the_mark(layout: Layout, base):
    import inspect

    read = inspect.getsource
    inspect.getsource = lambda thing: read(thing).replace("average_gradients_across_tp_domain", "something_else")
    try:
        adapted.adapted_chunks(base, ALONE)
    finally:
        inspect.getsource = read


def test_a_megatron_that_would_not_sum_the_gradients_is_refused(pool2, bases):
    with pytest.raises(WorkerError) as caught:
        pool2.run(without_the_mark, bases[True], tp=2)
    assert "does not know average_gradients_across_tp_domain" in str(caught.value)
