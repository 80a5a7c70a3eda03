"""Supervised fine-tuning: cross-entropy on given responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slime_plugins.lora.objectives.batch import Batch
from slime_plugins.lora.objectives.objective import Metrics, ModelOutput, Objective, detached


@dataclass(frozen=True)
class SFT(Objective):
    """Mean of -log p over the response tokens of all samples of one optimizer step; prompts count nothing."""

    rollouts = False
    curve = ("loss", "eval_reward")

    def prepare(self, batch: Batch) -> Batch:
        """``token_weight`` [N]: with it, a mean over samples is the mean over all of the step's response tokens.

        So a long response weighs as its tokens do, however ranks and microbatches cut the samples.
        """
        weight = len(batch) / batch.mask.sum()
        return batch.having(token_weight=weight.expand(len(batch)))

    def loss(self, output: ModelOutput, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        loss = -((output.log_probs * batch.mask).sum(1) * batch.fields["token_weight"]).mean()
        return loss, detached({"loss": loss})
