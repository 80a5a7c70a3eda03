"""Bytes that one forward of a Megatron model keeps for its backward. Runs on every rank."""

from __future__ import annotations

from contextlib import contextmanager

import moe_models
import torch

from slime_plugins.lora.rehearsal.model import local_layer_spec


def flash_spec(base, config):
    """A decoder layer whose attention keeps no scores."""
    layer = local_layer_spec(base, config)
    layer.submodules.self_attention.submodules.core_attention = moe_models.Attention
    return layer


class Saved:
    """Storages that autograd has saved: each counted once, parameters not."""

    def __init__(self, chunks):
        self._parameters = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}
        self._keep_alive = []  # or the allocator would hand the same address out again
        self.storages: dict[int, int] = {}
        """Address -> bytes, of the forward."""
        self.shapes: dict[int, list[str]] = {}
        """Of what was saved of each, to look into a difference."""

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        in_backward = torch._C._current_graph_task_id() != -1  # what is recomputed there
        if storage.data_ptr() not in self._parameters and not in_backward:
            self.storages[storage.data_ptr()] = storage.nbytes()
            self.shapes.setdefault(storage.data_ptr(), []).append(f"{list(tensor.shape)} {tensor.dtype}")
            self._keep_alive.append(tensor)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@contextmanager
def saving(chunks):
    """Inside, what autograd saves is counted."""
    saved = Saved(chunks)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        yield saved
