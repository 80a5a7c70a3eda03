"""Flags, what can and cannot work together, and the adapters in slime's model. Light: imported in every process."""

from __future__ import annotations

import contextlib
import functools
import logging
from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path

from slime_plugins.lora.arguments import add_lora_arguments, validate_lora_args
from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import LINEARS, hf_names
from slime_plugins.lora.slime.hooks.paths import TRACKER, adapter_step_dir, step_dir

logger = logging.getLogger(__name__)

SLIME_FLAGS = ("lora_sync", "lora_sync_dir", "lora_adapter_path", "lora_export_dir", "lora_critic", "lora_save_merged")
SGLANG_LORAS_PER_BATCH = 8
"""SGLang's default for --max-loras-per-batch: GPU memory for that many adapters."""
LORAS_IN_FLIGHT = 3
"""The current adapter, the one that requests under way still name, and none (the base)."""


def flags(get_provider):
    """Hook: the LoRA flags in slime's parser."""

    @functools.wraps(get_provider)
    def hooked(*args, **kwargs):
        add_slime_arguments = get_provider(*args, **kwargs)

        @functools.wraps(add_slime_arguments)
        def add_arguments(parser):
            parser = add_slime_arguments(parser)
            add_lora_arguments(parser)
            _add_slime_only(parser)
            return parser

        return add_arguments

    return hooked


