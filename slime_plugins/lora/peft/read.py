"""A PEFT adapter directory, opened: (A, B) by module, as Megatron's linears, and the LoRAConfig that fits it."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.spelling import canonical_layers
from slime_plugins.lora.names import megatron_name
from slime_plugins.lora.peft.checks import absent_targets, config_problems, module_to_save, unsupported
from slime_plugins.lora.peft.config import module_alpha, module_rank, module_scaling, parse_key
from slime_plugins.lora.peft.directory import AdapterTensors, read_adapter, validate_adapter
from slime_plugins.lora.peft.experts_form import per_expert
from slime_plugins.lora.peft.extra import extra_names, refuse_extra
from slime_plugins.lora.peft.rows import ALONE, VocabularyRows, row_key, rows_in, trained_ids


class PeftAdapter:
    """An adapter directory, opened and known to be representable: config, and (A, B) by module name.

    Args:
        base: that it was made for, if that is at hand: it knows how its modules are spelled, and what q_proj is.
        carries: modules that were trained beside it are somebody else's affair; else they are refused.
    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, or the adapter is more than lora_A and lora_B of linears that Megatron has.
    """

    def __init__(self, adapter_dir: str | os.PathLike, base: BaseCheckpoint | None = None, *, carries: bool = False):
        self.directory, self._base = Path(adapter_dir), base
        self.config: Mapping[str, Any]
        self._tensors: Any  # AdapterTensors, or its like that takes stacked experts apart
        self.config, self._tensors = read_adapter(adapter_dir)
        problems = config_problems(self.config)
        if not problems:
            self.config, self._tensors = per_expert(self.config, self._tensors)
            problems = unsupported(self.config)
        if problems:
            raise ValueError(f"{adapter_dir}: {problems[0]}: it cannot be imported")
        self.extra = tuple(extra_names(adapter_dir))
        """Names of tensors that were trained beside the adapter."""
        if not carries:
            refuse_extra(adapter_dir)
        self._keys: dict[str, dict[str, str]] = defaultdict(dict)
        for key in self._tensors:
            if row_key(key) is not None:
                continue
            module, half = parse_key(key) or (None, None)
            if module is None and module_to_save(self.config, key):
                continue
            if module is None or half is None or not self._is_known(module):
                raise ValueError(
                    f"{adapter_dir}: {key}: it cannot be imported, no linear that can be adapted has that name"
                )
            self._keys[module][half] = key
        self._by_canonical = {self.canonical(module): module for module in self._keys}

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

    def rows(self, base: BaseCheckpoint) -> list[VocabularyRows]:
        """Trained rows of the vocabulary, as changes of the base's. Raises ValueError as ``rows_in`` does."""
        return rows_in(self.config, self._tensors, base)

    def refuse_other_names(self, names: str | None) -> None:
        """Raise ValueError where a module is not spelled as ``names`` (of ``base.spelling.SPELLINGS``) has it.

        None takes every spelling. Needs the base.
        """
        if names is None or self._base is None:
            return
        strange = next((module for module in self.modules if module not in self._base.names(names)), None)
        if strange is not None:
            raise ValueError(
                f"{self.directory}: {strange} is no name of --names {names} for {self._base.directory}; leave --names "
                "out to read every spelling"
            )

    def linears(self) -> dict[str, list[str]]:
        """Megatron linear -> its adapted projections, in the order of the fused rows."""
        parts: dict[str, dict[int, str]] = defaultdict(dict)
        for module in self.modules:
            linear, part = self._megatron_name(module)
            parts[linear][part] = module
        return {linear: [found[part] for part in sorted(found)] for linear, found in parts.items()}

    def canonical(self, module: str) -> str:
        """Its name in the words of this package; without the base, by what names of layers begin with."""
        if self._base is not None:
            return self._base.canonical(module)
        return canonical_layers(module).replace(".shared_expert.", ".shared_experts.")

    def find(self, name: str) -> str | None:
        """The file's name of a linear, by its canonical one; None where the file has none."""
        return self._by_canonical.get(name)

    def _megatron_name(self, module: str) -> tuple[str, int]:
        return megatron_name(self.canonical(module), mla=self._base is not None and self._base.mla)

    def _is_known(self, module: str) -> bool:
        try:
            self._megatron_name(module)
        except KeyError:
            return False
        return True


def config_options(adapter: str | os.PathLike | PeftAdapter, layout: str | None = None) -> dict[str, Any]:
    """Arguments of the ``LoRAConfig`` of a model that holds this PEFT adapter exactly.

    Args:
        adapter: its directory, or what was opened of it.
        layout: ``split``, or ``fused``, where different As of one linear are stacked at the sum of their ranks; None
            takes ``fused`` if the projections of every linear share their A, as those of a fused export do.
    Raises:
        OSError, ValueError: the directory is damaged, or holds what Megatron cannot (naming it).
    """
    source = adapter if isinstance(adapter, PeftAdapter) else PeftAdapter(adapter, carries=True)
    validate_adapter(source.config, source.tensors)
    rows = tuple(sorted(trained_ids(source.config)))
    if source.config.get("peft_type") == ALONE:
        return {"target_modules": (), "trainable_token_indices": rows}
    linears = source.linears()
    dtypes, A_ranks = set(), {}
    for linear, modules in linears.items():
        As = distinct_A(source, modules)
        A_ranks[linear] = [A.shape[0] for A in As]
        dtypes |= {A.dtype for A in As}
    (dtype,) = dtypes  # one, in a valid adapter
    shared = {linear for linear, found in A_ranks.items() if len(found) == 1}
    if layout is None:
        layout = "fused" if len(shared) == len(linears) else "split"
    config = source.config
    options: dict[str, Any] = {"use_rslora": bool(config.get("use_rslora"))}
    ranks: dict[str, int]
    alphas: dict[str, float]
    if layout == "fused":
        ranks = {linear: sum(found) for linear, found in A_ranks.items()}
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
    ranks = {source.canonical(name): value for name, value in ranks.items()}
    alphas = {source.canonical(name): value for name, value in alphas.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return dict(
        rank=rank,
        alpha=float(alpha),
        dropout=float(config.get("lora_dropout") or 0.0),
        target_modules=_all_experts(_targets(source)),
        layout=layout,
        dtype=str(dtype).removeprefix("torch."),
        rank_pattern=_pattern(ranks, rank),
        alpha_pattern=_pattern(alphas, alpha),
        trainable_token_indices=rows,
        **options,
    )


def distinct_A(source: PeftAdapter, names: list[str]) -> list[torch.Tensor]:
    distinct: list[torch.Tensor] = []
    for name in names:
        A = source.tensors[source.key(name, "A")]
        if not any(equal(A, other) for other in distinct):
            distinct.append(A)
    return distinct


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _targets(source: PeftAdapter) -> tuple[str, ...]:
    """``target_modules`` that select the file's modules, as short as the file says it."""
    config = source.config
    targets, excluded = config.get("target_modules") or (), config.get("exclude_modules") or ()
    if config.get("layers_to_transform") not in (None, []) or isinstance(excluded, str):
        return tuple(map(source.canonical, source.modules))
    if targets == "all-linear" and not excluded:
        return (targets,)
    if isinstance(targets, str) or not all(re.fullmatch(r"[\w.]+", name) for name in targets):
        return tuple(map(source.canonical, source.modules))
    if any(f".{a}".endswith(f".{b}") or f".{b}".endswith(f".{a}") for a in targets for b in excluded):
        return tuple(map(source.canonical, source.modules))
    idle = absent_targets(config, source.modules)
    return tuple(source.canonical(name) for name in targets if name not in idle)


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
