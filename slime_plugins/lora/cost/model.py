"""What is reckoned with: the tensors of a base, and how ranks share them. Pure, no torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slime_plugins.lora.base import moe
from slime_plugins.lora.base.decoder import DENSE, HFBase
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import in_experts, megatron_name, record_of

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LAYERS = "model.layers."


@dataclass(frozen=True, kw_only=True)
class Split:
    """Ranks. Raises UsageError for sizes that do not fit each other."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    """Data-parallel ranks, those of context parallelism included."""
    ep: int = 1
    etp: int | None = None
    """Expert-tensor-parallel ranks; None: as ``tp``, as Megatron has it."""
    sp: bool | None = None
    """Sequence parallelism; None: where tp > 1, as slime's scripts have it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "etp", self.tp if self.etp is None else self.etp)
        object.__setattr__(self, "sp", self.tp > 1 if self.sp is None else self.sp)
        for name in ("tp", "pp", "dp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} is {getattr(self, name)}; expected at least 1")
        if self.tp * self.dp % (self.ep * self.experts_tp):
            raise UsageError(
                f"--ep {self.ep} x --etp {self.experts_tp} ranks share the experts of a stage, but --tp {self.tp} x "
                f"--dp {self.dp} = {self.tp * self.dp} is no multiple of {self.ep * self.experts_tp}; raise --dp"
                + (" or lower --etp" if self.experts_tp > 1 else "")
            )

    @property
    def experts_tp(self) -> int:
        """``etp``, resolved."""
        assert self.etp is not None
        return self.etp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts, and share their optimizer."""
        return self.tp * self.dp // (self.ep * self.experts_tp)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A base as numbers."""

    name: str
    """Of its directory."""
    architecture: str
    shapes: Mapping[str, tuple[int, ...]]
    """Canonical name -> shape of every parameter; tied heads once, experts stacked: [experts, out, in]."""
    num_layers: int
    num_heads: int
    hidden: int
    vocab_size: int
    tied: bool
    mla: bool = False
    """Latent attention."""
    top_k: int = 0
    """Routed experts per token; 0 without any."""
    base: Any = field(repr=False, default=None)
    """What checks whether it splits (``check_parallel``)."""

    @classmethod
    def of(cls, base: HFBase | moe.MoEBase) -> Model:
        """Of a base that is described already."""
        return cls(
            name=base.path.name,
            architecture=base.architecture,
            shapes=base.shapes(),
            num_layers=base.num_layers,
            num_heads=base.num_heads,
            hidden=base.hidden,
            vocab_size=base.vocab_size,
            tied=base.tied,
            mla=getattr(base, "mla", False),
            top_k=getattr(base, "top_k", 0),
            base=base,
        )

    @classmethod
    def read(cls, directory: str | Path) -> Model:
        """Of a directory with a ``config.json``; nothing else is read.

        Raises:
            UsageError: there is none.
            ValueError: it is not JSON, or something in it is not supported.
        """
        path = Path(directory)
        file = path / "config.json"
        if not file.is_file():
            raise UsageError(f"{path}: no config.json, expected a Hugging Face checkpoint directory")
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}") from None
        architecture = moe.architecture_of(config)
        if architecture in moe.ARCHITECTURES:
            return cls.of(moe.MoEBase.from_config(config, path))
        if architecture is not None and architecture not in DENSE:
            known = ", ".join((*DENSE, *moe.ARCHITECTURES))
            raise ValueError(f"{file}: architecture {architecture:.80} is not supported, only {known}")
        return cls.of(HFBase._from_config(config, path))

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer; 0 without any."""
        return max((shape[0] for name, shape in self.shapes.items() if in_experts(name)), default=0)

    @property
    def parameters(self) -> int:
        """Of the whole base."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def without_experts(self, split: Split) -> Split:
        """The split as far as it concerns this model: as it is, or without what cuts experts."""
        return split if self.num_experts else dataclasses.replace(split, ep=1, etp=None)

    def check(self, split: Split) -> None:
        """Raise UsageError for a split that this model does not take."""
        if self.num_experts:
            self.base.check_parallel(tp=split.tp, pp=split.pp, ep=split.ep, etp=split.experts_tp)
        elif split.ep > 1 or split.experts_tp != split.tp:
            flag = f"--ep {split.ep}" if split.ep > 1 else f"--etp {split.experts_tp}"
            raise UsageError(f"{flag}: {self.base.path} has no routed experts; drop it")
        else:
            self.base.check_parallel(tp=split.tp, pp=split.pp)

    def stage_of(self, layer: int, split: Split) -> int:
        """The pipeline stage that holds a layer."""
        return layer * split.pp // self.num_layers

    def layer(self, number: int) -> dict[str, tuple[int, ...]]:
        """Name within the layer -> shape."""
        prefix = f"{_LAYERS}{number}."
        return {name.removeprefix(prefix): s for name, s in self.shapes.items() if name.startswith(prefix)}

    def linears(self) -> dict[str, tuple[int, ...]]:
        """Canonical name without ``.weight`` -> shape of the decoder linears that a 4-bit base stores as codes."""
        found = {}
        for name, shape in self.shapes.items():
            module = name.removesuffix(".weight")
            matrix = name.startswith(_LAYERS) and len(shape) > 1 and not module.endswith("shared_expert_gate")
            if matrix and not record_of(megatron_name(module, mla=self.mla)[0]).by_name_only:
                found[module] = shape
        return found


def layer_of(name: str) -> int | None:
    """Number of the layer that a canonical name lies in."""
    return int(name.split(".")[2]) if name.startswith(_LAYERS) else None


def shards_of(name: str, shape: tuple[int, ...], model: Model, split: Split) -> int:
    """Into how many equal parts the ranks of a stage cut a layer's parameter, experts included."""
    if in_experts(name):
        return split.ep * split.experts_tp
    if "_proj" not in name:
        return 1  # norms, routers, gates of shared experts
    return (
        1 if record_of(megatron_name(name.rpartition(".")[0], mla=model.mla)[0]).parallel == "duplicated" else split.tp
    )
