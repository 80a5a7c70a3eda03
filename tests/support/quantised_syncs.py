"""Weight syncs into engines that run a quantised copy, through slime's hooks. Runs on every rank."""

from __future__ import annotations

import logging
import types
from argparse import Namespace

import engine_quantisers as reference
import slime_hooks_on_ranks as on_ranks
import slime_stand_ins
import torch
import torch.distributed as dist
from harness import Layout
from megatron.core import parallel_state as mpu

from slime_plugins.lora.adapters import iter_adapters, state_of


def run(layout: Layout, hf_dir, config: dict, offload: bool):
    """``sync_lost`` of both ways of gathering, and the same from whole matrices."""
    from slime_plugins.lora.slime.hooks import merged_sync as hooks
    from slime_plugins.lora.slime.hooks.policies import Policies

    common = slime_stand_ins.install()
    common.named_params_and_buffers = hooks.base_parameters(slime_stand_ins.named_params_and_buffers)
    gather_one = common.all_gather_param = hooks.merging_one(slime_stand_ins.all_gather_param)
    asked: list[str] = []
    converter = slime_stand_ins.module("slime.backends.megatron_utils.megatron_to_hf")
    converter.convert_to_hf = lambda *words: _convert(asked, *words)

    model = on_ranks.model_of(layout, hf_dir)
    args = Namespace(offload_train=offload)
    updater = types.SimpleNamespace(args=args, model=model, model_name="tiny", quantization_config=config)
    store = Policies(args, model)
    store.backup("actor")
    live = dict(common.named_params_and_buffers(args, model))
    whole = _whole_matrices(model, live)
    if offload:
        for linear in iter_adapters(model):
            linear.lora_A.data.fill_(float("nan"))
            linear.lora_B.data.fill_(float("nan"))

    gather_bucket = hooks.merging_bucket(
        lambda names, weights: [
            slime_stand_ins.all_gather_param(n, on_ranks._like(weights[n], live[n])) for n in names
        ]
    )
    ways = {
        "one by one": lambda: [gather_one(name, p) for name, p in live.items()],
        "bucket": lambda: [gather_bucket(chunk, store.get("actor")) for chunk in (list(live)[:3], list(live)[3:])],
    }
    seen: dict = {"lost": {}, "calls": [], "logs": mpu.is_pipeline_last_stage()}
    syncs, plain = {}, {}
    for way, gather in ways.items():
        asked.clear()
        with hooks.sending(model, store) as plain[way]:
            gather()
        assert not asked, "nothing is quantised for whom nothing is sent to"
        with hooks.sending(model, store, updater) as syncs[way]:
            gather()
        seen["calls"].append(len(asked))
    sampled = list(dict.fromkeys(asked))
    with Warnings() as warned:
        for way, sync in syncs.items():
            seen["lost"][way] = _step(model, sync)
    everyone: list = [None] * mpu.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(everyone, [whole[n] for n in sampled], group=mpu.get_pipeline_model_parallel_group())
    seen.update(
        sampled=len(sampled),
        warned=warned,
        expected=reference.lost([one for stage in everyone for one in stage], config),
    )
    seen["same as without"] = all(_counts(syncs[way]) == _counts(plain[way]) for way in ways)
    seen["unknown"] = _unknown(hooks, model, store, updater, converter, ways["one by one"])
    for linear in iter_adapters(model):
        linear.lora_A.data.fill_(1.0)  # not NaN any more
        linear.lora_B.data.zero_()
    store.backup("actor")
    converter.convert_to_hf = lambda *words: _convert([], *words)
    with hooks.sending(model, store, updater) as first:
        ways["bucket"]()
    seen["before the first step"] = _step(model, first)
    return seen


def _unknown(hooks, model, store, updater, converter, gather):
    """What is logged, and how many warnings there are, where slime makes what is not known."""
    converter.convert_to_hf = lambda args, model_name, name, param, config=None: [
        (name, param if config is None else param.to(torch.int8))
    ]
    with Warnings() as warned:
        with hooks.sending(model, store, updater) as sync:
            gather()
        return _step(model, sync), len(warned)


def _convert(asked: list, args, model_name, name, param, config=None):
    """slime's function: Hugging Face names, quantised by a config."""
    assert model_name == "tiny"
    asked.append(name)
    named = f"hf.{name}"
    return [(named, param)] if config is None else reference.quantise(named, param, config)


def _step(model, sync) -> float | None:
    from slime_plugins.lora.slime.hooks.metrics import measure, measuring

    state_of(model).last_sync = sync
    last = mpu.is_pipeline_last_stage()
    losses, _ = measuring(lambda model: ({"loss": 1.0} if last else {}, 0.5))(model)
    found = measure(model).get("sync_lost")
    assert not last or losses.get("lora/sync_lost") == found
    return found


def _counts(sync) -> tuple:
    return sync.bytes, sync.read_bytes, sync.merged, float(sync.rounding.size), float(sync.rounding.lost)


@torch.no_grad()
def _whole_matrices(model, live) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Name -> W, W + D and D of every adapted weight, gathered from all shards."""
    names, found = {id(p): name for name, p in live.items()}, {}
    for linear in iter_adapters(model):
        name, update = names[id(linear.weight)], linear.lora_update()
        shards = (linear.weight.detach(), linear.weight.detach() + update, update)
        found[name] = tuple(
            slime_stand_ins.all_gather_param(name, on_ranks._like(shard, linear.weight)).clone() for shard in shards
        )
    return found


class Warnings(logging.Handler):
    """Inside, what the plugin warns of."""

    def __enter__(self) -> list[str]:
        self.texts: list[str] = []
        logging.getLogger("slime_plugins.lora").addHandler(self)
        return self.texts

    def __exit__(self, *error) -> None:
        logging.getLogger("slime_plugins.lora").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.texts.append(record.getMessage())
