"""The teacher's pass and the loss as slime calls them, on Megatron-Core from the registry, without slime.

The judge is the paper's formula on whole logits of the same model, its adapters off for the teacher. What slime hands
over is imitated: packed samples one to a microbatch, trained in another order than they were shown in.

    pytest tests/slime/hooks/test_slime_gkd.py        # inside real slime: tests/slime/real/test_slime_distillation.py
"""

from __future__ import annotations

import types
from argparse import Namespace

import adapted
import pytest
import slime_hooks_on_ranks as on_ranks
import slime_stand_ins
import torch
import torch.distributed as dist
from harness import Layout
from megatron.core import parallel_state as mpu
from tiny_checkpoints import tiny

LENGTHS = [(5, 3), (4, 4), (6, 2), (3, 7)]
"""Tokens of prompt and response; the sums even, for sequence parallelism."""
TEACHERS = [2, 6, 4, 1]
"""Of the teacher's own prompts: even sums again."""
BETA, TEMPERATURE = 0.3, 2.0


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return tiny(tmp_path_factory)


def rollout(privileged: bool) -> dict:
    """What slime's actor has of a rollout."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda count: torch.randint(4, 128, (count,), generator=generator)  # noqa: E731
    tokens = [draw(prompt + response) for prompt, response in LENGTHS]
    data = {
        "tokens": tokens,
        "total_lengths": [len(one) for one in tokens],
        "response_lengths": [response for _, response in LENGTHS],
        "num_microbatches": [len(tokens)],
    }
    if privileged:
        responses = [one[prompt:] for one, (prompt, _) in zip(tokens, LENGTHS)]
        data["prompt"] = [torch.cat([draw(n), r]).tolist() for n, r in zip(prompts_of_teacher(), responses)]
    return data


def prompts_of_teacher() -> list[int]:
    """Their lengths: such that prompt and response have an even number of tokens."""
    return [n + (n + response) % 2 for n, (_, response) in zip(TEACHERS, LENGTHS)]


def get_responses(logits, *, args, unconcat_tokens, total_lengths, response_lengths):
    """slime's, of one pack of samples; a context-parallel rank holds two of 2 CP pieces of each, from both ends."""
    ranks, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    start = 0
    for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths):
        predicting = range(total - response - 1, total - 1)
        if ranks == 1:
            rows = [start + place for place in predicting]
            start += total
        else:
            piece = -(-total // (2 * ranks))
            held = [*range(rank * piece, (rank + 1) * piece)]
            held += range((2 * ranks - rank - 1) * piece, (2 * ranks - rank) * piece)
            predicting = [place for place in predicting if place in held]
            rows = [start + held.index(place) for place in predicting]
            start += 2 * piece
        yield logits[0][rows], tokens[[place + 1 for place in predicting]]


def install(forward_only=None):
    slime_stand_ins.install()
    slime_stand_ins.module("slime.backends.megatron_utils.loss", get_responses=get_responses)
    slime_stand_ins.module("slime.backends.megatron_utils.data", get_data_iterator=lambda data: data)
    slime_stand_ins.module("slime.backends.megatron_utils.model", forward_only=forward_only)


def logits_of(model, tokens):
    """[1, S, V/T] of one sample; one chunk."""
    mask = torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool).triu(1)
    return model[0](tokens[None], torch.arange(len(tokens))[None], mask)


def forward_only(keep, args, model, data, num_microbatches):
    for tokens, total, response in zip(data["tokens"], data["total_lengths"], data["response_lengths"]):
        output = logits_of(model, tokens).float()
        keep(output, unconcat_tokens=[tokens], total_lengths=[total], response_lengths=[response])


