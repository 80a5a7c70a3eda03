"""A PEFT adapter directory -> the adapters of a running, sharded model, or the LoRAConfig that fits it.

PEFT has one A per projection. A ``split`` layout holds that as it is. A ``fused`` linear has one A for all of its
projections: it takes adapters whose projections share A, and any others stacked, exactly, at the sum of the ranks:

    q: A_q [r, I], B_q    k: A_k, B_k    v: A_v, B_v   ->   A = [A_q; A_k; A_v]  [3r, I],  B rows of q = [B_q 0 0], ...
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.hf.checks import absent_targets, config_problems, unsupported
from slime_plugins.lora.hf.moe_form import per_expert
from slime_plugins.lora.hf.peft_config import module_alpha, module_rank, module_scaling, parse_key
from slime_plugins.lora.hf.peft_files import AdapterTensors, read_adapter, validate_adapter
from slime_plugins.lora.names import hf_names, megatron_name, spellings


@dataclass(frozen=True, kw_only=True)
class ImportedAdapter:
    """What ``import_peft`` did, equal on every rank."""

    projections: int
    """Adapted Hugging Face linears."""
    rescaled: tuple[str, ...]
    """Projections whose B was multiplied, because this model's alpha / rank is another one; B A stays as it was."""
    stacked: tuple[str, ...]
    """Megatron linears that hold the different As of their projections one below the other."""


class PeftAdapter:
    """An adapter directory, opened and known to be representable: config, and (A, B) by module name.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, or the adapter is more than lora_A and lora_B of linears that Megatron has.
    """

    def __init__(self, adapter_dir: str | os.PathLike):
        self.directory = Path(adapter_dir)
        self.config, self._tensors = read_adapter(adapter_dir)
        problems = config_problems(self.config)
        if not problems:
            self.config, self._tensors = per_expert(self.config, self._tensors)
            problems = unsupported(self.config)
        if problems:
            raise ValueError(f"{adapter_dir}: {problems[0]}: it cannot be imported")
        if self.config.get("modules_to_save"):
            names = ", ".join(self.config["modules_to_save"])
            raise ValueError(f"{adapter_dir}: it cannot be imported: modules_to_save holds whole modules ({names})")
        self._keys: dict[str, dict[str, str]] = defaultdict(dict)
        for key in self._tensors:
            module, half = parse_key(key) or (None, None)
            if module is None or not _is_known(module):
                raise ValueError(
                    f"{adapter_dir}: {key}: it cannot be imported, no linear that can be adapted has that name"
                )
            self._keys[module][half] = key

    @property
    def tensors(self) -> AdapterTensors:
        return self._tensors

    def __contains__(self, module: str) -> bool:
        return module in self._keys

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted linears, as the file has them."""
        return tuple(self._keys)

    def key(self, module: str, half: str) -> str:
        return self._keys[module][half]

    def pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank]."""
        return self._tensors[self.key(module, "A")], self._tensors[self.key(module, "B")]

    def scaling(self, module: str) -> float:
        """Factor on B A."""
        return module_scaling(self.config, module)

    def linears(self) -> dict[str, list[str]]:
        """Megatron linear -> its adapted projections, in the order of the fused rows."""
        parts: dict[str, dict[int, str]] = defaultdict(dict)
        for module in self.modules:
            linear, part = megatron_name(module)
            parts[linear][part] = module
        return {linear: [found[part] for part in sorted(found)] for linear, found in parts.items()}


def config_from_peft(adapter_dir: str | os.PathLike, layout: str | None = None) -> LoRAConfig:
    """The LoRAConfig of a model that holds this PEFT adapter exactly.

    Args:
        layout: ``split``, or ``fused``, where different As of one linear are stacked at the sum of their ranks; None
            takes ``fused`` if the projections of every linear share their A, as those of a fused export do.
    Raises:
        OSError, ValueError: the directory is damaged, or holds what Megatron cannot (naming it).
        UsageError: for a ``layout`` that there is not.
    """
    source = PeftAdapter(adapter_dir)
    validate_adapter(source.config, source.tensors)
    linears = source.linears()
    shared = {linear for linear, modules in linears.items() if len(_distinct_A(source, modules)) == 1}
    if layout is None:
        layout = "fused" if len(shared) == len(linears) else "split"
    config = source.config
    options: dict[str, Any] = {"use_rslora": bool(config.get("use_rslora"))}
    if layout == "fused":
        ranks = {linear: sum(A.shape[0] for A in _distinct_A(source, names)) for linear, names in linears.items()}
        if len(shared) < len(linears):  # then alpha is what gives each projection its scaling at the summed rank
            options["use_rslora"] = False
            alphas = {
                name: source.scaling(name) * ranks[linear] for linear, names in linears.items() for name in names
            }
        else:
            alphas = {name: module_alpha(config, name) for name in source.modules}
    else:
        ranks = {name: module_rank(config, name) for name in source.modules}
        alphas = {name: module_alpha(config, name) for name in source.modules}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    (dtype,) = {source.tensors[key].dtype for key in source.tensors}
    return LoRAConfig(
        rank=rank,
        alpha=float(alpha),
        dropout=float(config.get("lora_dropout") or 0.0),
        target_modules=_all_experts(_targets(source)),
        layout=layout,
        dtype=str(dtype).removeprefix("torch."),
        rank_pattern=_pattern(ranks, rank),
        alpha_pattern=_pattern(alphas, alpha),
        **options,
    )


