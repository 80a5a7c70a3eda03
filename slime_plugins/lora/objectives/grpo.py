"""GRPO (Shao et al. 2024, arXiv:2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slime_plugins.lora.objectives.batch import Batch
from slime_plugins.lora.objectives.objective import Computed, Metrics, ModelOutput, Objective, detached


@dataclass(frozen=True)
class GRPO(Objective):
    """Clipped policy ratio on advantages within each prompt's answers, and the KL to the base."""

    eps_clip: float
    kl_loss_coef: float
    rollout_temperature: float

    rollouts, given, rewarded = True, False, True
    computed = {
        "old_log_probs": Computed(lambda output, batch: output.log_probs),
        "ref_log_probs": Computed(lambda output, batch: output.log_probs, model="reference"),
    }
    sampled_log_probs = "old_log_probs"
    of_first_step = ("kl",)  # later steps are off-policy: their adapters have moved already
    curve = ("reward", "kl")

    @property
    def temperature(self) -> float:
        return self.rollout_temperature

    def of_rewards(self, rewards: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
        return {"advantages": group_advantages(rewards, group_size)}

    def loss(self, output: ModelOutput, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        log_probs, fields = output.log_probs, batch.fields
        ratio = (log_probs - fields["old_log_probs"]).exp()
        advantages = fields["advantages"][:, None].expand_as(ratio)
        policy_loss = sample_mean(clipped_policy_loss(ratio, advantages, self.eps_clip), batch.mask)
        kl = sample_mean(k3(log_probs, fields["ref_log_probs"]), batch.mask)
        loss = policy_loss + self.kl_loss_coef * kl
        clip_fraction = sample_mean(((ratio - 1).abs() > self.eps_clip).float(), batch.mask)
        return loss, detached({"loss": loss, "policy_loss": policy_loss, "kl": kl, "clip_fraction": clip_fraction})


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rewards [N], the samples of one prompt adjacent -> (reward - mean) / std within each prompt's group, [N].

    A group in which all rewards are equal teaches nothing: zeros.
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).view(-1)


def sample_mean(values_NS: torch.Tensor, mask_NS: torch.Tensor) -> torch.Tensor:
    """Mean over each sample's response tokens, then over samples; scalar."""
    return ((values_NS * mask_NS).sum(1) / mask_NS.sum(1).clamp(min=1)).mean()


def clipped_policy_loss(ratio: torch.Tensor, advantages: torch.Tensor, eps_clip: float) -> torch.Tensor:
    """-min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A), elementwise (PPO, arXiv:1707.06347)."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - eps_clip, 1 + eps_clip) * advantages)


def k3(log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """Estimator of KL(policy || reference) on the policy's samples, never negative, 0 where they agree.

    r - 1 - log r with r = reference / policy (http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = ref_log_probs - log_probs
    return log_ratio.exp() - 1 - log_ratio
