#!/bin/bash
# Supervised fine-tuning of Qwen3-4B-Base with LoRA: slime's scripts/run-qwen3-4B-base-sft.sh with a LORA_ARGS block.
#
# Once, from this repository:   slime-lora patch apply --slime "$SLIME_DIR"
# Then:                         SLIME_DIR=/root/slime bash examples/lora/run-qwen3-4B-lora-sft.sh
#
# Ends with a PEFT adapter in ${BASE_DIR}/Qwen3-4B-Base_lora_sft_peft/iter_*: no engine runs, no reference is loaded.

set -ex

# The job runs where `ray start` was run: in slime's checkout, hence the cd below.
SLIME_DIR=${SLIME_DIR:-/root/slime}
MEGATRON_DIR=${MEGATRON_DIR:-/root/Megatron-LM}
BASE_DIR=${BASE_DIR:-/root}

# for rerun the task; ends this machine's Ray cluster, nothing else
pkill -9 sglang || true
ray stop --force
sleep 3

# will prevent ray from buffering stdout/stderr
export PYTHONUNBUFFERED=1

if nvidia-smi topo -m 2>/dev/null | grep -q 'NV[0-9]'; then
    HAS_NVLINK=1
else
    HAS_NVLINK=0
fi
NUM_GPUS=${NUM_GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}
echo "HAS_NVLINK: $HAS_NVLINK, NUM_GPUS: $NUM_GPUS"

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

   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1

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

# launch the master node of ray in container
export MASTER_ADDR=${MASTER_ADDR:-"127.0.0.1"}
ray start --head --node-ip-address "${MASTER_ADDR}" --num-gpus "${NUM_GPUS}" --disable-usage-stats \
   --dashboard-host=127.0.0.1 --dashboard-port=8265

RUNTIME_ENV_JSON="{
  \"env_vars\": {
    \"PYTHONPATH\": \"${MEGATRON_DIR}\",
    \"CUDA_DEVICE_MAX_CONNECTIONS\": \"1\",
    \"NCCL_NVLS_ENABLE\": \"${HAS_NVLINK}\"
  }
}"

ray job submit --address="http://127.0.0.1:8265" \
   --runtime-env-json="${RUNTIME_ENV_JSON}" \
   -- python3 train_async.py \
   --actor-num-nodes 1 \
   --actor-num-gpus-per-node "${NUM_GPUS}" \
   "${MODEL_ARGS[@]}" \
   "${CKPT_ARGS[@]}" \
   "${LORA_ARGS[@]}" \
   "${SFT_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" \
   "${WANDB_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${MISC_ARGS[@]}"
