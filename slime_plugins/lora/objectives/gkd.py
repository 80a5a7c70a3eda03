"""Generalised knowledge distillation (Agarwal et al. 2024, arXiv:2306.13649): a teacher's whole distribution."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.objectives.batch import Batch, with_token_weight
from slime_plugins.lora.objectives.divergence import Divergence, Vocabulary, of_hidden, reduce_over
from slime_plugins.lora.objectives.objective import Computed, Metrics, ModelOutput, Objective, detached
from slime_plugins.lora.objectives.teacher_prompt import TeacherPrompt

TEACHERS = ("base", "ema")
"""Besides these, a directory: a PEFT adapter or a checkpoint of adapters."""


def teacher_view(batch: Batch) -> Batch:
    """The batch as the teacher sees it: with prompts of its own, where there are any, before the same responses."""
    fields = batch.fields
    tokens, mask = fields.get("teacher_tokens", batch.tokens), fields.get("teacher_mask", batch.mask)
    return Batch(tokens, mask, {"student_mask": batch.mask})


def at_students_tokens(hidden_NSH: torch.Tensor, view: Batch) -> torch.Tensor:
    """Hidden states of the teacher's tokens -> [N, S, H] where the student has the same ones; 0 elsewhere.

    By position: the state that predicts the j-th token of a response goes where the student predicts it.
    """
    target, source = predicts(view.fields["student_mask"]), predicts(view.mask)
    aligned = hidden_NSH.new_zeros(*target.shape, hidden_NSH.shape[-1])
    aligned[target > 0] = hidden_NSH[source > 0]
    return aligned


def predicts(mask_NS: torch.Tensor) -> torch.Tensor:
    """[N, S]: 1 at positions whose next token is part of the response."""
    return torch.nn.functional.pad(mask_NS[:, 1:], (0, 1))


def on_policy(lmbda: float, step: int, seed: int) -> bool:
    """Does a step, from 0, train on samples of the student, as a share ``lmbda`` of them does?"""
    return random.Random(f"{seed} {step}").random() < lmbda


@dataclass(frozen=True)
class GKD(Objective):
    """Mean divergence over the step's response tokens, the student's own or given ones. No reward is needed."""

    gkd_beta: float
    gkd_lmbda: float
    gkd_temperature: float
    sft_alpha: float
    gkd_teacher: str
    gkd_ema_decay: float | None
    gkd_teacher_prompt_template: str | None
    gkd_chunk_size: int
    rollout_temperature: float
    """Of sampling alone."""

    rollouts, given = True, True
    computed = {
        "teacher_hidden": Computed(at_students_tokens, model="teacher", hidden=True, sees=teacher_view),
    }
    curve = ("loss", "eval_reward")

    @property
    def teacher_prompt_template(self) -> str | None:
        return self.gkd_teacher_prompt_template

    def on_policy(self, step: int, seed: int) -> bool:
        """With probability lambda, by seed and step alone: a resumed run decides as the unbroken one."""
        return on_policy(self.gkd_lmbda, step, seed)

    def prepare(self, batch: Batch) -> Batch:
        return with_token_weight(batch)

    def loss(self, output: ModelOutput, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert output.head is not None
        sft = self._sft(output, batch)  # first: the divergence writes its gradient where the logits are
        weights = predicts(batch.mask) * batch.fields["token_weight"][:, None] / len(batch)
        divergence, statistics = Divergence(self.gkd_beta, self.gkd_temperature, self.gkd_chunk_size)(
            output.logits,
            of_hidden(batch.fields["teacher_hidden"], output.head),
            weights,
            Vocabulary(output.first_column, output.vocab_size, reduce_over(output.tp_group)),
            overwrite=True,
        )
        if sft is None:
            return divergence, detached({"loss": divergence, **statistics})
        loss = divergence + self.sft_alpha * sft
        return loss, detached({"loss": loss, "sft_loss": sft, **statistics})

    def _sft(self, output: ModelOutput, batch: Batch) -> torch.Tensor | None:
        """Cross-entropy on given responses; on samples of its own it would only sharpen what is there."""
        if not self.sft_alpha:
            return None
        weight = batch.fields["token_weight"] * batch.fields["is_given"]
        return -((output.log_probs * batch.mask).sum(1) * weight).mean()

    def check(self, *, copies: int, start: str | None, resumed: bool) -> None:
        self.check_values(copies=copies, resumed=resumed)
        self.check_difference(start)

    def check_values(self, *, copies: int, resumed: bool) -> None:
        """Raise UsageError for what is wrong whatever teacher and student are."""
        for flag, value in (("--gkd-beta", self.gkd_beta), ("--gkd-lmbda", self.gkd_lmbda)):
            if not 0 <= value <= 1:
                raise UsageError(f"{flag} {value}: expected a number from 0 to 1")
        if self.gkd_ema_decay is not None:
            if self.gkd_teacher != "ema":
                raise UsageError(f"--gkd-ema-decay is not read with --gkd-teacher {self.gkd_teacher}; drop it")
            if not 0 <= self.gkd_ema_decay < 1:
                raise UsageError(f"--gkd-ema-decay {self.gkd_ema_decay}: expected a number from 0 to below 1")
        if copies > 1 and self.gkd_lmbda < 1:
            raise UsageError(
                f"--n-samples-per-prompt {copies} with --gkd-lmbda {self.gkd_lmbda:g}: a given response is there "
                "once, expected 1; or --gkd-lmbda 1, which samples in every step"
            )
        if self.sft_alpha and self.gkd_lmbda == 1:
            raise UsageError(
                f"--sft-alpha {self.sft_alpha:g} with --gkd-lmbda 1: it weighs the cross-entropy on given responses, "
                "and no step has any; lower --gkd-lmbda, or drop it"
            )
        if resumed and self.gkd_teacher == "ema":
            raise UsageError(
                "--load with --gkd-teacher ema: the average is in no checkpoint; start anew from its adapter with "
                "--lora-adapter-path, or take another teacher"
            )

    def check_difference(self, start: str | None) -> None:
        """Refuse a student that is its teacher: the commonest set-up, one checkpoint for both, learns nothing."""
        template, teacher = self.gkd_teacher_prompt_template, self.gkd_teacher
        privileged = template is not None and TeacherPrompt(template).tells_more
        if privileged or self.sft_alpha:
            return
        same = {
            "base": "the adapters start as nothing (B = 0), so that the student is the base" if start is None else "",
            "ema": "the average starts as the student",
        }.get(teacher, "the student starts from it" if teacher == start else "")
        if same:
            raise UsageError(
                f"--gkd-teacher {teacher}: {same}: divergence and gradient are exactly 0 and nothing can be learnt. "
                "Show the teacher more than the student (--gkd-teacher-prompt-template, with {label} say), or give "
                "--sft-alpha above 0, another teacher, or another start (--lora-adapter-path)"
            )
