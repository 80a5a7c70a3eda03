"""Two forms of an adapter on routed experts, and the way between them. Pure, no Megatron.

per-expert   ...mlp.experts.3.gate_proj.lora_A [r, in], lora_B [out, r]: a matrix pair per expert and projection.
             vLLM and SGLang read it; so does PEFT with transformers 5, which turns it into the other.
fused        the stacked parameters that transformers 5 keeps in memory, as PEFT's ``target_parameters`` has them:
                 ...mlp.experts.base_layer   gate_up_proj [E, 2I, H]    A [E*R, H]   B [2I, R*E]
                 ...mlp.experts              down_proj    [E, H, I]     A [E*r, I]   B [H, r*E]
             Rows of A go expert by expert, columns of B rank by rank. Where only one of the two parameters is
             adapted, it is ``...mlp.experts``. gate and up of one expert share A at R = r, or have each their own
             at R = 2r, with B block-diagonal.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from slime_plugins.lora.peft.config import key_of, module_alpha, module_rank, parse_key

FORMATS = ("per-expert", "fused")
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parameter of all experts -> the projections in it, in the order of its rows."""
PARAMETER_OF = {leaf: parameter for parameter, leaves in STACKED.items() for leaf in leaves}

_ONE_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)")
INNER = ".base_layer"
_OF_STACK = re.compile(r".+\.experts(?:\.base_layer)?")
WEIGHT = ".weight"
"""End of a ``target_parameters`` entry that is a linear after all; its keys in the file are those of a module."""

Pair = tuple[torch.Tensor, torch.Tensor]


def experts_of(module: str) -> str | None:
    """``...mlp.experts.3.gate_proj`` -> ``...mlp.experts``; None for a module that is not of one expert."""
    match = _ONE_EXPERT.fullmatch(module)
    return match["experts"] if match else None


def stack(pairs: Mapping[str, Pair], num_experts: Callable[[str], int]) -> tuple[dict[str, Pair], dict[str, int]]:
    """Per-expert pairs -> fused ones, for pairs of one rank and one scaling.

    Args:
        pairs: module -> A [r, in], B [out, r]; modules that are no experts are passed on.
        num_experts: ``...mlp.experts`` -> experts of that layer in the base.
    Returns:
        module -> pair, and parameter -> its rank, the same in all layers.
    Raises:
        ValueError: naming an expert that has no adapter where others of its layer have one.
    """
    stacked = {name: pair for name, pair in pairs.items() if experts_of(name) is None}
    layers: dict[str, dict[str, dict[int, Pair]]] = defaultdict(lambda: defaultdict(dict))
    for name in pairs:
        match = _ONE_EXPERT.fullmatch(name)
        if match is None:
            continue
        layers[match["experts"]][match["leaf"]][int(match["number"])] = pairs[name]
    for experts, projections in layers.items():
        for leaf, found in projections.items():
            missing = set(range(num_experts(experts))) - found.keys()
            if missing:
                name = f"{experts}.{min(missing)}.{leaf}"
                raise ValueError(f"{name} has no adapter, but others of its layer have: the fused form needs all")
    shared = all(_same_A(projections) for projections in layers.values())
    ranks: dict[str, int] = {}
    for experts, projections in layers.items():
        present = [parameter for parameter, leaves in STACKED.items() if projections.keys() & set(leaves)]
        for parameter in present:
            A, B = _stack_one({leaf: projections.get(leaf) for leaf in STACKED[parameter]}, shared)
            inner = parameter == "gate_up_proj" and len(present) > 1
            stacked[f"{experts}.base_layer" if inner else experts] = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
            ranks[parameter] = A.shape[1]
    return stacked, ranks


def _same_A(projections: Mapping[str, Mapping[int, Pair]]) -> bool:
    """Do gate and up of every expert share their A, or is there only one of them?"""
    gate, up = (projections.get(leaf) for leaf in STACKED["gate_up_proj"])
    return gate is None or up is None or all(torch.equal(gate[i][0], up[i][0]) for i in gate)


def _stack_one(projections: Mapping[str, Mapping[int, Pair] | None], shared: bool) -> Pair:
    """A [E, R, in] and B [E, out, R] of one parameter. A projection without an adapter gets rows of zeros."""
    found = {leaf: [pairs[i] for i in sorted(pairs)] for leaf, pairs in projections.items() if pairs is not None}
    first = next(iter(found))
    As = {leaf: torch.stack([A for A, _ in pairs]) for leaf, pairs in found.items()}
    Bs = {leaf: torch.stack([B for _, B in pairs]) for leaf, pairs in found.items()}
    zeros = torch.zeros_like(Bs[first])
    rows = [Bs.get(leaf, zeros) for leaf in projections]
    if shared or len(projections) == 1:
        return As[first], torch.cat(rows, 1)
    return torch.cat([As[leaf] for leaf in projections], 1), torch.stack(
        [torch.block_diag(*(B[i] for B in rows)) for i in range(len(rows[0]))]
    )


@dataclass(frozen=True)
class _Slice:
    """Where one expert's projection lies in a fused pair."""

    module: str
    expert: int
    num_experts: int
    rank: slice
    """Of A's rows of the expert and B's columns."""
    half: int
    halves: int
    """B's rows: which part of how many."""

    def A(self, fused: torch.Tensor) -> torch.Tensor:
        return fused.unflatten(0, (self.num_experts, -1))[self.expert, self.rank]

    def B(self, fused: torch.Tensor) -> torch.Tensor:
        B_ORE = fused.unflatten(1, (-1, self.num_experts))
        return B_ORE.chunk(self.halves)[self.half][:, self.rank, self.expert]


