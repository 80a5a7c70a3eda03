"""Is an adapter directory whole, non-empty, trained, what its config says, and made for this base?"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.peft.checks import (
    FLOATS,
    Problem,
    absent_targets,
    config_problems,
    tensor_problems,
    unsupported,
)
from slime_plugins.lora.peft.config import is_target, key_of, module_scaling, parse_key
from slime_plugins.lora.peft.directory import AdapterTensors, open_tensors, read_config
from slime_plugins.lora.peft.experts_form import per_expert
from slime_plugins.lora.peft.extra import FILE, FOLDER, extra_names, extra_problems
from slime_plugins.lora.peft.loaders import SGLANG, VLLM, Adapted, describe, left_out, misnamed, not_whole, warnings
from slime_plugins.lora.peft.rows import ALONE, ids_of, rows_in


@dataclass(kw_only=True)
class Report:
    """What ``verify_adapter`` found. ``ok`` is the answer, ``problems`` the reasons, one line each."""

    adapter: str
    """Directory that was read."""
    checked_against: str | None = None
    """Base checkpoint directory, if one was given."""
    base: str | None = None
    """``base_model_name_or_path`` of the config."""
    rank: int | None = None
    alpha: float | None = None
    scalings: list[float] = field(default_factory=list)
    """Distinct factors on B A over the modules; one, unless there are patterns."""
    target_modules: list[str] | str | None = None
    lora_A: int = 0
    """Number of lora_A tensors; ``lora_B`` alike."""
    lora_B: int = 0
    other: int = 0
    """Tensors that are neither (modules_to_save, unknown keys)."""
    extra: list[str] = field(default_factory=list)
    """What was trained beside the adapter, by the base model's names (``peft.extra``)."""
    parameters: int = 0
    """Values in lora_A and lora_B."""
    bytes: int = 0
    dtypes: list[str] = field(default_factory=list)
    largest_B: float = 0.0
    """Largest magnitude in any lora_B."""
    base_compared: str | None = None
    """What of the base's weights was compared with what the adapter notes of them; known with a base."""
    expected_modules: int | None = None
    """Modules of the base that the config selects; known with a base."""
    checksums: int | None = None
    """Tensors whose checksum agreed; None where the file carries none."""
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    names: str | None = None
    """How its modules are spelled, one of ``base.spelling.SPELLINGS``; known with a base."""
    loaders: dict[str, str] = field(default_factory=dict)
    """Who takes the file, and what of it is left out without an error; known with a base."""
    not_whole_in: list[str] = field(default_factory=list)
    """Loaders that leave some of it out without an error, with the reason and what to do; known with a base."""
    base_quant: dict[str, Any] | None = None
    """What the base was stored as while it was trained (``BaseQuant``); None: dense, or not noted."""

    @property
    def ok(self) -> bool:
        """No problem; warnings do not count."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with ``ok``; warnings are their messages."""
        warnings = [warning.message for warning in self.warnings]
        return {"ok": self.ok, **dataclasses.asdict(self), "warnings": warnings}


