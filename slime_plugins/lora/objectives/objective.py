"""The seam: what an objective says of itself, so that a trainer can serve it without knowing it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

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

    @cached_property
    def log_probs(self) -> torch.Tensor:
        """float32 [N, S]: log-prob of token t at position t, at the objective's temperature; 0 at t = 0.

        Computed where it is first asked for, whole vocabulary over all ranks: ask on all of them or on none.
        """
        return self.token_log_probs()


@dataclass(frozen=True)
class Computed:
    """A field that the trainer fills before the first optimizer step on a batch, without gradients."""

    of: Callable[[ModelOutput, Batch], torch.Tensor]
    """Gives a tensor [N, ...]; it stays on the rank that made it."""
    adapters: bool = True
    """False: of the base, the same model with its adapters off."""


class Objective(abc.ABC):
    """A dataclass of hyperparameters, named as the flags that set them. Its methods see tensors alone."""

    rollouts: ClassVar[bool]
    """True: samples are drawn from the policy and rewarded. False: responses are given."""
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
    def temperature(self) -> float:
        """Logits are divided by it in ``ModelOutput.log_probs``."""
        return 1.0

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
