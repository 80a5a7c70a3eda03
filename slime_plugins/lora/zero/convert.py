"""A PEFT adapter out of a DeepSpeed ZeRO checkpoint of a PEFT-wrapped model."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.peft.checks import absent_targets
from slime_plugins.lora.peft.config import key_of, target_list
from slime_plugins.lora.peft.directory import CONFIG, read_config, write_adapter
from slime_plugins.lora.peft.extra import FILE, FOLDER, put_extra, write_extra
from slime_plugins.lora.peft.form import flat_config, select
from slime_plugins.lora.peft.verify import Report, verify_adapter
from slime_plugins.lora.zero.files import ZeroCheckpoint

# What wrappers put in front of the base model's own names: PEFT's base_model.model., whatever holds the PeftModel
# (base_model.base_model.model., module.base_model.model.), or nothing for adapters put into the model itself.
_WRAPPERS = r"(?:.*\bbase_model\.model\.|module\.)?"
_LORA = re.compile(rf"(?P<prefix>{_WRAPPERS})(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_BASE_WEIGHT = re.compile(rf"{_WRAPPERS}(?P<module>.+?)(?:\.base_layer)?\.weight")
_WRAPPED = re.compile(rf"{_WRAPPERS}(.+)")
_MODULE_TO_SAVE = re.compile(r"\.modules_to_save\.[^.]+\.")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What ``convert_zero`` did."""

    checkpoint: str
    """Directory of the tag that was read."""
    stage: int
    world_size: int
    """Ranks whose optimizer files were joined."""
    source: str
    """``fp32 masters``, or what stood in for them."""
    config_from: str
    """File that the adapter config was taken from, or what was inferred."""
    others: list[str]
    """Trained parameters that are no part of the adapter, DeepSpeed's names."""
    extra: str | None
    """File that they were saved to."""
    report: Report
    """``verify_adapter`` on the result."""


def convert_zero(
    checkpoint_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    tag: str | None = None,
    adapter: str | None = None,
    alpha: float | None = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    extra: str | os.PathLike | None = None,
    names: str = "module",
) -> Conversion:
    """Write the adapter in a ZeRO-1/2/3 checkpoint as a PEFT directory, verified before it takes its place.

    One tensor at a time, mapped from the files: memory is about the adapter's fp32 size, whatever the base's is.

    Args:
        tag: which save; None takes the one that ``latest`` names.
        adapter: name of the adapter where the model has several.
        alpha: lora_alpha; needed where the checkpoint has no ``adapter_config.json``.
        base_model: for ``base_model_name_or_path``; with a local directory the adapter is also checked against it.
        dtype: of the written tensors; None keeps what was trained, the fp32 masters.
        extra: file (``.safetensors``) or directory for what was trained beside the adapter; None keeps it in a folder
            below the adapter (``peft.extra``).
        names: how modules are called, one of ``base.spelling.SPELLINGS``; the run's own names without a local base.
    Raises:
        UsageError: no such checkpoint, tag or adapter; no config and no alpha.
        ValueError: the checkpoint is incomplete, damaged, or holds no adapter that PEFT could load.
    """
    checkpoint = ZeroCheckpoint(checkpoint_dir, tag)
    lora, others = _find_adapter(checkpoint, adapter)
    base = _local_base(base_model)
    if base is None and names != "module":
        raise UsageError(f"--names {names} is a spelling of the base's: give its directory with --base-model")
    # A run under an older transformers had the names of the base's files.
    renamed = {(base.renamed(module, names) if base else module, half): name for (module, half), name in lora.items()}
    tensors = _Adapter(checkpoint, renamed, dtype)
    config, config_from = _config(Path(checkpoint_dir), checkpoint, tensors, adapter, alpha, base_model, names)
    if base and renamed != lora:
        config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        config |= select((module for module, _ in renamed), base, names)
    reports: list[Report] = []

    def judge(written: Path) -> None:
        if extra is None and beside:
            put_extra(written, beside)
        report = verify_adapter(written, base.directory if base else None, names=names if base else None)
        if not report.ok:
            more = f" (and {len(report.problems) - 1} more)" if len(report.problems) > 1 else ""
            raise ValueError(f"not written, the result is not a good adapter: {report.problems[0].message}{more}")
        reports.append(report)

    beside = _extra(checkpoint, others)
    write_adapter(out_dir, config, tensors, base=base, inspect=judge)
    if extra is not None or not beside:
        put_extra(out_dir, {})  # of an adapter that was replaced
    report = reports[-1]
    report.adapter = str(out_dir)
    saved = None
    if beside:
        saved = Path(out_dir) / FOLDER / FILE if extra is None else _file(Path(extra))
        if extra is not None:
            write_extra(saved, beside)
    return Conversion(
        checkpoint=str(checkpoint.directory),
        stage=checkpoint.stage,
        world_size=checkpoint.world_size,
        source=checkpoint.source,
        config_from=config_from,
        others=others,
        extra=None if saved is None else str(saved),
        report=report,
    )


