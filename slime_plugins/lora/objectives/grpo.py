"""GRPO as functions of tensors (Shao et al. 2024, arXiv:2402.03300). No model, no process group.

Shape letters: N samples, S tokens of a padded sequence. ``mask_NS`` is 1 on response tokens, 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch


@dataclass
class Batch:
    """Samples of one rollout, prompt and response in one row, padded on the right."""

    tokens: torch.Tensor
    """int64 [N, S]."""
    mask: torch.Tensor
    """float32 [N, S]: position t is 1 if token t is part of the response. Never 1 at t = 0."""
    advantages: torch.Tensor
    """float32 [N]."""
    old_log_probs: torch.Tensor | None = None
    """float32 [N, S], of token t at position t; the policy that made the samples."""
    ref_log_probs: torch.Tensor | None = None
    """float32 [N, S]; the base."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Batch:
        return self._map(lambda value: value[rows])

    def lengths(self) -> torch.Tensor:
        """int64 [N]: tokens of prompt and response, without padding."""
        positions = torch.arange(self.tokens.shape[1])
        return ((positions + 1) * (self.mask > 0)).amax(1)

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda value: value.to(device))

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = (getattr(self, field.name) for field in fields(self))
        return Batch(*(None if value is None else fn(value) for value in values))


def make_batch(
    prompts: list[list[int]], responses: list[list[int]], advantages: torch.Tensor, *, multiple: int
) -> Batch:
    """Pad token lists to one length, a multiple of ``multiple`` (sequence parallelism cuts it into equal pieces)."""
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    size = -(-longest // multiple) * multiple
    tokens = torch.zeros(len(prompts), size, dtype=torch.int64)  # what pads does not matter: attention is causal
    mask = torch.zeros(len(prompts), size)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        mask[row, len(prompt) : end] = 1.0
    return Batch(tokens, mask, advantages)


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


def grpo_loss(
    log_probs: torch.Tensor, batch: Batch, *, eps_clip: float, kl_loss_coef: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a (micro-)batch under the current policy's log-probs [N, S], and what to log, detached."""
    ratio = (log_probs - batch.old_log_probs).exp()
    advantages = batch.advantages[:, None].expand_as(ratio)
    policy_loss = sample_mean(clipped_policy_loss(ratio, advantages, eps_clip), batch.mask)
    kl = sample_mean(k3(log_probs, batch.ref_log_probs), batch.mask)
    loss = policy_loss + kl_loss_coef * kl
    clipped = ((ratio - 1).abs() > eps_clip).float()
    metrics = {"loss": loss, "policy_loss": policy_loss, "kl": kl, "clip_fraction": sample_mean(clipped, batch.mask)}
    # Copies: Megatron's schedule divides the loss in place by the number of microbatches.
    return loss, {name: value.detach().clone() for name, value in metrics.items()}
