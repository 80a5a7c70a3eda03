"""The trained parameters in a DeepSpeed ZeRO checkpoint, whole again, one at a time. DeepSpeed is not imported.

How the files lie (DeepSpeed 0.19, ``engine.save_checkpoint``; W ranks):

    latest                                                   text: the tag
    <tag>/mp_rank_00_model_states.pt                         stages 0, 1, 2: one, with every weight
    <tag>/zero_pp_rank_<r>_mp_rank_00_model_states.pt        stage 3: one per rank, with placeholders
    <tag>/[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt one per rank, fp32 masters and moments

    stages 1, 2   ``single_partition_of_fp32_groups``: one flat tensor per parameter group. Ranks one after the other
                  are the group: parameters in the order of ``param_shapes``, padding at the end.
    stage 3       ``fp32_flat_groups``: flat tensors, one after the other. Every parameter is cut into W pieces of
                  ceil(numel / W), the last one padded; each rank has its pieces in the order of ``param_shapes``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files.regular import read_small
from slime_plugins.lora.files.torch_file import TorchFile

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_EXPERT = re.compile(r"(?:layer_\d+_)?exp.*_states\.pt")


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: the first ``numel`` values of some ranges of flat tensors, one after the other."""

    shape: torch.Size
    ranges: tuple[tuple[_Flat, int, int], ...]

    def read(self) -> torch.Tensor:
        pieces = [piece for flat, start, stop in self.ranges for piece in flat.take(start, stop)]
        return torch.cat(pieces)[: self.shape.numel()].reshape(self.shape)


