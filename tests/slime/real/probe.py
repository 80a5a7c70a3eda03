"""A plugin for the CPU harness (``--plugin probe``, imported in every process): says what the trainer holds.

A line ``PROBE {...}`` after ``init`` and after every training step, per rank: bits of the base, bytes of host memory
per policy, and the process's resident memory.
"""

import functools
import json

import slime_cpu_hooks


def watch(module):
    cls = module.MegatronTrainRayActor
    for name in ("init", "train_actor"):
        setattr(cls, name, reporting(name, getattr(cls, name)))


def reporting(when, method):
    @functools.wraps(method)
    def reported(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        if self.role == "actor":
            print("PROBE " + json.dumps({"when": when, **held(self)}), flush=True)
        return result

    return reported


def held(actor) -> dict:
    import torch

    bits = 0
    for chunk in actor.model:
        for name, parameter in chunk.named_parameters():
            if "lora_" not in name:
                bits += parameter.detach().contiguous().view(torch.uint8).long().sum().item()
    store = actor.weights_backuper
    copies = getattr(store, "host_bytes", None)
    if copies is None:  # slime's own
        copies = {
            tag: sum(t.numel() * t.element_size() for t in tensors.values()) for tag, tensors in store._backups.items()
        }
    with open("/proc/self/status") as status:
        rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024
    return {"base": bits, "copies": copies, "rss": rss, "rank": torch.distributed.get_rank()}


slime_cpu_hooks.after("slime.backends.megatron_utils.actor", watch)
