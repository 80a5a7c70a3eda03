"""A trainer whose one optimizer step subtracts a known multiple of the gradient, and samples for it."""

from __future__ import annotations

import torch

VOCAB, SAMPLES = 131, 8  # the vocabulary is odd: padded at TP 2
_SCALE, _EPSILON = 100.0, 1e8
GRADIENT_LR = _SCALE * _EPSILON
"""Of the settings that ``gradient_trainer`` is given."""


def samples():
    """Prompts and responses of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(3 + i % 3, 1 + i % 5) for i in range(SAMPLES)]
    draw = lambda n: torch.randint(3, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return [draw(p) for p, _ in lengths], [draw(r) for _, r in lengths]


def gradient_trainer(settings):
    """A rank's trainer with random adapters. Its Adam has an epsilon that outweighs what it divides by."""
    import megatron.core.optimizer as megatron_optimizer
    from adapted import randomize

    from slime_plugins.lora.rehearsal.trainer import RankTrainer

    config = megatron_optimizer.OptimizerConfig
    megatron_optimizer.OptimizerConfig = lambda **options: config(**options, adam_eps=_EPSILON)
    try:
        trainer = RankTrainer()
        trainer.build(settings)
    finally:
        megatron_optimizer.OptimizerConfig = config
    randomize(trainer.chunks)
    trainer.optimizer.reload_model_params()
    return trainer


def taken_gradient(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The gradient that a step has subtracted."""
    return (before - after) / _SCALE
