"""What cannot work together, known at launch: one row per combination, with the reason and the way out. No torch.

A row holds where reading or running the other side's code showed wrong weights, a hang, or a failure after minutes.
"""

from __future__ import annotations

from argparse import Namespace

from packaging.version import Version

from slime_plugins.lora.names import in_linear_attention
from slime_plugins.lora.slime.hooks.control.refusals import CONTROL
from slime_plugins.lora.slime.hooks.gkd_refusals import GKD
from slime_plugins.lora.slime.hooks.refusal import ROUTER, Launch, Refusal

_QKV, _FC1 = "self_attention.linear_qkv", "linear_fc1"


def refused(launch: Launch) -> list[Refusal]:
    """Every row that holds for this launch."""
    rows = [
        *TRAINING,
        *CONTROL,
        *(ADAPTER_SYNC if launch.adapter_sync else ()),
        *(GKD if launch.given("use_gkd") else ()),
    ]
    return [row for row in rows if row.when(launch)]


def _linear_attention(launch: Launch) -> bool:
    kinds = launch.base.get("layer_types") or ()
    return "linear_attention" in kinds or bool(launch.base.get("linear_num_key_heads"))


def _bitsandbytes(launch: Launch) -> bool:
    told = launch.base.get("quantization_config")
    return isinstance(told, dict) and told.get("quant_method") == "bitsandbytes"


def _frozen_first(launch: Launch) -> bool:
    """As slime's ``ModelConfig.resolve`` has it: without ``update_weights``, a model of another path is frozen."""
    try:
        first = next(iter(launch.models), None)
    except ValueError:
        return False  # slime stops at it, and ``doctor`` says so
    if first is None or launch.given("debug_train_only"):
        return False
    if first.get("update_weights") is not None:
        return not first["update_weights"]
    groups = first.get("server_groups") or first.get("engine_groups") or []
    paths = [(group.get("overrides") or {}).get("model_path") for group in groups if isinstance(group, dict)]
    path = next((path for path in paths if path), first.get("model_path"))
    return path not in (None, launch.given("hf_checkpoint"))


def _cuda_graphs(launch: Launch) -> bool:
    impl = launch.given("cuda_graph_impl")
    return bool(launch.given("enable_cuda_graph") or launch.given("external_cuda_graph") or impl not in (None, "none"))


