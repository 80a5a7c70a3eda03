"""The divergence against equation 1 of arXiv:2306.13649 in float64, differentiated by autograd, at TP 1, 2 and 4.

The formula here is written from the paper, over whole rows, and shares no code with the package. TRL's own code is
asked in tests/contracts/test_trl.py.

    pytest tests/objectives/test_divergence.py
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math

import pytest
import torch
from harness import Layout
from torch.utils._python_dispatch import TorchDispatchMode

from slime_plugins.lora.objectives import divergence as module
from slime_plugins.lora.objectives.divergence import Divergence, Vocabulary, of_hidden, of_logits, reduce_over

VOCAB, HIDDEN, SHAPE = 101, 24, (3, 7)
BETAS, TEMPERATURES = (0.0, 0.1, 0.5, 1.0), (0.7, 1.0, 2.0)
CASES = list(itertools.product(BETAS, TEMPERATURES))


@functools.lru_cache
def inputs(dtype=torch.float32):
    """Student logits, teacher hidden states, head, weights of rows: some 0, no two of the others alike."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weights = torch.rand(SHAPE, generator=generator) * (torch.rand(SHAPE, generator=generator) < 0.7)
    assert 0 < (weights > 0).sum() < weights.numel()
    return 2 * draw(*SHAPE, VOCAB), draw(*SHAPE, HIDDEN), draw(VOCAB, HIDDEN) / 2, weights


def expected(beta, temperature):
    """Weighted sum of D over rows and its gradient, by the paper, in float64."""
    student, hidden, head, weights = (tensor.double() for tensor in inputs())
    student.requires_grad_()
    p = (student / temperature).softmax(-1)
    q = (hidden @ head.T / temperature).softmax(-1)
    kl = lambda one, other: (one * (one / other).log()).sum(-1)  # noqa: E731
    if beta in (0, 1):
        rows = kl(p, q) if beta else kl(q, p)
    else:
        m = beta * q + (1 - beta) * p
        rows = beta * kl(q, m) + (1 - beta) * kl(p, m)
    loss = (rows * weights).sum()
    loss.backward()
    entropy = lambda one: -(one * one.log()).sum(-1)  # noqa: E731
    agree = (p.argmax(-1) == q.argmax(-1)).double()
    by_row = {"divergence": rows, "kl_to_student": kl(q, p), "kl_to_teacher": kl(p, q), "teacher_entropy": entropy(q)}
    by_row |= {"student_entropy": entropy(p), "top_agreement": agree}
    return loss.item(), student.grad, {name: (value * weights).sum().item() for name, value in by_row.items()}


def found(layout: Layout, cases, *, chunk_size=4, how="hidden", overwrite=False, padding=True, defect=None):
    """For each case the loss, this rank's columns of the gradient and the statistics, on a rank of ``layout.tp``."""
    import torch.distributed as dist

    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with _broken(defect):
        return [_one(case, rank, ranks, chunk_size, how, overwrite, padding) for case in cases]


