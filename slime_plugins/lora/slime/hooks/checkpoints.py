"""Loading and saving in slime: the base as slime does it with the adapters out of sight, the adapters by themselves.

--load                      first run                       resumed
missing, or a base          base from it (or --ref-load)    -
a checkpoint of adapters    -                               base from --ref-load, else --hf-checkpoint; adapters,
                                                            their optimizer, scheduler and RNG from it
"""

from __future__ import annotations

import contextlib
import functools
import logging
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from slime_plugins.lora.adapters import has_adapters
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.ends.export import export_peft
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files.json_text import read_object
from slime_plugins.lora.layers import hide_adapters
from slime_plugins.lora.names import is_adapter
from slime_plugins.lora.packing import dense_on_host, finish_packing
from slime_plugins.lora.peft.directory import open_tensors
from slime_plugins.lora.peft.extra import refuse_extra
from slime_plugins.lora.quant.codes import check_codes
from slime_plugins.lora.quantize import base_quant_of
from slime_plugins.lora.slime.hooks import merged_sync
from slime_plugins.lora.slime.hooks.base_check import remember_base
from slime_plugins.lora.slime.hooks.paths import adapter_step_dir, step_dir

logger = logging.getLogger(__name__)

_of_another_policy = False
"""slime's loader is told neither role nor tag, and an actor that is evaluated alone has no optimizer either."""
MERGED = "merged"
"""Directory below --save-hf's for the merged model of --lora-save-merged."""


def loading(load_checkpoint):
    """Hook: ``load_checkpoint``. The actor gets its adapters too, with an optimizer or, evaluated alone, without."""

    @functools.wraps(load_checkpoint)
    def hooked(ddp_model, optimizer, opt_param_scheduler, *more, **kwargs):
        if not has_adapters(ddp_model):
            return load_checkpoint(ddp_model, optimizer, opt_param_scheduler, *more, **kwargs)
        from megatron.training.global_vars import get_args

        args = get_args()

        def load_base():
            return load_checkpoint(ddp_model, None, None, *more, **kwargs)

        if _of_another_policy:
            with _base_only(ddp_model):
                return load_base()
        if is_critic(ddp_model):
            if _holds_whole_model(args):
                return load_checkpoint(ddp_model, optimizer, opt_param_scheduler, *more, **kwargs)
            with _base_only(ddp_model):
                loaded = load_base()
            if optimizer is not None:
                optimizer.reload_model_params()
            return loaded
        return _load(args, ddp_model, optimizer, opt_param_scheduler, load_base), 0

    return hooked


@contextlib.contextmanager
def another_policy() -> Iterator[None]:
    """Inside, what is loaded is a reference, a teacher, an old actor: base weights alone."""
    global _of_another_policy
    before, _of_another_policy = _of_another_policy, True
    try:
        yield
    finally:
        _of_another_policy = before


def is_critic(model) -> bool:
    """slime marks the first chunk of a model with its role."""
    return getattr(model[0], "role", "actor") == "critic"


def _holds_whole_model(args: Namespace) -> bool:
    """Is --load what a critic with adapters has saved: Megatron's checkpoint of all of it, adapters and value head?"""
    from megatron.core.dist_checkpointing.serialization import load_tensors_metadata

    found = step_dir(args.load, args.ckpt_step)
    if found is None or not (found / ".metadata").is_file():
        return False
    return any(is_adapter(key) for key in load_tensors_metadata(str(found)))