TRAINING = (
    Refusal(
        "optimizer of QLoRA scripts",
        lambda launch: launch.given("optim"),
        "--optim is not Megatron's; drop it: adapters take 12 bytes of optimizer state per parameter over the "
        "data-parallel ranks (21 MiB a GPU for Qwen3-32B, rank 8 on q, k, v, o, DP 8), so there is nothing to page",
    ),
    Refusal(
        "base trains",
        lambda launch: not launch.given("lora_only_trainable"),
        "--no-lora-only-trainable trains the base, which slime's reference policy and checkpoints take to be "
        "frozen; train without --use-lora, or drop it",
    ),
    Refusal(
        "slime's choice of parameters",
        lambda launch: launch.given("only_train_params_name_list") or launch.given("freeze_params_name_list"),
        "--only-train-params-name-list and --freeze-params-name-list choose what trains, and so does --use-lora; "
        "choose linears with --lora-target-modules and --lora-exclude-modules instead",
    ),
    Refusal(
        "MTP training",
        lambda launch: launch.given("enable_mtp_training"),
        "--enable-mtp-training trains the MTP layers, which --use-lora freezes with the base; drop one of them",
    ),
    Refusal(
        "FP8 parameters",
        lambda launch: launch.given("fp8_param_gather"),
        "--fp8-param-gather keeps the weights in FP8, into which no adapter can be merged; drop it",
    ),
    Refusal(
        "bridge",
        lambda launch: launch.given("megatron_to_hf_mode") == "bridge",
        "--megatron-to-hf-mode bridge reads the live weights behind slime's back; use --megatron-to-hf-mode raw",
    ),
    Refusal(
        "meta device",
        lambda launch: launch.given("init_model_with_meta_device"),
        "--init-model-with-meta-device builds weights after the adapters have been initialised; drop it",
    ),
    Refusal(
        "optimizer that no checkpoint holds",
        lambda launch: (
            (launch.given("optimizer_cpu_offload") or launch.given("use_precision_aware_optimizer"))
            and not launch.given("no_save_optim")
        ),
        "--optimizer-cpu-offload and --use-precision-aware-optimizer save memory that an adapter's optimizer does "
        "not take, and its checkpoint cannot hold their state; drop them, or add --no-save-optim",
    ),
    Refusal(
        "critic saves over the actor",
        lambda launch: (
            launch.given("use_critic")
            and launch.given("save")
            and not (launch.given("megatron_config_path") or launch.given("critic_save"))
        ),
        "the critic would save its model into the actor's --save; give it one of its own: --megatron-config-path "
        "(role: critic, overrides: {load: ..., save: ...}; before slime v0.3.0: --critic-load, --critic-save)",
    ),
    Refusal(
        "critic's adapters without a critic",
        lambda launch: launch.given("lora_critic") and not launch.given("use_critic"),
        "--lora-critic without a critic; it goes with --advantage-estimator ppo",
    ),
    Refusal(
        "router bias",
        lambda launch: launch.given("moe_router_enable_expert_bias") and launch.given("moe_router_bias_update_rate"),
        "--moe-router-bias-update-rate above 0 moves the router's expert bias, which is part of the frozen base: it "
        "is in no checkpoint of adapters and the reference drifts with it; set --moe-router-bias-update-rate 0",
    ),
    Refusal(
        "delta sync from an adapter",
        lambda launch: (
            launch.given("update_weight_mode") == "delta"
            and not launch.given("debug_train_only")
            and (launch.resumes or launch.given("lora_adapter_path"))
        ),
        "--update-weight-mode delta sends nothing at the first sync, so a run that starts from an adapter (--load, "
        "--lora-adapter-path) would roll out its first batch on the base; use --update-weight-mode full",
    ),
    Refusal(
        "op fuser",
        lambda launch: launch.given("use_transformer_engine_op_fuser"),
        "--use-transformer-engine-op-fuser computes MLPs from the weights alone and never calls the adapters; drop it",
    ),
    Refusal(
        "shared experts' overlap",
        lambda launch: launch.given("moe_shared_expert_overlap") and launch.shared,
        "--moe-shared-expert-overlap takes the shared experts' linears apart, past their adapters; drop it, or "
        "exclude them with --lora-exclude-modules shared_experts.linear_fc1 shared_experts.linear_fc2",
    ),
    Refusal(
        "experts' inputs given back",
        lambda launch: (
            launch.given("overlap_moe_expert_parallel_comm")
            and any(launch.given(name) for name in ("fp8", "fp8_format", "fp4", "fp4_format"))
            and launch.moe
        ),
        "--overlap-moe-expert-parallel-comm with FP8 or FP4 gives the experts' inputs back once they are cast, and "
        "their adapters' gradients are made of them; drop one of them, or --lora-exclude-modules experts.linear_fc1 "
        "experts.linear_fc2",
    ),
    Refusal(
        "experts without sequence parallelism",
        lambda launch: (
            (launch.given("tensor_model_parallel_size") or 1) > 1
            and launch.given("num_experts")
            and not launch.given("sequence_parallel")
        ),
        "--tensor-model-parallel-size above 1 on a base with experts: Megatron trains them under sequence parallelism "
        "alone and stops at the first step; add --sequence-parallel",
    ),
    Refusal(
        "linear attention over context parallelism",
        lambda launch: (launch.given("context_parallel_size") or 1) > 1 and _linear_attention(launch),
        "--context-parallel-size above 1 on a base with linear attention: slime's gather drops the gradients that "
        "cross chunks, and every adapter below such a layer trains on wrong ones; use --context-parallel-size 1",
    ),
    Refusal(
        "deepgemm",
        lambda launch: (
            launch.given("megatron_deepgemm_forward_layers") or launch.given("megatron_deepgemm_moe_forward_layers")
        ),
        "--megatron-deepgemm-forward-layers and --megatron-deepgemm-moe-forward-layers replace forwards of exact "
        "classes, past the adapters; drop them",
    ),
    Refusal(
        "delayed weight gradients",
        lambda launch: launch.given("delay_wgrad_compute"),
        '--delay-wgrad-compute queues weight gradients that a frozen base never has ("Pop empty queue" in the first '
        "backward); drop it",
    ),
    Refusal(
        "engines that start in 4 bits",
        lambda launch: _bitsandbytes(launch) and not launch.given("debug_train_only"),
        "--hf-checkpoint holds bitsandbytes codes, and engines that start from them take no dense weights and are not "
        "known to have these over several ranks; write its weights with `slime-lora dequantize`, give those as "
        "--hf-checkpoint and the codes as --ref-load",
    ),
    Refusal(
        "frozen model first",
        _frozen_first,
        "--sglang-config: its first model gets no weights, but slime's rollouts ask the first one: training would "
        "learn from answers of weights that no sync reaches; list the trained model first",
    ),
    Refusal(
        "CUDA graphs",
        _cuda_graphs,
        "--enable-cuda-graph, --external-cuda-graph and --cuda-graph-impl replay what was captured, so the adapters "
        "cannot be switched off for the reference or a teacher; drop them",
    ),
)
"""Of every run with ``--use-lora``."""


