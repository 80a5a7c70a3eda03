"""What the tests of slime's hooks do with a 4-bit base, on every rank: built in codes, loaded shard by shard."""

from __future__ import annotations

import itertools
import sys
import tracemalloc
import types
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

import adapted
import slime_stand_ins
import torch
from harness import Layout
from nf4_runs import watched, whole_weights
from slime_hooks_on_ranks import adapter_values, logits, tokens
from torch.multiprocessing.reductions import StorageWeakRef

from slime_plugins.lora import (
    BaseQuant,
    LoRAConfig,
    adapters_disabled,
    add_lora_arguments,
    apply_lora,
    merged,
    packing,
)
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.decoder import HFBase
from slime_plugins.lora.layers import hide_adapters
from slime_plugins.lora.quant.packed import Packed, PackedWeight
from slime_plugins.lora.rehearsal import model as rehearsal

TARGETS = ("q_proj", "linear_fc2")  # o_proj, gate and up stay unadapted
CONFIG = LoRAConfig(rank=3, alpha=6.0, target_modules=TARGETS)


def arguments(hf_dir, work, *more: str) -> Namespace:
    flags = ["--use-lora", "--lora-r", "3", "--lora-alpha", "6", "--lora-target-modules", *TARGETS]
    parser = add_lora_arguments(ArgumentParser())
    args = parser.parse_args([*flags, "--lora-base-quant", "nf4", *more])
    vars(args).update(
        load=str(hf_dir), ref_load=str(hf_dir), hf_checkpoint=str(hf_dir), ckpt_step=None, ref_ckpt_step=None,
        finetune=True, no_load_optim=True, no_load_rng=True, no_save_optim=False, lora_adapter_path=None,
        save=str(Path(work) / "ckpt"), save_hf=None, lora_export_dir=None, lora_save_merged=False,
        offload_train=False, opd_teacher_ckpt_step=None,
    )  # fmt: skip
    slime_stand_ins.install(args)
    return args


def build(layout: Layout, args: Namespace, dtype=torch.float32):
    """The model as slime builds it: through the hook, nothing loaded, in DDP; and its optimizer."""
    from slime_plugins.lora.slime.hooks.launch import model_provider

    load_base, rehearsal.load_base = rehearsal.load_base, lambda *_: None
    register, made = packing._registered, []

    def counted(module, name, parameter):
        """Notes the linears' dense weights that are alive when one more is registered."""
        packed = register(module, name, parameter)
        if packed is not None:
            most["alive"] = max(most["alive"], sum(not ref.expired() for ref in made))
            made.append(StorageWeakRef(parameter.untyped_storage()))
        return packed

    def provide(*_, **__):
        (chunk,) = rehearsal.build_chunks(args.hf_checkpoint, dtype=dtype, sequence_parallel=layout.sp)
        return chunk

    most, packing._registered = {"alive": 0}, counted
    try:
        chunks = [model_provider(lambda args, role: provide)(args, "actor")()]
    finally:
        rehearsal.load_base, packing._registered = load_base, register
    assert made and most["alive"] == 0, most
    model = adapted.wrap(chunks)
    return model, adapted.optimizer_for(model, bf16=dtype == torch.bfloat16)


def load(args, model, optimizer, leave_out: str | None = None):
    """Through the hook, on a loader that stands for slime's. The most dense bytes that were there in a load."""
    from slime_plugins.lora.slime.hooks import checkpoints

    def load_checkpoint(ddp_model, optimizer, scheduler, context):
        base = HFBase.read(args.load)
        weights = BaseCheckpoint(base.path)
        for ddp in ddp_model:
            for parameter in ddp.module.parameters():
                assert bool(parameter.isnan().all())
            if leave_out is not None:
                hidden = ddp.module.decoder.layers[0].get_submodule(leave_out)._parameters.pop("weight")
            rehearsal.load_base(ddp.module, base, weights)
            if leave_out is not None:
                ddp.module.decoder.layers[0].get_submodule(leave_out)._parameters["weight"] = hidden
        return 0, 0

    return checkpoints.loading(load_checkpoint)(model, optimizer, None, {})