def _load(args: Namespace, model, optimizer, scheduler, load_base) -> int:
    """Base, then adapters. Returns the iteration that slime goes on from, as its own loader does."""
    resumed = adapter_step_dir(args.load, args.ckpt_step) is not None
    base, base_step = base_source(args)
    quant = BaseQuant.from_args(args)
    files = _hf_files(base, quant)
    if quant is not None and files is not None:
        _check_form(quant, files)
    with (
        _base_only(model),
        _codes_read(files) if files is not None and files.coded else contextlib.nullcontext(),
        dense_on_host(model) if quant is not None and not _is_hf(base) else contextlib.nullcontext(),
        _changed(args, load=str(base), ckpt_step=base_step, finetune=True, no_load_optim=True, no_load_rng=True),
    ):
        load_base()
    if quant is not None:
        logger.info("LoRA: %s", finish_packing(model, quant, codes_of=base if _is_hf(base) else None))
    remember_base(model, base, base_step)
    logger.info("LoRA: base from %s", base)
    if resumed:
        return _resume(args, model, optimizer, scheduler)
    if args.lora_adapter_path:
        _start_from(model, args.lora_adapter_path)
    if optimizer is not None:
        optimizer.reload_model_params()  # or the first step would undo the load
    return 0


def _resume(args: Namespace, model, optimizer, scheduler) -> int:
    from slime_plugins.lora.checkpoint.load import load_adapter

    fresh = args.finetune or args.no_load_optim or args.no_save_optim
    loaded = load_adapter(
        model,
        adapter_step_dir(args.load, args.ckpt_step) or args.load,
        optimizer=optimizer,
        scheduler=None if fresh else scheduler,
        fresh_optimizer=fresh,
        restore_rng=not (args.finetune or args.no_load_rng),
    )
    logger.info("LoRA: adapters of step %s from %s%s", loaded.step, args.load, ", optimizer fresh" * fresh)
    return 0 if args.finetune else loaded.step or 0


def _is_hf(base: str) -> bool:
    return (Path(base) / "config.json").is_file()


def _hf_files(base: str, quant: BaseQuant | None) -> BaseCheckpoint | None:
    """Of a Hugging Face directory whose form matters: it may hold codes, or codes are to be made of it."""
    if not _is_hf(base):
        return None
    told = "quantization_config" in read_object(Path(base) / "config.json")
    return BaseCheckpoint(base) if told or quant is not None else None


def _check_form(quant: BaseQuant, base: BaseCheckpoint) -> None:
    """Raise UsageError for files that cannot become the base that is asked for, before they are read."""
    if base.quantised is not None:
        raise UsageError(
            f"{base.directory} is quantised already ({base.quantised}), of which no 4-bit base is made; give the "
            "dense checkpoint, or one in bitsandbytes' nf4"
        )
    check_codes(quant, base)


@contextlib.contextmanager
def _codes_read(base: BaseCheckpoint) -> Iterator[None]:
    """Inside, slime's reader of Hugging Face files gives the matrices that NF4 codes stand for.

    Raises:
        UsageError: this slime has no such reader.
    """
    try:
        from slime.backends.megatron_utils.hf_to_megatron.common import SafetensorReader
    except ImportError:
        raise UsageError(
            f"{base.directory} holds NF4 codes, which slime before v0.3.1 cannot read; write its weights with "
            "`slime-lora dequantize` and train on those without --lora-base-quant, or take a newer slime"
        ) from None
    get = SafetensorReader.get_tensor

    def get_tensor(self, name: str) -> torch.Tensor:
        return base.weights[name].read() if name in base.coded else get(self, name)

    SafetensorReader.get_tensor = get_tensor
    try:
        yield
    finally:
        SafetensorReader.get_tensor = get


def base_source(args: Namespace) -> tuple[str, int | None]:
    """Where the base weights come from, and which step of it.

    Raises:
        UsageError: a resumed run that does not say what its base is.
    """
    if adapter_step_dir(args.load, args.ckpt_step) is None:
        return args.load, args.ckpt_step
    base = args.ref_load or args.hf_checkpoint
    if base is None or not Path(base).exists():
        raise UsageError(f"--load {args.load} holds adapters; give their base with --ref-load")
    if adapter_step_dir(base) is not None:
        raise UsageError(
            f"--ref-load {base} holds adapters, not a base; give the base that {args.load} was trained on"
        )
    return base, args.ref_ckpt_step


