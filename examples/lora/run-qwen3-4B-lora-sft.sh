#!/bin/bash
# Supervised fine-tuning of Qwen3-4B-Base with LoRA: slime's scripts/run-qwen3-4B-base-sft.sh with a LORA_ARGS block.
#
# Once, from this repository:   slime-lora patch apply --slime "$SLIME_DIR"
# Then:                         SLIME_DIR=/root/slime bash examples/lora/run-qwen3-4B-lora-sft.sh
#
# Ends with a PEFT adapter in ${BASE_DIR}/Qwen3-4B-Base_lora_sft_peft/iter_*: no engine runs, no reference is loaded.

set -e

source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
check_slime qwen3-4B.sh
cd "${SLIME_DIR}"
source "${SLIME_DIR}/scripts/models/qwen3-4B.sh"

CKPT_ARGS=(
   --hf-checkpoint "${BASE_DIR}/Qwen3-4B-Base"
   --ref-load "${BASE_DIR}/Qwen3-4B-Base_torch_dist"
   --load "${BASE_DIR}/Qwen3-4B-Base_lora_sft/"
   --save "${BASE_DIR}/Qwen3-4B-Base_lora_sft/"
   --save-interval 1000
)

LORA_ARGS=(
   --use-lora
   # supervised data says more per example than a reward does: a larger rank than for RL
   --lora-r 64
   --lora-alpha 64
   --lora-dropout 0.05
   --lora-target-modules all-linear
   --lora-export-dir "${BASE_DIR}/Qwen3-4B-Base_lora_sft_peft"
)

SFT_ARGS=(
   --rollout-function-path slime.rollout.sft_rollout.generate_rollout
   --prompt-data "${BASE_DIR}/openhermes2_5.parquet"
   --input-key messages
   --rollout-shuffle
   --num-epoch 3
   --rollout-batch-size 128
   --global-batch-size 128

   --loss-type sft_loss
   --calculate-per-token-loss
   --disable-compute-advantages-and-returns
   --debug-train-only
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

OPTIMIZER_ARGS=(
   --optimizer adam
   # about 10x the rate of full training; the plugin warns below 5e-6
   --lr 1e-4
   --lr-decay-style cosine
   --min-lr 1e-5
   --lr-warmup-fraction 0.1
   --weight-decay 0.0
   --adam-beta1 0.9
   --adam-beta2 0.95
)

WANDB_ARGS=(
   # --use-wandb
   # --wandb-project slime-lora
   # --wandb-group qwen3-4B-base-lora-sft
   # --wandb-key "${WANDB_KEY}"
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
   "${MODEL_ARGS[@]}"
   "${CKPT_ARGS[@]}"
   "${LORA_ARGS[@]}"
   "${SFT_ARGS[@]}"
   "${OPTIMIZER_ARGS[@]}"
   "${WANDB_ARGS[@]}"
   "${PERF_ARGS[@]}"
   "${MISC_ARGS[@]}"
)
check_job "${JOB_ARGS[@]}"
start_ray "${BASE_DIR}/Qwen3-4B-Base_lora_sft"

set -x
ray job submit --address="${JOB_ADDRESS}" --runtime-env-json="${RUNTIME_ENV_JSON}" \
   -- python3 train_async.py "${JOB_ARGS[@]}"
