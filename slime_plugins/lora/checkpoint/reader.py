"""A checkpoint as Hugging Face projections, in one plain process: no Megatron, no process group, no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

from slime_plugins.lora.checkpoint import base, directory
from slime_plugins.lora.checkpoint.manifest import Adapter, Manifest
from slime_plugins.lora.checkpoint.storage import TensorReader
from slime_plugins.lora.hf.headers import BaseCheckpoint
from slime_plugins.lora.hf.peft_form import Projection
from slime_plugins.lora.names import hf_names


class AdapterCheckpoint:
    """The weights of a checkpoint; every byte that is read is compared with its checksum.

    Raises:
        UsageError: there is no checkpoint at ``path``.
        ValueError, OSError: it is damaged or incomplete, naming the file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = directory.find(path)
        self.manifest = Manifest.read(self.path)
        self._reader = TensorReader.open(self.path)
        self._reader.check_files()

    def projections(self) -> Iterator[Projection]:
        """Every adapted projection whole, in layer order, read one at a time."""
        for name, adapter in self.manifest.adapters.items():
            full_names = {full.rsplit(".", 1)[-1]: full for full in hf_names(name)}
            for i, leaf in enumerate(adapter.projections):
                yield self._projection(name, adapter, i, full_names[leaf])

    def _projection(self, name: str, adapter: Adapter, i: int, full_name: str) -> Projection:
        leaf, rank = adapter.projections[i], adapter.ranks[i]
        A_key = f"{name}.lora_A.{leaf}" if adapter.layout == "split" else f"{name}.lora_A"
        try:
            A, B = self._reader.read(A_key), self._reader.read(f"{name}.lora_B.{leaf}")
        except KeyError as error:
            raise ValueError(f"{self.path} has no tensor {error}") from None
        # In a split layout, narrower projections are padded to the widest, and the padding must contribute nothing.
        if A[rank:].any() and B[:, rank:].any():
            raise ValueError(f"{self.path}: {full_name} has rank {rank}, but values beyond it")
        return Projection(full_name, A[:rank].clone(), B[:, :rank].clone(), adapter.scalings[i])

    def check_base(self, checkpoint: BaseCheckpoint) -> None:
        """Raise ValueError for another base: other sizes, or other weights in the first layer (which is read)."""
        saved = self.manifest.base
        layers = sorted(int(n) for n in saved["layers"])[:1]
        found = base.differences(saved, base.fingerprint_of_hf(checkpoint, saved["dtype"], layers))
        if found:
            raise ValueError(f"{checkpoint.directory} is not the base of {self.path}: {'; '.join(found)}")