def whole_life(layout: Layout, hf_dir, dense_dir, work, dtype):
    """Build, load, sync, reference, step, save, resume; beside a dense base of the same (dequantised) weights."""
    from slime_plugins.lora.slime.hooks import checkpoints
    from slime_plugins.lora.slime.hooks import merged_sync as hooks
    from slime_plugins.lora.slime.hooks.base_check import refuse_other_base, remember_base
    from slime_plugins.lora.slime.hooks.policies import Policies, other_policy

    args = arguments(hf_dir, work)
    model, optimizer = build(layout, args, dtype)
    unset = [p for p in model[0].module.parameters() if isinstance(p, PackedWeight)]
    seen = {"packed while built": len(unset), "nan": all(bool(p.isnan().all()) for p in unset)}
    with watched() as alive:
        load(args, model, optimizer)
        seen["dense after load"] = alive()
    adapted.randomize(model)

    dense = adapted.wrap(
        rehearsal.build_chunks(
            dense_dir,
            dtype=dtype,
            sequence_parallel=layout.sp,
            apply=partial(apply_lora, config=CONFIG, linears="taps"),
        )
    )
    adapted.randomize(dense)
    common = slime_stand_ins.install(args)
    common.named_params_and_buffers = hooks.base_parameters(slime_stand_ins.named_params_and_buffers)
    with merged(dense):
        live = dict(common.named_params_and_buffers(args, dense))
        expected = {name: slime_stand_ins.all_gather_param(name, p).clone() for name, p in live.items()}
    store = Policies(args, model)
    store.backup("actor")
    live = dict(common.named_params_and_buffers(args, model))
    gather_one = hooks.merging_one(_all_gather_dense)
    gather_bucket = hooks.merging_bucket(
        lambda infos, weights: [_all_gather_dense(i, _like(weights[i], live[i])) for i in infos]
    )
    names = sorted(live)
    with hooks.sending(model, store):
        one = {name: gather_one(name, p).clone() for name, p in live.items()}
    with hooks.sending(model, store) as sync:
        bucket = [gather_bucket(chunk, store.get("actor")) for chunk in (names[:3], names[3:])]
    bucket = dict(zip(names, itertools.chain(*bucket)))
    seen["sent"] = [
        [n for n in expected if type(got[n]) is PackedWeight or not torch.equal(got[n], expected[n])]
        for got in (one, bucket)
    ]
    seen["names"] = one.keys() == bucket.keys() == expected.keys()
    seen["bytes"] = [sync.bytes, sum(t.nbytes for t in expected.values())]

    with adapters_disabled(dense):
        base = logits(dense)
    seen["policy"] = torch.equal(logits(model), logits(dense))
    remember_base(model, str(hf_dir), None)
    actor = types.SimpleNamespace(args=args, model=model, weights_backuper=store)
    other_policy(None)(actor, "ref", str(hf_dir))
    store.restore("ref")
    seen["reference"] = torch.equal(logits(model), base)
    store.restore("actor")
    seen["raised"] = [
        _raised(lambda: other_policy(None)(actor, "teacher", str(dense_dir))),
        _raised(lambda: refuse_other_base(model, str(hf_dir))),
    ]
    refuse_other_base(model, str(dense_dir))

    optimizer.reload_model_params()
    adapted.train_step(model, optimizer, tokens())
    checkpoints.saving(None)(1, model, optimizer, None)
    adapted.train_step(model, optimizer, tokens())
    args.load, args.finetune, args.no_load_optim, args.no_load_rng = args.save, False, False, False
    resumed, resumed_optimizer = build(layout, args, dtype)
    load(args, resumed, resumed_optimizer)
    adapted.train_step(resumed, resumed_optimizer, tokens())
    seen["resumed"] = all(torch.equal(a, b) for a, b in zip(adapter_values(model), adapter_values(resumed)))
    return seen


def resumed_elsewhere(layout: Layout, hf_dir, work, dtype):
    """Adapter values of a resumed model, at any parallelism; and what a dense base says of that checkpoint."""
    from slime_plugins.lora import load_adapter

    args = arguments(hf_dir, work)
    args.load, args.finetune, args.no_load_optim, args.no_load_rng = args.save, False, False, False
    model, optimizer = build(layout, args, dtype)
    load(args, model, optimizer)
    dense = adapted.wrap(
        rehearsal.build_chunks(hf_dir, dtype=dtype, apply=partial(apply_lora, config=CONFIG, linears="taps"))
    )
    return len(list(iter_adapters(model))), _raised(lambda: load_adapter(dense, args.save, restore_rng=False))


