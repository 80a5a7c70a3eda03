"""A PEFT adapter directory -> the adapters of a running, sharded model.

PEFT has one A per projection. A ``split`` layout holds that as it is. A ``fused`` linear has one A for all of its
projections: it takes adapters whose projections share A, and any others stacked, exactly, at the sum of the ranks:

    q: A_q [r, I], B_q    k: A_k, B_k    v: A_v, B_v   ->   A = [A_q; A_k; A_v]  [3r, I],  B rows of q = [B_q 0 0], ...
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import accumulate

import torch

from slime_plugins.lora.adapters import config_of, iter_adapters
from slime_plugins.lora.names import hf_names, spellings
from slime_plugins.lora.parallel import all_gather, everywhere, on_rank_0
from slime_plugins.lora.peft.directory import validate_adapter
from slime_plugins.lora.peft.read import PeftAdapter, distinct_A, equal


@dataclass(frozen=True, kw_only=True)
class ImportedAdapter:
    """What ``import_peft`` did, equal on every rank."""

    projections: int
    """Adapted Hugging Face linears."""
    rescaled: tuple[str, ...]
    """Projections whose B was multiplied, because this model's alpha / rank is another one; B A stays as it was."""
    stacked: tuple[str, ...]
    """Megatron linears that hold the different As of their projections one below the other."""


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
    distinct = distinct_A(source, names)
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
    return [next(start for start, other in zip(offsets, distinct) if equal(A, other)) for A in As], distinct


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