def _version_below(launch: Launch, number: str) -> bool:
    """SGLang is older, or there is none here to ask: then it is taken for the one that slime pins."""
    return launch.sglang is None or launch.sglang < Version(number)


def _speculates_without_adapters(launch: Launch) -> bool:
    known = [None, "NGRAM"]
    if not _version_below(launch, "0.5.23"):
        known += ["EAGLE", "EAGLE3", "NEXTN", "DFLASH", "DSPARK"]
    return launch.given("sglang_speculative_algorithm") not in known


def _leaves(launch: Launch, path: str) -> set[str]:
    return launch.adapted.get(path, set())


def _half_qkv(launch: Launch) -> bool:
    return bool(_leaves(launch, _QKV)) and not _leaves(launch, _QKV) >= {"q_proj", "v_proj"}


def _up_without_gate(launch: Launch) -> bool:
    return any(leaves == {"up_proj"} for path, leaves in launch.adapted.items() if path.endswith(_FC1))


def _adapted_linear_attention(launch: Launch) -> set[str]:
    """Leaves of linear attention that get adapters."""
    return {path.rsplit(".", 1)[1] for path in launch.adapted if in_linear_attention(path)}


def _mla_down(launch: Launch) -> set[str]:
    return _leaves(launch, "self_attention.linear_q_down_proj") | _leaves(launch, "self_attention.linear_kv_down_proj")


