"""Distillation beside the model: the teacher's pass before slime's training steps, and the loss in them.

The pass keeps final hidden states of response tokens, by the identity of the student's token tensors: slime hands the
same tensors to every microbatch, in whatever order and size it packs them. The head is applied in the loss.
"""

from __future__ import annotations

import contextlib
import inspect
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu

from slime_plugins.lora.objectives.divergence import Divergence, Vocabulary, reduce_over
from slime_plugins.lora.objectives.head import output_weight, without_head
from slime_plugins.lora.objectives.teacher import Teacher
from slime_plugins.lora.parallel import unwrapped
from slime_plugins.lora.slime.hooks.distillation import is_given
from slime_plugins.lora.slime.hooks.replay import no_replay
from slime_plugins.lora.slime.hooks.teachers import teacher_weights


class OtherWeights:
    """A teacher with weights of its own: one of slime's policies, kept in host memory and swapped in whole."""

    _TAG = "gkd_teacher"  # slime's own distillation has "teacher"

    def __init__(self, actor: Any, path: str):
        actor.load_other_checkpoint(self._TAG, path)
        self._policies = actor.weights_backuper

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the model is the teacher; afterwards the actor again, bit for bit."""
        self._policies.restore(self._TAG)
        try:
            yield
        finally:
            self._policies.restore("actor")

    def follow(self) -> None:
        """It stays as it is."""


@dataclass
class _Run:
    """The distillation of this process's actor."""

    model: Any
    teacher: Teacher | OtherWeights
    head: torch.Tensor | None = None
    """This rank's rows of the teacher's output layer, where it is not the student's."""
    hidden: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Identity of a sample's tokens -> those tokens, kept so that no other tensor gets their identity, and the
    teacher's hidden states [R, H] of this rank's part of the response; until the loss has read them."""
    given: bool = False
    """Are this rollout's responses those of the data?"""


_current: _Run | None = None


def begin(actor: Any) -> None:
    """Make the teacher of slime's actor, whose adapters and policies are there. Call on all ranks.

    Raises:
        UsageError, OSError, ValueError: what ``--gkd-teacher`` names does not fit.
    """
    global _current
    args, weights = actor.args, teacher_weights(actor.args)
    teacher = OtherWeights(actor, weights) if weights else Teacher(actor.model, args.gkd_teacher, args.gkd_ema_decay)
    _current = _Run(actor.model, teacher)


def after_step(model: Any) -> None:
    """An optimizer step has been made: an average follows it."""
    if _current is not None and _current.model is model:
        _current.teacher.follow()


def teach(args: Namespace, rollout_id: int, rollout_data: dict) -> None:
    """slime's hook on a rollout's data, before it trains on them: one forward pass of the teacher over all samples."""
    assert _current is not None
    if args.gkd_own_postprocess is not None:
        from slime.utils.misc import load_function

        load_function(args.gkd_own_postprocess)(args, rollout_id, rollout_data)
    _current.given = is_given(args, rollout_id)
    _current.hidden.clear()
    shown, students = _shown(rollout_data)
    with _current.teacher.active(), no_replay():
        with without_head(_last(_current.model)):
            _forward(args, _current.model, shown, students)
        if isinstance(_current.teacher, OtherWeights) and mpu.is_pipeline_last_stage():
            _current.head = output_weight(_last(_current.model)).clone()


def _shown(rollout_data: dict) -> tuple[dict, dict[int, torch.Tensor]]:
    """What the teacher reads; and the student's tokens by the identity of the teacher's."""
    tokens = rollout_data["tokens"]
    own = rollout_data.pop("prompt", None)  # log_rollout_data would average it
    if own is None:
        return rollout_data, {id(one): one for one in tokens}
    theirs = [torch.as_tensor(ids, dtype=one.dtype, device=one.device) for ids, one in zip(own, tokens)]
    for index, (ids, one, length) in enumerate(zip(theirs, tokens, rollout_data["response_lengths"])):
        if not torch.equal(ids[len(ids) - length :], one[len(one) - length :]):
            raise ValueError(
                f"sample {index} of this rank: the teacher's tokens do not end in the student's response of {length} "
                "tokens; --custom-convert-samples-to-train-data-path or a hook has changed one of them; change both"
            )
    shown = {**rollout_data, "tokens": theirs, "total_lengths": [len(ids) for ids in theirs]}
    return shown, {id(ids): one for ids, one in zip(theirs, tokens)}


def _forward(args: Namespace, model: Any, shown: dict, students: dict[int, torch.Tensor]) -> None:
    from slime.backends.megatron_utils.model import forward_only

    def keep(output: torch.Tensor, *, unconcat_tokens, total_lengths, response_lengths, **_unused):
        assert _current is not None
        states = _whole_sequence(output, _config(model))[0]
        states = states.to(output_weight(_last(model)).dtype)  # Megatron's wrapper hands float32 out
        found = _rows(args, len(states), unconcat_tokens, total_lengths, response_lengths)
        for tokens, length, (rows, places) in zip(unconcat_tokens, response_lengths, found):
            student, own = students[id(tokens)], states[rows.to(states.device)]
            if student is not tokens:
                own = _at_students_places(args, own, places, student, length)
            _current.hidden[id(student)] = student, own
        return output.new_empty(0), {}

    with torch.no_grad():
        forward_only(keep, args, model, *_schedule(args, model, shown))


