"""Distillation beside the model: the teacher's pass before slime's training steps, and the loss in them.

The pass keeps final hidden states of response tokens, by the identity of the student's token tensors: slime hands the
same tensors to every microbatch, in whatever order and size it packs them. The head is applied in the loss.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from slime_plugins.lora.objectives.divergence import Divergence, Vocabulary, reduce_over
from slime_plugins.lora.objectives.teacher import Teacher
from slime_plugins.lora.parallel import unwrapped
from slime_plugins.lora.slime.hooks.distillation import is_given


@dataclass
class _Run:
    """The distillation of this process's actor."""

    model: Any
    teacher: Teacher | None = None
    """Made at the first pass: the adapters have their values then."""
    hidden: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Identity of a sample's tokens -> those tokens, kept so that no other tensor gets their identity, and the
    teacher's hidden states [R, H] of this rank's part of the response."""
    given: bool = False
    """Are this rollout's responses those of the data?"""


_current: _Run | None = None


def begin(args: Namespace, model: Any) -> None:
    """Note whose model the loss is of; called when slime's actor has built it."""
    global _current
    _current = _Run(model)


def after_step(model: Any) -> None:
    """An optimizer step has been made: an average follows it."""
    if _current is not None and _current.model is model and _current.teacher is not None:
        _current.teacher.follow()


def teach(args: Namespace, rollout_id: int, rollout_data: dict) -> None:
    """slime's hook on a rollout's data, before it trains on them: one forward pass of the teacher over all samples."""
    assert _current is not None
    if args.gkd_own_postprocess is not None:
        from slime.utils.misc import load_function

        load_function(args.gkd_own_postprocess)(args, rollout_id, rollout_data)
    if _current.teacher is None:
        _current.teacher = Teacher(_current.model, args.gkd_teacher, args.gkd_ema_decay)
    _current.given = is_given(args, rollout_id)
    _current.hidden.clear()
    shown, students = _shown(rollout_data)
    with _current.teacher.active(), _without_head(_current.model), _no_replay():
        _forward(args, _current.model, shown, students)


def _shown(rollout_data: dict) -> tuple[dict, dict[int, torch.Tensor]]:
    """What the teacher reads, and of each of its token tensors, by identity, the student's."""
    tokens = rollout_data["tokens"]
    own = rollout_data.pop("prompt", None)  # log_rollout_data would average it
    if own is None:
        return rollout_data, {id(one): one for one in tokens}
    theirs = [torch.as_tensor(ids, dtype=one.dtype, device=one.device) for ids, one in zip(own, tokens)]
    for ids, one, length in zip(theirs, tokens, rollout_data["response_lengths"]):
        if not torch.equal(ids[len(ids) - length :], one[len(one) - length :]):
            raise ValueError(
                "the teacher's tokens do not end in the student's response; is a rollout of another kind?"
            )
    shown = {**rollout_data, "tokens": theirs, "total_lengths": [len(ids) for ids in theirs]}
    return shown, {id(ids): one for ids, one in zip(theirs, tokens)}


def _forward(args: Namespace, model: Any, shown: dict, students: dict[int, torch.Tensor]) -> None:
    from slime.backends.megatron_utils.model import forward_only

    def keep(output: torch.Tensor, *, unconcat_tokens, total_lengths, response_lengths, **_unused):
        assert _current is not None
        states = _whole_sequence(output, _config(model))[0]
        states = states.to(_head(model).dtype)  # Megatron's wrapper hands float32 out
        for tokens, rows in zip(
            unconcat_tokens, _rows(args, len(states), unconcat_tokens, total_lengths, response_lengths)
        ):
            student = students[id(tokens)]
            _current.hidden[id(student)] = student, states[rows.to(states.device)]
        return output.new_empty(0), {}

    with torch.no_grad():
        forward_only(keep, args, model, *_schedule(args, model, shown))


def _schedule(args: Namespace, model: Any, shown: dict) -> tuple[list, list[int]]:
    """slime's iterators over samples, and the number of microbatches of each step."""
    from slime.backends.megatron_utils.data import get_data_iterator

    if len(inspect.signature(get_data_iterator).parameters) == 1:
        return get_data_iterator(shown), shown["num_microbatches"]
    return get_data_iterator(args, model, shown)  # v0.2.4 makes the schedule here


def loss(args: Namespace, batch: dict, logits: torch.Tensor, sum_of_sample_mean) -> tuple[torch.Tensor, dict]:
    """slime's custom loss: of logits [1, T, V/TP], summed over samples as slime's own losses are, and what to log."""
    from megatron.core import mpu

    assert _current is not None
    tokens = batch["unconcat_tokens"]
    total, metrics = _other_losses(args, batch, logits, sum_of_sample_mean)
    rows = _rows(args, logits.shape[1], tokens, batch["total_lengths"], batch["response_lengths"])
    hidden = torch.cat([_current.hidden[id(one)][1] for one in tokens])
    row = torch.cat(rows).to(logits.device)
    weights = logits.new_zeros(logits.shape[1])
    weights[row] = _weights(sum_of_sample_mean, len(row), logits.device)
    place = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    place[row] = torch.arange(len(row), device=logits.device)
    head, width = _head(_current.model), logits.shape[-1]
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


def _rows(args, length: int, tokens, total_lengths, response_lengths) -> list[torch.Tensor]:
    """Per sample, in which of this rank's ``length`` rows its response tokens are predicted: int64."""
    from slime.backends.megatron_utils.loss import get_responses

    numbers = torch.arange(length, dtype=torch.float32)[None, :, None]  # exact to 2^24
    found = get_responses(
        numbers,
        args=Namespace(**{**vars(args), "rollout_temperature": 1.0}),  # rows, not logits: v0.2.4 always divides
        unconcat_tokens=tokens,
        total_lengths=total_lengths,
        response_lengths=response_lengths,
    )
    return [rows[:, 0].long() for rows, _ in found]


def _last(model: Any) -> torch.nn.Module:
    return unwrapped(model[-1])


def _config(model: Any) -> Any:
    return _last(model).config


def _head(model: Any) -> torch.Tensor:
    """This rank's rows of the output layer's weight, on the last stage."""
    last: Any = _last(model)
    tied = last.share_embeddings_and_output_weights
    return (last.shared_embedding_or_output_weight() if tied else last.output_layer.weight).detach()


@contextlib.contextmanager
def _without_head(model: Any) -> Iterator[None]:
    """Inside, the model gives its final hidden states in place of logits."""
    layer: Any = getattr(_last(model), "output_layer", None)
    if layer is None:
        yield
        return
    own = layer.__dict__.get("forward")
    layer.forward = lambda hidden, *args, **options: (hidden, None)
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def _whole_sequence(hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """[1, T, H] of what a rank has of it under sequence parallelism."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    if not config.sequence_parallel:
        return hidden
    return gather_from_sequence_parallel_region(hidden.transpose(0, 1).contiguous()).transpose(0, 1)


@contextlib.contextmanager
def _no_replay() -> Iterator[None]:
    """Inside, experts are chosen by the router: slime's routing replay would replay the student's choice."""
    before = os.environ.get("ROUTING_REPLAY_STAGE")
    os.environ["ROUTING_REPLAY_STAGE"] = "fallthrough"
    try:
        yield
    finally:
        if before is None:
            del os.environ["ROUTING_REPLAY_STAGE"]
        else:
            os.environ["ROUTING_REPLAY_STAGE"] = before
