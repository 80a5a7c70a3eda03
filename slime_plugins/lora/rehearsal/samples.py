"""From prompts to batches: sampled and rewarded, or given; and the reward on held-out prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from slime_plugins.lora.objectives.batch import Batch, make_batch
from slime_plugins.lora.objectives.objective import Objective
from slime_plugins.lora.rehearsal.cluster import Cluster
from slime_plugins.lora.rehearsal.display import Display
from slime_plugins.lora.rehearsal.outputs import Recorder
from slime_plugins.lora.rehearsal.preflight import is_builtin, teacher_prompts
from slime_plugins.lora.rehearsal.rewards import Rewarder, RewardSample, Status
from slime_plugins.lora.rehearsal.rollout import Sample
from slime_plugins.lora.rehearsal.settings import Settings
from slime_plugins.lora.rehearsal.task import Prompt

_COPIES = 16
"""Answers to each held-out prompt of the built-in task from which the expected reward is estimated: 4,096 in all."""


@dataclass
class Source:
    """Makes the batch of every step."""

    settings: Settings
    objective: Objective
    cluster: Cluster
    adapter_dir: Path
    rewarder: Rewarder
    recorder: Recorder
    display: Display
    flat_steps: int = 0
    """Steps in which no reward differed within any prompt's answers."""

    def batch(self, prompts: list[Prompt], step: int) -> tuple[Batch, dict[str, float]]:
        """Samples of the ``step``-th step, from 0, and what to log of them."""
        on_policy = self.objective.on_policy(step, self.settings.seed)
        batch, metrics = self._roll_out(prompts, step) if on_policy else self._given(prompts)
        if self.objective.rollouts and self.objective.given:
            metrics["on_policy"] = float(on_policy)
        return batch, metrics

    def held_out_reward(self, prompts: list[Prompt], done: int) -> float:
        """Mean reward of the likeliest answers after ``done`` steps."""
        samples = self.cluster.rollout("answer", str(self.adapter_dir), [prompt.prompt for prompt in prompts])
        scored = self._scored(prompts, samples)
        self.recorder.samples(done, scored, held_out=True)
        return sum(one.reward for one in scored) / len(scored)

    def validation_loss(self, prompts: list[Prompt]) -> float:
        """Mean of -log p over all response tokens of given responses, in nats."""
        size, nll, tokens = self.settings.samples_per_rank * self.settings.dp, 0.0, 0.0
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            batch, _ = self._given(part)
            padding = size - len(part)
            if padding:  # of samples without a response token
                tokens_NS, mask_NS = (F.pad(t, (0, 0, 0, padding)) for t in (batch.tokens, batch.mask))
                batch = Batch(tokens_NS, mask_NS)
            for found in self.cluster.ranks("validate", batch):  # every tensor-parallel rank counts the same
                if found is not None:
                    nll, tokens = nll + found[0], tokens + found[1]
        return nll / tokens

    def expected_reward(self, prompts: list[Prompt], adapter_dir: Path | None, *, as_teacher: bool = False) -> float:
        """Mean reward of answers that are sampled as training samples; the same draws whenever it is called.

        Args:
            adapter_dir: of a PEFT adapter; None for the base.
            as_teacher: show what the teacher is shown.
        """
        template = self.objective.teacher_prompt_template if as_teacher else None
        shown = [prompt.prompt for prompt in prompts] if template is None else teacher_prompts(template, prompts)
        copies = _COPIES if is_builtin(self.settings) else 1
        samples = self.cluster.rollout("draw", adapter_dir and str(adapter_dir), shown, copies)
        scored = self._scored(prompts, samples)
        return sum(one.reward for one in scored) / len(scored)

    def _roll_out(self, prompts: list[Prompt], step: int) -> tuple[Batch, dict[str, float]]:
        """Sample with the exported adapter, decode, reward."""
        start = time.monotonic()
        samples = self.cluster.rollout("sample", str(self.adapter_dir), [prompt.prompt for prompt in prompts], step)
        n = self.settings.n_samples_per_prompt
        scored = self._scored(prompts, samples)
        rewards = torch.tensor([one.reward for one in scored])
        self.recorder.samples(step + 1, scored)
        self.display.samples(scored[: self.settings.show_samples])
        if self.objective.rewarded:
            self._count_flat(rewards.view(-1, n))
        batch = self._pad(prompts, samples, is_given=0.0, **self.objective.of_rewards(rewards, n))
        return batch, {
            "reward": rewards.mean().item(),
            "response_length": batch.mask.sum(1).mean().item(),
            "rollout_seconds": time.monotonic() - start,
        }

    def _given(self, prompts: list[Prompt]) -> tuple[Batch, dict[str, float]]:
        texts, responses = [prompt.prompt for prompt in prompts], [prompt.response for prompt in prompts]
        batch = self._pad(prompts, self.cluster.rollout("given", texts, responses), is_given=1.0)
        return batch, {"response_length": batch.mask.sum(1).mean().item()}

    def _scored(self, prompts: list[Prompt], samples: Sequence[Sample]) -> list[RewardSample]:
        scored = _reward_samples(prompts, samples)
        for one, reward in zip(scored, self.rewarder(scored)):
            one.reward = reward
        return scored

    def _pad(
        self, prompts: list[Prompt], samples: Sequence[Sample], *, is_given: float, **fields: torch.Tensor
    ) -> Batch:
        fields = {**fields, "is_given": torch.full((len(samples),), is_given)}
        responses, multiple = [sample.response for sample in samples], self.settings.tp
        template = self.objective.teacher_prompt_template
        if template is not None:
            copies = len(samples) // len(prompts)
            shown = self.cluster.rollout("encode", teacher_prompts(template, prompts))
            shown = [ids for ids in shown for _ in range(copies)]
            teachers = make_batch(shown, responses, multiple=multiple)
            fields |= {"teacher_tokens": teachers.tokens, "teacher_mask": teachers.mask}
        return make_batch([sample.prompt for sample in samples], responses, multiple=multiple, **fields)

    def _count_flat(self, groups: torch.Tensor) -> None:
        """Say once, and count, that rewards [prompts, answers] give nothing to learn from."""
        if not (groups == groups[:, :1]).all():
            return
        if not self.flat_steps:
            same = (groups == groups[0, 0]).all()
            alike = f"all {groups.numel()} answers got reward {groups[0, 0]:g}"
            value = alike if same else "the answers to each prompt got equal rewards"
            why = "look at samples.jsonl: do answers end, and in the form that the reward wants?"
            if self.cluster.rollout("template_unused"):
                why = f"the usual cause: a chat model without --apply-chat-template; {why}"
            self.display.line(f"nothing to learn from in this step: {value} ({why})")
        self.flat_steps += 1


def _reward_samples(prompts: list[Prompt], samples: Sequence[Sample]) -> list[RewardSample]:
    """The samples of one prompt adjacent."""
    copies = len(samples) // len(prompts)
    return [
        RewardSample(
            index=index,
            group_index=index // copies,
            prompt=prompts[index // copies].prompt,
            response=sample.text,
            label=prompts[index // copies].label,
            metadata=prompts[index // copies].metadata,
            tokens=sample.prompt + sample.response,
            response_length=len(sample.response),
            status=Status.COMPLETED if sample.ended else Status.TRUNCATED,
        )
        for index, sample in enumerate(samples)
    ]
