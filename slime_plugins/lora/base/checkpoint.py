"""What a Hugging Face checkpoint directory holds, from ``config.json`` and safetensors headers: no model is loaded.

Names of modules are *canonical* elsewhere in this package (``model.layers.3.mlp.shared_experts.up_proj``); how a base
spells them is known here alone: ``spelled`` and ``canonical``.

Links in the directory are followed wherever they lead: caches of Hugging Face and serve directories are made of them.
An index, which comes with the download, names plain files beside it and nothing else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slime_plugins.lora.base.coded import Coded, in_matrices
from slime_plugins.lora.base.spelling import CANONICAL_LAYERS, LAYER_PREFIXES, SPELLINGS, module_name, text_name
from slime_plugins.lora.base.stacks import StackedExpert, stacked_experts
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files.json_text import read_object
from slime_plugins.lora.files.regular import identity
from slime_plugins.lora.files.safetensors import Stored, read_header
from slime_plugins.lora.names import spellings

if TYPE_CHECKING:
    import torch

MERGEABLE = ("F64", "F32", "BF16", "F16")
"""Dtypes, in the words of safetensors, that an adapter can be merged into."""

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_SAMPLE = 4096  # bytes from the start of each tensor that go into the fingerprint


class BaseCheckpoint:
    """Names and shapes of a base model's weights, and their values when asked for.

    Attributes:
        weights: by name; a matrix that is stored in NF4 codes (bitsandbytes) as the dense one that it stands for.

    Raises:
        UsageError: the directory is not a Hugging Face checkpoint with safetensors.
        ValueError, OSError: a file of it is damaged or missing.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        config, index = self.directory / "config.json", self.directory / INDEX
        self._as_read = {path: _identity(path) for path in (config, index)}
        self.config = self._config(config)
        files, named = self._files(index)
        self._as_read |= {path: _identity(path) for path in files}
        tensors = self._tensors(files, named)
        self.files = list(dict.fromkeys(tensor.file for tensor in tensors.values()))
        """Those that hold weights."""
        self.weights: dict[str, Stored] = in_matrices(tensors)
        self._names: dict[str, dict[str, str]] = {}

    @classmethod
    def of(cls, base: str | os.PathLike | BaseCheckpoint) -> BaseCheckpoint:
        """The checkpoint itself, or that of a directory."""
        return base if isinstance(base, BaseCheckpoint) else cls(base)

    def changed(self) -> list[Path]:
        """Its files that have been written to, replaced or removed since they were read here."""
        return [path for path, found in self._as_read.items() if _identity(path) != found]

    @cached_property
    def coded(self) -> dict[str, Coded]:
        """Those of ``weights`` that are stored in NF4 codes."""
        return {name: weight for name, weight in self.weights.items() if isinstance(weight, Coded)}

    @property
    def quantised(self) -> str | None:
        """What its config says that its weights are stored as, where they are not read here; None: they are read."""
        config = self.config.get("quantization_config")
        if config is None or self.coded:
            return None
        return str(config.get("quant_method", "no method named")) if isinstance(config, dict) else "no method named"

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of ``config.json``: ``text_config`` where there is one."""
        return self.config.get("text_config") or self.config

    def model_type(self, spelling: str = "module") -> str | None:
        """Hugging Face's name of the family; in ``text``, of the language model alone."""
        name = (self.text_config if spelling == "text" else self.config).get("model_type")
        return name if isinstance(name, str) else None

    @property
    def tied(self) -> bool:
        """Is the output layer the embedding?"""
        return bool(self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings")))

    @property
    def mla(self) -> bool:
        """Multi-latent attention (DeepSeek-V3, Kimi-K2, Moonlight), where q_proj is a linear of its own?"""
        return bool(self.text_config.get("kv_lora_rank"))

    @cached_property
    def layer_prefix(self) -> str:
        """The one of ``LAYER_PREFIXES`` that this base's names have."""
        return next((p for p in LAYER_PREFIXES if any(n.startswith(p) for n in self.weights)), CANONICAL_LAYERS)

    @property
    def embedding(self) -> str:
        """Name of the embedding's weight, beside the layers."""
        return f"{self.layer_prefix.removesuffix('layers.')}embed_tokens.weight"

    def spelled(self, module: str) -> str:
        """A canonical name of a module or a weight as this base has it; with its prefix, if there is none.

        ``model.layers.3.mlp.shared_experts.up_proj`` -> ``model.language_model.layers.3.mlp.shared_expert.up_proj``.
        """
        name = module
        if module.startswith(CANONICAL_LAYERS):
            name = self.layer_prefix + module.removeprefix(CANONICAL_LAYERS)
        found = (s for s in spellings(name) if s in self.linears or s in self.weights or f"{s}.weight" in self.weights)
        return next(found, name)

    def canonical(self, name: str) -> str:
        """The inverse of ``spelled``, of ``module`` too. A name that is canonical already stays."""
        name = self.modules.get(name, name)
        if name.startswith(self.layer_prefix):
            name = CANONICAL_LAYERS + name.removeprefix(self.layer_prefix)
        return name.replace(".shared_expert.", ".shared_experts.")

    def module(self, name: str) -> str:
        """A name as this base's files have it -> what it is called in the model that transformers makes of them."""
        return module_name(self.model_type(), name)

    @cached_property
    def modules(self) -> dict[str, str]:
        """Every one of ``linears``, by its name in a loaded model -> by its name in the files."""
        return self.names("module")

    def names(self, spelling: str) -> dict[str, str]:
        """Every one of ``linears``, by its name in one of ``SPELLINGS`` -> by its name in the files.

        ``text`` has no name for the linears of a vision tower.
        """
        if spelling not in self._names:
            spelled = ((self.named(name, spelling), name) for name in self.linears)
            self._names[spelling] = {new: name for new, name in spelled if new is not None}
        return self._names[spelling]

    def renamed(self, module: str, spelling: str) -> str:
        """A linear's name in any spelling, in this one; a name that the base does not know as it is.

        Raises:
            UsageError: it has none in ``text``, being part of a tower.
        """
        stored = next((known[module] for known in map(self.names, SPELLINGS) if module in known), None)
        if stored is None:
            return module
        name = self.named(stored, spelling)
        if name is None:
            raise UsageError(
                f"{module} is no part of the language model: in names of {spelling} it has none; use --names module"
            )
        return name

    def named(self, stored: str, spelling: str) -> str | None:
        """A name as the files have it, in one of ``SPELLINGS``; None where that has none."""
        if spelling == "text":
            return text_name(self.layer_prefix, stored)
        return self.module(stored) if spelling == "module" else stored

    def spelling_of(self, modules: Collection[str]) -> str:
        """The one of ``SPELLINGS`` in which this base knows the most of these names, the first of several."""
        counts = {spelling: len(self.names(spelling).keys() & set(modules)) for spelling in SPELLINGS}
        return max(SPELLINGS, key=counts.__getitem__)

    def layer_of(self, name: str) -> int | None:
        """Number of the layer that a weight of this base lies in; None for those outside of layers."""
        if not name.startswith(self.layer_prefix):
            return None
        number = name.removeprefix(self.layer_prefix).partition(".")[0]
        return int(number) if number.isascii() and number.isdecimal() and len(number) < 6 else None

    def linear_shape(self, module: str) -> tuple[int, int] | None:
        """[out, in] of a linear, by this base's name; None when it has no such module, or holds it in other codes."""
        if module in self.stacks:
            return self.stacks[module].shape
        weight = self.weights.get(f"{module}.weight")
        if weight is None and module == "lm_head" and self.tied:
            weight = self.weights.get(self.embedding)
        if weight is None or len(weight.shape) != 2 or weight.dtype not in _FLOATS:
            return None
        return weight.shape[0], weight.shape[1]

    @cached_property
    def linears(self) -> frozenset[str]:
        """Names of all modules with a matrix for a weight, embeddings left out; packed (4-bit) ones too.

        Experts that are held stacked are named one by one, as others are. Multi-token prediction is left out, too.
        """
        names = {name.removesuffix(".weight") for name, w in self.weights.items() if len(w.shape) == 2}
        names = {name for name in names if f"{name}.weight" in self.weights}
        names |= {name.removesuffix(".qweight") for name in self.weights if name.endswith(".qweight")}
        names |= self.stacks.keys()
        if self.tied:
            names.add("lm_head")
        return frozenset(name for name in names if "embed" not in name.rpartition(".")[2] and not self._predicts(name))

    def convolutions(self, spelling: str) -> list[str]:
        """Modules with a weight of more dimensions, in one of ``SPELLINGS``: PEFT takes them for targets, too."""
        stored = (n.removesuffix(".weight") for n, w in self.weights.items() if len(w.shape) > 2 and ".weight" in n)
        return [name for name in (self.named(name, spelling) for name in stored) if name is not None]

    def _predicts(self, name: str) -> bool:
        """Is this of multi-token prediction, which models of transformers leave in the files?"""
        layer, layers = self.layer_of(name), self.text_config.get("num_hidden_layers")
        beyond = layer is not None and isinstance(layers, int) and layer >= layers
        return name.startswith("mtp.") or bool(beyond and self.text_config.get("num_nextn_predict_layers"))

    @cached_property
    def stacks(self) -> dict[str, StackedExpert]:
        """``...experts.3.gate_proj`` -> its place in the tensor that holds all of its layer, where one does."""
        return stacked_experts(self.weights, self.text_config)

    def read(self, name: str, *, dim: int | None = None, part: int = 0, parts: int = 1) -> torch.Tensor:
        """One tensor, or the ``part``-th of ``parts`` equal slices along dimension 0 or 1. On the CPU.

        Raises ValueError, OSError where the file is not what its header said.
        """
        stored = self.weights[name]
        if dim is None or parts == 1:
            return stored.read()
        size = stored.shape[dim] // parts
        wanted = slice(part * size, (part + 1) * size)
        return stored.read(rows=wanted) if dim == 0 else stored.read(columns=wanted)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` that exist, of a matrix that may end before ``stop``."""
        return self.weights[name].read(rows=slice(start, stop))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over name, dtype, shape and the first 4 KiB of every weight, however they are spread over files.

        Two fine-tunes of one model have equal shapes; the samples tell them apart without reading gigabytes.
        ``base.fingerprint.weights_digest`` is over every byte.
        """
        sha = hashlib.sha256()
        for name in sorted(self.weights):
            weight = self.weights[name]
            sha.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
            sha.update(weight.bytes(0, _SAMPLE))
        return sha.hexdigest()

    def _config(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            raise UsageError(
                f"{self.directory} has no config.json; expected the directory of a Hugging Face checkpoint"
            )
        config = read_object(path)
        if not isinstance(config.get("text_config"), (dict, type(None))):
            raise ValueError(f"{path}: text_config is {config['text_config']!r:.80}, expected an object")
        return config

    def _tensors(self, files: list[Path], named: dict[str, str]) -> dict[str, Stored]:
        weights: dict[str, Stored] = {}
        for path in files:
            for name, stored in read_header(path).tensors.items():
                if name in weights:
                    raise ValueError(f"{self.directory}: {name} is in {weights[name].file.name} and in {path.name}")
                weights[name] = stored
        for name, file in named.items():
            if name not in weights or weights[name].file.name != file:
                raise ValueError(f"{self.directory}: {INDEX} says that {name!r:.120} is in {file}, which has it not")
        return weights

    def _files(self, index: Path) -> tuple[list[Path], dict[str, str]]:
        """The safetensors files, and what the index says: name of a weight -> name of its file."""
        if not index.exists():
            single = self.directory / _SINGLE
            if not single.exists():
                raise UsageError(f"{self.directory} has no {_SINGLE} and no {INDEX}; other weight files are not read")
            return [single], {}
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index}: not a safetensors index: its weight_map gives no file name for every weight")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: weight_map names {name!r:.120}, expected a .safetensors file beside it")
        files = [self.directory / name for name in names]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ValueError(f"{self.directory}: {INDEX} names {', '.join(missing)}, which is not there")
        return files, weight_map


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written to or replaced; None while there is none."""
    return identity(path.stat()) if path.exists() else None