class PerExpert(Mapping[str, torch.Tensor]):
    """The tensors of an adapter with its fused experts taken apart, by per-expert keys; other keys as they are.

    Everything else that is asked of it (checksums, files) is the file's own.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], slices: Mapping[str, _Slice]) -> None:
        self._tensors = tensors
        fused = {key_of(s.module, half) for s in slices.values() for half in "AB"}
        self._keys: dict[str, tuple[_Slice, str] | None] = {key: None for key in tensors if key not in fused}
        self._keys |= {key_of(name, half): (s, half) for name, s in slices.items() for half in "AB"}
        # A and B of both stacks of a layer: files hold experts one by one, all projections of each.
        self._load = lru_cache(maxsize=4)(self._read)

    def _read(self, key: str) -> tuple[torch.Tensor, str | None]:
        if hasattr(self._tensors, "load"):
            return self._tensors.load(key)
        return self._tensors[key], None

    def load(self, key: str) -> tuple[torch.Tensor, str | None]:
        """As ``AdapterTensors.load``: the tensor, and the reason not to use it, if there is one."""
        found = self._keys[key]
        if found is None:
            return self._read(key)
        place, half = found
        tensor, fault = self._load(key_of(place.module, half))
        return getattr(place, half)(tensor), fault

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor, fault = self.load(key)
        if fault:
            raise ValueError(fault)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensors, name)


def per_expert(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
    """An adapter as it would be in the per-expert form: config without ``target_parameters``, tensors one by one.

    Adapters that need nothing done, and those with parameters of another kind, are passed on as they are.

    Raises:
        ValueError: a fused tensor whose shape is not that of a whole number of experts, naming it.
    """
    parameters, targets = config.get("target_parameters") or [], config.get("target_modules") or []
    fused = [p for p in parameters if p.rpartition(".")[2] in STACKED and not p.endswith(WEIGHT)]
    linears = [p.removesuffix(WEIGHT) for p in parameters if p.endswith(WEIGHT)]
    if not parameters or isinstance(targets, str) or len(fused) + len(linears) < len(parameters):
        return config, tensors
    slices: dict[str, _Slice] = {}
    names: dict[str, None] = {}
    patterns: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    stacks = list(_stacks(config, tensors, fused))
    halved = all(_is_block_diagonal(tensors, *found) for found in stacks if found[1] == "gate_up_proj")
    for module, parameter, num_experts, rank in stacks:
        leaves = STACKED[parameter]
        parts = len(leaves) if halved and len(leaves) > 1 else 1
        experts = module.removesuffix(INNER)
        scaling = module_alpha(config, f"{experts}.{parameter}")
        scaling /= math.sqrt(rank) if config.get("use_rslora") else rank
        own = rank // parts
        alpha = scaling * (math.sqrt(own) if config.get("use_rslora") else own)
        for i, leaf in enumerate(leaves):
            columns = slice(i * own, (i + 1) * own) if parts > 1 else slice(None)
            for expert in range(num_experts):
                name = f"{experts}.{expert}.{leaf}"
                slices[name] = _Slice(module, expert, num_experts, columns, i, len(leaves))
                names[re.sub(r"^.*\.layers\.\d+\.", "", name)] = None
            for field, value, usual in (("rank_pattern", own, "r"), ("alpha_pattern", alpha, "lora_alpha")):
                if value != config[usual]:
                    patterns[field][rf"experts\.\d+\.{leaf}"] = value
    plain = {key: value for key, value in config.items() if key != "target_parameters"}
    plain["target_modules"] = list(dict.fromkeys([*targets, *linears, *names]))
    for field, found in patterns.items():
        kept = {k: v for k, v in (config.get(field) or {}).items() if not k.endswith(tuple(STACKED))}
        plain[field] = kept | found
    return plain, PerExpert(tensors, slices) if slices else tensors


def _stacks(config, tensors, fused: list[str]) -> Iterator[tuple[str, str, int, int]]:
    """Module, parameter, experts and rank of every fused pair in the file."""
    modules = {parsed[0] for parsed in map(parse_key, tensors) if parsed and _OF_STACK.fullmatch(parsed[0])}
    known = {p.rpartition(".")[2] for p in fused}
    for module in sorted(modules):
        experts = module.removesuffix(INNER)
        alone = f"{experts}{INNER}" not in modules
        gate_up = module.endswith(INNER) or (alone and "gate_up_proj" in known)
        parameter = "gate_up_proj" if gate_up else "down_proj"
        rank = module_rank(config, f"{experts}.{parameter}")
        for key in (key_of(module, "A"), key_of(module, "B")):
            if key not in tensors or tensors[key].ndim != 2 or not tensors[key].numel():
                raise ValueError(f"{key} is missing or holds no matrix: fused experts need lora_A and lora_B")
        rows, columns = tensors[key_of(module, "A")].shape[0], tensors[key_of(module, "B")].shape[1]
        if rows % rank:
            raise ValueError(
                f"{key_of(module, 'A')} has {rows} rows, which is no whole number of experts of rank {rank}"
            )
        if columns != rows:
            raise ValueError(f"{key_of(module, 'B')} has {columns} columns, where lora_A has {rows} rows")
        yield module, parameter, rows // rank, rank


def _is_block_diagonal(tensors, module: str, parameter: str, num_experts: int, rank: int) -> bool:
    B = tensors[key_of(module, "B")]
    if rank % 2 or B.shape[0] % 2 or B.shape[1] != rank * num_experts:
        return False
    B_ORE = B.unflatten(1, (rank, num_experts))
    half, own = B.shape[0] // 2, rank // 2
    return not B_ORE[:half, own:].any() and not B_ORE[half:, :own].any()