def _start_from(model, path: str) -> None:
    """Adapter values from a PEFT directory or from a checkpoint of adapters."""
    checkpoint = adapter_step_dir(path)
    if checkpoint is not None:
        from slime_plugins.lora.checkpoint.load import load_adapter

        refuse_extra(checkpoint.parent)
        load_adapter(model, checkpoint, restore_rng=False)
    else:
        from slime_plugins.lora.ends.import_ import import_peft

        import_peft(model, path)
        noted = open_tensors(path).base_quant
        if noted is not None and noted != base_quant_of(model):
            logger.warning(
                "LoRA: %s was trained on a base in 4 bits (%s), which this one is not: unless these are its "
                "dequantised weights it answers otherwise here; give --lora-base-quant nf4",
                path,
                noted,
            )
    logger.info("LoRA: adapters start from %s", path)


def saving(save_checkpoint):
    """Hook: Megatron's ``save_checkpoint`` as slime calls it. Adapters and what trains them; never the base.

    Of a critic with adapters, Megatron saves the whole, since its value head trains too.
    """

    @functools.wraps(save_checkpoint)
    def hooked(iteration, model, optimizer, opt_param_scheduler, *more, **kwargs):
        if not has_adapters(model) or is_critic(model):
            return save_checkpoint(iteration, model, optimizer, opt_param_scheduler, *more, **kwargs)
        from megatron.training.global_vars import get_args

        from slime_plugins.lora.checkpoint.save import save_adapter

        args = get_args()
        save_adapter(
            model,
            args.save,
            step=iteration,
            optimizer=None if args.no_save_optim else optimizer,
            scheduler=None if args.no_save_optim else opt_param_scheduler,
        )
        if args.lora_export_dir:
            out = Path(args.lora_export_dir) / f"iter_{iteration:07d}"
            logger.info("LoRA: PEFT adapter in %s", export_peft(model, out, hf_checkpoint=args.hf_checkpoint))
        return None

    return hooked


def saving_hf(save_hf):
    """Hook: slime's writer of Hugging Face checkpoints, which serves ``--save-hf`` and the disk weight sync alike."""

    @functools.wraps(save_hf)
    def hooked(args: Namespace, where, model, **kwargs):
        if not has_adapters(model) or merged_sync.is_sending():
            return save_hf(args, where, model, **kwargs)
        by_number = not isinstance(where, (str, Path))  # before v0.3.1: a rollout's number
        out = Path(args.save_hf.format(rollout_id=where) if by_number else where)
        logger.info("LoRA: PEFT adapter in %s", export_peft(model, out, hf_checkpoint=args.hf_checkpoint))
        if args.lora_save_merged:
            with merged_sync.sending(model), _changed(args, save_hf=str(out / MERGED)):
                save_hf(args, where if by_number else out / MERGED, model, **kwargs)
            logger.info("LoRA: merged model in %s", out / MERGED)
        return None

    return hooked


@contextlib.contextmanager
def _base_only(model) -> Iterator[None]:
    """Inside, loaders see the base alone. On exit every base weight must have been written.

    slime's Megatron skips checkpoint keys that are missing and leaves what was there: so that nothing random is
    taken for the base, the weights are made NaN first.

    Raises:
        ValueError: naming the base weights that the checkpoint does not have.
    """
    with contextlib.ExitStack() as hidden, torch.no_grad():
        for chunk in model:
            hidden.enter_context(hide_adapters(chunk))
            for parameter in chunk.parameters():
                if not parameter.requires_grad:  # a critic's value head may be new
                    parameter.fill_(float("nan"))
        yield
        missing = [
            name
            for chunk in model
            for name, parameter in chunk.named_parameters()
            if not parameter.requires_grad and bool(parameter.isnan().all())
        ]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"the base checkpoint has no weights for {shown}; is it a checkpoint of this model?")


@contextlib.contextmanager
def _changed(args: Namespace, **values) -> Iterator[None]:
    """Inside, these attributes of slime's arguments have these values."""
    before = {name: getattr(args, name) for name in values if hasattr(args, name)}
    vars(args).update(values)
    try:
        yield
    finally:
        for name in values:
            delattr(args, name)
        vars(args).update(before)
