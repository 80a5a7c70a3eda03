"""The generalised Jensen-Shannon divergence between two policies, over a vocabulary that ranks may share.

p is the student, q the teacher, m = beta q + (1 - beta) p (Agarwal et al. 2024, arXiv:2306.13649, equation 1):

    D = beta KL(q || m) + (1 - beta) KL(p || m)        0 < beta < 1
    D = KL(q || p)                                     beta = 0, supervised distillation's
    D = KL(p || q)                                     beta = 1, reinforcement learning's

At 0 and 1 equation 1 itself is 0; as TRL does, its limits are taken, divided by beta or 1 - beta. Both policies are
softmaxes of logits divided by a temperature T; D is not multiplied by T^2.

With d = log q - log p and a = log m - log p, all of it is a function of d, and exactly 0 where d is:

    a = log(1 + beta (e^d - 1))        dD/dz = p (r - <p, r>) / T,  r = -(1 - beta) a
                                       beta = 1: r = -d             beta = 0: dD/dz = (p - q) / T

Shape letters: M rows (tokens), C rows of a chunk, W columns that this rank holds, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Index = tuple[torch.Tensor, ...]
"""Where rows lie in leading dimensions: one int64 [C] each."""
TeacherLogits = Callable[[Index], torch.Tensor]
"""Logits [C, W] of the teacher for rows of the student, this rank's columns; a new tensor: it is overwritten."""


@dataclass(frozen=True)
class Vocabulary:
    """Which columns this rank holds, and how it sums over the ranks that hold the others."""

    first_column: int
    """Vocabulary index of column 0."""
    size: int
    """Columns whose index is not below it are padding: no policy gives them anything."""
    all_reduce: Callable[[torch.Tensor, str], None] | None = None
    """(tensor, "sum" or "max"): reduces in place over the ranks; None where one rank holds all columns."""

    def real(self, columns: int) -> int:
        """How many of this rank's first columns are no padding."""
        return min(max(self.size - self.first_column, 0), columns)


def reduce_over(group: Any) -> Callable[[torch.Tensor, str], None] | None:
    """``Vocabulary.all_reduce`` over a process group."""
    if group is None or group.size() == 1:
        return None
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
    return lambda tensor, how: dist.all_reduce(tensor, op=operations[how], group=group)


def of_hidden(hidden: torch.Tensor, head: torch.Tensor) -> TeacherLogits:
    """A teacher by its final hidden states [..., H], lying as the student's rows do, and this rank's head [W, H]."""
    return lambda index: hidden[index].to(head.dtype) @ head.t()


def of_logits(logits: torch.Tensor) -> TeacherLogits:
    """A teacher by its logits [..., W], lying as the student's."""
    return lambda index: logits[index]