def loaded_in_parts(layout: Layout, hf_dir, work):
    """Whole weights after a load that writes to slices of each tensor, as Megatron's torch_dist does."""
    args = arguments(hf_dir, work)
    model, _ = build(layout, args, torch.bfloat16)
    values = rehearsal.build_chunks(hf_dir, dtype=torch.bfloat16)[0].state_dict()
    with torch.no_grad(), hide_adapters(model[0]), packing.dense_on_host(model):
        for name, parameter in model[0].module.named_parameters():
            for ours, theirs in zip(parameter.data.chunk(2), values[name].chunk(2)):
                ours.copy_(theirs)
    packing.finish_packing(model, BaseQuant())
    return whole_weights(model)


def from_codes(layout: Layout, hf_dir, work, *flags):
    """Whole weights of a model that was loaded from a checkpoint in codes, and what slime's reader gave of it."""
    name, given = "slime.backends.megatron_utils.hf_to_megatron.common", {}
    args = arguments(hf_dir, work, *flags)
    reader = type("SafetensorReader", (), {"get_tensor": lambda self, name: f"slime's {name}"})
    common = slime_stand_ins.module(name, SafetensorReader=reader)
    model, optimizer = build(layout, args, torch.bfloat16)
    read = rehearsal.load_base

    def load_base(*args):
        given.update({name: common.SafetensorReader().get_tensor(f"{name}.weight") for name in CODED})
        read(*args)

    rehearsal.load_base = load_base
    try:
        load(args, model, optimizer)
    finally:
        rehearsal.load_base = read
        del sys.modules[name]  # the next test in this process may be of a slime without it
    assert common.SafetensorReader().get_tensor("x") == "slime's x"
    return whole_weights(model), given


CODED = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "model.norm")


def loading_peak(layout: Layout, hf_dir, work):
    """Bytes: what torch has at most while slime loads, above what it had and the packed base; what has been read from
    files and is there, at most; of the largest dense matrix; of all of them dense."""
    args = arguments(hf_dir, work)
    model, optimizer = build(layout, args, torch.bfloat16)
    packed = [p for p in model[0].module.parameters() if isinstance(p, PackedWeight)]
    unset, read, load_base = sum(p.packed.nbytes for p in packed), [], rehearsal.load_base

    def measured(*args):
        tracemalloc.start()
        load_base(*args)
        read.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    Packed.of(torch.ones(64, 64)).dense(torch.float32)  # bitsandbytes is imported from now on
    rehearsal.load_base = measured
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            load(args, model, optimizer)
    finally:
        rehearsal.load_base = load_base
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]")
    most = max(itertools.accumulate(size for _, size in events))
    # As many bytes of codes as there were unset ones; that those go is not among the events.
    return most - unset, read[0], max(p.nbytes for p in packed), sum(p.nbytes for p in packed)


def refused_bases(layout: Layout, hf_dir, directories, work):
    """What is said of each in place of the base."""
    said = []
    for directory in directories:
        args = arguments(hf_dir, work)
        model, optimizer = build(layout, args, torch.bfloat16)
        args.load = str(directory)
        said.append(_raised(lambda args=args, model=model, optimizer=optimizer: load(args, model, optimizer)))
    return said


def incomplete(layout: Layout, hf_dir, work, leave_out: str):
    args = arguments(hf_dir, work)
    model, optimizer = build(layout, args)
    return _raised(lambda: load(args, model, optimizer, leave_out))


def excluded(layout: Layout, hf_dir, work):
    """Which weights are codes, with an exclusion."""
    args = arguments(hf_dir, work, "--lora-base-quant-exclude", "linear_fc1")
    model, optimizer = build(layout, args)
    load(args, model, optimizer)
    named = model[0].module.named_parameters()
    return sorted({name.rsplit(".", 2)[-2] for name, p in named if isinstance(p, PackedWeight)}), logits(model)


def _all_gather_dense(name: str, param) -> torch.Tensor:
    """slime's, which hands tensors to collectives that know no codes."""
    assert not isinstance(param, PackedWeight), name
    return slime_stand_ins.all_gather_param(name, param)


def _like(tensor: torch.Tensor, parameter) -> torch.nn.Parameter:
    shard = torch.nn.Parameter(tensor, requires_grad=False)
    shard.tensor_model_parallel = getattr(parameter, "tensor_model_parallel", False)
    shard.partition_dim = getattr(parameter, "partition_dim", -1)
    return shard


def _raised(fn) -> str:
    try:
        fn()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""