def import_peft(model, adapter_dir: str | os.PathLike, *, optimizer=None) -> ImportedAdapter:
    """Load a PEFT adapter into an adapted model, at any parallelism. Call on all ranks.

    The model needs adapters on the same projections at the same ranks: those of ``LoRAConfig.from_peft``, or a fused
    layout with room for stacking. Where its scaling differs, B is multiplied so that the adapter computes the same.

    Args:
        model: a module or the list of this rank's pipeline chunks, wrapped or not.
        optimizer: Megatron's, if it exists already; its float32 copies would otherwise undo the import.
    Collectives:
        object gathers over the world.
    Raises:
        OSError, ValueError: on every rank alike, naming what is missing, extra, of another shape or rank, damaged, not
            finite, or not representable. Nothing has been changed then.
    """
    from slime_plugins.lora.adapters import config_of, iter_adapters
    from slime_plugins.lora.checkpoint.collective import all_gather, everywhere, on_rank_0

    config_of(model)
    source = everywhere(lambda: PeftAdapter(adapter_dir))
    on_rank_0(lambda: validate_adapter(source.config, source.tensors))
    linears = [one for linear in iter_adapters(model) for one in linear.lora_linears()]
    here = {name for names in all_gather([name for one in linears for name in _projections(one)]) for name in names}
    on_rank_0(lambda: _compare(source, here))
    fits = everywhere(lambda: [_fit(one, source) for one in linears])
    with torch.no_grad():
        for one, fit in zip(linears, fits):
            one.lora_A.copy_(fit.A)
            one.lora_B.copy_(fit.B)
    if optimizer is not None:
        optimizer.reload_model_params()
    notes = all_gather([(fit.rescaled, fit.stacked) for fit in fits])
    rescaled = sorted({name for rank in notes for names, _ in rank for name in names})
    stacked = sorted({name for rank in notes for _, name in rank if name})
    return ImportedAdapter(projections=len(here), rescaled=tuple(rescaled), stacked=tuple(stacked))


@dataclass(frozen=True)
class _Fit:
    """New values for one linear's adapter on this rank."""

    A: torch.Tensor
    B: torch.Tensor
    rescaled: tuple[str, ...]
    stacked: str | None


def _fit(linear, source: PeftAdapter) -> _Fit:
    """This rank's lora_A and lora_B out of the file's. Raises ValueError naming the tensor that does not fit."""
    spec, names = linear.lora, [_in_file(name, source) for name in _projections(linear)]
    A, B = torch.zeros_like(linear.lora_A, device="cpu"), torch.zeros_like(linear.lora_B, device="cpu")
    rescaled, stacked = [], None
    starts, distinct = _places(spec, names, source)
    if len(distinct) > 1:
        stacked = spec.name
    for i, (name, part) in enumerate(zip(names, spec.parts)):
        A_i, B_i = source.pair(name)
        _check_shapes(linear, i, name, source, A_i, B_i)
        want = A_i.shape[0] if stacked else spec.ranks[i]
        A_i, B_i = _at_rank(source, name, A_i, B_i, want)
        if not math.isclose(source.scaling(name), spec.scalings[i], rel_tol=1e-9):
            B_i = B_i.float() * (source.scaling(name) / spec.scalings[i])
            rescaled.append(name)
        columns = slice(starts[i], starts[i] + want)
        A[columns] = _shard(A_i, linear, dim=1 if spec.parallel == "row" else None).to(A)
        rows = spec.rows_of(i)
        width = slice(0, want) if spec.split else columns
        block = torch.zeros(part.size, spec.rank, dtype=B.dtype)
        block[:, width] = _shard(B_i, linear, dim=0 if spec.parallel == "column" else None).to(B)
        B[rows] = block
    for half, tensor in (("A", A), ("B", B)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source.key(names[0], half)}: a value is too large for {tensor.dtype} adapters")
    return _Fit(A, B, tuple(rescaled), stacked)