@dataclass(frozen=True)
class Divergence:
    """What is measured, and in pieces of how many rows."""

    beta: float
    """0 to 1."""
    temperature: float = 1.0
    chunk_size: int = 512

    def __call__(
        self,
        logits: torch.Tensor,
        teacher: TeacherLogits,
        weights: torch.Tensor,
        vocabulary: Vocabulary,
        *,
        overwrite: bool = False,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum over rows of weight times divergence; the gradient goes to the student's logits alone.

        Equal on all ranks of the vocabulary, which must call it together, with the same rows. Rows of weight 0 are
        not looked at. Memory beside the inputs: a gradient as large as the logits, or none with ``overwrite``, and
        some eight float32 tensors [C, W].

        Args:
            logits: the student's, [..., W], floating, not divided by the temperature.
            weights: [...], not negative.
            overwrite: put the gradient where the logits were. Nobody may read them afterwards, nor may the backward
                of what made them (a matrix product does not).
        Returns:
            The sum, float32, and weighted sums of what ``STATISTICS`` names, detached.
        """
        loss, statistics = _Divergence.apply(logits, teacher, weights, vocabulary, self, overwrite)
        return loss, dict(zip(STATISTICS, statistics))


STATISTICS = ("divergence", "kl_to_student", "kl_to_teacher", "teacher_entropy", "student_entropy", "top_agreement")
"""Per row: D; KL(q || p), which makes the student cover the teacher; KL(p || q), which keeps it within; both
entropies, in nats, at the temperature; 1 if the student's likeliest token is the teacher's."""


class _Divergence(torch.autograd.Function):
    """The gradient is computed with the value: neither policy is kept for the backward pass, or computed again."""

    @staticmethod
    def forward(ctx, logits, teacher, weights, vocabulary, options, overwrite):
        rows = weights.nonzero(as_tuple=True)
        wants_gradient = ctx.needs_input_grad[0]
        # Rows that are not looked at have no gradient; those that are must be read before it is written.
        gradient = _gradient_buffer(logits, weights, overwrite) if wants_gradient else None
        totals = torch.zeros(len(STATISTICS), device=logits.device)
        width = vocabulary.real(logits.shape[-1])
        for start in range(0, len(rows[0]), options.chunk_size):
            index = tuple(where[start : start + options.chunk_size] for where in rows)
            weight = weights[index].float()
            student_z = logits[index][:, :width].float().div_(options.temperature)
            teacher_z = teacher(index)[:, :width].float().div_(options.temperature)
            values, slope = _chunk(student_z, teacher_z, vocabulary, options.beta, wants_gradient)
            totals += values @ weight
            if gradient is not None:
                gradient[index] = _padded(slope.mul_(weight[:, None] / options.temperature), logits)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(totals)
        return totals[0].clone(), totals

    @staticmethod
    def backward(ctx, grad_loss, grad_statistics):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the divergence's gradient has been taken already; it is kept for one backward pass")
        return gradient.mul_(grad_loss), None, None, None, None, None


def _gradient_buffer(logits: torch.Tensor, weights: torch.Tensor, overwrite: bool) -> torch.Tensor:
    """Zeros where no gradient will be written; else what the logits hold, if it is their memory."""
    if not overwrite:
        return torch.zeros_like(logits)
    logits = logits.detach()
    logits[weights == 0] = 0
    return logits


def _padded(slope: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """With zeros for padding columns, in the logits' dtype."""
    return torch.nn.functional.pad(slope, (0, logits.shape[-1] - slope.shape[-1])).to(logits.dtype)


def _chunk(
    student_z: torch.Tensor, teacher_z: torch.Tensor, vocabulary: Vocabulary, beta: float, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics [6, C], over all ranks, and dD/dz T [C, W] of logits over T [C, W] in float32, both overwritten."""
    reduce = vocabulary.all_reduce or (lambda tensor, how: None)
    student_top, top_index = _shifted(student_z, teacher_z, reduce)
    p, q = student_z.exp(), teacher_z.exp()
    sums = torch.stack([p.sum(-1), q.sum(-1)])
    reduce(sums, "sum")
    p, q = p.div_(sums[0][:, None]), q.div_(sums[1][:, None])
    log_sums = sums.log()
    # Shifted logits of what a policy gives nothing to are finite: 0 times them is 0.
    partial = [(q * teacher_z).sum(-1), (p * student_z).sum(-1), _value_at(teacher_z, top_index, student_top)]
    d = teacher_z.sub_(student_z).add_((log_sums[0] - log_sums[1])[:, None])
    partial += [(q * d).sum(-1), -(p * d).sum(-1)]
    if 0 < beta < 1:
        shared = _mixture(d, beta)
        partial += [(q * d.clamp(max=0).sub_(shared)).sum(-1)]  # log q - log m
        a = shared.add_(d.clamp_(min=0))
        partial += [(p * a).sum(-1)]
    total = torch.stack(partial)
    reduce(total, "sum")
    teacher_mean, student_mean, agreement, kl_to_student, kl_to_teacher = total[:5]
    if 0 < beta < 1:
        divergence = beta * total[5] - (1 - beta) * total[6]
    else:
        divergence = kl_to_teacher if beta else kl_to_student
    statistics = [divergence, kl_to_student, kl_to_teacher]
    # Likeliest tokens of one value may lie on several ranks.
    statistics += [log_sums[1] - teacher_mean, log_sums[0] - student_mean, agreement.clamp(max=1)]
    if not wants_gradient:
        slope = p
    elif beta == 0:
        slope = p.sub_(q)
    elif beta == 1:
        slope = p.mul_(d.add_(kl_to_teacher[:, None]).neg_())  # <p, r> is KL(p || q) itself
    else:
        slope = p.mul_(a.sub_(total[6][:, None]).mul_(-(1 - beta)))
    return torch.stack(statistics), slope


def _mixture(d: torch.Tensor, beta: float) -> torch.Tensor:
    """log m - log max(p, q) by d = log q - log p: nothing overflows, and nothing is lost where d is small or large.

    log m - log p = log(1 + beta (e^d - 1)) for d <= 0, and log m - log q = log(1 + (1 - beta) (e^-d - 1)) above.
    """
    share = torch.where(d <= 0, beta, 1 - beta)
    return d.abs().neg_().expm1_().mul_(share).log1p_()


def _shifted(student_z, teacher_z, reduce) -> tuple[torch.Tensor, torch.Tensor]:
    """Take each policy's largest logit over all ranks from its logits, in place.

    Returns, for rows [C], whether this rank holds the student's likeliest token, and in which column.
    """
    rows, width = student_z.shape
    if width == 0:
        largest = student_z.new_full((2, rows), -math.inf)
        top_index = torch.zeros(rows, dtype=torch.int64, device=student_z.device)
    else:
        own, top_index = student_z.max(-1)
        largest = torch.stack([own, teacher_z.amax(-1)])
    mine = largest[0].clone()
    reduce(largest, "max")
    student_z.sub_(largest[0][:, None])
    teacher_z.sub_(largest[1][:, None])
    return mine == largest[0], top_index


def _value_at(teacher_z: torch.Tensor, top_index: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """1.0 [C] where this rank holds the student's likeliest token and it is the teacher's: shifted logit 0."""
    if teacher_z.shape[-1] == 0:
        return torch.zeros(len(top_index), device=teacher_z.device)
    return (held & (teacher_z.gather(-1, top_index[:, None])[:, 0] == 0)).float()
