"""Supervised fine-tuning: cross-entropy on given responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slime_plugins.lora.objectives.batch import Batch, with_token_weight
from slime_plugins.lora.objectives.objective import Metrics, ModelOutput, Objective, detached


@dataclass(frozen=True)
class SFT(Objective):
    """Mean of -log p over the response tokens of all samples of one optimizer step; prompts count nothing."""

    rollouts, given = False, True
    curve = ("loss", "eval_reward")

    def prepare(self, batch: Batch) -> Batch:
        return with_token_weight(batch)

    def loss(self, output: ModelOutput, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        loss = -((output.log_probs * batch.mask).sum(1) * batch.fields["token_weight"]).mean()
        return loss, detached({"loss": loss})
