#!/bin/bash
# Self-distillation (GKD) of Qwen3-30B-A3B with LoRA, 8 GPUs, colocated: one copy of the base is student and teacher.
# The teacher is the base with the adapters off, and reads a worked solution that the student does not see.
#
# Once, from this repository:   slime-lora patch apply --slime "$SLIME_DIR"
# Then:                         SLIME_DIR=/root/slime bash examples/lora/run-qwen3-30B-A3B-gkd.sh
#
# What is compared, what is refused, what is logged (train/gkd/*): docs/distillation.md.

set -e

source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
check_slime qwen3-30B-A3B.sh
cd "${SLIME_DIR}"
source "${SLIME_DIR}/scripts/models/qwen3-30B-A3B.sh"

CKPT_ARGS=(
   --hf-checkpoint "${BASE_DIR}/Qwen3-30B-A3B"
   # the base that is frozen, and with it the reference policy: adapters off, no second copy of the model
   --ref-load "${BASE_DIR}/Qwen3-30B-A3B_torch_dist"
   # adapters and their optimizer state only: 14 bytes per adapter parameter, loadable at any TP, EP and PP
   --load "${BASE_DIR}/Qwen3-30B-A3B_lora_gkd/"
   --save "${BASE_DIR}/Qwen3-30B-A3B_lora_gkd/"
   --save-interval 20
)

LORA_ARGS=(
   --use-lora
   --lora-r 8
   --lora-alpha 16
   # On experts too, which is possible at --expert-tensor-parallel-size 1 only. The teacher's pass has none.
   --lora-dropout 0.05
   --lora-target-modules all-linear
)

GKD_ARGS=(
   --use-gkd
   # 0: KL(teacher || student); 1: KL(student || teacher); between: generalised Jensen-Shannon
   --gkd-beta 0.5
   # Half of the rollouts are the student's own samples, the others the solutions of the data.
   --gkd-lmbda 0.5
   # Of both in the loss; sampling has --rollout-temperature.
   --gkd-temperature 1.0
   --gkd-teacher base
   # Without it teacher and student would be one and the same, and nothing could be learnt: that is refused. {prompt} is
   # the text after the chat template, so what is shown more comes before it, as a turn of its own.
   --gkd-teacher-prompt-template '<|im_start|>system\nA correct solution:\n{label}<|im_end|>\n{prompt}'
)

ROLLOUT_ARGS=(
   # lines of {"prompt": a question or messages, "label": a worked solution}
   --prompt-data "${BASE_DIR}/math-solutions/train.jsonl"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   # Rewards are logged and train nothing.
   --rm-type deepscaler
   --num-rollout 1000
   --rollout-batch-size 128
   # A given solution is there once.
   --n-samples-per-prompt 1
   --rollout-max-response-len 8192
   --rollout-temperature 1

   --global-batch-size 128
   --balance-data
)

EVAL_ARGS=(
   --eval-interval 20
   --eval-prompt-data aime "${BASE_DIR}/aime-2024/aime-2024.jsonl"
   --n-samples-per-eval-prompt 16
   --eval-max-response-len 16384
   --eval-top-p 1
)

PERF_ARGS=(
   --tensor-model-parallel-size 4
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 8
   --expert-tensor-parallel-size 1

   # Without it, --tokens 20480 of slime-lora plan --compare is 45 of 80 GB where the router spreads tokens evenly. It need not.
   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1

   # --micro-batch-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 20480
)

OPTIMIZER_ARGS=(
   --optimizer adam
   # 10x the 1e-6 of full training. B starts at zero and only r directions per matrix move, so the best LoRA rate is
   # about ten times the full one whatever the rank (Schulman et al. 2025, "LoRA Without Regret"). At 1e-6 the reward
   # curve is flat and looks like a bug. Sensible range: 1e-5 to 1e-4.
   --lr 1e-5
   --lr-decay-style constant
   --weight-decay 0.0
   --adam-beta1 0.9
   --adam-beta2 0.98
)

WANDB_ARGS=(
   # --use-wandb
   # --wandb-project slime-lora
   # --wandb-group qwen3-30B-A3B-gkd
   # --wandb-key "${WANDB_KEY}"
)

SGLANG_ARGS=(
   --rollout-num-gpus-per-engine 8
   --sglang-mem-fraction-static 0.7
)

MISC_ARGS=(
   # default dropout in megatron is 0.1
   --attention-dropout 0.0
   --hidden-dropout 0.0
   # should be good for model performance
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
   # need to comment this when using model with MLA
   --attention-backend flash
)

JOB_ARGS=(
   --actor-num-nodes 1
   --actor-num-gpus-per-node "${NUM_GPUS}"
   --colocate
   "${MODEL_ARGS[@]}"
   "${CKPT_ARGS[@]}"
   "${LORA_ARGS[@]}"
   "${GKD_ARGS[@]}"
   "${ROLLOUT_ARGS[@]}"
   "${OPTIMIZER_ARGS[@]}"
   "${WANDB_ARGS[@]}"
   "${PERF_ARGS[@]}"
   "${EVAL_ARGS[@]}"
   "${SGLANG_ARGS[@]}"
   "${MISC_ARGS[@]}"
)
check_job "${JOB_ARGS[@]}"
start_ray "${BASE_DIR}/Qwen3-30B-A3B_lora_gkd"

set -x
ray job submit --address="${JOB_ADDRESS}" --runtime-env-json="${RUNTIME_ENV_JSON}" \
   -- python3 train.py "${JOB_ARGS[@]}"
