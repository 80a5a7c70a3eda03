"""A checkpoint saved at one parallelism and loaded at another is the same run.

pytest tests/checkpoint/test_checkpoint.py            # a chain through all layouts
pytest tests/checkpoint/test_checkpoint.py -m slow    # every layout to every layout
"""

from __future__ import annotations

import checkpoint_runs as runs
import pytest
import torch
from checkpoint_runs import LAYOUTS
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig

FUSED = LoRAConfig(rank=3, alpha=12)
SPLIT = LoRAConfig(rank=3, alpha=12, layout="split", rank_pattern={"k_proj": 2})
PARTIAL = LoRAConfig(rank=3, alpha=12, target_modules=("q_proj", "v_proj", "up_proj", "*.layers.2.*.linear_proj"))


@pytest.fixture(scope="module")
def pools(request):
    return lambda layout: request.getfixturevalue(f"pool{LAYOUTS[layout][0]}")


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def saved(pools, hf_dir, tmp_path_factory):
    """layout, config, options -> directory and the run that never stopped; made once."""
    made = {}

    def get(layout, config, **kwargs):
        key = layout, repr(config), tuple(kwargs.items())
        if key not in made:
            path = tmp_path_factory.mktemp(layout)
            sizes = LAYOUTS[layout][1]
            made[key] = path, pools(layout).run(runs.save_run, hf_dir, config, path, kwargs, **sizes)[0]
        return made[key]

    return get


def check(pools, saved, hf_dir, target, sources, config, **kwargs):
    """Resume at ``target`` from checkpoints of ``sources``."""
    made = [saved(source, config, **kwargs) for source in sources]
    paths = [path for path, _ in made]
    results = pools(target).run(runs.resume_runs, hf_dir, config, paths, kwargs, **LAYOUTS[target][1])[0]
    for source, (_, (state, losses, last)), (found, new_losses, new_last) in zip(sources, made, results):
        assert found.keys() == state.keys()
        assert runs.digest(last) != runs.digest(state)  # the run goes on
        different = [key for key in state if not torch.equal(found[key], state[key])]
        assert not different, (source, target, different[:3])
        if source == target:
            assert new_losses == losses
            assert runs.digest(new_last) == runs.digest(last)
        elif not kwargs.get("bf16"):
            assert new_losses == pytest.approx(losses, abs=1e-6)
            tolerance = 1e-6 if kwargs.get("name") == "sgd" else 1e-4
            adapters = [key for key in last if " " not in key]
            largest = max(last[key].abs().max() for key in adapters)
            assert max((new_last[key] - last[key]).abs().max() for key in adapters) <= tolerance * largest


CHAIN = [("tp2sp", ["tp2sp", "tp1"]), ("tp1", ["tp2sp", "pp2"]), ("tp2dp2", ["dp2", "tp2dp2"]), ("dp2", ["tp2dp2"])]


@pytest.mark.parametrize("target, sources", CHAIN, ids=[target for target, _ in CHAIN])
def test_resume(pools, saved, hf_dir, target, sources):
    check(pools, saved, hf_dir, target, sources, FUSED)


MATRIX = [name for name in LAYOUTS if name != "vpp2"]


@pytest.mark.slow
@pytest.mark.parametrize("config", [FUSED, SPLIT, PARTIAL], ids=["fused", "split", "partial"])
@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_to_every_layout(pools, saved, hf_dir, target, config):
    check(pools, saved, hf_dir, target, list(LAYOUTS), config)


@pytest.mark.slow
@pytest.mark.parametrize("target", MATRIX)
def test_every_layout_with_sgd(pools, saved, hf_dir, target):
    check(pools, saved, hf_dir, target, MATRIX, FUSED, name="sgd")


@pytest.mark.parametrize("config", [SPLIT, PARTIAL], ids=["split", "partial"])
def test_other_adapters(pools, saved, hf_dir, config):
    """Padded ranks; projections alone; a layer that has an adapter which the others have not."""
    check(pools, saved, hf_dir, "vpp2", ["tp2"], config)
    check(pools, saved, hf_dir, "tp2", ["tp2"], config)


def test_sgd(pools, saved, hf_dir):
    """No moments, and Megatron's plain fp32 optimizer."""
    check(pools, saved, hf_dir, "tp2", ["tp1", "tp2"], FUSED, name="sgd")


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "plain"])
def test_bf16(pools, saved, hf_dir, distributed):
    """Masters are not the weights then: both must come back."""
    check(pools, saved, hf_dir, "tp2", ["tp2dp2", "tp2"], FUSED, bf16=True, distributed=distributed)