def _at_students_places(args: Namespace, states, places, student: torch.Tensor, length: int) -> torch.Tensor:
    """The same [R, H] of a response, cut over the context-parallel ranks as after the student's prompt.

    Another prompt moves the cuts. The whole response is on every rank for a moment, of one sample at a time.
    """
    group = mpu.get_context_parallel_group()
    if group.size() == 1:
        return states
    whole = states.new_zeros(length, states.shape[-1])
    whole[places.to(states.device)] = states
    dist.all_reduce(whole, group=group)  # each row is one rank's, so the sum is exact
    total = len(student)
    ((_, wanted),) = _rows(args, total + 4 * group.size(), [student], [total], [length])
    return whole[wanted.to(states.device)]


def _schedule(args: Namespace, model: Any, shown: dict) -> tuple[list, list[int]]:
    """slime's iterators over samples, and the number of microbatches of each step."""
    from slime.backends.megatron_utils.data import get_data_iterator

    if len(inspect.signature(get_data_iterator).parameters) == 1:
        return get_data_iterator(shown), shown["num_microbatches"]
    return get_data_iterator(args, model, shown)  # v0.2.4 makes the schedule here


def _taught(tokens: torch.Tensor) -> torch.Tensor:
    """The teacher's hidden states of a sample, which are given up: they are read once."""
    assert _current is not None
    if id(tokens) not in _current.hidden:
        raise ValueError(
            f"--use-gkd: a sample of {len(tokens)} tokens in a training step was not shown to the teacher, expected "
            "the very tensors of the rollout, each once; does a hook change or copy them, or train on them twice?"
        )
    return _current.hidden.pop(id(tokens))[1]


def loss(args: Namespace, batch: dict, logits: torch.Tensor, sum_of_sample_mean) -> tuple[torch.Tensor, dict]:
    """slime's custom loss: of logits [1, T, V/TP], summed over samples as slime's own losses are, and what to log."""
    assert _current is not None
    tokens = batch["unconcat_tokens"]
    total, metrics = _other_losses(args, batch, logits, sum_of_sample_mean)
    rows = _rows(args, logits.shape[1], tokens, batch["total_lengths"], batch["response_lengths"])
    hidden = torch.cat([_taught(one) for one in tokens])
    row = torch.cat([of_sample for of_sample, _ in rows]).to(logits.device)
    weights = logits.new_zeros(logits.shape[1])
    weights[row] = _weights(sum_of_sample_mean, len(row), logits.device)
    place = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    place[row] = torch.arange(len(row), device=logits.device)
    head, width = output_weight(_last(_current.model)) if _current.head is None else _current.head, logits.shape[-1]
    divergence, statistics = Divergence(args.gkd_beta, args.gkd_temperature, args.gkd_chunk_size)(
        logits[0],
        lambda index: hidden[place[index[0]]] @ head.t(),
        weights,
        Vocabulary(
            mpu.get_tensor_model_parallel_rank() * width,
            args.vocab_size,
            reduce_over(mpu.get_tensor_model_parallel_group()),
        ),
        overwrite=total is None,  # the policy loss may have kept the logits
    )
    weight = 1.0 if args.gkd_coef is None else args.gkd_coef
    total = weight * divergence if total is None else total + weight * divergence
    # As slime divides what is logged by the number of samples: 0 or 1 in each step, over steps the share.
    statistics["on_policy"] = weights.sum() * (not _current.given)
    metrics |= {f"gkd/{name}": value for name, value in statistics.items()}
    return total, {**metrics, "loss": total.detach().clone()}


def _other_losses(args, batch, logits, sum_of_sample_mean) -> tuple[torch.Tensor | None, dict]:
    """The policy loss of ``--gkd-coef`` and the cross-entropy of ``--sft-alpha``; None where there is neither."""
    from slime.backends.megatron_utils import loss as slime_loss

    assert _current is not None
    total, metrics = None, {}
    if args.gkd_coef is not None:
        total, metrics = slime_loss.policy_loss_function(args, batch, logits, sum_of_sample_mean)
        metrics = {("policy_loss" if name == "loss" else name): value for name, value in metrics.items()}
    if args.sft_alpha and _current.given:
        sft, _ = slime_loss.sft_loss_function(args, batch, logits, sum_of_sample_mean)
        total = args.sft_alpha * sft if total is None else total + args.sft_alpha * sft
    return total, metrics


def _weights(sum_of_sample_mean, count: int, device: torch.device) -> torch.Tensor:
    """[count]: what slime's reduction, which is linear, multiplies each response token's value with."""
    with torch.enable_grad():
        values = torch.zeros(count, device=device, requires_grad=True)
        (weights,) = torch.autograd.grad(sum_of_sample_mean(values), values)
    return weights


def _rows(args, length: int, tokens, total_lengths, response_lengths) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per sample, in which of this rank's ``length`` rows response tokens are predicted, and which of the response's
    tokens those are: int64, both."""
    from slime.backends.megatron_utils.loss import get_responses

    numbers = torch.arange(length, dtype=torch.float32)[None, :, None]  # exact to 2^24
    found = get_responses(
        numbers,
        args=Namespace(**{**vars(args), "rollout_temperature": 1.0}),  # rows, not logits: v0.2.4 always divides
        unconcat_tokens=[torch.arange(len(one)) for one in tokens],
        total_lengths=total_lengths,
        response_lengths=response_lengths,
    )
    return [
        (rows[:, 0].long(), places - (total - response))
        for (rows, places), total, response in zip(found, total_lengths, response_lengths)
    ]


def _last(model: Any) -> torch.nn.Module:
    return unwrapped(model[-1])


def _config(model: Any) -> Any:
    return _last(model).config


def _whole_sequence(hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """[1, T, H] of what a rank has of it under sequence parallelism."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    if not config.sequence_parallel:
        return hidden
    return gather_from_sequence_parallel_region(hidden.transpose(0, 1).contiguous()).transpose(0, 1)