def verify_adapter(
    adapter_dir: str | os.PathLike,
    hf_checkpoint: str | os.PathLike | None = None,
    *,
    full: bool = False,
    names: str | None = None,
) -> Report:
    """Look at every tensor of a PEFT adapter directory, one at a time, and list all that is wrong.

    With ``hf_checkpoint`` also against the base: its modules and shapes, and the first 4 KiB of each of its tensors,
    or with ``full`` every byte, where the adapter notes what they were (``Report.base_compared`` says what it was).
    ``names``: the spelling that was asked for; None wants what PEFT acts on, and reads every one.

    Raises:
        UsageError: a directory is not there, or ``hf_checkpoint`` is not a Hugging Face checkpoint.
        ValueError: the base checkpoint is damaged. What is wrong with the adapter is in the report, not raised.
    """
    if not Path(adapter_dir).is_dir():
        raise UsageError(f"{adapter_dir}: no such directory; expected one with adapter_config.json")
    base = BaseCheckpoint(hf_checkpoint) if hf_checkpoint is not None else None
    report = Report(adapter=str(adapter_dir), checked_against=str(hf_checkpoint) if base else None)

    config: Mapping[str, Any] | None
    tensors: Any  # AdapterTensors, or its like that takes stacked experts apart
    config, tensors = _open(adapter_dir, report)
    if config is not None:
        report.base, report.target_modules = config.get("base_model_name_or_path"), config.get("target_modules")
        report.rank, report.alpha = config.get("r"), config.get("lora_alpha")
        report.problems += config_problems(config)
    if config is None or tensors is None or report.problems:
        return report

    try:
        quant = tensors.base_quant
    except ValueError as error:
        report.problems.append(Problem(kind="config", message=str(error)))
        return report
    report.base_quant = None if quant is None else quant.to_dict()
    report.problems += [Problem(kind="config", message=line) for line in tensors.config_changes(config)]
    written = tensors
    try:
        config, tensors = per_expert(config, tensors)
    except (KeyError, ValueError) as error:
        report.problems.append(Problem(kind="shape", message=str(error)))
        return report
    watched = _Watched(tensors)
    problems = tensor_problems(config, watched)
    report.problems += watched.faults + problems
    report.problems += [Problem(kind="checksum", message=f"{name} is lost", tensor=name) for name in tensors.lost()]
    report.problems += unsupported(config)
    watched.fill(report)
    report.problems += _look_beside(adapter_dir, report)
    shapes = watched.shapes
    report.scalings = sorted({module_scaling(config, module) for module, _ in shapes})
    report.problems += _untrained(watched, report)
    if base is None:
        report.warnings += [Problem(kind="layers", message=m) for m in _uneven_layers(module for module, _ in shapes)]
        report.warnings += [
            Problem(
                kind="target",
                message=f"target_modules names {name!r}, for which there is no tensor: give --hf-checkpoint to learn "
                "whether that is right",
            )
            for name in absent_targets(config, [module for module, _ in shapes])
        ]
    else:
        _against_base(report, config, tensors, base, shapes, full=full, names=names, fused=tensors is not written)
    report.warnings += [
        Problem(kind="server", message=message) for message in _server_warnings(config, {m for m, _ in shapes})
    ]
    return report


def _against_base(
    report: Report,
    config: Mapping[str, Any],
    tensors: Any,
    base: BaseCheckpoint,
    shapes: Mapping[tuple[str, str], tuple[int, ...]],
    *,
    full: bool,
    names: str | None,
    fused: bool,
) -> None:
    """What the base adds: is it the adapter's, are its modules and shapes, who loads what. ``fused``: of experts."""
    other, report.base_compared = tensors.other_base(base, full=full)
    report.problems += [Problem(kind="base", message=other)] if other else []
    modules = {module for module, _ in shapes}
    report.names = base.spelling_of(modules) if names is None else names
    adapted = Adapted(base, frozenset(modules), report.names, fused=fused)
    if names is None:
        report.problems += _name_problems(adapted)
    if config.get("peft_type") != ALONE:
        report.problems += _base_problems(config, shapes, base, report)
    report.problems += _idle_rows(config, tensors, base, adapts=bool(modules))
    if modules & base.names(report.names).keys():
        left = left_out(adapted)
        report.loaders = {loader: describe(reasons, len(modules)) for loader, reasons in left.items()}
        report.warnings += [Problem(kind="loader", message=line) for line in warnings(left, len(modules))]
        report.not_whole_in = not_whole(left, len(modules))
    if ids_of(config):
        report.loaders |= dict.fromkeys((VLLM, SGLANG), "does not serve trained vocabulary rows")


