"""A PEFT adapter directory -> the adapters of a running, sharded model.

PEFT has one A per projection. A ``split`` layout holds that as it is. A ``fused`` linear has one A for all of its
projections: it takes adapters whose projections share A, and any others stacked, exactly, at the sum of the ranks:

    q: A_q [r, I], B_q    k: A_k, B_k    v: A_v, B_v   ->   A = [A_q; A_k; A_v]  [3r, I],  B rows of q = [B_q 0 0], ...
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch

from slime_plugins.lora.adapters import config_of, iter_adapters, iter_token_rows
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.checkpoint.model import other_base
from slime_plugins.lora.layers import AdapterSpec, LoRALinear
from slime_plugins.lora.layers.pieces import Piece, Placement
from slime_plugins.lora.parallel import all_gather, everywhere, on_rank_0
from slime_plugins.lora.peft.directory import validate_adapter
from slime_plugins.lora.peft.read import PeftAdapter, distinct_A, equal
from slime_plugins.lora.peft.rows import LEAVES, trained_ids
from slime_plugins.lora.projections import piece_key


@dataclass(frozen=True, kw_only=True)
class ImportedAdapter:
    """What ``import_peft`` did, equal on every rank."""

    projections: int
    """Adapted Hugging Face linears."""
    rescaled: tuple[str, ...]
    """Projections whose B was multiplied, because this model's alpha / rank is another one; B A stays as it was."""
    stacked: tuple[str, ...]
    """Megatron linears that hold the different As of their projections one below the other."""


def import_peft(model, adapter_dir: str | os.PathLike, *, optimizer=None, carries: bool = False) -> ImportedAdapter:
    """Load a PEFT adapter into an adapted model, at any parallelism. Call on all ranks.

    The model needs adapters on the same projections at the same ranks: those of ``LoRAConfig.from_peft``, or a fused
    layout with room for stacking. Where its scaling differs, B is multiplied so that the adapter computes the same.

    Args:
        model: a module or the list of this rank's pipeline chunks, wrapped or not.
        optimizer: Megatron's, if it exists already; its float32 copies would otherwise undo the import.
        carries: the caller carries what was trained beside the adapter (``peft.extra``); else that is refused.
    Collectives:
        object gathers over the world, and those of ``other_base``.
    Raises:
        OSError, ValueError: on every rank alike, naming what is missing, extra, of another shape or rank, damaged, not
            finite, not representable, or made for a base that is here and is another. Nothing has been changed then.
    """
    config_of(model)
    source = everywhere(lambda: PeftAdapter(adapter_dir, carries=carries))
    on_rank_0(lambda: validate_adapter(source.config, source.tensors))
    _refuse_other_base(model, source)
    linears = list(iter_adapters(model))
    specs = [one for linear in linears for one in linear.lora.one_by_one()]
    here = {name for names in all_gather([name for spec in specs for name in spec.projections]) for name in names}
    on_rank_0(lambda: _compare(source, here))
    fits = {spec.name: fit for spec, fit in zip(specs, everywhere(lambda: [_fit(spec, source) for spec in specs]))}
    everywhere(lambda: _check_shapes(linears, fits))
    rows = everywhere(lambda: _rows(model, source))
    with torch.no_grad():
        for parameter, place, piece in _all_pieces(linears):
            piece.put(parameter, place.part_of(piece, fits[piece.linear].tensors[piece.key]))
        for parameter, delta in rows:
            parameter.copy_(delta)
    if optimizer is not None:
        optimizer.reload_model_params()
    notes = all_gather([(fit.rescaled, fit.stacked) for fit in fits.values()])
    rescaled = sorted({name for rank in notes for names, _ in rank for name in names})
    stacked = sorted({name for rank in notes for _, name in rank if name})
    return ImportedAdapter(projections=len(here), rescaled=tuple(rescaled), stacked=tuple(stacked))


