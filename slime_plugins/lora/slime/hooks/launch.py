"""Flags, what can and cannot work together, and the adapters in slime's model. Light: imported in every process."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path

from slime_plugins.lora.arguments import add_lora_arguments, add_new_tokens, name_new_tokens, validate_lora_args
from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.slime.hooks import distillation
from slime_plugins.lora.slime.hooks.control import flags as control
from slime_plugins.lora.slime.hooks.engine_scheme import scheme_of
from slime_plugins.lora.slime.hooks.paths import TRACKER, resumed_step, step_dir
from slime_plugins.lora.slime.hooks.refusal import Launch
from slime_plugins.lora.slime.hooks.refusals import refused
from slime_plugins.lora.slime.hooks.serving import serve_adapters, transport

logger = logging.getLogger(__name__)

SLIME_FLAGS = (
    "lora_sync", "lora_sync_dir", "lora_sync_lag", "lora_sync_timeout", "lora_adapter_path", "lora_export_dir",
    "lora_critic", "lora_save_merged", "lora_ref", "new_tokens",
)  # fmt: skip


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
            distillation.add_flags(parser)
            control.add_flags(parser)
            return parser

        return add_arguments

    return hooked


def _add_slime_only(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA in slime", "where adapters come from and where they go")

    def add(flag: str, **kwargs) -> None:
        if flag not in parser._option_string_actions:  # add_lora_arguments may have it
            group.add_argument(flag, **kwargs)

    if "--new-tokens" not in parser._option_string_actions:
        add_new_tokens(group)
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
        "--lora-sync-lag",
        type=int,
        default=None,
        metavar="N",
        help="--lora-sync adapter: syncs that a request may live through; that many older versions stay loaded "
        "(default: --max-policy-version-lag where slime has it, else 1)",
    )
    add(
        "--lora-sync-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="--lora-sync adapter: how long an engine may take to answer one request of a sync (default: %(default)g)",
    )
    add(
        "--lora-adapter-path",
        default=None,
        metavar="DIR",
        help="start from this adapter: a PEFT directory or a checkpoint of adapters (a --load that resumes wins)",
    )
    add(
        "--lora-ref",
        choices=("base", "start"),
        default=None,
        help="reference policy of a run with --lora-adapter-path: the base (default), or start, that adapter, kept in "
        "--save/reference",
    )
    add("--lora-export-dir", default=None, metavar="DIR", help="write a PEFT adapter below it with every checkpoint")
    add("--lora-critic", action="store_true", help="adapters and value head on the critic too (else it trains whole)")
    add("--optim", default=None, help=SUPPRESS)  # of QLoRA scripts; see ``refusals``
    add("--lora-save-merged", action="store_true", help="--save-hf: the merged model in merged/, beside the adapter")


def validation(validate):
    """Hook: after slime's own checks, those of LoRA. A combination that cannot work fails here, at launch."""

    @functools.wraps(validate)
    def hooked(args: Namespace, *more, **kwargs):
        result = validate(args, *more, **kwargs)
        if hasattr(args, "use_lora"):
            complete(args)
            validate_in_slime(args)
            control.set_up(args)  # last: it may end the process
        return result

    return hooked


def complete(args: Namespace) -> None:
    """Set what other LoRA flags follow from: trained rows alone are carried as adapters are; tokens by their ids."""
    args.use_lora = args.use_lora or args.freeze_llm
    name_new_tokens(args)


def validate_in_slime(args: Namespace) -> None:
    """Check the LoRA flags against slime's, and set what follows from them (SGLang's LoRA arguments).

    Raises:
        UsageError: with the reason and the way out.
    """
    validate_lora_args(args)
    if not args.use_lora:
        distillation.refuse_unread(args)
        control.refuse_unread(args)
        defaults = ArgumentParser()
        _add_slime_only(defaults)
        given = [n for n in SLIME_FLAGS if getattr(args, n, None) != defaults.get_default(n) and hasattr(args, n)]
        if given:
            shown = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UsageError(f"{shown} given without --use-lora; add --use-lora, or drop them")
        return
    _refuse(args)
    _warn_of_quantised_rollouts(args)
    distillation.set_up(args)
    if args.load is not None and (Path(args.load) / TRACKER).is_file() and step_dir(args.load, args.ckpt_step) is None:
        raise UsageError(f"--load {args.load} has no checkpoint of step {args.ckpt_step or 'its tracker'}")
    if args.load is not None and resumed_step(args) is None:
        # The base, even where it is a Megatron checkpoint with an iteration and an optimizer of its own.
        args.finetune = args.no_load_optim = args.no_load_rng = True
        if args.start_rollout_id is None:
            args.start_rollout_id = 0
    elif args.lora_adapter_path is not None:
        logger.warning("LoRA: --load %s is resumed; --lora-adapter-path is not read", args.load)
    if args.lora_sync == "adapter" and not args.debug_train_only:
        serve_adapters(args)
        logger.info("LoRA: adapters go to the engines as %s", transport(args))
    control.check_rule(args)


def _warn_of_quantised_rollouts(args: Namespace) -> None:
    launch = Launch(args)
    told = launch.base.get("quantization_config")
    if not told or launch.adapter_sync or args.debug_train_only:
        return
    scheme = scheme_of(told)
    if scheme is None:
        measured = "which counts the rounding to the base's own dtype, does not see it"
    else:
        measured = f"measured after slime's quantiser ({scheme}), says how far off the engines are"
    warnings.warn(
        f"--hf-checkpoint {args.hf_checkpoint} is quantised, and --lora-sync merged sends W + update in that form: "
        f"updates below its step are lost; train/lora/sync_lost, {measured}; --lora-sync adapter keeps them",
        stacklevel=3,
    )


def _refuse(args: Namespace) -> None:
    for row in refused(Launch(args)):
        raise UsageError(row.reason)
    if args.lora_save_merged and args.save_hf is None:
        raise UsageError("--lora-save-merged says what --save-hf writes; give --save-hf too")


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


def optimizing(get_megatron_optimizer):
    """Hook: LoRA+, in the optimizer of a model that has adapters."""

    @functools.wraps(get_megatron_optimizer)
    def hooked(config, model_chunks, *more, **kwargs):
        from megatron.training.global_vars import get_args

        from slime_plugins.lora.adapters import has_adapters
        from slime_plugins.lora.control.rates import with_lora_plus

        args = get_args()
        ratio = args.lora_plus_ratio if getattr(args, "use_lora", False) and has_adapters(model_chunks) else 1.0
        return with_lora_plus(get_megatron_optimizer, ratio)(config, model_chunks, *more, **kwargs)

    return hooked


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
    report = apply_lora(chunks, LoRAConfig.from_args(args), linears=args.lora_linears)
    if role == "critic":
        for chunk in chunks:
            if getattr(chunk, "post_process", False):
                chunk.output_layer.requires_grad_(True)
    if dist.get_rank() == 0:
        logger.info("LoRA on the %s: %s", role, report)
