#!/bin/bash
# Sourced by the scripts beside it; copy it with them. Three functions, called in this order:
#
#   check_slime NAME.sh    the checkout, its plugin, Megatron and the model file scripts/models/NAME.sh are there
#   check_job FLAGS...     what the job's flags name is there; what it will write to can be written
#   start_ray DIR          a Ray cluster of the run that saves to DIR
#
# Nothing is started or stopped before the checks are through. What is stopped then is what an earlier start of the same
# run (the same DIR) left: processes that carry this run's mark in their environment, never all of a name. slime's
# own scripts end every process named python, ray or sglang on the machine; do not copy that from them.
#
#   RAY_ADDRESS=http://HOST:8265   submits to that cluster: none is started, none stopped
#   RAY_PORT, DASHBOARD_PORT       other ports than 6379 and 8265

fail() {
   echo "error: $*" >&2
   exit 2
}

# Absolute, because the job runs where `ray start` was run: in slime's checkout, hence the scripts' cd.
SLIME_DIR=$(realpath -m -- "${SLIME_DIR:-/root/slime}")
MEGATRON_DIR=$(realpath -m -- "${MEGATRON_DIR:-/root/Megatron-LM}")
BASE_DIR=$(realpath -m -- "${BASE_DIR:-/root}")
RAY_PORT=${RAY_PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
# shellcheck disable=SC2034
JOB_ADDRESS=${RAY_ADDRESS:-http://127.0.0.1:${DASHBOARD_PORT}}

# will prevent ray from buffering stdout/stderr
export PYTHONUNBUFFERED=1

NUM_GPUS=${NUM_GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}
if nvidia-smi topo -m 2>/dev/null | grep -q 'NV[0-9]'; then
   HAS_NVLINK=1
else
   HAS_NVLINK=0
fi
# shellcheck disable=SC2034
RUNTIME_ENV_JSON="{
  \"env_vars\": {
    \"PYTHONPATH\": \"${MEGATRON_DIR}\",
    \"CUDA_DEVICE_MAX_CONNECTIONS\": \"1\",
    \"NCCL_NVLS_ENABLE\": \"${HAS_NVLINK}\"
  }
}"

check_slime() {
   local patch="slime-lora patch apply --slime ${SLIME_DIR}"
   [ -f "${SLIME_DIR}/train.py" ] || fail "SLIME_DIR=${SLIME_DIR} is no slime checkout: it has no train.py"
   [ -f "${SLIME_DIR}/scripts/models/$1" ] || fail "${SLIME_DIR}/scripts/models/$1: no such file in this slime"
   [ -f "${SLIME_DIR}/slime_plugins/lora/slime/__init__.py" ] \
      || fail "${SLIME_DIR}/slime_plugins/lora is not the plugin; put it there: ${patch}"
   grep -q '@slime_lora\.flags ' "${SLIME_DIR}/slime/utils/arguments.py" \
      || fail "${SLIME_DIR} knows no --use-lora; put it in: ${patch}"
   [ -d "${MEGATRON_DIR}/megatron/core" ] || fail "MEGATRON_DIR=${MEGATRON_DIR} is no Megatron-LM: it has no megatron/core"
   command -v ray >/dev/null || fail "no command 'ray' on this machine"
   [ "${NUM_GPUS}" -gt 0 ] || fail "nvidia-smi shows no GPU; if there are some, say how many: NUM_GPUS=8"
}

check_job() {
   local flag
   while [ $# -gt 0 ]; do
      flag=$1
      shift
      case ${flag} in
      --hf-checkpoint) [ -f "$1/config.json" ] || fail "${flag} $1: no model there, it has no config.json" ;;
      --ref-load) [ -d "$1" ] || fail "${flag} $1: no such directory" ;;
      --prompt-data) need_data "${flag}" "$1" ;;
      --eval-prompt-data)
         while [ $# -gt 1 ] && [[ $1 != --* ]]; do # pairs of a name and a path
            need_data "${flag} $1" "$2"
            shift 2
         done
         ;;
      --save | --lora-export-dir)
         mkdir -p "$1" 2>/dev/null && [ -w "$1" ] || fail "${flag} $1: cannot be written"
         ;;
      esac
   done
}

need_data() {
   [ -e "${2%@\[*}" ] || fail "$1 $2: no such file" # data.jsonl@[0:100] is a part of a file
}

start_ray() {
   if [ -n "${RAY_ADDRESS:-}" ]; then
      echo "submitting to the cluster at ${RAY_ADDRESS}; nothing is started or stopped"
      return
   fi
   RUN=$(realpath -m -- "$1")
   stop_run
   local port
   for port in "${RAY_PORT}" "${DASHBOARD_PORT}"; do
      if (: <>"/dev/tcp/127.0.0.1/${port}") 2>/dev/null; then
         fail "port ${port} is in use, by another run's Ray or somebody's; it is left alone. End it, or submit to it:" \
            "RAY_ADDRESS=http://127.0.0.1:${DASHBOARD_PORT}"
      fi
   done
   # launch the master node of ray in container; SPT_NOENV keeps the mark in processes that rename themselves
   export MASTER_ADDR=${MASTER_ADDR:-"127.0.0.1"}
   SLIME_LORA_RUN=${RUN} SPT_NOENV=1 ray start --head --node-ip-address "${MASTER_ADDR}" --port "${RAY_PORT}" \
      --num-gpus "${NUM_GPUS}" --disable-usage-stats --dashboard-host=127.0.0.1 --dashboard-port="${DASHBOARD_PORT}"
}

# Ends what an earlier start of this run left: Ray, the job, engines.
stop_run() {
   local pids waited
   mapfile -t pids < <(run_pids)
   [ ${#pids[@]} -gt 0 ] || return 0
   echo "stopping what an earlier start of ${RUN} left: ${pids[*]}"
   kill "${pids[@]}" 2>/dev/null || true
   for ((waited = 0; waited < 10 && ${#pids[@]} > 0; waited++)); do
      sleep 1
      mapfile -t pids < <(run_pids)
   done
   [ ${#pids[@]} -eq 0 ] || kill -9 "${pids[@]}" 2>/dev/null || true
}

run_pids() {
   { grep -lzxF "SLIME_LORA_RUN=${RUN}" /proc/[0-9]*/environ 2>/dev/null || true; } | cut -d/ -f3
}
