"""Random states of every rank. They cannot be resharded: restored at the parallelism that they were saved at only."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

_TRACKER = "megatron."


def local_state() -> dict[str, Any]:
    """Of python, numpy, torch, the device, and Megatron's model-parallel tracker: tensors, numbers and strings."""
    version, words, gauss = random.getstate()
    generator: Any = numpy.random.get_state(legacy=True)
    kind, key, position, has_gauss, cached = generator
    state: dict[str, Any] = {
        "python": (version, _words(numpy.array(words, dtype="uint32")), gauss),
        "numpy": (str(kind), _words(key), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["device"] = torch.cuda.get_rng_state().cpu()
    for name, value in get_cuda_rng_tracker().get_states().items():
        state[_TRACKER + name] = (value if isinstance(value, torch.Tensor) else value.get_state()).cpu()
    return state


def _words(words: numpy.ndarray) -> torch.Tensor:
    """uint32, as the int32 of the same bits: torch has no arithmetic for the former, and older ones do not load it."""
    return torch.from_numpy(words.view("int32").copy())


def set_local_state(state: dict[str, Any]) -> None:
    """The inverse of ``local_state``."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.numpy().view("uint32").tolist()), gauss))
    kind, key, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, key.numpy().view("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "device" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["device"])
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    for name, value in state.items():
        if name.startswith(_TRACKER):
            current = states.get(name.removeprefix(_TRACKER))
            if isinstance(current, torch.Generator):
                current.set_state(value)
            else:
                states[name.removeprefix(_TRACKER)] = value
    tracker.set_states(states)


def pack(states: list[dict[str, Any]]) -> dict[str, Any]:
    """All ranks' states, equal ones stored once: most are equal over data-parallel ranks."""
    values: list[Any] = []
    ranks = []
    for state in states:
        numbers = {}
        for name, value in state.items():
            same = (n for n, known in enumerate(values) if _equal(known, value))
            numbers[name] = next(same, len(values))
            if numbers[name] == len(values):
                values.append(value)
        ranks.append(numbers)
    return {"values": values, "ranks": ranks}


def unpack(packed: dict[str, Any], rank: int) -> dict[str, Any]:
    """One rank's state."""
    return {name: packed["values"][number] for name, number in packed["ranks"][rank].items()}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b))
    return a == b
