"""What a base is stored as on the training ranks: 4-bit NF4 codes instead of dense matrices. Pure, no torch.

NF4 (Dettmers et al. 2023, arXiv:2305.14314): blocks of 64 weights of one row share a scale, and each weight is one of
16 numbers times it. Nested ("double") quantisation stores the scales in 8 bits, in groups of 256 with a scale of their
own, after the mean of a whole matrix is taken off; a matrix is one Hugging Face projection.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import hf_names, in_experts, megatron_name, record_of
from slime_plugins.lora.targets import Targets, check_all_matched, short_name

FORMS = ("nf4",)
BLOCK = 64
"""Weights of one row that share a scale."""
GROUP = 256
"""Scales that share a scale."""


@dataclass(frozen=True, kw_only=True)
class BaseQuant:
    """How the weights of decoder linears are stored.

    Raises:
        UsageError: on construction, for a form that is not known.
    """

    form: str = "nf4"
    double_quant: bool = True
    """Nested statistics: 0.516 bytes a weight instead of 0.5625."""
    exclude: tuple[str, ...] = ()
    """Linears that stay dense: Megatron or Hugging Face names or wildcards, as LoRA targets are named."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(self.exclude))
        if self.form not in FORMS:
            raise UsageError(f"base quantisation {self.form!r} is not known; expected {', '.join(FORMS)}")

    @classmethod
    def from_args(cls, args: Any) -> BaseQuant | None:
        """Of the flags of ``add_lora_arguments``; None for a dense base."""
        if getattr(args, "lora_base_quant", "none") == "none":
            return None
        exclude = (name for value in args.lora_base_quant_exclude for name in value.split(",") if name)
        return cls(form=args.lora_base_quant, double_quant=args.lora_base_double_quant, exclude=tuple(exclude))

    @classmethod
    def read(cls, noted: Any, where: Any) -> BaseQuant:
        """The inverse of ``to_dict``. Raises ValueError naming ``where``, for what was not written by it."""
        known = isinstance(noted, Mapping) and noted.keys() == {field.name for field in dataclasses.fields(cls)}
        known = known and noted["form"] in FORMS and isinstance(noted["double_quant"], bool)
        if known and isinstance(noted["exclude"], list) and all(isinstance(name, str) for name in noted["exclude"]):
            return cls(**noted)
        raise ValueError(f"{where}: what the base was stored as is {noted!r:.120}, which this version does not know")

    @property
    def targets(self) -> Targets:
        """Of ``exclude``."""
        return Targets(self.exclude)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``BaseQuant(**d)`` reads it back."""
        return {**dataclasses.asdict(self), "exclude": list(self.exclude)}

    def to_hf(self, dense: Iterable[str] = ()) -> dict[str, Any]:
        """Keywords of transformers' BitsAndBytesConfig for the same bits; ``dense``: what else stays dense there."""
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.form,
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_skip_modules": ["lm_head", *dense],
        }

    def bytes_of(self, shape: tuple[int, int], *, shards: int = 1, cut: str = "column") -> int:
        """Bytes on one rank of one projection's [O, I] matrix; ``cut`` in ``shards`` by its rows or (``row``) columns.

        Codes, scales, and per shard the scales' own scales, 4 bytes of position per row and the mean.
        """
        numel, scales = math.prod(shape), math.prod(shape) // BLOCK
        if not self.double_quant:
            return (numel // 2 + 4 * scales) // shards
        rows = shape[0] // (1 if cut == "row" else shards)
        return (numel // 2 + scales) // shards + 4 * math.ceil(scales / GROUP) + 4 * rows + 8


def is_excluded(targets: Targets, megatron_name: str) -> bool:
    """Does this linear stay dense?

    Args:
        targets: ``BaseQuant.targets``.
        megatron_name: global; of stacked experts.
    Raises:
        UsageError: some of its projections would and others would not, but Megatron has them in one matrix.
    """
    numbers, projections = targets.parts_of(megatron_name), hf_names(megatron_name)
    if numbers and len(numbers) < len(projections):
        leaf = short_name(megatron_name)
        left = ", ".join(projections[i].rsplit(".", 1)[-1] for i in range(len(projections)) if i not in numbers)
        raise UsageError(
            f"--lora-base-quant-exclude names part of {megatron_name}, one matrix in Megatron; "
            f"name {left} too, or {leaf}"
        )
    return bool(numbers)


def check_flags(args: Any) -> None:
    """Refuse what cannot be, of the parsed flags of a trainer.

    Raises:
        UsageError: naming the flags.
    """
    if args.lora_base_quant == "none":
        for flag, given in (
            ("--lora-base-quant-exclude", bool(args.lora_base_quant_exclude)),
            ("--no-lora-base-double-quant", not args.lora_base_double_quant),
        ):
            if given:
                raise UsageError(f"{flag} given without --lora-base-quant nf4; add it, or drop {flag}")
        return
    if not args.lora_only_trainable:
        raise UsageError("--no-lora-only-trainable with --lora-base-quant nf4: 4-bit weights are frozen; drop one")
    for name, what in _CANNOT.items():
        if getattr(args, name, None):
            raise UsageError(f"--{name.replace('_', '-')} with --lora-base-quant nf4: {what}")


_CANNOT = {
    "fp8_format": "weights are dequantised for TransformerEngine in 16 bits; drop one of them",
    "fp8": "weights are dequantised for TransformerEngine in 16 bits; drop one of them",
    "fp4_format": "weights are dequantised for TransformerEngine in 16 bits; drop one of them",
    "enable_cuda_graph": "a graph would keep the dense weights of every linear alive; drop --enable-cuda-graph",
    "external_cuda_graph": "a graph would keep the dense weights of every linear alive; drop --external-cuda-graph",
    "cpu_offloading": "activation offload and 4-bit weights both replace what autograd saves; drop --cpu-offloading",
    "fine_grained_activation_offloading": "activation offload and 4-bit weights both replace what autograd saves; "
    "drop --fine-grained-activation-offloading",
    "lora_critic": "a critic of its own base is not quantised; drop --lora-critic",
}
"""Flags of slime's trainer, by their names in the namespace, that a 4-bit base excludes, and why."""


def dense_modules(quant: BaseQuant, hf_linears: Iterable[str], *, mla: bool = False) -> list[str]:
    """Of a checkpoint's decoder linears, those that ``exclude`` leaves dense. Raises UsageError as ``is_excluded``."""
    targets, names = quant.targets, list(hf_linears)
    owners = [megatron_name(name, mla=mla)[0] for name in names]
    found = [name for name, owner in zip(names, owners) if is_excluded(targets, owner)]
    check_all_matched(targets, targets.matched, dict.fromkeys(owners))
    return found


def check_checkpoint(
    quant: BaseQuant, shapes: Mapping[str, tuple[int, ...]], *, tp: int = 1, etp: int = 1, mla: bool = False
) -> None:
    """Before anything is loaded: does every linear of a model divide into blocks, as it is cut?

    Args:
        shapes: Hugging Face name -> [out, in] of every decoder linear; of stacked experts [experts, out, in].
        tp, etp: into how many shards dense linears and experts are cut.
        mla: the model has latent attention.
    Raises:
        UsageError: it does not, or an ``exclude`` that names nothing.
    """
    dense = set(dense_modules(quant, shapes, mla=mla))
    for name, shape in shapes.items():
        owner = megatron_name(name, mla=mla)[0]
        shards = (etp if in_experts(owner) else tp) if record_of(owner).parallel == "row" else 1
        if name not in dense:
            check_blocks(owner, shape[-1] // shards, shards)


def check_blocks(name: str, columns: int, shards: int) -> None:
    """Refuse a linear whose rows do not divide into blocks, whole or as they are cut.

    Args:
        columns: inputs on one rank.
        shards: into how many shards the inputs are cut.
    Raises:
        UsageError: naming the linear, and what to do.
    """
    if columns % BLOCK == 0:
        return
    leaf, full = short_name(name), columns * shards
    where = f"{full} inputs" if shards == 1 else f"{full} inputs cut in {shards}"
    rest = f"{_sizes(full // BLOCK)}, or " if full % BLOCK == 0 else ""
    raise UsageError(
        f"{name}: {where} do not divide into NF4's blocks of {BLOCK}; {rest}keep it dense with "
        f"--lora-base-quant-exclude {leaf}"
    )


def _sizes(blocks: int) -> str:
    return "use tensor-parallel size 1" if blocks == 1 else f"use a tensor-parallel size that divides {blocks}"