def _one(case, rank, ranks, chunk_size, how, overwrite, padding):
    import torch.distributed as dist

    student, hidden, head, weights = inputs()
    width = -(-VOCAB // ranks) + (3 if padding else 0)  # the last rank has more padding than that
    columns = slice(rank * width, (rank + 1) * width)
    student, head = (torch.nn.functional.pad(t, (0, ranks * width - VOCAB)) for t in (student, head.T))
    student, head = student[..., columns].clone(), head[:, columns].T.contiguous()
    if padding:  # what is there must not matter: larger than all else
        student[..., max(VOCAB - rank * width, 0) :] = 50.0
    vocabulary = Vocabulary(rank * width, VOCAB, reduce_over(dist.group.WORLD if ranks > 1 else None))
    teacher = of_hidden(hidden, head) if how == "hidden" else of_logits(hidden @ head.T)
    leaf = student.requires_grad_()
    logits = leaf * 1.0  # as a model gives them: no leaf
    logits.retain_grad()
    measure = Divergence(*case, chunk_size=chunk_size)
    loss, statistics = measure(logits, teacher, weights, vocabulary, overwrite=overwrite)
    (2 * loss).backward()
    gradient = leaf.grad / 2
    assert not gradient[..., max(VOCAB - rank * width, 0) :].any(), "padding columns have a gradient"
    real = min(max(VOCAB - rank * width, 0), width)
    return loss.item(), gradient[..., :real], {name: value.item() for name, value in statistics.items()}


def compare(per_rank, cases=CASES):
    """Values to 1e-6 and gradients to 1e-5, relative."""
    for number, (beta, temperature) in enumerate(cases):
        loss, gradient, statistics = expected(beta, temperature)
        for rank in per_rank:
            assert rank[number][0] == pytest.approx(loss, rel=1e-6), (beta, temperature)
            for name, value in statistics.items():
                assert rank[number][2][name] == pytest.approx(value, rel=3e-6), (name, beta, temperature)
        whole = torch.cat([rank[number][1] for rank in per_rank], dim=-1).double()
        assert whole.shape == gradient.shape
        assert (whole - gradient).norm() <= 1e-5 * gradient.norm(), (beta, temperature)
        assert (whole - gradient).abs().max() <= 1e-5 * gradient.abs().max(), (beta, temperature)


@pytest.mark.parametrize("how", ["hidden", "logits"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_one_process(how, overwrite, chunk_size):
    compare([found(Layout(), CASES, chunk_size=chunk_size, how=how, overwrite=overwrite)])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("pool, tp", [("pool2", 2), ("pool4", 4)])
def test_over_a_shared_vocabulary(request, pool, tp, overwrite):
    run = functools.partial(found, overwrite=overwrite)
    compare(request.getfixturevalue(pool).run(run, CASES, tp=tp))


def _broken(defect):
    """Inside, the function with a defect that some implementation has had."""
    from unittest import mock

    chunk, call = module._chunk, Divergence.__call__

    def local_sums(student_z, teacher_z, vocabulary, *rest):
        """Softmax sums of this rank's columns alone, as if the others had none."""
        return chunk(student_z, teacher_z, Vocabulary(vocabulary.first_column, vocabulary.size), *rest)

    def off_by_one(self, logits, teacher, weights, vocabulary, **options):
        shifted = lambda index: teacher((*index[:-1], (index[-1] - 1) % SHAPE[1]))  # noqa: E731
        return call(self, logits, shifted, weights, vocabulary, **options)

    return {
        None: contextlib.nullcontext,
        "local softmax sums": lambda: mock.patch.object(module, "_chunk", local_sums),
        "unmasked padding": lambda: mock.patch.object(Vocabulary, "real", lambda self, columns: columns),
        "rows off by one": lambda: mock.patch.object(Divergence, "__call__", off_by_one),
    }[defect]()


@pytest.mark.parametrize("defect", ["local softmax sums", "unmasked padding", "rows off by one"])
def test_a_defect_is_seen(pool2, defect):
    with pytest.raises((AssertionError, RuntimeError)):
        compare(pool2.run(functools.partial(found, defect=defect), CASES[4:5], tp=2), CASES[4:5])


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_equal_policies_teach_exactly_nothing(beta):
    """Not almost nothing: Adam turns a gradient of rounding errors into steps of the learning rate."""
    student, _, _, weights = inputs()
    logits = student.clone().requires_grad_()
    measure = Divergence(beta, 0.7)
    loss, statistics = measure(logits, of_logits(student), weights, Vocabulary(0, VOCAB))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()
    assert statistics["top_agreement"] == pytest.approx(weights.sum().item())


@pytest.mark.parametrize("beta", BETAS)
def test_policies_far_apart(beta):
    """Logits 200 apart: probabilities that underflow, differences of logs that overflow."""
    student = torch.tensor([[200.0, 0.0, -200.0], [0.0, 0.0, 200.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 0.0, 200.0], [200.0, 0.0, 0.0]])
    loss, statistics = Divergence(beta)(student, of_logits(teacher), torch.ones(2), Vocabulary(0, 3))
    loss.backward()
    assert student.grad.isfinite().all()
    nowhere_in_common = -2 * sum(share * math.log(share) for share in (beta, 1 - beta) if share)
    assert loss.item() == pytest.approx(400 + 200 if beta in (0, 1) else nowhere_in_common, rel=1e-6)
    assert all(value.isfinite() for value in statistics.values())


def test_bf16_logits_get_a_bf16_gradient():
    student, hidden, head, weights = inputs()
    logits = student.bfloat16().requires_grad_()
    loss, _ = Divergence(0.5)(logits, of_hidden(hidden.bfloat16(), head.bfloat16()), weights, Vocabulary(0, VOCAB))
    loss.backward()
    value, gradient, _ = expected(0.5, 1.0)
    assert logits.grad.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value, rel=2e-2)
    assert (logits.grad - gradient).norm() <= 2e-2 * gradient.norm()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation has made inside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        memory = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in memory:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("beta", BETAS)
def test_memory_is_bounded_by_the_chunk(beta):
    """Forward and backward make nothing larger than a chunk where the logits may be overwritten; else a gradient."""
    rows, columns, chunk = 64, 97, 4
    hidden, head = torch.randn(rows, 8), torch.randn(columns, 8)
    for overwrite, expected in ((True, chunk * columns), (False, rows * columns)):
        logits = torch.randn(rows, columns).requires_grad_() * 1.0
        with Largest() as largest:
            measure = Divergence(beta, chunk_size=chunk)
            weights, teacher = torch.ones(rows), of_hidden(hidden, head)
            loss, _ = measure(logits, teacher, weights, Vocabulary(0, columns), overwrite=overwrite)
            torch.autograd.grad(loss, logits)
        assert largest.elements == expected


def test_the_gradient_is_taken_once():
    student, hidden, head, weights = inputs()
    logits = student.clone().requires_grad_()
    loss, _ = Divergence(0.5)(logits, of_hidden(hidden, head), weights, Vocabulary(0, VOCAB))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has been taken already"):
        loss.backward()


def test_no_row_is_no_loss():
    student, hidden, head, _ = inputs()
    logits = student.clone().requires_grad_()
    loss, _ = Divergence(0.5)(logits, of_hidden(hidden, head), torch.zeros(SHAPE), Vocabulary(0, VOCAB))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()
