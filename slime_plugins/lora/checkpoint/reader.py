"""A checkpoint as Hugging Face projections, in one plain process: no Megatron, no process group, no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import torch

from slime_plugins.lora.base import fingerprint as base
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.checkpoint import directory
from slime_plugins.lora.checkpoint.manifest import Manifest
from slime_plugins.lora.checkpoint.storage import TensorReader
from slime_plugins.lora.peft.rows import LEAVES, VocabularyRows
from slime_plugins.lora.projections import Projection


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

    @property
    def base_quant(self) -> BaseQuant | None:
        """What the base was stored as; None: dense."""
        noted = self.manifest.base.get("quantization")
        return None if noted is None else BaseQuant.read(noted, self.path)

    def projections(self) -> Iterator[Projection]:
        """Every adapted projection whole, in layer order, read one at a time."""
        for name, adapter in self.manifest.adapters.items():
            try:
                yield from adapter.whole(name, partial(self._read, name))
            except KeyError as error:
                raise ValueError(f"{self.path} has no tensor {error}") from None
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from None

    def rows(self) -> list[VocabularyRows]:
        """Trained rows of the vocabulary; tied ones once."""
        ids = self.manifest.config.trainable_token_indices
        found = {
            leaf: f"{name}.lora_rows" for name, leaf in LEAVES.items() if f"{name}.lora_rows" in self._reader.index
        }
        if bool(ids) != bool(found):
            raise ValueError(f"{self.path} holds rows of {', '.join(found) or 'nothing'}, for {len(ids)} token ids")
        return [VocabularyRows(leaf, ids, self._reader.read(key)) for leaf, key in found.items()]

    def _read(self, linear: str, key: str) -> torch.Tensor:
        return self._reader.read(f"{linear}.{key}")

    def check_base(self, checkpoint: BaseCheckpoint) -> str:
        """Raise ValueError for another base: other sizes or weights, in anything that the checkpoint knows of it.

        Returns:
            what was compared, for people.
        """
        saved = self.manifest.base
        layers = [int(n) for n in saved["layers"]]
        here = base.fingerprint_of_hf(checkpoint, saved["dtype"], layers)
        # The checkpoint that its base was made from; what it was stored as while training is no fact of the files.
        found = base.differences({**saved, "quantization": None}, here)
        if found:
            raise ValueError(f"{checkpoint.directory} is not the base of {self.path}: {'; '.join(found)}")
        rest = " and all else" if saved.get("rest") else ""
        return f"{len(layers)} of {here['architecture']['num_layers']} layers{rest}"
