"""What of training control cannot work together, known at launch; rows of ``refusals``. No torch."""

from __future__ import annotations

from slime_plugins.lora.slime.hooks.refusal import Launch, Refusal, resumes


def _by(launch: Launch, kind: str) -> bool:
    return (launch.given("lr_plateau_metric") or "").startswith(kind)


def _controls(launch: Launch) -> bool:
    return launch.given("lr_plateau_metric") is not None or launch.given("val_interval") is not None


CONTROL = (
    Refusal(
        "LoRA+ and a warmup that does not start at 0",
        lambda launch: (launch.given("lora_plus_ratio") or 1) != 1 and launch.given("lr_warmup_init"),
        "--lora-plus-ratio with --lr-warmup-init: the warmup starts A and B at one rate, not at the ratio; drop "
        "--lr-warmup-init",
    ),
    Refusal(
        "reference without a start",
        lambda launch: (
            launch.given("lora_ref") == "start" and not launch.given("lora_adapter_path") and not resumes(launch)
        ),
        "--lora-ref start without --lora-adapter-path: training starts from the base, which is the reference anyway; "
        "give the adapter to start from, or drop --lora-ref",
    ),
    Refusal(
        "reference without a KL",
        lambda launch: launch.given("lora_ref") and not launch.given("use_kl_loss") and not launch.given("kl_coef"),
        "--lora-ref says what the KL is measured from, and none is: add --use-kl-loss or --kl-coef, or drop it",
    ),
    Refusal(
        "reference that moves",
        lambda launch: launch.given("lora_ref") == "start" and launch.given("ref_update_interval"),
        "--lora-ref start keeps the reference at the start, --ref-update-interval moves it; drop one of them",
    ),
    Refusal(
        "validation loss without validations",
        lambda launch: _by(launch, "val_loss") and not (launch.given("val_data") and launch.given("val_interval")),
        "--lr-plateau-metric val_loss needs --val-data and --val-interval: it is not measured",
    ),
    Refusal(
        "validations without an interval",
        lambda launch: bool(launch.given("val_data")) != (launch.given("val_interval") is not None),
        "--val-data and --val-interval go together: what is validated on, and after how many rollouts; give both",
    ),
    Refusal(
        "an interval that is none",
        lambda launch: launch.given("val_interval") is not None and launch.given("val_interval") < 1,
        "--val-interval counts rollouts, expected 1 or more",
    ),
    Refusal(
        "evaluations that there are none of",
        lambda launch: _by(launch, "eval/") and not launch.given("eval_interval"),
        "--lr-plateau-metric eval/NAME needs --eval-interval: it is not measured",
    ),
    Refusal(
        "evaluations without engines",
        lambda launch: _by(launch, "eval/") and launch.given("debug_train_only"),
        "--lr-plateau-metric eval/NAME with --debug-train-only, under which slime evaluates nothing; use val_loss",
    ),
    Refusal(
        "evaluations of older weights",
        lambda launch: (
            _by(launch, "eval/")
            and (launch.given("update_weights_interval") or 1) > 1
            and (
                launch.given("num_rollout") is None
                or (launch.given("eval_interval") or 0) % launch.given("update_weights_interval")
            )
        ),
        "--lr-plateau-metric eval/NAME with --update-weights-interval above 1: slime would evaluate weights of an "
        "earlier step; give --num-rollout and an --eval-interval that is a multiple of it",
    ),
    Refusal(
        "a history without a place",
        lambda launch: _controls(launch) and not launch.given("save"),
        "--lr-plateau-metric and --val-interval need --save, where training_history.json is kept and resumed from",
    ),
    Refusal(
        "a trainer that is gone after each step",
        lambda launch: _controls(launch) and launch.given("release_train"),
        "--release-train ends the trainer after each step, before anything is decided; drop it",
    ),
    Refusal(
        "an actor that does not train",
        lambda launch: _controls(launch) and (launch.given("debug_rollout_only") or launch.given("critic_train_only")),
        "--lr-plateau-metric and --val-interval validate the actor, which does not train here; drop them, or "
        "--debug-rollout-only and --critic-train-only",
    ),
    Refusal(
        "padded validation",
        lambda launch: launch.given("val_data") and launch.given("qkv_format") == "bshd",
        "--val-data with --qkv-format bshd, which pads every sample: validations are packed; use --qkv-format thd",
    ),
    Refusal(
        "validation with pictures",
        lambda launch: launch.given("val_data") and launch.given("multimodal_keys"),
        "--val-data with --multimodal-keys: validations are of text; drop one of them",
    ),
)
"""Of learning rates, references, validations and stopping."""