class _Adapter(Mapping[str, torch.Tensor]):
    """PEFT keys -> tensors, read from the checkpoint each time they are asked for."""

    def __init__(self, checkpoint: ZeroCheckpoint, names: dict[tuple[str, str], str], dtype: torch.dtype | None):
        self.names = names
        self._checkpoint, self._dtype = checkpoint, dtype
        self._keys = {key_of(module, half): name for (module, half), name in names.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor = self._checkpoint[self._keys[key]]
        return tensor if self._dtype is None else tensor.to(self._dtype)

    def ranks(self) -> dict[str, int]:
        """Module -> rank, from the shapes of lora_A."""
        shapes = {module: self._checkpoint.shape(name) for (module, half), name in self.names.items() if half == "A"}
        return {module: shape[0] if len(shape) else 0 for module, shape in shapes.items()}


def _find_adapter(checkpoint: ZeroCheckpoint, adapter: str | None) -> tuple[dict[tuple[str, str], str], list[str]]:
    """(module, half) -> DeepSpeed's name for the adapter's tensors, and the names of all else that was trained."""
    found: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    others = []
    for name in checkpoint:
        match = _LORA.fullmatch(name)
        if not match:
            others.append(name)
            continue
        of_adapter, place = found[match["adapter"] or "default"], (match["module"], match["half"])
        if place in of_adapter:
            raise ValueError(f"{of_adapter[place]} and {name} would be one tensor of the adapter: two PEFT models")
        of_adapter[place] = name
    for name in others:
        if "lora_magnitude_vector" in name or "lora_embedding_" in name or ".lora_" in name:
            raise ValueError(f"{name} was trained: lora_A and lora_B of linears alone would be a wrong adapter")
    if not found:
        example = f", the first is {others[0]}" if others else ""
        raise ValueError(f"{checkpoint.directory}: no LoRA among the {len(others)} trained parameters{example}")
    if adapter is None and len(found) > 1:
        raise UsageError(f"several adapters were trained; choose one with --adapter: {', '.join(sorted(found))}")
    adapter = adapter or next(iter(found))
    if adapter not in found:
        raise UsageError(f"no adapter {adapter!r} was trained; there is: {', '.join(sorted(found))}")
    others += [name for other, names in found.items() if other != adapter for name in names.values()]
    return found[adapter], others


def _config(
    checkpoint_dir: Path,
    checkpoint: ZeroCheckpoint,
    tensors: _Adapter,
    adapter: str | None,
    alpha: float | None,
    base_model: str | None,
    names: str,
) -> tuple[dict[str, Any], str]:
    """The adapter config that was saved with the checkpoint, else one that the tensors and ``alpha`` allow."""
    places = (checkpoint_dir, checkpoint.directory, checkpoint.directory.parent)
    for directory in [*(place / adapter for place in places if adapter), *places]:
        if (directory / CONFIG).is_file():
            config = read_config(directory)
            if alpha is not None and config.get("lora_alpha") != alpha:
                raise UsageError(
                    f"--lora-alpha is {alpha:g}, but {directory / CONFIG} has {config.get('lora_alpha')}: leave it out"
                )
            if base_model:
                config["base_model_name_or_path"] = base_model
            # Heads and embeddings go beside the adapter, so that every server can read it (``peft.extra``).
            config |= {"inference_mode": True, "modules_to_save": None}
            if stale := absent_targets(config, tensors.ranks()):  # names that the model did not have
                config["target_modules"] = [name for name in config["target_modules"] if name not in stale]
            return config, str(directory / CONFIG)
    if alpha is None:
        raise UsageError(f"{checkpoint_dir} has no {CONFIG}: give the run's alpha with --lora-alpha")
    ranks = tensors.ranks()
    rank = Counter(ranks.values()).most_common(1)[0][0]
    config = flat_config(
        base_model=base_model,
        target_modules=target_list(ranks, _base_linears(checkpoint, base_model, ranks, names)),
        rank=rank,
        alpha=alpha,
    )
    if patterns := {module: value for module, value in ranks.items() if value != rank}:
        config["rank_pattern"] = patterns
    return config, f"inferred: rank {rank} from the tensors, alpha {alpha:g} as given, scaling alpha / rank"


def _local_base(base_model: str | None) -> BaseCheckpoint | None:
    """The base, where it is a directory here. Raises UsageError for what is neither that nor a name on the hub."""
    if base_model is None:
        return None
    if os.path.lexists(base_model):
        return BaseCheckpoint(base_model)
    if not re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", base_model) or base_model.startswith("."):
        raise UsageError(f"--base-model {base_model!r:.120}: no such directory, and no name of a model (owner/name)")
    return None


def _base_linears(checkpoint: ZeroCheckpoint, base_model: str | None, adapted: Iterable[str], names: str) -> set[str]:
    """Names of the base's modules as far as they are known: from the base, the checkpoint, or other layers."""
    if base := _local_base(base_model):
        return set(base.names(names))
    known = {match["module"] for name in checkpoint.names if (match := _BASE_WEIGHT.fullmatch(name))}
    known = {module for module in known if ".lora_" not in module}
    if known - set(adapted):
        return known
    # Frozen parameters were left out: suppose that every adapted layer has the modules that any of them has.
    layers = {match[0] for module in adapted if (match := re.search(r"\.layers\.\d+\.", module))}
    return {re.sub(r"\.layers\.\d+\.", layer, module, count=1) for module in adapted for layer in layers}


def _file(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / FILE


def _extra(checkpoint: ZeroCheckpoint, names: list[str]) -> dict[str, torch.Tensor]:
    """Everything trained beside the adapter, under the base model's names."""
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        match = _WRAPPED.fullmatch(name)
        plain = _MODULE_TO_SAVE.sub(".", match[1] if match else name)
        tensors[name if plain in tensors else plain] = checkpoint[name]
    return tensors