def _rows(model, source: PeftAdapter) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """This rank's trained rows of the vocabulary and their new values. Raises ValueError if file and model differ."""
    here = config_of(model).trainable_token_indices
    ids = trained_ids(source.config)
    if tuple(sorted(ids)) != here:
        raise ValueError(
            f"{source.directory} has {len(ids)} trained vocabulary rows, this model {len(here)}, or others: give its "
            "ids with --trainable-token-indices"
        )
    carriers = [carrier for carrier in iter_token_rows(model) if carrier.lora_table]
    if not carriers:
        return []
    named = source.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not os.path.isdir(named):
        raise ValueError(
            f"{source.directory}: trained rows are values of its base, {named!r}, which is not here: their change of "
            "it is not known; set base_model_name_or_path to where it is"
        )
    found = {rows.leaf: rows.delta for rows in source.rows(BaseCheckpoint(named))}
    return [(carrier.lora_rows, found[LEAVES[carrier.lora_name]].to(carrier.lora_rows)) for carrier in carriers]


def _refuse_other_base(model, source: PeftAdapter) -> None:
    """Raise ValueError if the base that the adapter names is on this machine and is not this model's. Collective."""
    named = source.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not on_rank_0(lambda: os.path.isfile(os.path.join(named, "config.json"))):
        return
    different = other_base(model, named)
    if different:
        raise ValueError(f"{source.directory} was made for {named}, not for this base: {'; '.join(different)}")


@dataclass(frozen=True)
class _Fit:
    """New values for one linear's adapter, whole."""

    tensors: dict[str, torch.Tensor]
    """By the keys of ``projections``."""
    files: dict[str, str]
    """The same keys -> the file's key, for messages."""
    rescaled: tuple[str, ...]
    stacked: str | None


def _fit(spec: AdapterSpec, source: PeftAdapter) -> _Fit:
    """One linear's whole tensors out of the file's. Raises ValueError naming the tensor that does not fit."""
    names = [_in_file(name, source) for name in spec.projections]
    starts, As = _places(spec, names, source)
    stacked = spec.name if len(As) > 1 else None
    pairs, rescaled = [], []
    for i, name in enumerate(names):
        A, B = source.pair(name)
        A, B = _at_rank(source, name, A, B, A.shape[0] if stacked else spec.ranks[i])
        if not math.isclose(source.scaling(name), spec.scalings[i], rel_tol=1e-9):
            B = B.float() * (source.scaling(name) / spec.scalings[i])
            rescaled.append(name)
        if stacked:
            B = torch.nn.functional.pad(B, (starts[i], spec.rank - starts[i] - B.shape[1]))
            A = torch.cat(As)
        pairs.append((A, B))
    tensors = spec.record.tensors(pairs)
    files = {piece_key("lora_A"): source.key(names[0], "A")}
    for leaf, name in zip(spec.record.projections, names):
        files |= {piece_key(f"lora_{half}", leaf): source.key(name, half) for half in "AB"}
    return _Fit(tensors, files, tuple(rescaled), stacked)


def _places(spec: AdapterSpec, names: list[str], source: PeftAdapter) -> tuple[list[int], list[torch.Tensor]]:
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


def _check_shapes(linears: list[LoRALinear], fits: Mapping[str, _Fit]) -> None:
    """Raise ValueError naming the tensor that is not as large as this model's, or too large for its dtype."""
    for parameter, place, piece in _all_pieces(linears):
        whole, _ = place.extent(piece, piece.take(parameter).shape)
        found, file_key = fits[piece.linear].tensors[piece.key], fits[piece.linear].files[piece.key]
        for dim, side in ((0, "outputs"), (1, "inputs")):
            if found.shape[dim] != whole[dim]:
                raise ValueError(
                    f"{file_key} has {found.shape[dim]} {side} where this model has {whole[dim]}: another base"
                )
        if not torch.isfinite(found.to(parameter.dtype)).all():
            raise ValueError(f"{file_key}: a value is too large for {parameter.dtype} adapters")


def _all_pieces(linears: list[LoRALinear]) -> Iterator[tuple[torch.nn.Parameter, Placement, Piece]]:
    for linear in linears:
        place, parameters = linear.lora_placement(), linear.lora_parameters()
        for name, pieces in linear.lora_pieces().items():
            yield from ((parameters[name], place, piece) for piece in pieces)


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


def _in_file(name: str, source: PeftAdapter) -> str:
    return source.find(name) or name


def _compare(source: PeftAdapter, here: set[str]) -> None:
    """Raise ValueError listing the projections that the file and the model do not both have."""
    missing = sorted(name for name in here if source.find(name) is None)
    extra = sorted(name for name in source.modules if source.canonical(name) not in here)
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