class _Watched(Mapping[str, torch.Tensor]):
    """Passes tensors on and notes what it saw, so that each is read once."""

    def __init__(self, tensors: AdapterTensors):
        self.tensors = tensors
        self.faults: list[Problem] = []
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        self.zero: set[tuple[str, str]] = set()
        self._seen: list[tuple[str, int, int, torch.dtype]] = []
        self._largest_B = 0.0

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor, fault = self.tensors.load(key)
        if fault:
            self.faults.append(Problem(kind="checksum", message=fault, tensor=key))
        module, half = parse_key(key) or (key, "")
        self._seen.append((half, tensor.numel(), tensor.nbytes, tensor.dtype))
        if half:
            self.shapes[module, half] = tuple(tensor.shape)
            largest = _largest(tensor)
            if largest == 0.0:
                self.zero.add((module, half))
            elif half == "B" and largest is not None:
                self._largest_B = max(self._largest_B, largest)
        return tensor

    def fill(self, report: Report) -> None:
        """Write the counts into the report."""
        adapter = [entry for entry in self._seen if entry[0]]
        report.lora_A = sum(half == "A" for half, *_ in adapter)
        report.lora_B = len(adapter) - report.lora_A
        report.other = len(self._seen) - len(adapter)
        report.parameters = sum(numel for _, numel, _, _ in adapter)
        report.bytes = sum(nbytes for _, _, nbytes, _ in self._seen)
        report.dtypes = sorted({str(dtype).removeprefix("torch.") for *_, dtype in adapter})
        report.largest_B = self._largest_B
        if self.tensors.has_checksums:
            report.checksums = len(self._seen) - len(self.faults)


def _largest(tensor: torch.Tensor) -> float | None:
    """Largest magnitude; None where there is none to speak of, which ``tensor_problems`` reports."""
    if not tensor.numel() or tensor.dtype not in FLOATS:
        return None
    low, high = tensor.aminmax()
    largest = max(-low.item(), high.item())
    return largest if math.isfinite(largest) else None


def _open(adapter_dir: str | os.PathLike, report: Report) -> tuple[dict[str, Any] | None, AdapterTensors | None]:
    config = tensors = None
    try:
        config = read_config(adapter_dir)
    except (OSError, ValueError) as error:
        report.problems.append(Problem(kind="file", message=str(error)))
    try:
        tensors = open_tensors(adapter_dir)
    except (OSError, ValueError) as error:
        report.problems.append(Problem(kind="file", message=str(error)))
    return config, tensors


def _look_beside(adapter_dir: str | os.PathLike, report: Report) -> list[Problem]:
    """What was trained beside the adapter: its names into the report, its faults returned."""
    if (Path(adapter_dir) / FOLDER / FILE).exists() and (problems := extra_problems(adapter_dir)):
        return problems
    try:
        report.extra = extra_names(adapter_dir)
    except (OSError, ValueError) as error:
        return [Problem(kind="missing", message=str(error))]
    return []


def _untrained(watched: _Watched, report: Report) -> Iterable[Problem]:
    """A zero matrix on either side makes the product zero; lora_B starts as zero, so no training looks like that."""
    modules = {module for module, _ in watched.shapes}
    dead = {module for module, _ in watched.zero}
    if modules and dead == modules:
        message = "every adapter is zero: it was never trained (lora_B starts as zero) and changes nothing in the base"
        yield Problem(kind="untrained", message=message)
        return
    for module, half in sorted(watched.zero):
        message = f"{key_of(module, half)} is all zero: this adapter was never trained and changes nothing"
        if ".experts." in module:  # an expert that no token was routed to
            report.warnings.append(Problem(kind="untrained", message=message, tensor=key_of(module, half)))
        else:
            yield Problem(kind="untrained", message=message, tensor=key_of(module, half))


def _idle_rows(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: BaseCheckpoint, *, adapts: bool
) -> Iterable[Problem]:
    """Trained rows of the vocabulary that are not the base's to train, or have the base's own values."""
    try:
        rows = rows_in(config, tensors, base)
    except (UsageError, ValueError) as error:
        yield Problem(kind="rows", message=str(error))
        return
    idle = [one for one in rows if not one.delta.any()]
    if idle and not adapts and len(idle) == len(rows):
        yield Problem(kind="untrained", message="every trained row has the base's own values: it was never trained")


def _uneven_layers(modules: Iterable[str]) -> Iterable[str]:
    """Without a base: a module that some of the adapted layers have and others do not, as a lost shard leaves it."""
    layers: dict[str, set[int]] = defaultdict(set)
    for module in modules:
        match = re.search(r"\.layers\.(\d+)\.", f".{module}")
        if match:
            layers[f".{module}".replace(match[0], ".layers.*.", 1)[1:]].add(int(match[1]))
    everywhere = set().union(*layers.values()) if layers else set()
    for name, found in sorted(layers.items()):
        if lost := sorted(everywhere - found):
            yield (
                f"{name} is adapted in {len(found)} of {len(everywhere)} layers, not in {lost[0]}"
                f"{', ...' if len(lost) > 1 else ''}: give --hf-checkpoint to learn whether that is right"
            )