def distil(layout: Layout, hf_dir, privileged: bool):
    """Loss and statistics of every sample by the hooks, and by the formula."""
    from slime_plugins.lora import adapters_disabled
    from slime_plugins.lora.slime.hooks import gkd

    install(forward_only)
    model, data = on_ranks.model_of(layout, hf_dir), rollout(privileged)
    shown = [torch.tensor(ids) for ids in data.get("prompt", data["tokens"])]
    args = Namespace(
        gkd_teacher="base", gkd_ema_decay=None, gkd_own_postprocess=None, gkd_lmbda=0.0, seed=1, gkd_coef=None,
        gkd_beta=BETA, gkd_temperature=TEMPERATURE, gkd_chunk_size=2, vocab_size=128, sft_alpha=0.0,
    )  # fmt: skip
    gkd.begin(types.SimpleNamespace(args=args, model=model))
    gkd.teach(args, 0, data)
    assert "prompt" not in data
    results = {}
    for i in reversed(range(len(data["tokens"]))):
        tokens, (_, response) = data["tokens"][i], LENGTHS[i]
        batch = {"unconcat_tokens": [tokens], "total_lengths": [len(tokens)], "response_lengths": [response]}
        logits = logits_of(model, tokens).float()
        loss, metrics = gkd.loss(args, batch, logits * 1.0, lambda values: values.mean())
        with torch.no_grad(), adapters_disabled(model):
            teacher = whole(logits_of(model, shown[i]))
        expected = divergence(whole(logits)[-response - 1 : -1], teacher[-response - 1 : -1]).mean()
        results[i] = loss.item(), expected.item(), metrics["gkd/on_policy"].item()
    with pytest.raises(ValueError, match="was not shown to the teacher"):
        gkd.loss(args, batch, logits * 1.0, lambda values: values.mean())
    return results


def whole(logits) -> torch.Tensor:
    """float64 [S, V] of [1, S, V/T]."""
    return adapted.gather_logits(logits.detach(), 128)[0].double()


def divergence(student, teacher):
    p, q = (student / TEMPERATURE).softmax(-1), (teacher / TEMPERATURE).softmax(-1)
    m = BETA * q + (1 - BETA) * p
    kl = lambda one, other: (one * (one / other).log()).sum(-1)  # noqa: E731
    return BETA * kl(q, m) + (1 - BETA) * kl(p, m)


@pytest.mark.parametrize("sizes", [dict(tp=1), dict(tp=2), dict(tp=2, sp=True)], ids=["tp1", "tp2", "tp2-sp"])
@pytest.mark.parametrize("privileged", [False, True], ids=["plain", "privileged"])
def test_loss(request, hf_dir, sizes, privileged):
    pool = request.getfixturevalue("pool1" if sizes["tp"] == 1 else "pool2")
    for results in pool.run(distil, hf_dir, privileged, **sizes):
        assert sorted(results) == list(range(len(LENGTHS)))
        for found, expected, on_policy in results.values():
            assert found == pytest.approx(expected, rel=2e-6)
            assert expected > 1e-3
            assert on_policy == 0.0
        assert len({round(found, 6) for found, _, _ in results.values()}) == len(LENGTHS), "samples must differ"


def test_a_teachers_tokens_must_end_in_the_students_response():
    from slime_plugins.lora.slime.hooks import gkd

    data = rollout(privileged=True)
    data["prompt"][2][-1] += 1
    with pytest.raises(ValueError, match="the teacher's tokens do not end in the student's response"):
        gkd._shown(data)


def places(layout: Layout, response: int, theirs: int, ours: int):
    """Rows of a response cut behind the teacher's prompt, moved to where they are cut behind the student's."""
    from slime_plugins.lora.slime.hooks import gkd

    install()
    teacher, student = torch.arange(theirs + response), torch.arange(ours + response)
    ((_, held),) = gkd._rows(Namespace(), 99, [teacher], [len(teacher)], [response])
    states = torch.stack([held.float(), held.float() ** 2], -1)  # the place in the response, so that it can be told
    moved = gkd._at_students_places(Namespace(), states, held, student, response)
    found = get_responses(
        torch.zeros(1, 99, 1), args=None, unconcat_tokens=[student], total_lengths=[len(student)],
        response_lengths=[response],
    )  # fmt: skip
    ((_, tokens),) = found
    return moved, tokens - ours, dist.get_rank()


@pytest.mark.parametrize("response, theirs, ours", [(5, 9, 2), (5, 2, 9), (1, 7, 3), (16, 1, 1), (3, 30, 1)])
def test_states_move_where_the_student_is_cut(pool2, response, theirs, ours):
    ranks = pool2.run(places, response, theirs, ours, cp=2)
    for moved, wanted, _ in ranks:
        assert torch.equal(moved, torch.stack([wanted.float(), wanted.float() ** 2], -1))
    assert sorted(torch.cat([wanted for _, wanted, _ in ranks]).tolist()) == list(range(response))
