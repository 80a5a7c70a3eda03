#!/bin/bash
# GRPO on Qwen3-30B-A3B with LoRA on attention and all 128 experts, 8 GPUs, colocated: slime's
# scripts/run-qwen3-30B-A3B.sh with a LORA_ARGS block, and without its optimizer offload, which adapters do not need.
#
# Once, from this repository:   slime-lora patch apply --slime "$SLIME_DIR"
# Then:                         SLIME_DIR=/root/slime bash examples/lora/run-qwen3-30B-A3B-lora.sh
#
# The log shows a table headed "LoRA on the actor" before the first step. None means that no adapter is there: see
# docs/troubleshooting.md. What is adapted in a model with experts: docs/experts.md.

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
   --load "${BASE_DIR}/Qwen3-30B-A3B_lora/"
   --save "${BASE_DIR}/Qwen3-30B-A3B_lora/"
   --save-interval 20
)

LORA_ARGS=(
   --use-lora
   # One adapter per expert. A multiple of 8 takes the grouped product in bf16.
   --lora-r 16
   --lora-alpha 32
   # Dropout on experts is possible at --expert-tensor-parallel-size 1 only.
   --lora-dropout 0.0
   # All but the router. Attention alone: linear_qkv linear_proj. Experts alone: experts.linear_fc1 experts.linear_fc2
   --lora-target-modules all-linear
   --lora-only-trainable
   # A PEFT adapter with every checkpoint, a pair of tensors per expert, for transformers, vLLM and SGLang:
   # --lora-export-dir "${BASE_DIR}/Qwen3-30B-A3B_lora_peft"
)

ROLLOUT_ARGS=(
   --prompt-data "${BASE_DIR}/dapo-math-17k/dapo-math-17k.jsonl"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --rm-type deepscaler
   --num-rollout 3000
   --rollout-batch-size 32
   --n-samples-per-prompt 8
   --rollout-max-response-len 8192
   --rollout-temperature 1

   --global-batch-size 256
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
   # 10x the 1e-6 of full training. B starts at zero and only r directions per matrix move, so the best LoRA rate is
   # about ten times the full one whatever the rank (Schulman et al. 2025, "LoRA Without Regret"). At 1e-6 the reward
   # curve is flat and looks like a bug. Sensible range: 1e-5 to 1e-4.
   --lr 1e-5
   --lr-decay-style constant
   # Decay on A and B pulls the update to zero, not the weights; the KL term is there for that.
   --weight-decay 0.0
   --adam-beta1 0.9
   --adam-beta2 0.98
)

WANDB_ARGS=(
   # --use-wandb
   # --wandb-project slime-lora
   # --wandb-group qwen3-30B-A3B-lora
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
start_ray "${BASE_DIR}/Qwen3-30B-A3B_lora"

set -x
ray job submit --address="${JOB_ADDRESS}" --runtime-env-json="${RUNTIME_ENV_JSON}" \
   -- python3 train.py "${JOB_ARGS[@]}"
