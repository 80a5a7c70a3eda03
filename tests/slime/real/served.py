"""A plugin for the CPU harness (``--plugin served``): its recording engine behaves as one with our server plugin.

The hook itself runs against SGLang's own code in tests/contracts; here it is the recording server's requests that go
through it. Adapters that come as files are copied beside the others, so that a test sees what was served; the log of
requests also has ``started`` with a server's LoRA arguments and ``served`` with the adapter that answered.
"""

import os
import shutil
import types
from pathlib import Path

import slime_cpu_hooks

ARGUMENTS = ("enable_lora", "max_lora_rank", "lora_target_modules", "max_loras_per_batch", "weight_version")


def serve(module):
    from slime_plugins.lora.server import sglang_plugin

    engine, refused = module._Engine, module._Refused
    start, generate, load, files = engine.__init__, engine.generate, engine._loaded, engine.load_lora_adapter
    unload = engine.unload_lora_adapter

    def started(self, server_args):
        start(self, server_args)
        version = "slime-lora" if getattr(server_args, "enable_lora", False) else "default"
        sglang_plugin.started(None, self, types.SimpleNamespace(weight_version=version))
        self.lora_registry = types.SimpleNamespace(get_all_adapters=lambda: self.adapters)
        self.log("started", {name: getattr(server_args, name, None) for name in ARGUMENTS})

    def loaded(self, name, where):
        self.slime_lora_current = name if self.slime_lora else None
        return load(self, name, where)

    def from_files(self, payload):
        answer = files(self, payload)
        file = Path(payload["lora_path"]) / "adapter_model.safetensors"
        shutil.copyfile(file, self.dir / f"lora_{payload['lora_name']}.safetensors")
        return answer

    def generated(self, payload):
        if self.slime_lora:
            try:
                name = sglang_plugin._name_for(self, payload.get("lora_path"))
            except ValueError as error:
                raise refused(str(error)) from None
            payload = {**payload, "lora_path": name}
        answer = generate(self, payload)
        if payload["sampling_params"].get("max_new_tokens") != 1:  # not a sync's proof
            self.log("served", {"lora_path": payload.get("lora_path")})
        return answer

    def unloaded(self, payload):
        if payload["lora_name"] not in self.adapters:  # in SGLang's words
            raise refused(f"LoRA with name {payload['lora_name']} does not exist. Loaded LoRAs: {list(self.adapters)}")
        return unload(self, payload)

    engine.unload_lora_adapter = unloaded
    engine.__init__, engine._loaded, engine.generate, engine.load_lora_adapter = started, loaded, generated, from_files


if os.environ.get("SLIME_LORA_NO_SERVER_PLUGIN") is None:
    slime_cpu_hooks.after("sglang.srt.entrypoints.http_server", serve)