_SPELLED = {
    "module": "as in the model",
    "checkpoint": "as in the files of {}",
    "text": "as in the language model alone of {}",
}


def _name_problems(adapted: Adapted) -> Iterable[Problem]:
    """Names under which PEFT loads nothing."""
    base, moved = adapted.base, misnamed(adapted)
    if moved:
        called = base.module(base.names(adapted.spelling)[moved[0]])
        yield Problem(
            kind="names",
            tensor=key_of(moved[0], "A"),
            message=f"{len(moved)} modules are named {_SPELLED[adapted.spelling].format(base.directory)} ({moved[0]}),"
            f" but a loaded {base.model_type()} calls them {called}: PEFT would load the adapter without an error and "
            f"change nothing; export it again, or rename its keys (meant so: --names {adapted.spelling})",
        )


def _base_problems(
    config: Mapping[str, Any],
    shapes: Mapping[tuple[str, str], tuple[int, ...]],
    base: BaseCheckpoint,
    report: Report,
) -> Iterable[Problem]:
    """Modules and shapes of the adapter that are not the base's, and modules of the base that the adapter lacks."""
    assert report.names is not None
    known = base.names(report.names)
    modules = {module for module, _ in shapes}
    expected = {module for module in known if is_target(config, module)}
    if config.get("target_modules") == "all-linear":
        expected.discard("lm_head")  # PEFT leaves the output layer out
    report.expected_modules = len(expected)
    unknown = sorted(modules - known.keys())
    if unknown and len(unknown) == len(modules):
        message = f"the adapter is for another base: none of its {len(modules)} modules is in {base.directory}"
        yield Problem(kind="base", message=f"{message} (first: {unknown[0]})")
        return
    for module in unknown:
        yield Problem(
            kind="base", tensor=key_of(module, "A"), message=f"{module} is adapted, but the base has no such linear"
        )
    for module in sorted(expected - modules):
        message = f"{module} is selected by target_modules and in the base, but {key_of(module, 'A')} is missing"
        yield Problem(kind="missing", tensor=key_of(module, "A"), message=message)
    for (module, half), shape in shapes.items():
        linear = base.linear_shape(known.get(module, module))
        if linear is None or len(shape) != 2 or 0 in shape:
            continue
        width, expected_width = (shape[1], linear[1]) if half == "A" else (shape[0], linear[0])
        if width != expected_width:
            side = "inputs" if half == "A" else "outputs"
            message = f"{key_of(module, half)} has shape {list(shape)}, where the base has {expected_width} {side}"
            yield Problem(kind="base", tensor=key_of(module, half), message=message)


def _server_warnings(config: Mapping[str, Any], modules: Iterable[str]) -> Iterable[str]:
    """What servers do without a word.

    PEFT and vLLM read these fields; SGLang computes lora_alpha / r for every layer. vLLM absorbs kv_b_proj into its
    attention over compressed keys and never calls the linear that it has wrapped (reported: vllm issue 48974).
    """
    latent = sum(module.endswith(".kv_b_proj") for module in modules)
    if latent:
        yield (
            f"{latent} adapters of kv_b_proj: vLLM is reported to load them and never apply them (vllm issue 48974); "
            "serve with SGLang 0.5.23 or newer, which corrects for them, or merge the adapter into its base"
        )
    for leaf, ids in ids_of(config).items():
        yield (
            f"{len(ids)} trained rows of {leaf}: vLLM and SGLang do not serve them; merge the adapter into its base "
            "(slime-lora merge, slime-lora export --merge), or the rows alone (export --bake-tokens)"
        )
    for name in ("use_rslora", "rank_pattern", "alpha_pattern"):
        if config.get(name):
            yield f"adapter_config.json: SGLang ignores {name} without a word and would scale the adapter wrongly"