class _Flat:
    """1-D tensors seen as one after the other, without joining them."""

    def __init__(self, pieces: list[torch.Tensor]):
        self.pieces = pieces
        self.ends = list(accumulate(piece.numel() for piece in pieces))

    @property
    def numel(self) -> int:
        return self.ends[-1] if self.ends else 0

    def take(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Views of the values from ``start`` to ``stop``."""
        for piece, end in zip(self.pieces, self.ends):
            begin = end - piece.numel()
            if begin < stop and start < end:
                yield piece[max(start - begin, 0) : min(stop, end) - begin]


class ZeroCheckpoint(Mapping[str, torch.Tensor]):
    """DeepSpeed's parameter names -> trained values, joined from the ranks' files when asked for.

    fp32 masters where there are optimizer files; without any, and outside stage 3, the model's own weights.
    Where the model's weights are there too, each master rounded to their dtype has to equal them: files of different
    runs or steps do not mix unseen.

    Args:
        directory: what ``save_checkpoint`` was given (it has ``latest``), or the directory of one tag.
        tag: which one; None takes ``latest``'s.
    Raises:
        UsageError: no checkpoint there, or no such tag.
        ValueError: a file is missing, damaged, of another run, or wants code to run; model or expert parallelism.
    """

    def __init__(self, directory: str | os.PathLike, tag: str | None = None):
        self.directory = find_tag(Path(directory), tag)
        models, optims = _files(self.directory)
        self._model = TorchFile(models[0])
        state = self._model.value
        shapes = _shapes(self._model)
        self.deepspeed_version: str | None = state.get("ds_version")
        self.stage = _stage(self._model, sharded=models[0].name.startswith("zero_"))
        self.weights: Mapping[str, torch.Tensor] = _field(self._model, state, "module", Mapping)
        if not all(isinstance(weight, torch.Tensor) for weight in self.weights.values()):
            raise ValueError(f"{models[0]}: 'module' is not the tensors by name that DeepSpeed writes")
        self.names = frozenset(self.weights) | frozenset(state.get("frozen_param_shapes") or ())
        """Names of all parameters that the checkpoint speaks of, frozen ones too."""
        for path in models[1:]:
            _same_run(self._model, TorchFile(path), _model_marks)
        if optims:
            self.source = "fp32 masters"
            self._places = self._find_masters([TorchFile(path) for path in optims], shapes)
            if self.stage == 3:
                _complete(models, self.world_size, models[0].name)
        else:
            self._without_masters(shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> torch.Tensor:
        place, weight = self._places[name], self.weights.get(name)
        if place is None:
            return self._model.checked(self.weights[name])
        master = place.read()
        if weight is None or tuple(weight.shape) != tuple(place.shape) or not weight.numel():
            return master
        if not _same_bits(master.to(weight.dtype), self._model.checked(weight)):
            raise ValueError(
                f"{name}: the fp32 master in the optimizer files, rounded to {_short(weight.dtype)}, is not the "
                f"weight in {self._model.path}: files of different runs or steps are mixed"
            )
        return master

    def shape(self, name: str) -> torch.Size:
        """Shape of a parameter, without reading it."""
        place = self._places[name]
        return self.weights[name].shape if place is None else place.shape

    def _without_masters(self, shapes: list[dict[str, torch.Size]]) -> None:
        if self.stage == 3:
            raise ValueError(
                f"{self.directory}: no *_optim_states.pt; in stage 3 only they hold the weights that were trained"
            )
        self.world_size = 1
        self._places = {}
        for name in (name for group in shapes for name in group):
            if name not in self.weights:
                raise ValueError(f"{self._model.path}: {name} was trained but its weight is not in the file")
            self._places[name] = None
        dtypes = {_short(self.weights[name].dtype) for name in self._places}
        self.source = f"the model's {'/'.join(sorted(dtypes))} weights (there is no *_optim_states.pt)"

    def _find_masters(self, files: list[TorchFile], shapes: list[dict[str, torch.Size]]) -> dict[str, _Place | None]:
        first = files[0]
        state = _field(first, first.value, "optimizer_state_dict", Mapping)
        count = _field(first, state, "partition_count", (int, list, tuple))
        self.world_size = count if isinstance(count, int) else max(count, default=0)
        _complete([file.path for file in files], self.world_size, first.path.name)
        for file in files[1:]:
            _same_run(first, file, _optim_marks)
        if "fp32_flat_groups" in state:
            ranks = [_flat_tensors(file, "fp32_flat_groups") for file in files]
            places = _cut_places(self.directory, ranks, {k: v for group in shapes for k, v in group.items()})
        else:
            ranks = [_flat_tensors(file, "single_partition_of_fp32_groups") for file in files]
            places = _joined_places(self.directory, ranks, shapes, state.get("param_alignment_paddings"))
        return places


def find_tag(directory: Path, tag: str | None) -> Path:
    """The directory of a tag. Raises UsageError naming the tags that there are."""
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory")
    tags = sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and any(entry.glob("*_states.pt")))
    latest = directory / "latest"
    if tag is None and any(directory.glob("*_states.pt")):
        return directory
    if tag is None and not latest.is_file():
        known = f"choose one with --tag: {', '.join(tags)}" if tags else "and no directory with *_model_states.pt"
        raise UsageError(f"{directory}: not a DeepSpeed checkpoint, it has no file 'latest'; {known}")
    if tag is None:
        tag = read_small(latest, 4096).decode(errors="replace").strip()
    if tag not in tags:
        raise UsageError(f"{directory}: no checkpoint with tag {tag!r}; there is: {', '.join(tags) or 'none'}")
    return directory / tag


def _files(directory: Path) -> tuple[list[Path], list[Path]]:
    """Model and optimizer files of a tag in the order of their ranks, as numbers (10 after 2)."""
    models: dict[int, Path] = {}
    optims: dict[int, Path] = {}
    kinds = set()
    for path in sorted(directory.glob("*_states.pt")):
        model, optim = _MODEL.fullmatch(path.name), _OPTIM.fullmatch(path.name)
        if _EXPERT.fullmatch(path.name):
            raise ValueError(f"{path}: expert-parallel DeepSpeed checkpoints are not supported")
        match = model or optim
        if match is None:
            raise ValueError(f"{path}: not a file that DeepSpeed ZeRO writes")
        if int(match[2] if model else match[3]):
            raise ValueError(
                f"{path}: DeepSpeed checkpoints with model parallelism (mp_rank above 0) are not supported"
            )
        kinds.add(("model", match[1] is None) if model else ("optim", match[1]))
        if model:
            models[int(match[1] or 0)] = path
        else:
            optims[int(match[2])] = path
    for kind, example in (("model", models), ("optim", optims)):
        if sum(name == kind for name, _ in kinds) > 1:
            raise ValueError(
                f"{directory}: *_{kind}_states.pt of two kinds, as two runs into one directory leave them"
            )
        if example and sorted(example) != list(range(len(example))):
            lost = next(rank for rank in range(max(example)) if rank not in example)
            name = re.sub(r"pp_rank_\d+", f"pp_rank_{lost}", example[max(example)].name)
            raise ValueError(f"{directory}: {name} is missing")
    if not models:
        raise ValueError(f"{directory}: no *_model_states.pt, which has the names and shapes of the parameters")
    return [models[rank] for rank in sorted(models)], [optims[rank] for rank in sorted(optims)]


def _complete(paths: list[Path], world_size: int, example: str) -> None:
    """``paths`` are of ranks 0, 1, ...: there have to be as many as there were ranks."""
    if len(paths) < world_size:
        lost = re.sub(r"pp_rank_\d+", f"pp_rank_{len(paths)}", example)
        raise ValueError(f"{paths[0].parent}: {lost} is missing ({len(paths)} of {world_size} ranks are there)")
    if len(paths) > world_size:
        raise ValueError(
            f"{paths[0].parent}: {paths[world_size].name} is of another run, this one had {world_size} ranks"
        )


def _field(file: TorchFile, mapping: Mapping, name: str, kind: type | tuple[type, ...]) -> Any:
    value = mapping.get(name) if isinstance(mapping, Mapping) else None
    if not isinstance(value, kind):
        raise ValueError(f"{file.path}: has no {name!r} as DeepSpeed writes it (got {type(value).__name__})")
    return value


def _shapes(file: TorchFile) -> list[dict[str, torch.Size]]:
    """``param_shapes``: per parameter group of the optimizer, name -> shape, in the order of the flat tensors."""
    groups = _field(file, file.value, "param_shapes", (list, tuple))
    if not all(isinstance(group, Mapping) and all(map(_is_shape, group.values())) for group in groups):
        raise ValueError(f"{file.path}: 'param_shapes' is not what DeepSpeed writes")
    return [{str(name): torch.Size(shape) for name, shape in group.items()} for group in groups]


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(n) is int and 0 <= n < 2**31 for n in value)


def _stage(file: TorchFile, *, sharded: bool) -> int:
    config = file.value.get("ds_config") or {}
    stage = (config.get("zero_optimization") or {}).get("stage", 0) if isinstance(config, Mapping) else 0
    if sharded != (stage == 3):
        raise ValueError(f"{file.path}: its name is not that of ZeRO stage {stage}, which its ds_config has")
    return stage


def _flat_tensors(file: TorchFile, name: str) -> list[torch.Tensor]:
    tensors = _field(file, file.value["optimizer_state_dict"], name, (list, tuple))
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 1 or tensor.dtype != torch.float32:
            raise ValueError(f"{file.path}: {name!r} is not a list of flat fp32 tensors")
        file.checked(tensor)
    return list(tensors)


def _joined_places(
    directory: Path, ranks: list[list[torch.Tensor]], shapes: list[dict[str, torch.Size]], paddings: Any
) -> dict[str, _Place | None]:
    """Stages 1 and 2: the ranks' partitions of a group, one after the other."""
    if {len(rank) for rank in ranks} != {len(shapes)}:
        raise ValueError(f"{directory}: the ranks do not have one fp32 partition for each of {len(shapes)} groups")
    places: dict[str, _Place | None] = {}
    align = 2 * len(ranks)  # DeepSpeed pads a group to a multiple of this
    for index, group in enumerate(shapes):
        flat, offset = _Flat([rank[index] for rank in ranks]), 0
        after = paddings[index] if paddings else [0] * len(group)
        for (name, shape), padding in zip(group.items(), after):
            places[name] = _Place(shape, ((flat, offset, offset + shape.numel()),))
            offset += shape.numel() + padding
        if len(after) != len(group) or math.ceil(offset / align) != math.ceil(flat.numel / align):
            raise ValueError(f"{directory}: group {index} has {flat.numel} fp32 values where its shapes need {offset}")
    return places


def _cut_places(
    directory: Path, ranks: list[list[torch.Tensor]], shapes: dict[str, torch.Size]
) -> dict[str, _Place | None]:
    """Stage 3: a piece of ceil(numel / W) of every parameter on every rank."""
    flats = [_Flat(rank) for rank in ranks]
    places: dict[str, _Place | None] = {}
    offset = 0
    for name, shape in shapes.items():
        piece = math.ceil(shape.numel() / len(ranks))
        places[name] = _Place(shape, tuple((flat, offset, offset + piece) for flat in flats))
        offset += piece
    for rank, flat in enumerate(flats):
        if flat.numel != offset:
            raise ValueError(f"{directory}: rank {rank} has {flat.numel} fp32 values where the shapes need {offset}")
    return places


def _same_run(first: TorchFile, other: TorchFile, marks) -> None:
    """Ranks of one save agree on all of this; files of another run or step differ in some of it."""
    ours, theirs = marks(first), marks(other)
    for name, value in ours.items():
        if theirs[name] != value:
            detail = f"{theirs[name]} where {first.path.name} has {value}"
            detail = detail if len(detail) < 200 else f"not that of {first.path.name}"
            raise ValueError(f"{other.path}: is of another run or step: {name} is {detail}")


def _model_marks(file: TorchFile) -> dict[str, str]:
    fields = ("global_steps", "skipped_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_version")
    marks = {name: repr(file.value.get(name)) for name in fields}
    marks["ds_config"] = repr(file.value.get("ds_config"))
    marks["param_shapes"] = repr(_shapes(file))
    return marks


def _optim_marks(file: TorchFile) -> dict[str, str]:
    state = _field(file, file.value, "optimizer_state_dict", Mapping)
    marks = {name: repr(file.value.get(name)) for name in ("ds_version", "ds_config")}
    marks["partition_count"] = repr(state.get("partition_count"))
    for name in ("optimizer_state_dict", "base_optimizer_state"):
        inner = state.get(name)
        if isinstance(inner, Mapping):
            marks["param_groups"] = repr(inner.get("param_groups"))
            moments = inner.get("state")
            if isinstance(moments, Mapping):
                steps = [entry.get("step") for entry in moments.values() if isinstance(entry, Mapping)]
                marks["step of the optimizer"] = repr(steps)
    return marks


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
