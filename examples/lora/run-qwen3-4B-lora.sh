#!/bin/bash
# GRPO on Qwen3-4B with LoRA, 8 GPUs, colocated. slime's scripts/run-qwen3-4B.sh with a LORA_ARGS block.
#
# Once, from this repository:   slime-lora patch apply --slime "$SLIME_DIR"
# Then:                         SLIME_DIR=/root/slime bash examples/lora/run-qwen3-4B-lora.sh
#
# Expected in the log before the first step:
#   LoRA on the actor: LoRA
#     module       projections             rank  layers  parameters
#     linear_qkv   q_proj, k_proj, v_proj  32    36      10,027,008
#     linear_proj  o_proj                  32    36      7,667,712
#     linear_fc1   gate_proj, up_proj      32    36      25,362,432
#     linear_fc2   down_proj               32    36      14,155,776
#     trainable params: 57,212,928 || all params: 4,079,681,024 || trainable%: 1.4024 || adapter: 109.12 MiB
# No such table means that no adapter is there: see docs/troubleshooting.md.

set -e

source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
check_slime qwen3-4B.sh
cd "${SLIME_DIR}"
source "${SLIME_DIR}/scripts/models/qwen3-4B.sh"

CKPT_ARGS=(
   --hf-checkpoint "${BASE_DIR}/Qwen3-4B"
   # the base that is frozen, and with it the reference policy: adapters off, no second copy of the model
   --ref-load "${BASE_DIR}/Qwen3-4B_torch_dist"
   # adapters and their optimizer state only: 14 bytes per adapter parameter, 0.8 GB here, at any number of GPUs
   --load "${BASE_DIR}/Qwen3-4B_lora/"
   --save "${BASE_DIR}/Qwen3-4B_lora/"
   --save-interval 20
)

LORA_ARGS=(
   --use-lora
   # Small ranks are enough for RL (a bit or so of information per episode); 32 leaves room at 1 % of the parameters.
   --lora-r 32
   # scaling = alpha / r. Raising r at constant alpha keeps the best learning rate about where it was.
   --lora-alpha 32
   --lora-dropout 0.0
   # All linears of every layer: attention alone trains worse, at any rank.
   --lora-target-modules all-linear
   --lora-only-trainable
   # Engines get W + s B A, so every rollout feature works. "adapter" sends the adapter alone.
   # --lora-sync adapter
   # A PEFT adapter with every checkpoint, ready for transformers, vLLM and SGLang:
   # --lora-export-dir "${BASE_DIR}/Qwen3-4B_lora_peft"
   # Start from an adapter instead of from zero: a PEFT directory or a checkpoint of --save.
   # --lora-adapter-path "${BASE_DIR}/Qwen3-4B_lora_peft"
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
   --tensor-model-parallel-size 2
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1

   # No recompute: it fits without (slime-lora plan --compare, docs/memory.md), and is a third part of a step's work.
   # Out of memory, or longer responses? --recompute-granularity full --recompute-method uniform --recompute-num-layers 1

   # --micro-batch-size 1
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
   # --wandb-group qwen3-4B-lora
   # --wandb-key "${WANDB_KEY}"
)

SGLANG_ARGS=(
   --rollout-num-gpus-per-engine 2
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
start_ray "${BASE_DIR}/Qwen3-4B_lora"

set -x
ray job submit --address="${JOB_ADDRESS}" --runtime-env-json="${RUNTIME_ENV_JSON}" \
   -- python3 train.py "${JOB_ARGS[@]}"
