"""The seam: what an objective says of itself, so that a trainer can serve it without knowing it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from slime_plugins.lora.objectives.batch import Batch

Metrics = dict[str, torch.Tensor]


@dataclass
class ModelOutput:
    """What the model says of a (micro-)batch, on a rank of the last pipeline stage."""

    logits: torch.Tensor
    """[N, S, V/T] as the model gives them: this rank's columns, in its dtype, not divided by a temperature."""
    first_column: int
    """Vocabulary index of column 0."""
    vocab_size: int
    """Columns whose index is not below it are padding."""
    token_log_probs: Callable[[], torch.Tensor]
    tp_group: Any = None
    """Process group of the ranks that hold the other columns."""
    head: torch.Tensor | None = None
    """[V/T, H]: what the logits were made of final hidden states [N, S, H] with; frozen."""

    @cached_property
    def log_probs(self) -> torch.Tensor:
        """float32 [N, S]: log-prob of token t at position t, at the objective's temperature; 0 at t = 0.

        Computed where it is first asked for, whole vocabulary over all ranks: ask on all of them or on none.
        """
        return self.token_log_probs()


@dataclass(frozen=True)
class Computed:
    """A field that the trainer fills before the first optimizer step on a batch, without gradients."""

    of: Callable[[Any, Batch], torch.Tensor]
    """Gives a tensor [N, ...] of a ``ModelOutput`` and a micro-batch; it stays on the rank that made it."""
    model: Literal["policy", "reference", "teacher"] = "policy"
    """``reference``: the same model with its adapters off, or those that it started from. ``teacher``: whatever the
    trainer has for one."""
    hidden: bool = False
    """True: in place of a ``ModelOutput``, final hidden states [N, S, H] in the model's dtype; no logits are made."""
    sees: Callable[[Batch], Batch] = lambda batch: batch
    """What the model is shown in place of the batch, as many samples; ``of`` is given that too."""


class Objective(abc.ABC):
    """A dataclass of hyperparameters, named as the flags that set them. Its methods see tensors alone."""

    rollouts: ClassVar[bool]
    """May samples be drawn from the policy?"""
    given: ClassVar[bool]
    """May responses be given?"""
    rewarded: ClassVar[bool] = False
    """Is it trained on rewards? If not, samples are rewarded only for people to see."""
    computed: ClassVar[Mapping[str, Computed]] = {}
    """Fields that ``loss`` reads, by name, beside those of ``of_rewards`` and ``prepare``."""
    sampled_log_probs: ClassVar[str | None] = None
    """The computed field, if there is one, that holds the policy's log-probs of its own samples: it is compared
    with the probability that they were drawn with."""
    of_first_step: ClassVar[tuple[str, ...]] = ()
    """Metrics of which the first optimizer step on a batch counts; of the others, the mean over all steps."""
    curve: ClassVar[tuple[str, str]]
    """Metrics to draw over the steps: on the left axis, and on the right."""

    @property
    def teacher_prompt_template(self) -> str | None:
        """What a teacher is shown in place of the prompt (``teacher_prompt``); None: the prompt, or no teacher."""
        return None

    @property
    def temperature(self) -> float:
        """Logits are divided by it in ``ModelOutput.log_probs``."""
        return 1.0

    def on_policy(self, step: int, seed: int) -> bool:
        """Does this step, from 0, train on samples of the policy? The same answer whenever it is asked."""
        return self.rollouts

    def check(self, *, copies: int, start: str | None, resumed: bool) -> None:
        """Raise UsageError for hyperparameters that cannot work, or nothing can be learnt with.

        Args:
            copies: samples of each prompt in a step.
            start: the adapter that the run starts from; None where it starts as nothing (B = 0).
            resumed: ``start`` is a checkpoint that the run goes on with.
        """
        return

    def of_rewards(self, rewards: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
        """Fields made of rewards float32 [N], the ``group_size`` samples of one prompt adjacent."""
        return {}

    def prepare(self, batch: Batch) -> Batch:
        """Add fields that depend on all samples of one optimizer step, before ranks and microbatches cut them."""
        return batch

    @abc.abstractmethod
    def loss(self, output: ModelOutput, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """Loss of a (micro-)batch, and what to log, detached.

        The trainer takes plain means over microbatches and data-parallel ranks, which have equal numbers of samples.
        """


def detached(metrics: Metrics) -> Metrics:
    """Copies to log: Megatron's schedule divides the loss in place by the number of microbatches."""
    return {name: value.detach().clone() for name, value in metrics.items()}
