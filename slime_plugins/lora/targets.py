"""Which linears are adapted: names in Megatron's and in Hugging Face's vocabulary. Pure, no torch.

An entry of ``target_modules`` or ``exclude_modules`` is one of
    linear_qkv, mlp.linear_fc1                  a Megatron module: leaf name or dotted suffix
    q_proj, self_attn.o_proj                    one Hugging Face projection: q_proj alone is the q rows alone
    *.layers.0.*.linear_qkv, *.layers.[0-3].*   a wildcard (fnmatch) on the full name, in either vocabulary
    all-linear                                  every linear of ``names.LINEARS`` but those adapted by name alone
    experts.linear_fc1, experts.gate_proj       the routed experts alone, always all of a layer
    shared_experts.linear_fc1, mlp.linear_fc1   the shared experts alone, the dense MLPs alone
    router, gate                                the router, which nothing else names
Layer numbers are global and count from 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import hf_names, of_expert, record_of, spellings

ALL_LINEAR = "all-linear"


def matches(entry: str, full_name: str) -> bool:
    """Does one entry name this module? Wildcards match the full name, plain entries a dotted suffix of it."""
    if any(mark in entry for mark in "*?["):
        return fnmatchcase(full_name, entry)
    return full_name == entry or full_name.endswith("." + entry)


class Targets:
    """The adapted linears and projections of one config, and the entries that have matched nothing so far."""

    def __init__(self, target_modules: Iterable[str], exclude_modules: Iterable[str] = ()) -> None:
        self.target_modules = tuple(target_modules)
        self.exclude_modules = tuple(exclude_modules)
        self.matched: set[str] = set()
        """Entries that named something among the modules asked about."""

    def parts_of(self, megatron_name: str) -> tuple[int, ...]:
        """Which projections of a linear are adapted, as positions in ``hf_names``; () if it is not adapted."""
        projections = hf_names(megatron_name)
        wanted = self._select(self.target_modules, megatron_name, projections)
        unwanted = self._select(self.exclude_modules, megatron_name, projections)
        return tuple(sorted(wanted - unwanted))

    def _select(self, entries: tuple[str, ...], megatron_name: str, projections: tuple[str, ...]) -> set[int]:
        selected: set[int] = set()
        for entry in entries:
            if not _may_name(entry, megatron_name):
                continue
            if entry == ALL_LINEAR or _matches_any(entry, megatron_name):
                hit = set(range(len(projections)))
            else:
                hit = {i for i, name in enumerate(projections) if _matches_any(entry, name)}
            if hit:
                self.matched.add(entry)
                selected |= hit
        return selected


def _may_name(entry: str, megatron_name: str) -> bool:
    """The router is taken by its own name alone: not by all-linear, and not by a wildcard over a layer."""
    record = record_of(megatron_name)
    return not record.by_name_only or entry.rsplit(".", 1)[-1] in (record.path.rsplit(".", 1)[-1], *record.leaves)


def _matches_any(entry: str, full_name: str) -> bool:
    """Does an entry name this module in any spelling? ``*.experts.*.gate_proj`` names experts, ``experts.3.`` none."""
    names = [*spellings(full_name)]
    if ".experts." in full_name:
        names.append(of_expert(full_name, "{expert}"))
    return any(matches(entry, name) for name in names)


def check_all_matched(targets: Targets, matched: set[str], candidates: Iterable[str]) -> None:
    """Raise UsageError for entries that named nothing on any pipeline stage, listing what could have been named.

    Args:
        matched: the union of ``Targets.matched`` over all pipeline stages.
        candidates: full Megatron names of every linear on any stage.
    """
    unmatched = [e for e in (*targets.target_modules, *targets.exclude_modules) if e not in matched]
    if not unmatched:
        return
    candidates = list(candidates)
    leaves = dict.fromkeys(short_name(name) for name in candidates)
    projections = dict.fromkeys(short_name(hf) for name in candidates for hf in hf_names(name))
    example = f", or a wildcard on a full name such as {candidates[0]}" if candidates else ""
    raise UsageError(
        f"LoRA target or exclude names that match no module: {', '.join(unmatched)}. This model has "
        f"{', '.join(leaves) or 'no linear that can be adapted'} (Megatron), {', '.join(projections)} (Hugging Face), "
        f"{ALL_LINEAR}{example}"
    )


def short_name(full_name: str) -> str:
    """The leaf; with ``experts`` in front where that is what tells it from a dense one."""
    parent, _, leaf = full_name.rpartition(".")
    parent = parent.rpartition(".")[2]
    return f"{parent}.{leaf}" if parent.endswith("experts") else leaf
