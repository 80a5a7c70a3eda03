#!/bin/bash
# One base, an adapter per task: math, code, medical, trained in turn. 0.8 GB of checkpoint each instead of 56 GB, and one
# server can hold all three: each request names its adapter.
#
# Once, from this repository:   slime-lora patch apply --slime "$SLIME_DIR"
# Then:                         SLIME_DIR=/root/slime bash examples/lora/run-multi-task-lora.sh [math] [code] [medical]
#
# A task that was interrupted goes on from its own --save directory. Afterwards, with the adapters of the last step:
#   python3 -m sglang.launch_server --model-path "${BASE_DIR}/Qwen3-4B" --enable-lora --max-loras-per-batch 3 \
#      --lora-paths math=.../math/iter_0000199 code=.../code/iter_0000199 medical=.../medical/iter_0000199

set -e

source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"
check_slime qwen3-4B.sh
cd "${SLIME_DIR}"
source "${SLIME_DIR}/scripts/models/qwen3-4B.sh"

ADAPTERS=${BASE_DIR}/Qwen3-4B_adapters
TASKS=("$@")
[ ${#TASKS[@]} -gt 0 ] || TASKS=(math code medical)

# Prompts and reward of each task; jsonl files with the keys "prompt" and "label".
task_args() {
    case $1 in
    math) TASK_ARGS=(--prompt-data "${BASE_DIR}/dapo-math-17k/dapo-math-17k.jsonl" --rm-type deepscaler) ;;
    # runs the answer against the tests in the label, in a sandbox of yours: {"prompt", "response", "label"} -> reward
    code) TASK_ARGS=(--prompt-data "${BASE_DIR}/code/train.jsonl"
                     --rm-type remote_rm --rm-url "${CODE_RM_URL:-http://127.0.0.1:8100/reward}") ;;
    # multiple choice, the label is the letter (MedQA, MedMCQA)
    medical) TASK_ARGS=(--prompt-data "${BASE_DIR}/medqa/train.jsonl" --rm-type gpqa) ;;
    *) echo "unknown task $1; expected math, code or medical" >&2; exit 2 ;;
    esac
}

CKPT_ARGS=(
   --hf-checkpoint "${BASE_DIR}/Qwen3-4B"
   # the same frozen base, and reference, for every task
   --ref-load "${BASE_DIR}/Qwen3-4B_torch_dist"
   --save-interval 20
)

LORA_ARGS=(
   --use-lora
   --lora-r 32
   --lora-alpha 32
   --lora-target-modules all-linear
)

ROLLOUT_ARGS=(
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --num-rollout 200
   --rollout-batch-size 32
   --n-samples-per-prompt 8
   --rollout-max-response-len 8192
   --rollout-temperature 1

   --global-batch-size 256
   --balance-data
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
   --lr 1e-5
   --lr-decay-style constant
   --weight-decay 0.0
   --adam-beta1 0.9
   --adam-beta2 0.98
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

CHECKPOINTS=${ADAPTERS}/checkpoints
job_args() {
   task_args "$1"
   JOB_ARGS=(
      --actor-num-nodes 1
      --actor-num-gpus-per-node "${NUM_GPUS}"
      --colocate
      "${MODEL_ARGS[@]}"
      "${CKPT_ARGS[@]}"
      "${LORA_ARGS[@]}"
      "${TASK_ARGS[@]}"
      "${ROLLOUT_ARGS[@]}"
      "${OPTIMIZER_ARGS[@]}"
      "${GRPO_ARGS[@]}"
      "${PERF_ARGS[@]}"
      "${SGLANG_ARGS[@]}"
      "${MISC_ARGS[@]}"
      --load "${CHECKPOINTS}/$1"
      --save "${CHECKPOINTS}/$1"
      --lora-export-dir "${ADAPTERS}/$1"
   )
}

for TASK in "${TASKS[@]}"; do # all of them, before the first one starts
   job_args "${TASK}"
   check_job "${JOB_ARGS[@]}"
done
start_ray "${CHECKPOINTS}"

for TASK in "${TASKS[@]}"; do
   job_args "${TASK}"
   (
      set -x
      ray job submit --address="${JOB_ADDRESS}" --runtime-env-json="${RUNTIME_ENV_JSON}" \
         -- python3 train.py "${JOB_ARGS[@]}"
   )
done
