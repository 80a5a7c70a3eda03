#!/bin/bash
# GRPO on Qwen3-0.6B with LoRA on one GPU: trainer and engine take turns on it.
#
# Once, from this repository:   slime-lora patch apply --slime "$SLIME_DIR"
# Then:                         SLIME_DIR=/root/slime bash examples/lora/run-qwen3-0.6B-lora.sh
#
# Expected in the log before the first step (no such table: docs/troubleshooting.md):
#   LoRA on the actor: LoRA
#     module       projections             rank  layers  parameters
#     linear_qkv   q_proj, k_proj, v_proj  16    28      2,293,760
#     linear_proj  o_proj                  16    28      1,376,256
#     linear_fc1   gate_proj, up_proj      16    28      3,211,264
#     linear_fc2   down_proj               16    28      1,835,008
#     trainable params: 8,716,288 || all params: 604,766,208 || trainable%: 1.4413 || adapter: 16.62 MiB

set -e

NUM_GPUS=${NUM_GPUS:-1}
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
check_slime qwen3-0.6B.sh
cd "${SLIME_DIR}"
source "${SLIME_DIR}/scripts/models/qwen3-0.6B.sh"

CKPT_ARGS=(
   # slime v0.3.1 and later load the base straight from Hugging Face; earlier ones want a torch_dist directory here
   --hf-checkpoint "${BASE_DIR}/Qwen3-0.6B"
   --ref-load "${BASE_DIR}/Qwen3-0.6B"
   --load "${BASE_DIR}/Qwen3-0.6B_lora/"
   --save "${BASE_DIR}/Qwen3-0.6B_lora/"
   --save-interval 20
)

LORA_ARGS=(
   --use-lora
   --lora-r 16
   --lora-alpha 32
   --lora-target-modules all-linear
   # 17 MiB instead of 1.1 GiB per sync; the engine keeps the base, and a copy of it while it is offloaded
   --lora-sync adapter
   --lora-export-dir "${BASE_DIR}/Qwen3-0.6B_lora_peft"
)

ROLLOUT_ARGS=(
   --prompt-data "${BASE_DIR}/gsm8k/train.parquet"
   --input-key messages
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --rm-type math
   --num-rollout 100
   --rollout-batch-size 16
   --n-samples-per-prompt 8
   --rollout-max-response-len 1024
   --rollout-temperature 1

   --global-batch-size 128
)

EVAL_ARGS=(
   --eval-interval 20
   --eval-prompt-data gsm8k "${BASE_DIR}/gsm8k/test.parquet"
   --n-samples-per-eval-prompt 1
   --eval-max-response-len 1024
   --eval-top-k 1
)

PERF_ARGS=(
   --tensor-model-parallel-size 1
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1

   # No recompute: it fits without (slime-lora plan --compare, docs/memory.md), and is a third part of a step's work.
   # Out of memory, or longer responses? --recompute-granularity full --recompute-method uniform --recompute-num-layers 1

   --use-dynamic-batch-size
   --max-tokens-per-gpu 9216
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.00
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
)

OPTIMIZER_ARGS=(
   --optimizer adam
   # about 10x the rate of full training; the plugin warns below 5e-6
   --lr 2e-5
   --lr-decay-style constant
   --weight-decay 0.0
   --adam-beta1 0.9
   --adam-beta2 0.98
)

WANDB_ARGS=(
   # --use-wandb
   # --wandb-project slime-lora
   # --wandb-group qwen3-0.6B-lora
   # --wandb-key "${WANDB_KEY}"
)

SGLANG_ARGS=(
   --rollout-num-gpus-per-engine 1
   --sglang-mem-fraction-static 0.6
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
   "${ROLLOUT_ARGS[@]}"
   "${OPTIMIZER_ARGS[@]}"
   "${GRPO_ARGS[@]}"
   "${WANDB_ARGS[@]}"
   "${PERF_ARGS[@]}"
   "${EVAL_ARGS[@]}"
   "${SGLANG_ARGS[@]}"
   "${MISC_ARGS[@]}"
)
check_job "${JOB_ARGS[@]}"
start_ray "${BASE_DIR}/Qwen3-0.6B_lora"

set -x
ray job submit --address="${JOB_ADDRESS}" --runtime-env-json="${RUNTIME_ENV_JSON}" \
   -- python3 train.py "${JOB_ARGS[@]}"