def _places(spec, names: list[str], source: PeftAdapter) -> tuple[list[int], list[torch.Tensor]]:
    """First row in lora_A for each projection, and the different As among them.

    Raises ValueError for a fused linear that has neither one A for all nor room for all.
    """
    if spec.split:
        return [i * spec.rank for i in range(len(names))], []
    distinct = _distinct_A(source, names)
    if len(distinct) == 1:
        return [0] * len(names), distinct
    total = sum(A.shape[0] for A in distinct)
    if total != spec.rank:
        leaves = ", ".join(name.rpartition(".")[2] for name in names)
        raise ValueError(
            f"{source.directory}: {leaves} of {spec.name} have different lora_A, which a fused linear of rank "
            f"{spec.rank} cannot hold: use layout split (--lora-layout split), or rank {total} for this linear"
        )
    offsets = [0, *accumulate(A.shape[0] for A in distinct)]
    As = [source.pair(name)[0] for name in names]
    return [next(start for start, other in zip(offsets, distinct) if _equal(A, other)) for A in As], distinct


def _distinct_A(source: PeftAdapter, names: list[str]) -> list[torch.Tensor]:
    distinct: list[torch.Tensor] = []
    for name in names:
        A, _ = source.pair(name)
        if not any(_equal(A, other) for other in distinct):
            distinct.append(A)
    return distinct


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _check_shapes(linear, index: int, name: str, source: PeftAdapter, A: torch.Tensor, B: torch.Tensor) -> None:
    spec = linear.lora
    columns = linear.lora_A.shape[1] * (linear.lora_tp_size if spec.parallel == "row" else 1)
    rows = spec.parts[index].size * (linear.lora_tp_size if spec.parallel == "column" else 1)
    for half, found, expected, side in (("A", A.shape[1], columns, "inputs"), ("B", B.shape[0], rows, "outputs")):
        if found != expected:
            raise ValueError(
                f"{source.key(name, half)} has {found} {side} where this model has {expected}: another base"
            )


def _at_rank(
    source: PeftAdapter, name: str, A: torch.Tensor, B: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B without the zero rows or columns that an export pads them with. Raises ValueError if ranks differ."""
    found = A.shape[0]
    padding = found > rank and (not A[rank:].any() or not B[:, rank:].any())
    if found != rank and not padding:
        raise ValueError(
            f"{source.key(name, 'A')} has rank {found}, but this model's adapter has rank {rank}: use --lora-r {found}"
        )
    return A[:rank], B[:, :rank]


def _shard(whole: torch.Tensor, linear, dim: int | None) -> torch.Tensor:
    if dim is None or linear.lora_tp_size == 1:
        return whole
    return whole.chunk(linear.lora_tp_size, dim=dim)[linear.lora_tp_group.rank()]


def _projections(linear) -> list[str]:
    """Full Hugging Face names of a linear's adapted projections."""
    names = {name.rpartition(".")[2]: name for name in hf_names(linear.lora.name)}
    return [names[part.name] for part in linear.lora.parts]


def _in_file(name: str, source: PeftAdapter) -> str:
    return next((spelling for spelling in spellings(name) if spelling in source), name)


def _compare(source: PeftAdapter, here: set[str]) -> None:
    """Raise ValueError listing the projections that the file and the model do not both have."""
    found = set(source.modules)
    missing = sorted(name for name in here if not found.intersection(spellings(name)))
    extra = sorted(found - {spelling for name in here for spelling in spellings(name)})
    problems = []
    if missing:
        problems.append(f"no adapter for {_listed(missing)}, which this model adapts")
    if extra:
        problems.append(f"an adapter for {_listed(extra)}, which this model does not adapt")
    if problems:
        targets = source.config.get("target_modules")
        raise ValueError(
            f"{source.directory} has {' and '.join(problems)}: its target_modules are {targets}, "
            "choose the same with --lora-target-modules"
        )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _is_known(module: str) -> bool:
    try:
        megatron_name(module)
    except KeyError:
        return False
    return True


def _targets(source: PeftAdapter) -> tuple[str, ...]:
    """``target_modules`` that select the file's modules, as short as the file says it."""
    config = source.config
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or ()
    if config.get("layers_to_transform") not in (None, []) or isinstance(excluded, str):
        return source.modules
    if targets == "all-linear" and not excluded:
        return (targets,)
    if isinstance(targets, str) or not all(re.fullmatch(r"[\w.]+", name) for name in targets):
        return source.modules
    if any(f".{a}".endswith(f".{b}") or f".{b}".endswith(f".{a}") for a in targets for b in excluded):
        return source.modules
    idle = absent_targets(config, source.modules)
    return tuple(name for name in targets if name not in idle)


def _all_experts(targets: tuple[str, ...]) -> tuple[str, ...]:
    """``experts.3.up_proj`` -> ``experts.up_proj``: experts are adapted together."""
    return tuple(dict.fromkeys(re.sub(r"(^|\.)experts\.\d+\.", r"\1experts.", name) for name in targets))


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Name -> value where it is not the default: by leaf where all modules of that leaf agree, else by full name."""
    by_leaf: dict[str, set] = defaultdict(set)
    for name, value in values.items():
        by_leaf[name.rpartition(".")[2]].add(value)
    pattern = {}
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        key = leaf if len(by_leaf[leaf]) == 1 else name
        if value != default:
            pattern[key] = value
    return pattern