ADAPTER_SYNC = (
    Refusal(
        "trained rows",
        lambda launch: launch.given("trainable_token_indices"),
        "--lora-sync adapter with trained vocabulary rows: SGLang serves adapters of linears alone and would ignore "
        "them; use --lora-sync merged, which sends the changed rows with the weights",
    ),
    Refusal(
        "SGLang without plugins",
        lambda launch: launch.sglang is not None and launch.sglang < Version("0.5.12"),
        "--lora-sync adapter needs SGLang 0.5.12 or newer: older ones load no server plugins, and without "
        "slime-lora's a request that names no adapter gets the base in silence; use --lora-sync merged",
    ),
    Refusal(
        "delta",
        lambda launch: launch.given("update_weight_mode") == "delta",
        "--update-weight-mode delta sends weights, --lora-sync adapter does not; use --lora-sync merged",
    ),
    Refusal(
        "release train",
        lambda launch: launch.given("release_train"),
        "--release-train hands whole checkpoints to the engines; use --lora-sync merged",
    ),
    Refusal(
        "disk and colocate",
        lambda launch: launch.given("update_weight_transport") == "disk" and launch.given("colocate"),
        "--lora-sync adapter with --colocate sends tensors; drop --update-weight-transport disk",
    ),
    Refusal(
        "weight check",
        lambda launch: launch.given("check_weight_update_equal"),
        "--check-weight-update-equal overwrites the engines' weights and waits for a sync to restore them, which "
        "--lora-sync adapter does not; drop it, or use --lora-sync merged",
    ),
    Refusal(
        "data-parallel engines",
        lambda launch: (launch.given("sglang_dp_size") or 1) > 1 or launch.given("sglang_enable_dp_attention"),
        "--sglang-dp-size above 1 and --sglang-enable-dp-attention: SGLang loads adapters into engines of one "
        "data-parallel rank alone; use more engines (--rollout-num-gpus-per-engine), or --lora-sync merged",
    ),
    Refusal(
        "speculative decoding",
        _speculates_without_adapters,
        "--sglang-speculative-algorithm: this SGLang serves adapters with NGRAM alone (0.5.23 and newer with EAGLE, "
        "EAGLE3, NEXTN, DFLASH and DSPARK too, whose drafts stay those of the base); drop it, or use --lora-sync "
        "merged",
    ),
    Refusal(
        "tokenizer workers",
        lambda launch: (launch.given("sglang_tokenizer_worker_num") or 1) > 1,
        "--sglang-tokenizer-worker-num above 1: every worker keeps a list of adapters of its own, and a load reaches "
        "one; drop it, or use --lora-sync merged",
    ),
    Refusal(
        "MoE runner",
        lambda launch: launch.moe and launch.given("sglang_moe_runner_backend") not in (None, "auto", "triton"),
        "--sglang-moe-runner-backend: adapters of experts are served by SGLang's triton runner; use triton, leave the "
        "experts out (--lora-exclude-modules experts.linear_fc1 experts.linear_fc2), or use --lora-sync merged",
    ),
    Refusal(
        "expert all-to-all",
        lambda launch: launch.moe and launch.given("sglang_moe_a2a_backend") not in (None, "none"),
        "--sglang-moe-a2a-backend brings an expert runner of its own, which serves no adapters; drop it, leave the "
        "experts out (--lora-exclude-modules experts.linear_fc1 experts.linear_fc2), or use --lora-sync merged",
    ),
    Refusal(
        "evicted adapters",
        lambda launch: (
            launch.given("sglang_max_loaded_loras") is not None
            and launch.given("sglang_max_loaded_loras") < versions_kept(launch.args)
        ),
        "--sglang-max-loaded-loras is below the number of versions that a sync keeps loaded, so SGLang would drop one "
        "and look for its files later; drop the flag",
    ),
    Refusal(
        "router",
        lambda launch: ROUTER in launch.adapted,
        "SGLang serves no adapter of the router; leave it out of --lora-target-modules, or use --lora-sync merged",
    ),
    Refusal(
        "part of q, k, v",
        _half_qkv,
        "SGLang stacks q, k and v and takes an adapter of q_proj and v_proj at least; target linear_qkv, or both, or "
        "use --lora-sync merged",
    ),
    Refusal(
        "up without gate",
        _up_without_gate,
        "SGLang stacks gate and up and takes no adapter of up_proj alone; target linear_fc1, or use --lora-sync "
        "merged",
    ),
    Refusal(
        "part of the latent down-projections",
        lambda launch: len(_mla_down(launch)) == 1 and launch.given("q_lora_rank"),
        "SGLang fuses q_a_proj and kv_a_proj_with_mqa and takes an adapter of both or of neither; target both "
        "(linear_q_down_proj linear_kv_down_proj), or use --lora-sync merged",
    ),
    Refusal(
        "latent attention without a low-rank query",
        lambda launch: (
            launch.given("multi_latent_attention")
            and not launch.given("q_lora_rank")
            and (_mla_down(launch) or _leaves(launch, "self_attention.linear_q_proj"))
        ),
        "this base has latent attention without q_lora_rank, for which SGLang has no adapters of q_proj and "
        "kv_a_proj_with_mqa: leave them out (--lora-exclude-modules linear_q_proj linear_kv_down_proj), or use "
        "--lora-sync merged",
    ),
    Refusal(
        "shared experts sized as dense ones",
        lambda launch: (
            launch.base.get("model_type") in ("qwen2_moe", "qwen3_next")
            and (launch.shared or launch.moe)
            and _version_below(launch, "0.5.23")
        ),
        "this SGLang sizes the shared expert of Qwen2-MoE and Qwen3-Next by the wrong width and dies at its start; "
        "adapt attention alone (--lora-target-modules linear_qkv linear_proj), take SGLang 0.5.23 or newer, or use "
        "--lora-sync merged",
    ),
    Refusal(
        "gated attention",
        lambda launch: launch.base.get("model_type") == "qwen3_next" and _leaves(launch, _QKV),
        "SGLang makes no room for the gate in Qwen3-Next's q_proj; leave it out (--lora-exclude-modules linear_qkv), "
        "or use --lora-sync merged",
    ),
    Refusal(
        "linear attention of Qwen3-Next",
        lambda launch: launch.base.get("model_type") == "qwen3_next" and _adapted_linear_attention(launch),
        "SGLang makes room for adapters of linear attention in Qwen3.5 alone, not in Qwen3-Next; leave it out "
        "(--lora-exclude-modules in_proj_qkvz out_proj), or use --lora-sync merged",
    ),
    Refusal(
        "gates of linear attention",
        lambda launch: {"in_proj_a", "in_proj_b", "in_proj_ba"} & _adapted_linear_attention(launch),
        "SGLang serves no adapter of in_proj_a, in_proj_b and in_proj_ba; leave them out of --lora-target-modules, or "
        "use --lora-sync merged",
    ),
)
"""Of ``--lora-sync adapter``: what SGLang would refuse, drop or die of."""


def versions_kept(args: Namespace) -> int:
    """Adapter versions on an engine at a time: the current one and those that requests under way may still name.

    A rollout of slime's names the adapter with every request, and a sync waits for the rollout under way, with
    ``--partial-rollout`` too; one version back covers requests that overlap a sync. A rollout function that keeps
    requests running over more syncs says so with ``--lora-sync-lag``.
    """
    lag = getattr(args, "lora_sync_lag", None)
    if lag is None:
        lag = getattr(args, "max_policy_version_lag", None)  # slime's own name for it, where it has one
    return 1 + max(1 if lag is None else lag, 1)
