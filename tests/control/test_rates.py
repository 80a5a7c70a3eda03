"""LoRA+ in Megatron's optimizer: PEFT's own, the ratio under a scheduler, in checkpoints. pytest tests/control"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from functools import partial

import adapted
import checkpoint_runs as runs
import pytest
import reference
import torch
from checkpoint_runs import Run
from harness import Layout, WorkerError
from megatron.core.optimizer import get_megatron_optimizer
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.arguments import check_lora_plus
from slime_plugins.lora.checkpoint.load import load_adapter
from slime_plugins.lora.checkpoint.save import save_adapter
from slime_plugins.lora.control import rates
from slime_plugins.lora.errors import UsageError

RATIO, LR, STEPS = 16.0, 1e-4, 5
CONFIG = LoRAConfig(rank=4, alpha=8, layout="split")


@contextmanager
def with_ratio(ratio):
    """Inside, ``adapted.optimizer_for`` builds optimizers with LoRA+, decaying to a tenth."""

    def get_optimizer(config, model):
        config = dataclasses.replace(config, min_lr=config.lr / 10)
        return rates.with_lora_plus(get_megatron_optimizer, ratio)(config, model)

    adapted.get_megatron_optimizer = get_optimizer
    try:
        yield
    finally:
        adapted.get_megatron_optimizer = get_megatron_optimizer


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return tiny(tmp_path_factory)


def train(layout: Layout, hf_dir, ratio, microbatches=1):
    """The adapters after five steps on one batch."""
    chunks = adapted.adapted_chunks(hf_dir, CONFIG, sp=layout.sp)
    adapted.set_adapters(chunks, CONFIG.layout, CONFIG.rank)
    model = adapted.wrap(chunks)
    with with_ratio(ratio):
        optimizer = adapted.optimizer_for(model, lr=LR)
    for _ in range(STEPS):
        adapted.train_step(model, optimizer, reference.batch(128), microbatches=microbatches)
    return runs.whole(model)


def pefts_own(hf_dir, ratio) -> dict[str, torch.Tensor]:
    from peft.optimizers import create_loraplus_optimizer

    model = reference.peft_model(hf_dir, rank=CONFIG.rank, alpha=CONFIG.alpha, layout=CONFIG.layout)
    optimizer = create_loraplus_optimizer(model, torch.optim.Adam, lr=LR, loraplus_lr_ratio=ratio)
    for _ in range(STEPS):
        optimizer.zero_grad()
        reference.logits_loss_grads(model, reference.batch(128))
        optimizer.step()
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            for half in "AB":
                found[f"{reference._plain(name)}.{half}"] = getattr(module, f"lora_{half}")["default"].weight.detach()
    return found


@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"tp": 2, "sp": True}], ids=["dp2", "tp2", "tp2sp"])
def test_five_steps_are_those_of_pefts_optimizer(pool2, hf_dir, sizes):
    expected, start = pefts_own(hf_dir, RATIO), pefts_own(hf_dir, 1)
    found = pool2.run(train, hf_dir, RATIO, **sizes)[0]
    assert found.keys() == expected.keys() and len(found) == 2 * 7 * 4
    for name, tensor in found.items():
        largest = expected[name].abs().max()
        assert (tensor - expected[name]).abs().max() <= 1e-5 * largest, name
        if name.endswith(".B"):
            assert (start[name] - expected[name]).abs().max() > 1e-4 * largest, "plain LoRA would pass, too"


def test_without_a_ratio_the_optimizer_is_megatrons(pool1, hf_dir):
    assert rates.with_lora_plus(get_megatron_optimizer, 1) is get_megatron_optimizer


def rates_of(layout: Layout, hf_dir, ratio, distributed=True):
    """Over a warmup and a linear decay: what every parameter's rate was, A's and B's."""
    with with_ratio(ratio):
        run = Run(layout, hf_dir, CONFIG, distributed=distributed)
    seen = []
    for _ in range(12):
        run.scheduler.step(1)
        seen.append([group["lr"] for group in run.optimizer.param_groups])
    groups = [(len(group["params"]), rates.RATIO in group) for group in run.optimizer.param_groups]
    return seen, groups


