"""Distillation in slime at launch and in the rollout process. Pure.

pytest tests/slime/hooks/test_distillation.py
"""

from __future__ import annotations

import json
import types

import pytest
from test_slime_launch import parse, slime_validate_args

from slime_plugins.lora import slime as hooks
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.rehearsal.tiny import make_tiny
from slime_plugins.lora.slime.hooks import distillation

GKD = ("--use-lora", "--use-gkd", "--gkd-teacher-prompt-template", "{label} {prompt}")
HERE = "slime_plugins.lora.slime.hooks"


def launch(*words, **settings):
    slime = dict(
        n_samples_per_prompt=1, seed=1234, rollout_global_dataset=True, loss_type="policy_loss",
        rollout_temperature=1.0,
        custom_loss_function_path=None, rollout_data_postprocess_path=None, compute_advantages_and_returns=True,
        rollout_function_path="slime.rollout.sglang_rollout.generate_rollout", recompute_loss_function=False,
    )  # fmt: skip
    args = parse(*words, **{**slime, **settings})
    slime_validate_args(args)
    return args


def test_slime_calls_the_plugin_for_loss_teacher_and_responses():
    args = launch(*GKD, rollout_data_postprocess_path="my.own")
    assert (args.loss_type, args.custom_loss_function_path) == ("custom_loss", f"{HERE}.gkd.loss")
    assert (args.rollout_data_postprocess_path, args.gkd_own_postprocess) == (f"{HERE}.gkd.teach", "my.own")
    assert args.rollout_function_path == f"{HERE}.distillation.generate_rollout"
    assert args.gkd_sampler == "slime.rollout.sglang_rollout.generate_rollout"
    assert args.compute_advantages_and_returns is False, "nobody reads them"


def test_on_samples_alone_the_rollout_is_the_users():
    args = launch(*GKD, "--lmbda", "1", n_samples_per_prompt=4, rollout_global_dataset=False)
    assert args.rollout_function_path == "slime.rollout.sglang_rollout.generate_rollout"


def test_beside_the_policy_loss_advantages_stay():
    args = launch("--use-lora", "--use-gkd", "--gkd-coef", "0.1", "--gkd-lmbda", "1", n_samples_per_prompt=8)
    assert args.compute_advantages_and_returns is True
    assert args.loss_type == "custom_loss"


@pytest.mark.parametrize(
    "words, settings, reason",
    [
        (("--use-lora", "--use-gkd"), {}, "divergence and gradient are exactly 0 and nothing can be learnt"),
        (("--use-gkd",), {}, "--use-gkd without --use-lora"),
        (("--use-lora", "--gkd-beta", "0.3"), {}, "--gkd-beta given without --use-gkd"),
        (("--sft-alpha", "0.3"), {}, "--sft-alpha given without --use-gkd"),
        ((*GKD, "--beta", "2"), {}, "--gkd-beta 2.0: expected a number from 0 to 1"),
        ((*GKD, "--lmbda", "nan"), {}, "--gkd-lmbda nan"),
        ((*GKD, "--gkd-temperature", "0"), {}, "--gkd-temperature 0.0: expected a number above 0"),
        ((*GKD, "--gkd-chunk-size", "0"), {}, "--gkd-chunk-size 0"),
        ((*GKD, "--seq-kd"), {}, "--seq-kd trains on a teacher's samples"),
        (GKD, {"n_samples_per_prompt": 8}, "--n-samples-per-prompt 8 with --gkd-lmbda 0.5"),
        (GKD, {"rollout_global_dataset": False}, "--gkd-lmbda below 1 takes responses from the data set"),
        (GKD, {"debug_train_only": True}, "--debug-train-only samples nothing"),
        (GKD, {"loss_type": "sft_loss"}, "drop --loss-type"),
        (GKD, {"recompute_loss_function": True}, "--recompute-loss-function computes the loss again"),
        (GKD, {"context_parallel_size": 2}, "--gkd-teacher-prompt-template with --context-parallel-size above 1"),
        (GKD, {"qkv_format": "bshd"}, "--qkv-format bshd"),
        (GKD, {"allgather_cp": True}, "--allgather-cp"),
        ((*GKD, "--gkd-coef", "1"), {}, "--gkd-coef with --gkd-lmbda below 1"),
        ((*GKD, "--gkd-coef", "1"), {"compute_advantages_and_returns": False}, "which needs advantages"),
        (
            (*GKD, "--gkd-teacher", "ema"),
            {"offload_train": True},
            "--gkd-teacher other than base with --offload-train",
        ),
        ((*GKD[:2], "--gkd-teacher-prompt-template", "{answer}"), {}, "'{answer}', expected {prompt}, {label} or"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(words, settings, reason):
    with pytest.raises(UsageError) as info:
        launch(*words, **settings)
    assert reason in str(info.value)
    assert "\n" not in str(info.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("distillation") / "base", "qwen3", num_layers=1)


def sample(prompt, label, tokens=(), length=0, **more):
    status = types.SimpleNamespace(COMPLETED="completed")
    cls = type("Sample", (types.SimpleNamespace,), {"Status": status})
    return cls(prompt=prompt, label=label, tokens=list(tokens), response_length=length, metadata={}, index=3, **more)


def test_the_teachers_tokens_end_in_the_students_response(base):
    @hooks.teacher_prompts
    def convert(self, samples):
        return {"tokens": [one.tokens for group in samples for one in group]}

    args = types.SimpleNamespace(use_gkd=True, gkd_teacher_prompt_template="{label} {prompt}", hf_checkpoint=str(base))
    groups = [[sample("t5 t6", "t9", [5, 6, 77, 78], 2)], [sample("t4", "t8", [4, 79], 1)]]
    data = convert(types.SimpleNamespace(args=args), groups)
    assert data["prompt"] == [[9, 5, 6, 77, 78], [8, 4, 79]]
    args.gkd_teacher_prompt_template = None
    assert "prompt" not in convert(types.SimpleNamespace(args=args), groups)
    args.use_gkd = False
    assert "prompt" not in convert(types.SimpleNamespace(args=args), groups)


def test_given_responses_are_labels_and_an_end(base):
    args = types.SimpleNamespace(gkd_lmbda=0.0, seed=1, hf_checkpoint=str(base), rollout_batch_size=2)
    source = types.SimpleNamespace(get_samples=lambda count: [[sample("t5 t6", "t9 t7")] for _ in range(count)])
    (one,), (_,) = distillation.generate_rollout(args, 0, source)
    end = json.loads((base / "config.json").read_text())["eos_token_id"]
    assert one.tokens == [5, 6, 9, 7, end]
    assert (one.response_length, one.response, one.status) == (3, "t9 t7", "completed")
    source.get_samples = lambda count: [[sample([{"role": "user"}], "t9")]]
    with pytest.raises(ValueError, match="sample 3 has a list for a prompt"):
        distillation.generate_rollout(args, 0, source)
