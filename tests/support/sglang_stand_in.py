"""A module ``sglang.srt.managers.io_struct`` with the LoRA request of SGLang after 0.5.15: a payload per rank."""

import dataclasses
import sys
import types

for _name in ("sglang", "sglang.srt", "sglang.srt.managers"):
    sys.modules.setdefault(_name, types.ModuleType(_name))


@dataclasses.dataclass
class LoadLoRAAdapterFromTensorsReqInput:
    lora_name: str
    config_dict: dict
    serialized_named_tensors: list


io_struct = types.ModuleType("sglang.srt.managers.io_struct")
io_struct.LoadLoRAAdapterFromTensorsReqInput = LoadLoRAAdapterFromTensorsReqInput
sys.modules["sglang.srt.managers"].io_struct = io_struct
sys.modules["sglang.srt.managers.io_struct"] = io_struct
