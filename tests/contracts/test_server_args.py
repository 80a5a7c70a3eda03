"""The server arguments of a launch through SGLang's own checks of them, and what those refuse against what we do.

make contracts
"""

from __future__ import annotations

import types

import pytest
import serving_cases
from packaging.version import Version
from sglang_engine import _Environ
from sglang_worker import Worker, wheel_of
from wheels import SGLANG

from slime_plugins.lora.slime.hooks.refusal import Launch
from slime_plugins.lora.slime.hooks.refusals import refused
from slime_plugins.lora.slime.hooks.serving import SERVING, serve_adapters

pytestmark = pytest.mark.contracts
QUIET = types.SimpleNamespace(info=lambda *args: None, warning=lambda *args: None)
OTHERS = dict(
    lora_paths=None, enable_lora_overlap_loading=None, max_loaded_loras=None, max_lora_chunk_size=16,
    lora_use_virtual_experts=False, lora_drain_wait_threshold=0.0, speculative_algorithm=None, lora_backend="csgmv",
    moe_runner_backend="auto", speculative_moe_runner_backend=None, speculative_adaptive=False,
)  # fmt: skip
"""SGLang's defaults of what its checks look at beside what we set."""


@pytest.fixture(params=SGLANG)
def version(request):
    return request.param


@pytest.fixture
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def check(version: str, settings: types.SimpleNamespace) -> None:
    """SGLang's own check of LoRA's server arguments."""
    wheel = wheel_of(version)
    reference = wheel.module("sglang.srt.lora.lora_registry").LoRARef
    if version == "0.5.15.post1":
        own = wheel.take(
            "sglang.srt.server_args", "ServerArgs.check_lora_server_args", LoRARef=reference, logger=QUIET
        )
        own.check_lora_server_args(settings)
        return
    names = ("check_lora_speculative_compatibility", "check_lora_moe_runner_args", "check_lora_server_args")
    own = wheel.take(
        "sglang.srt.arg_groups.lora_hook", *names, LoRARef=reference, logger=QUIET, envs=_Environ(),
        resolving_view=lambda args: args,
        declare_resolution=lambda args, by, **values: vars(args).update(values),
    )  # fmt: skip
    own.check_lora_server_args(settings)


def served_with(root, family: str, **more) -> types.SimpleNamespace:
    """What a launch sets, as an engine's arguments."""
    args = serving_cases.arguments(serving_cases.base(root, family), "--lora-r", "16")
    for name, value in SERVING.items():
        setattr(args, f"sglang_{name}", value)
    args.offload_rollout = True
    serve_adapters(args)
    return types.SimpleNamespace(**{**OTHERS, **{name: getattr(args, f"sglang_{name}") for name in SERVING}, **more})


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_sglang_takes_what_a_launch_sets(root, version, family):
    settings = served_with(root, family)
    check(version, settings)
    assert settings.enable_lora and settings.max_lora_rank == 16 and settings.max_loras_per_batch == 2


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "STANDALONE", "NGRAM", None])
def test_speculation_is_refused_as_sglang_refuses_it(root, version, algorithm):
    args = serving_cases.arguments(serving_cases.base(root, "qwen3"))
    args.sglang_speculative_algorithm = algorithm
    ours = bool(refused(Launch(args, Version(version))))
    try:
        check(version, served_with(root, "qwen3", speculative_algorithm=algorithm))
        theirs = False
    except ValueError:
        theirs = True
    assert ours == theirs


@pytest.mark.parametrize("runner", ["triton", "deep_gemm", "flashinfer_cutlass", "flashinfer_trtllm", "cutlass"])
def test_expert_runners_are_refused_as_sglang_refuses_them(root, version, runner):
    """0.5.15 dies of it when it wraps the experts. Later ones ask the quantisation method; we go on refusing."""
    if version != SGLANG[0] and runner != "triton":
        pytest.skip("depends on how the base is quantised")
    hf_dir = serving_cases.base(root, "qwen3_moe")
    args = serving_cases.arguments(hf_dir)
    args.sglang_moe_runner_backend = runner
    ours = bool(refused(Launch(args, Version(version))))
    wheel = wheel_of(version, 1, 0, True)  # the worker's
    runners = wheel.module("sglang.srt.layers.moe").MoeRunnerBackend
    utils = wheel.module("sglang.srt.layers.moe.utils")
    plain = utils.get_moe_runner_backend
    utils.get_moe_runner_backend = lambda: runners(runner)
    try:
        Worker(version, hf_dir, ["gate_proj", "up_proj", "down_proj"], 4)
        theirs = False
    except (NotImplementedError, ValueError):
        theirs = True
    finally:
        utils.get_moe_runner_backend = plain
    assert ours == theirs
