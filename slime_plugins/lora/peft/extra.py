"""What was trained beside an adapter, a head, an encoder: carried along by name, unchanged, computed with by nobody.

It comes as PEFT has it (``modules_to_save``, in the adapter's own file) and is kept in a file of its own, in a folder
below the adapter: servers take every ``*.safetensors`` beside the adapter's for a part of it. A run keeps it once,
in its directory, beside the steps.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from slime_plugins.lora.files.atomic import replaced_directory
from slime_plugins.lora.peft.checks import Problem, absent_modules, module_to_save, value_problems
from slime_plugins.lora.peft.config import parse_key
from slime_plugins.lora.peft.directory import (
    CONFIG,
    SHA256,
    AdapterTensors,
    digest,
    open_tensors,
    read_config,
)

FOLDER, FILE = "extra", "extra.safetensors"
_PREFIX = "base_model.model."


def extra_of(directory: str | os.PathLike) -> dict[str, torch.Tensor]:
    """By the base model's own names (``score.weight``), of an adapter or of a run; {} where there is nothing.

    Raises:
        OSError, ValueError: a damaged file, naming it; a name that is there twice.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensors, key in _places(directory):
        if name in found:
            raise ValueError(f"{directory}: {name} is there twice, in {FOLDER}/ and as modules_to_save")
        found[name] = tensors[key]
    return found


def extra_names(directory: str | os.PathLike) -> list[str]:
    """As ``extra_of``, without reading a tensor."""
    return [name for name, _, _ in _places(directory)]


def extra_problems(directory: str | os.PathLike) -> list[Problem]:
    """What is wrong with the tensors of the folder; those of ``modules_to_save`` are judged with the adapter's."""
    try:
        tensors = _in_folder(directory)
    except (OSError, ValueError) as error:
        return [Problem(kind="file", message=str(error))]
    problems = []
    for key in tensors:
        tensor, fault = tensors.load(key)
        problems += [Problem(kind="checksum", message=fault, tensor=key)] if fault else []
        problems += value_problems(key, tensor, matrix=False) if tensor.is_floating_point() else []
    return problems + [Problem(kind="checksum", message=f"{name} is lost", tensor=name) for name in tensors.lost()]


def refuse_part_of_base(directory: str | os.PathLike, base: Iterable[str]) -> None:
    """Raise ValueError if what is carried along is a trained copy of a tensor of the base, which would be lost.

    Args:
        base: names of the base's tensors.
    """
    mine = {*base, "lm_head.weight"}  # which a tied base does not store
    for name in extra_names(directory):
        if name in mine:
            raise ValueError(
                f"{directory}: {name} was trained beside the adapter and is part of the base: what is computed with "
                "the base's own would be wrong; only modules that the base lacks can be carried along"
            )


def refuse_extra(directory: str | os.PathLike) -> None:
    """Raise ValueError, by name, for what a caller would lose that carries nothing along."""
    names = extra_names(directory)
    if names:
        raise ValueError(
            f"{directory}: beside the adapter whole modules were trained ({', '.join(names)}), which would be lost "
            f"here; a rehearsal carries them along. To go on without them, move {FOLDER}/ away (`slime-lora import` "
            "makes one of modules_to_save)"
        )


def put_extra(directory: str | os.PathLike, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write them below ``directory``, in place of what was there; nothing, if there are none."""
    place = Path(directory) / FOLDER
    if not tensors:
        shutil.rmtree(place, ignore_errors=True)
        return
    with replaced_directory(place, drop=(FILE,)) as new:
        write_extra(new / FILE, tensors)


def write_extra(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One file, with the checksum of every tensor."""
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    sums = {name: digest(tensor) for name, tensor in owned.items()}
    unfinished = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(owned, unfinished, {"format": "pt", SHA256: json.dumps(sums)})
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _places(directory: str | os.PathLike) -> Iterable[tuple[str, AdapterTensors, str]]:
    """Name, file and key of each."""
    if (Path(directory) / FOLDER / FILE).exists():
        tensors = _in_folder(directory)
        yield from ((key, tensors, key) for key in tensors)
    if not (Path(directory) / CONFIG).is_file():
        return
    config = read_config(directory)
    if config.get("modules_to_save"):
        tensors = open_tensors(directory)
        if lost := absent_modules(config, tensors):
            raise ValueError(f"{directory}: modules_to_save names {lost[0]}, but the adapter holds no tensor of it")
        for key in tensors:
            if parse_key(key) is None and module_to_save(config, key):
                yield key.removeprefix(_PREFIX), tensors, key


def _in_folder(directory: str | os.PathLike) -> AdapterTensors:
    return AdapterTensors(Path(directory) / FOLDER / FILE)
