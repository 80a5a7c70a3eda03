"""TRL's own GKD loss against the package's divergence: same values, same gradients, at every size of the vocabulary.

make contracts
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from harness import Layout
from wheels import TRL, Wheel, unpacked

pytestmark = pytest.mark.contracts
SHAPE, VOCAB, HIDDEN = (3, 9), 103, 24
CASES = list(itertools.product((0.0, 0.1, 0.5, 1.0), (0.7, 1.0, 2.0)))


@pytest.fixture(params=TRL)
def generalized_jsd_loss(request):
    wheel = Wheel(unpacked("trl", request.param), "trl")
    module = "trl.experimental.gkd.gkd_trainer"
    module = module if wheel.path(module).is_file() else "trl.trainer.gkd_trainer"
    from torch.nn import functional

    return wheel.take(module, "GKDTrainer.generalized_jsd_loss", F=functional, torch=torch).generalized_jsd_loss


@functools.lru_cache
def inputs():
    """Student logits, teacher hidden states, head, and TRL's labels: -100 where a token does not count."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    labels = torch.where(torch.rand(SHAPE, generator=generator) < 0.6, 7, -100)
    return 2 * draw(*SHAPE, VOCAB), draw(*SHAPE, HIDDEN), draw(VOCAB, HIDDEN) / 2, labels


def ours(layout: Layout):
    """Loss and this rank's columns of the gradient, for every case."""
    import torch.distributed as dist

    from slime_plugins.lora.objectives.divergence import Divergence, Vocabulary, of_hidden, reduce_over

    rank, ranks = (dist.get_rank(), layout.tp) if layout.tp > 1 else (0, 1)
    student, hidden, head, labels = inputs()
    width = -(-VOCAB // ranks)
    columns = slice(rank * width, (rank + 1) * width)
    padded = torch.nn.functional.pad(student, (0, ranks * width - VOCAB))[..., columns]
    shard = torch.nn.functional.pad(head, (0, 0, 0, ranks * width - VOCAB))[columns]
    weights = (labels != -100).float() / (labels != -100).sum()  # TRL's mean over tokens
    vocabulary = Vocabulary(rank * width, VOCAB, reduce_over(dist.group.WORLD if ranks > 1 else None))
    results = []
    for beta, temperature in CASES:
        logits = padded.clone().requires_grad_()
        measure = Divergence(beta, temperature, chunk_size=4)
        loss, _ = measure(logits, of_hidden(hidden, shard), weights, vocabulary)
        loss.backward()
        results.append((loss.item(), logits.grad[..., : vocabulary.real(width)]))
    return results


@pytest.mark.parametrize("pool, tp", [("pool1", 1), ("pool2", 2), ("pool4", 4)])
def test_equals_trl(request, generalized_jsd_loss, pool, tp):
    per_rank = request.getfixturevalue(pool).run(ours, tp=tp)
    student, hidden, head, labels = inputs()
    for number, (beta, temperature) in enumerate(CASES):
        logits = student.clone().requires_grad_()
        loss = generalized_jsd_loss(logits, hidden @ head.T, labels, beta, temperature)
        loss.backward()
        for rank in per_rank:
            assert rank[number][0] == pytest.approx(loss.item(), rel=1e-6), (beta, temperature)
        gradient = torch.cat([rank[number][1] for rank in per_rank], dim=-1)
        assert (gradient - logits.grad).norm() <= 1e-5 * logits.grad.norm(), (beta, temperature)