def _add_slime_only(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA in slime", "where adapters come from and where they go")

    def add(flag: str, **kwargs) -> None:
        if flag not in parser._option_string_actions:  # add_lora_arguments may have it
            group.add_argument(flag, **kwargs)

    add(
        "--lora-sync",
        choices=("merged", "adapter"),
        default="merged",
        help="merged: W + scaling B A to the rollout engines, tensor by tensor (works with every engine); "
        "adapter: the adapter alone, to SGLang's LoRA endpoints (default: %(default)s)",
    )
    add(
        "--lora-sync-dir",
        default=None,
        metavar="DIR",
        help="--lora-sync adapter without --colocate: a directory that trainer and engines share "
        "(default: --update-weight-disk-dir)",
    )
    add(
        "--lora-adapter-path",
        default=None,
        metavar="DIR",
        help="start from this adapter: a PEFT directory or a checkpoint of adapters (a --load that resumes wins)",
    )
    add("--lora-export-dir", default=None, metavar="DIR", help="write a PEFT adapter below it with every checkpoint")
    add("--lora-critic", action="store_true", help="adapters and value head on the critic too (else it trains whole)")
    add("--optim", default=None, help=SUPPRESS)  # of QLoRA scripts; see ``_refuse``
    add("--lora-save-merged", action="store_true", help="--save-hf: the merged model in merged/, beside the adapter")


def validation(validate):
    """Hook: after slime's own checks, those of LoRA. A combination that cannot work fails here, at launch."""

    @functools.wraps(validate)
    def hooked(args: Namespace, *more, **kwargs):
        result = validate(args, *more, **kwargs)
        if hasattr(args, "use_lora"):
            validate_in_slime(args)
        return result

    return hooked


def validate_in_slime(args: Namespace) -> None:
    """Check the LoRA flags against slime's, and set what follows from them (SGLang's LoRA arguments).

    Raises:
        UsageError: with the reason and the way out.
    """
    validate_lora_args(args)
    if not args.use_lora:
        defaults = ArgumentParser()
        _add_slime_only(defaults)
        given = [n for n in SLIME_FLAGS if getattr(args, n, None) != defaults.get_default(n) and hasattr(args, n)]
        if given:
            shown = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UsageError(f"{shown} given without --use-lora; add --use-lora, or drop them")
        return
    _refuse(args)
    if args.load is not None and (Path(args.load) / TRACKER).is_file() and step_dir(args.load, args.ckpt_step) is None:
        raise UsageError(f"--load {args.load} has no checkpoint of step {args.ckpt_step or 'its tracker'}")
    if args.load is not None and adapter_step_dir(args.load, args.ckpt_step) is None:
        # The base, even where it is a Megatron checkpoint with an iteration and an optimizer of its own.
        args.finetune = args.no_load_optim = args.no_load_rng = True
        if args.start_rollout_id is None:
            args.start_rollout_id = 0
    elif args.lora_adapter_path is not None:
        logger.warning("LoRA: --load %s is resumed; --lora-adapter-path is not read", args.load)
    if args.lora_sync == "adapter" and not args.debug_train_only:
        _serve_adapters(args)


def _refuse(args: Namespace) -> None:
    bridge = getattr(args, "megatron_to_hf_mode", "raw") == "bridge"
    adapter_sync = args.lora_sync == "adapter"
    transport = getattr(args, "update_weight_transport", None)
    for wrong, reason in (
        (
            getattr(args, "optim", None),
            f"--optim {getattr(args, 'optim', None)} is not Megatron's; drop it: adapters take 12 bytes of optimizer "
            "state per parameter over the data-parallel ranks (21 MiB a GPU for Qwen3-32B, rank 8 on q, k, v, o, "
            "DP 8), so there is nothing to page",
        ),
        (
            not args.lora_only_trainable,
            "--no-lora-only-trainable trains the base, which slime's reference policy and checkpoints take to be "
            "frozen; train without --use-lora, or drop it",
        ),
        (
            getattr(args, "only_train_params_name_list", None) or getattr(args, "freeze_params_name_list", None),
            "--only-train-params-name-list and --freeze-params-name-list choose what trains, and so does --use-lora; "
            "choose linears with --lora-target-modules and --lora-exclude-modules instead",
        ),
        (
            getattr(args, "enable_mtp_training", False),
            "--enable-mtp-training trains the MTP layers, which --use-lora freezes with the base; drop one of them",
        ),
        (
            getattr(args, "fp8_param_gather", False),
            "--fp8-param-gather keeps the weights in FP8, into which no adapter can be merged; drop it",
        ),
        (
            bridge,
            "--megatron-to-hf-mode bridge reads the live weights behind slime's back; use --megatron-to-hf-mode raw",
        ),
        (
            getattr(args, "init_model_with_meta_device", False),
            "--init-model-with-meta-device builds weights after the adapters have been initialised; drop it",
        ),
        (
            (getattr(args, "optimizer_cpu_offload", False) or getattr(args, "use_precision_aware_optimizer", False))
            and not args.no_save_optim,
            "--optimizer-cpu-offload and --use-precision-aware-optimizer save memory that an adapter's optimizer does "
            "not take, and its checkpoint cannot hold their state; drop them, or add --no-save-optim",
        ),
        (
            args.use_critic
            and getattr(args, "save", None)
            and not (getattr(args, "megatron_config_path", None) or getattr(args, "critic_save", None)),
            "the critic would save its model into the actor's --save; give it one of its own: --megatron-config-path "
            "(role: critic, overrides: {load: ..., save: ...}; before slime v0.3.0: --critic-load, --critic-save)",
        ),
        (
            args.lora_critic and not args.use_critic,
            "--lora-critic without a critic; it goes with --advantage-estimator ppo",
        ),
        (
            adapter_sync and getattr(args, "update_weight_mode", "full") == "delta",
            "--update-weight-mode delta sends weights, --lora-sync adapter does not; use --lora-sync merged",
        ),
        (
            adapter_sync and getattr(args, "release_train", False),
            "--release-train hands whole checkpoints to the engines; use --lora-sync merged",
        ),
        (
            adapter_sync and transport == "disk" and args.colocate,
            "--lora-sync adapter with --colocate sends tensors; drop --update-weight-transport disk",
        ),
    ):
        if wrong:
            raise UsageError(reason)
    if args.lora_save_merged and args.save_hf is None:
        raise UsageError("--lora-save-merged says what --save-hf writes; give --save-hf too")


def _serve_adapters(args: Namespace) -> None:
    """Set SGLang's LoRA arguments from the LoRA flags."""
    if not hasattr(args, "sglang_enable_lora"):
        raise UsageError("--lora-sync adapter: this SGLang has no --enable-lora; use --lora-sync merged")
    config = LoRAConfig.from_args(args)
    rank = max([config.rank, *config.rank_pattern.values()])
    if args.sglang_max_lora_rank is not None and args.sglang_max_lora_rank < rank:
        raise UsageError(f"--sglang-max-lora-rank is {args.sglang_max_lora_rank}, but the adapter has rank {rank}")
    args.sglang_enable_lora = True
    args.sglang_max_lora_rank = args.sglang_max_lora_rank or rank
    args.sglang_lora_target_modules = args.sglang_lora_target_modules or projections(config, args)
    if getattr(args, "sglang_max_loras_per_batch", None) == SGLANG_LORAS_PER_BATCH:
        args.sglang_max_loras_per_batch = LORAS_IN_FLIGHT
    if args.offload_rollout:
        # The engines forget their weights while they are offloaded, and this sync does not bring the base again.
        if not hasattr(args, "sglang_enable_weights_cpu_backup"):
            raise UsageError(
                "--lora-sync adapter with --offload-rollout needs an SGLang with --enable-weights-cpu-backup, or the "
                "engines lose their base; use --no-offload-rollout or --lora-sync merged"
            )
        args.sglang_enable_weights_cpu_backup = True
    if not args.colocate:
        args.lora_sync_dir = args.lora_sync_dir or getattr(args, "update_weight_disk_dir", None)
        if not args.lora_sync_dir:
            raise UsageError(
                "--lora-sync adapter without --colocate passes the adapter through files: give --lora-sync-dir, a "
                "directory that trainer and engines share"
            )
    if getattr(args, "update_weight_transport", None) == "disk":
        args.update_weight_transport = "nccl"  # or slime's train group would wait for a whole checkpoint on disk


def projections(config: LoRAConfig, args: Namespace) -> list[str]:
    """Hugging Face leaves that an adapter touches, in the table's order: what SGLang must make room for."""
    from slime_plugins.lora.targets import Targets

    mla = getattr(args, "multi_latent_attention", False)
    targets = Targets(config.target_modules, config.exclude_modules)
    found = {}
    for path, record in LINEARS.items():
        if record.mla not in (None, bool(mla)):
            continue
        for layer in range(args.num_layers):
            name = f"decoder.layers.{layer}.{path}"
            for part in targets.parts_of(name):
                found[hf_names(name)[part].rsplit(".", 1)[-1]] = None
    return list(found)


def model_provider(get_provider):
    """Hook: adapters into every model that slime builds for a role that wants them, before DDP wraps it."""

    @functools.wraps(get_provider)
    def hooked(args: Namespace, role: str = "actor"):
        provider = get_provider(args, role)
        if not wants_adapters(args, role):
            return provider
        chunks = []

        @functools.wraps(provider)
        def with_adapters(*more, **kwargs):
            with _packing_if(BaseQuant.from_args(args)):
                model = provider(*more, **kwargs)
            chunks.append(model)
            if len(chunks) == (getattr(args, "virtual_pipeline_model_parallel_size", None) or 1):
                _adapt(chunks, args, role)  # all chunks at once: a target may match in one of them alone
                chunks.clear()
            return model

        return with_adapters

    return hooked


def _packing_if(quant: BaseQuant | None) -> contextlib.AbstractContextManager:
    """Build with codes in place of dense weights, if that is asked for."""
    if quant is None:
        return contextlib.nullcontext()
    from slime_plugins.lora.packing import packing

    return packing()


def wants_adapters(args: Namespace, role: str) -> bool:
    """Does the model of this role get adapters?"""
    return bool(getattr(args, "use_lora", False)) and (role == "actor" or getattr(args, "lora_critic", False))


def _adapt(chunks: list, args: Namespace, role: str) -> None:
    import torch.distributed as dist

    from slime_plugins.lora.inject import apply_lora
    from slime_plugins.lora.packing import keep_packed

    quant = BaseQuant.from_args(args)
    if quant is not None:
        keep_packed(chunks, quant)
    report = apply_lora(chunks, LoRAConfig.from_args(args))
    if role == "critic":
        for chunk in chunks:
            if getattr(chunk, "post_process", False):
                chunk.output_layer.requires_grad_(True)
    if dist.get_rank() == 0:
        logger.info("LoRA on the %s: %s", role, report)
