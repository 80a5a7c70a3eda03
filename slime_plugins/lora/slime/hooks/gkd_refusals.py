"""What cannot work together with ``--use-gkd``: rows for ``refusals``. No torch."""

from __future__ import annotations

from slime_plugins.lora.slime.hooks.refusal import Refusal
from slime_plugins.lora.slime.hooks.teachers import teacher_weights

GKD = (
    Refusal(
        "trained rows",
        lambda launch: launch.given("trainable_token_indices"),
        "--use-gkd with trained vocabulary rows: the teacher is read through the student's output layer, which would "
        "be the frozen one; drop --trainable-token-indices",
    ),
    Refusal(
        "sequence-level distillation",
        lambda launch: launch.given("seq_kd"),
        "--seq-kd trains on a teacher's samples: write them into the data set and train with --gkd-lmbda 0; drop it",
    ),
    Refusal(
        "another loss",
        lambda launch: launch.given("loss_type") not in (None, "policy_loss"),
        "--use-gkd is the loss, or with --gkd-coef a part of the policy loss; drop --loss-type",
    ),
    Refusal(
        "a part of a loss that is not there",
        lambda launch: launch.given("gkd_coef") is not None and not launch.given("compute_advantages_and_returns"),
        "--gkd-coef adds the divergence to the policy loss, which needs advantages; drop "
        "--disable-compute-advantages-and-returns, or --gkd-coef",
    ),
    Refusal(
        "the policy loss on given responses",
        lambda launch: (
            launch.given("gkd_coef") is not None
            and not launch.given("debug_train_only")
            and launch.given("gkd_lmbda") < 1
        ),
        "--gkd-coef with --gkd-lmbda below 1: given responses are no samples of the policy and have no rewards, and "
        "one response to a prompt has no advantage; use --gkd-lmbda 1",
    ),
    Refusal(
        "recomputed loss",
        lambda launch: launch.given("recompute_loss_function"),
        "--recompute-loss-function computes the loss again from logits that the divergence has overwritten with their "
        "gradient, and saves nothing there: it keeps no vocabulary-sized tensor; drop it",
    ),
    Refusal(
        "samples without a rollout",
        lambda launch: launch.given("debug_train_only") and launch.given("gkd_lmbda"),
        "--debug-train-only samples nothing, and --gkd-lmbda above 0 wants the student's own samples; give "
        "--gkd-lmbda 0, which trains on the responses that are loaded",
    ),
    Refusal(
        "responses without a data set",
        lambda launch: (
            not launch.given("debug_train_only")
            and launch.given("gkd_lmbda") < 1
            and launch.given("rollout_global_dataset") is False
        ),
        "--gkd-lmbda below 1 takes responses from the data set (--label-key), and --disable-rollout-global-dataset "
        "says that there is none; give --gkd-lmbda 1, or a data set",
    ),
    Refusal(
        "slime's own distillation without advantages",
        lambda launch: launch.given("use_opd") and launch.given("gkd_coef") is None,
        "--use-opd subtracts its penalty from advantages, and --use-gkd alone has none; add --gkd-coef, or drop "
        "one of them",
    ),
    Refusal(
        "routing that nobody records",
        lambda launch: (
            launch.given("use_routing_replay")
            and not launch.given("use_rollout_routing_replay")
            and launch.given("gkd_coef") is None
        ),
        "--use-routing-replay replays what the pass for log-probs records, and --use-gkd alone has no such pass; drop "
        "it",
    ),
    Refusal(
        "routing of given responses",
        lambda launch: launch.given("use_rollout_routing_replay") and launch.given("gkd_lmbda") < 1,
        "--use-rollout-routing-replay with --gkd-lmbda below 1: no engine has chosen experts for given responses; "
        "drop it, or give --gkd-lmbda 1",
    ),
    Refusal(
        "a 4-bit base and weights of the teacher's own",
        lambda launch: (launch.given("lora_base_quant") or "none") != "none" and teacher_weights(launch.args),
        "--lora-base-quant with a --gkd-teacher that has weights of its own: a packed base holds no others; give an "
        "adapter, or train on a dense base",
    ),
    Refusal(
        "gathered context parallelism",
        lambda launch: launch.given("allgather_cp"),
        "--allgather-cp moves log-probs between ranks after the loss has them, a vocabulary it cannot; drop it",
    ),
    Refusal(
        "padded batches",
        lambda launch: launch.given("qkv_format") == "bshd",
        "--qkv-format bshd pads every sample, and distillation looks for tokens in packed ones; use --qkv-format thd",
    ),
    Refusal(
        "the critic's loss",
        lambda launch: launch.given("use_critic"),
        "--use-gkd replaces the loss of every model in slime, the critic's too; use an estimator without a critic",
    ),
)
"""Of ``--use-gkd``."""