@pytest.mark.parametrize("distributed", [True, False])
def test_the_scheduler_keeps_the_ratio(pool1, hf_dir, distributed):
    seen, groups = pool1.run(rates_of, hf_dir, RATIO, distributed)[0]
    assert [marked for _, marked in groups] == [False, True] and all(count > 0 for count, _ in groups)
    assert seen[0][0] < seen[1][0] == pytest.approx(10 * seen[-1][0]), "a warmup, then a decay"
    assert all(b == pytest.approx(RATIO * a, rel=1e-12) for a, b in seen)


def test_a_pipeline_stage_without_adapters_has_the_groups_of_the_others(pool2, hf_dir):
    """Two stages; layer 3 alone is adapted."""
    results = pool2.run(last_layer, hf_dir, pp=2)
    assert [[marked for _, marked in groups] for groups in results] == [[False, True]] * 2
    assert [count for count, _ in results[0]] == [0, 0] and all(count for count, _ in results[1])


def last_layer(layout: Layout, hf_dir):
    config = LoRAConfig(rank=4, target_modules=("*.layers.3.*.linear_qkv",))
    with with_ratio(RATIO):
        optimizer = Run(layout, hf_dir, config).optimizer
    return [(len(group["params"]), rates.RATIO in group) for group in optimizer.param_groups]


def saved(layout: Layout, hf_dir, path):
    """Three steps, a save, three steps; the state then."""
    with with_ratio(RATIO):
        run = Run(layout, hf_dir, CONFIG)
    run.start()
    run.train(0, 3)
    save_adapter(run.model, path, optimizer=run.optimizer, scheduler=run.scheduler, step=3)
    losses = run.train(3, 3)
    return losses, run.state()


def resumed(layout: Layout, hf_dir, path, ratio, fresh=False):
    with with_ratio(ratio):
        run = Run(layout, hf_dir, CONFIG)
    load = partial(load_adapter, run.model, path, optimizer=run.optimizer, fresh_optimizer=fresh)
    load(scheduler=None if fresh else run.scheduler)
    return run.train(3, 3), run.state()


def test_a_resumed_run_goes_on_with_the_ratio(pool2, hf_dir, tmp_path):
    losses, expected = pool2.run(saved, hf_dir, tmp_path / "run", tp=2)[0]
    again, state = pool2.run(resumed, hf_dir, tmp_path / "run", RATIO, tp=2)[0]
    assert again == losses and state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    other, _ = pool2.run(resumed, hf_dir, tmp_path / "run", RATIO)[0]
    assert other == pytest.approx(losses, rel=1e-5), "at another parallelism"
    for ratio in (1.0, 4.0):
        with pytest.raises(WorkerError, match=rf"ran with --lora-plus-ratio 16, this one runs with {ratio:g}; give"):
            pool2.run(resumed, hf_dir, tmp_path / "run", ratio, tp=2)
    pool2.run(resumed, hf_dir, tmp_path / "run", 4.0, True, tp=2)


def through_slimes_hook(layout: Layout, hf_dir, use_lora):
    """As slime calls it: whether anything has another rate."""
    from argparse import Namespace

    import slime_stand_ins
    from megatron.core.optimizer import OptimizerConfig

    from slime_plugins.lora import slime as hooks

    slime_stand_ins.install(Namespace(use_lora=use_lora, lora_plus_ratio=RATIO))
    model = adapted.wrap(adapted.adapted_chunks(hf_dir, CONFIG))
    config = OptimizerConfig(optimizer="adam", lr=LR, min_lr=0.0, use_distributed_optimizer=True)
    hooked = hooks.optimizing(get_megatron_optimizer)
    optimizer = hooked(config=config, model_chunks=model, use_gloo_process_groups=True)
    return {rates.RATIO in group: group["max_lr"] for group in optimizer.param_groups}


def test_slimes_hook(pool1, hf_dir):
    assert pool1.run(through_slimes_hook, hf_dir, True)[0] == {False: LR, True: pytest.approx(RATIO * LR)}
    assert pool1.run(through_slimes_hook, hf_dir, False)[0] == {False: LR}


@pytest.mark.parametrize("ratio", [0.5, 0.0, -1.0, float("nan"), float("inf")])
def test_ratios_that_lora_plus_does_not_have(ratio):
    with pytest.raises(UsageError, match=r"--lora-plus-ratio .*expected at least 1"):
        check_lora_plus(ratio)
