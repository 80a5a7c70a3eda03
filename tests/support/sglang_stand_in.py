"""Modules of SGLang after 0.5.15, as far as a sync imports them: the LoRA request (a payload per rank), the bucket."""

import dataclasses
import sys
import types

import torch

for _name in ("sglang", "sglang.srt", "sglang.srt.managers", "sglang.srt.weight_sync"):
    sys.modules.setdefault(_name, types.ModuleType(_name))


@dataclasses.dataclass
class LoadLoRAAdapterFromTensorsReqInput:
    lora_name: str
    config_dict: dict
    serialized_named_tensors: list
    load_format: str | None = None


class FlattenedTensorBucket:
    """Tensors end to end as bytes, and where each lies."""

    def __init__(self, named_tensors) -> None:
        self.flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in named_tensors])
        self.where = [(name, tensor.shape, tensor.dtype) for name, tensor in named_tensors]

    def get_flattened_tensor(self):
        return self.flat

    def get_metadata(self):
        return self.where


def tensors_of(flat: dict) -> dict[str, torch.Tensor]:
    """What the bucket was made of."""
    found, start = {}, 0
    for name, shape, dtype in flat["metadata"]:
        end = start + shape.numel() * dtype.itemsize
        found[name] = flat["flattened_tensor"][start:end].view(dtype).reshape(shape)
        start = end
    return found


def _module(name: str, **attributes) -> None:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    parent, leaf = name.rsplit(".", 1)
    setattr(sys.modules[parent], leaf, module)
    sys.modules[name] = module


_module("sglang.srt.managers.io_struct", LoadLoRAAdapterFromTensorsReqInput=LoadLoRAAdapterFromTensorsReqInput)
_module("sglang.srt.weight_sync.tensor_bucket", FlattenedTensorBucket=FlattenedTensorBucket)
