"""Which policy is live: the actor, its reference, the teacher, an old actor. Stands in for slime's TensorBackuper.

slime keeps a copy of every weight in host memory per tag ("actor", "ref", "teacher", "old_actor", "rollout_actor") and
swaps whole models. On a frozen base a policy is at most an adapter:

    ref, teacher from the base     the adapters switched off: no copy, no swap
    ref with --lora-ref start      a copy of the adapters that training started from
    actor, old_actor, ...          a copy of the adapters
    ref after --ref-update-interval    a copy of the adapters as they were then
    ref, teacher from other weights    a full copy of those and of the base, said aloud
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

import torch

from slime_plugins.lora.adapters import adapters_disabled, base_parameters, has_adapters, iter_carriers
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.layers import Carrier
from slime_plugins.lora.quantize import base_quant_of
from slime_plugins.lora.slime.hooks.base_check import same_base
from slime_plugins.lora.slime.hooks.checkpoints import another_policy
from slime_plugins.lora.slime.hooks.merged_sync import MergedWeights
from slime_plugins.lora.slime.hooks.reference import use_reference

logger = logging.getLogger(__name__)


def weights_backuper(actor, backuper):
    """Hook: the actor's store of weights. slime's own for a model without adapters."""
    if not has_adapters(actor.model):
        return backuper
    return Policies(actor.args, actor.model)


def other_policy(load_other_checkpoint):
    """Hook: make the weights of a tag available, from a path that slime would load whole."""

    @functools.wraps(load_other_checkpoint)
    def hooked(self, model_tag: str, path: str) -> None:
        store = self.weights_backuper
        if not isinstance(store, Policies):
            return load_other_checkpoint(self, model_tag, path)
        if model_tag == "old_actor":  # slime loads --load, which is what the actor is
            store.backup("old_actor")
            return None
        step = {"ref": "ref_ckpt_step", "teacher": "opd_teacher_ckpt_step"}.get(model_tag)
        if same_base(path, getattr(self.args, step, None) if step else None, self.model):
            if model_tag == "ref" and use_reference(store, self.args, self.model):
                return None
            store.use_base(model_tag)
            _log("LoRA: %s is the base with the adapters off; no copy of it in host memory", model_tag)
            return None
        if model_tag == "ref" and getattr(self.args, "lora_ref", None) == "start":
            raise ValueError(
                f"--lora-ref start: the reference is the adapter that training starts from, on the base that trains; "
                f"--ref-load {path} is another place than that base was read from, give the same"
            )
        if base_quant_of(self.model) is not None:
            raise UsageError(
                f"--lora-base-quant nf4: the {model_tag} would come from {path}, not the base that trains, and a "
                f"4-bit base holds no other weights; give the base as the {model_tag}, or train on a dense base"
            )
        with another_policy():
            store.use_full_copy(model_tag, lambda: load_other_checkpoint(self, model_tag, path), path)
        self._active_model_tag = "actor"
        return None

    return hooked


class Policies:
    """The TensorBackuper's methods, on adapters.

    Copies of adapters are as large as the adapters and lie in host memory, so they survive slime's offload, which
    gives up the memory of everything that DDP holds in its buffers.
    """

    def __init__(self, args, model) -> None:
        self._args = args
        self._model = model
        self._carriers: list[Carrier] = list(iter_carriers(model))
        self._adapters: dict[str, list[dict[str, torch.Tensor]]] = {}
        """Tag -> name -> copy, one mapping per carrier."""
        self._base_tags: set[str] = set()
        self._full: dict[str, dict[str, torch.Tensor]] = {}
        """Tag -> base parameters by name; also "base" itself, where a tag has other ones."""
        self._off = contextlib.ExitStack()
        self._on_device: tuple[Carrier, dict[str, torch.Tensor]] | None = None
        """The carrier that ``adapter_values`` was asked for last, with its values."""

    @property
    def backup_tags(self) -> list[str]:
        """Tags that ``restore`` knows."""
        return [*self._adapters, *self._base_tags, *(tag for tag in self._full if tag != "base")]

    @property
    def host_bytes(self) -> dict[str, int]:
        """Bytes of host memory per tag."""
        copies = {tag: [t for values in own for t in values.values()] for tag, own in self._adapters.items()}
        copies |= {f"{tag} (full)": list(own.values()) for tag, own in self._full.items()}
        return {tag: sum(t.numel() * t.element_size() for t in tensors) for tag, tensors in copies.items()}

    @torch.no_grad()
    def backup(self, tag: str) -> None:
        """Copy the live adapters. For "ref" this ends its being the base (``--ref-update-interval``)."""
        if tag not in self._adapters:
            pin = torch.cuda.is_available()
            self._adapters[tag] = [
                {name: torch.empty_like(p, device="cpu", pin_memory=pin) for name, p in live.items()}
                for live in self._live()
            ]
        for copy, parameter in self._pairs(tag):
            copy.copy_(parameter.detach(), non_blocking=True)
        self._base_tags.discard(tag)
        self._full.pop(tag, None)
        if set(self._full) == {"base"}:
            del self._full["base"]
        _synchronize()

    @torch.no_grad()
    def copy(self, *, src_tag: str, dst_tag: str) -> None:
        """Make one tag's adapters another's."""
        for source, target in zip(self._adapters[src_tag], self._adapters[dst_tag]):
            for name, value in source.items():
                target[name].copy_(value)

    @torch.no_grad()
    def restore(self, tag: str) -> None:
        """Make a tag's policy live: its adapters on its base, or the base alone.

        Raises:
            ValueError: a tag that nothing is known of; it is not taken for the base.
        """
        if tag not in self.backup_tags:
            raise ValueError(f"there is no policy {tag!r}; known are {', '.join(self.backup_tags) or 'none'}")
        self._off.close()
        if self._full:
            self._put_base(self._full[tag if tag in self._full else "base"])
        if tag in self._adapters:
            for copy, parameter in self._pairs(tag):
                parameter.copy_(copy, non_blocking=True)
        else:
            self._off.enter_context(adapters_disabled(self._model))
        _synchronize()

    def get(self, tag: str):
        """A mapping of global names to the actor's merged weights, each built when it is asked for."""
        if tag != "actor":
            raise ValueError(f"only the actor's weights are sent, not those of {tag!r}")
        return MergedWeights(self._args, self._model, self)

    def adapter_values(self, carrier: Carrier) -> contextlib.AbstractContextManager:
        """Inside, this carrier's parameters are the actor's, also while slime has offloaded the trainer's memory."""
        if not getattr(self._args, "offload_train", False):
            return contextlib.nullcontext()
        if self._on_device is None or self._on_device[0] is not carrier:
            self._on_device = None  # what it held goes before the next comes
            index = next(i for i, other in enumerate(self._carriers) if other is carrier)
            device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
            values = {name: copy.to(device) for name, copy in self._adapters["actor"][index].items()}
            self._on_device = carrier, values
        return _values(*self._on_device)

    def forget_values(self) -> None:
        """Free what ``adapter_values`` has put on the device."""
        self._on_device = None

    def use_base(self, tag: str) -> None:
        """Let a tag be the base with the adapters off."""
        self._base_tags.add(tag)

    @torch.no_grad()
    def use_full_copy(self, tag: str, load, path: str) -> None:
        """Let a tag be other weights of the same shape; if they are the base's after all, ``use_base``.

        Args:
            load: puts the tag's weights into the live base parameters.
        """
        base = self._copy_base()
        load()
        self._adapters.pop(tag, None)  # what slime's backup of the tag has made
        differing = [name for name, p in self._base_parameters() if not torch.equal(p.detach().cpu(), base[name])]
        other = self._copy_base() if _any_rank(bool(differing)) else None
        self._put_base(base)
        if other is None:
            self.use_base(tag)
            _log("LoRA: %s (%s) holds the base's weights, bit for bit; no copy of it in host memory", tag, path)
            return
        self._full.setdefault("base", base)
        self._full[tag] = other
        size = sum(t.numel() * t.element_size() for t in other.values()) / 2**30
        _warn(
            "LoRA: %s (%s) is not the base that trains: two full copies (it and the base, %.2f GiB each on this rank) "
            "stay in host memory and are swapped every step; give the base itself to save that",
            tag,
            path,
            size,
        )

    def _live(self) -> Iterator[dict[str, torch.nn.Parameter]]:
        return (carrier.lora_parameters() for carrier in self._carriers)

    def _pairs(self, tag: str) -> Iterator[tuple[torch.Tensor, torch.nn.Parameter]]:
        """A tag's copy and the live parameter, of every adapter parameter."""
        for copies, live in zip(self._adapters[tag], self._live()):
            yield from ((copies[name], parameter) for name, parameter in live.items())

    def _base_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for i, chunk in enumerate(self._model):
            yield from ((f"{i}.{name}", parameter) for name, parameter in base_parameters(chunk))

    def _copy_base(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self._base_parameters()}

    def _put_base(self, copies: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._base_parameters():
            parameter.copy_(copies[name])


@contextlib.contextmanager
def _values(carrier: Carrier, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the carrier's parameters are these tensors: the memory that they pointed to is not touched."""
    parameters = carrier.lora_parameters()
    kept = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]


def _any_rank(flag: bool) -> bool:
    """Is it true on any rank? Ranks must agree on what a tag is."""
    import torch.distributed as dist
    from slime.utils.distributed_utils import get_gloo_group

    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=get_gloo_group())
    return bool(flags.item())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _is_rank_zero() -> bool:
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def _log(message: str, *args) -> None:
    if _is_rank_zero():
        logger.info(message, *args)


def _warn(message: str, *args) -> None:
    if _is_rank_zero():
        logger.warning(message, *args)
