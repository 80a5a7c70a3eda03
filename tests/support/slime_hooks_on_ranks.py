"""What the tests of slime's hooks do with an adapted model. Runs on every rank."""

from __future__ import annotations

import itertools
import shutil
import types
import weakref
from argparse import Namespace
from pathlib import Path

import adapted
import slime_stand_ins
import torch
import torch.distributed as dist
from harness import Layout
from megatron.core import parallel_state as mpu
from views import iter_linears

from slime_plugins.lora import LoRAConfig, adapters_disabled, merged
from slime_plugins.lora.adapters import iter_adapters, state_of
from slime_plugins.lora.projections import Rounding

CONFIG = LoRAConfig(rank=3, alpha=6.0)


def model_of(layout: Layout, hf_dir, *, dtype=torch.float32, config=CONFIG, wrap=True):
    """Chunks with non-zero adapters, in DDP as slime has them."""
    chunks = adapted.adapted_chunks(hf_dir, config, sp=layout.sp, vpp=layout.vpp, dtype=dtype)
    adapted.randomize(chunks)
    return adapted.wrap(chunks) if wrap else chunks


def tokens() -> torch.Tensor:
    return torch.randint(4, 128, (4, 17), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model):
    found = adapted.run_schedule(model, tokens(), forward_only=True, collect_logits=True)
    return torch.zeros(0) if found is None else found


def base_sum(model) -> int:
    """Sum of the base's bit patterns on this rank."""
    return sum(
        p.detach().view(torch.uint8).long().sum().item()
        for chunk in model
        for name, p in chunk.named_parameters()
        if "lora_" not in name
    )


def policies(layout: Layout, hf_dir):
    """Every policy that slime asks for, one after the other; returns what the outputs were."""
    from slime_plugins.lora.slime.hooks.base_check import remember_base
    from slime_plugins.lora.slime.hooks.policies import Policies, other_policy

    slime_stand_ins.install()
    model = model_of(layout, hf_dir)
    store = Policies(Namespace(offload_train=False), model)
    actor = types.SimpleNamespace(
        args=_of_a_start(hf_dir, opd_teacher_ckpt_step=None), model=model, weights_backuper=store
    )
    remember_base(model, str(hf_dir), None)
    load_other = other_policy(lambda self, tag, path: _load_scaled(self, tag, float(Path(path).name)))
    seen, before = {}, base_sum(model)
    with adapters_disabled(model):
        seen["base"] = logits(model)
    seen["actor"] = logits(model)
    store.backup("actor")
    load_other(actor, "ref", str(hf_dir))
    seen["tags"], seen["bytes"] = sorted(store.backup_tags), dict(store.host_bytes)
    try:
        store.restore("refs")
    except ValueError as error:
        seen["unknown"] = str(error)
    seen["sizes"] = [
        sum(p.numel() * p.element_size() for _, p in model[0].named_parameters()),
        sum(t.numel() * t.element_size() for linear in iter_adapters(model) for t in (linear.lora_A, linear.lora_B)),
    ]
    store.restore("ref")
    seen["ref"] = logits(model)
    store.restore("actor")
    seen["actor again"] = logits(model)

    store.backup("rollout_actor")
    load_other(actor, "old_actor", "never read")
    _step(model)
    store.backup("actor")
    seen["stepped"] = logits(model)
    store.restore("old_actor")
    seen["old_actor"] = logits(model)
    store.restore("actor")
    seen["stepped again"] = logits(model)
    store.copy(src_tag="rollout_actor", dst_tag="old_actor")
    store.restore("ref")
    seen["ref after a step"] = logits(model)

    store.restore("actor")
    store.backup("ref")  # --ref-update-interval
    _step(model)
    store.backup("actor")
    store.restore("ref")
    seen["ref updated"] = logits(model)
    store.restore("actor")

    load_other(actor, "teacher", "1.0")  # another path, the same weights
    seen["same weights"] = sorted(store.host_bytes)
    load_other(actor, "teacher", "1.5")  # other weights
    seen["live after loading others"] = logits(model)
    seen["base untouched"] = base_sum(model) == before
    seen["active"] = actor._active_model_tag
    seen["full"] = dict(store.host_bytes)
    store.restore("teacher")
    seen["teacher"] = logits(model)
    store.restore("actor")
    seen["last"] = logits(model)
    _scale_base(model, 1.5)
    with adapters_disabled(model):
        seen["expected teacher"] = logits(model)
    return seen


def _of_a_start(hf_dir, **changes) -> Namespace:
    """slime's arguments that say what a run starts from: the base, without an adapter."""
    start = dict(load=str(hf_dir), save=None, ckpt_step=None, finetune=False, lora_adapter_path=None, lora_ref=None)
    return Namespace(**(start | {"ref_ckpt_step": None, "offload_train": False} | changes))


def reference(layout: Layout, hf_dir, work, resumed: bool, args: dict):
    """The reference policy of a run from an adapter, at its start or resumed: outputs, before and after a step.

    A start leaves ``work``/adapter (PEFT) and, as slime does after two steps, ``work``/run/iter_0000002.
    """
    from slime_plugins.lora import export_peft
    from slime_plugins.lora.checkpoint.load import load_adapter
    from slime_plugins.lora.checkpoint.save import save_adapter
    from slime_plugins.lora.slime.hooks.base_check import remember_base
    from slime_plugins.lora.slime.hooks.policies import Policies, other_policy

    slime_stand_ins.install()
    model = model_of(layout, hf_dir)
    if resumed:
        load_adapter(model, work / "run")
    store = Policies(Namespace(offload_train=False), model)
    actor = types.SimpleNamespace(args=_of_a_start(hf_dir, **args), model=model, weights_backuper=store)
    remember_base(model, str(hf_dir), None)
    store.backup("actor")
    other_policy(None)(actor, "ref", str(hf_dir))
    seen = {"actor": logits(model), "bytes": dict(store.host_bytes)}
    store.restore("ref")
    seen["ref"] = _whole(model)
    store.restore("actor")
    if not resumed:
        export_peft(model, work / "adapter", hf_checkpoint=hf_dir)
    _step(model)
    store.backup("actor")
    seen["stepped"] = logits(model)
    if not resumed:
        save_adapter(model, work / "run", step=2)
    store.restore("ref")
    seen["ref after a step"] = _whole(model)
    return seen


def _whole(model):
    """Logits over the whole vocabulary."""
    return adapted.gather_logits(logits(model), 128)


def _load_scaled(actor, tag: str, factor: float) -> None:
    """Stands for slime's ``load_other_checkpoint``: other base weights into the live ones, then a backup."""
    _scale_base(actor.model, factor)
    actor.weights_backuper.backup(tag)
    actor._active_model_tag = tag


@torch.no_grad()
def _scale_base(model, factor: float) -> None:
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if name.endswith("weight") and "lora_" not in name:
                parameter.mul_(factor)


@torch.no_grad()
def _step(model) -> None:
    for linear in iter_adapters(model):
        linear.lora_B += 0.01


def merged_sync(layout: Layout, hf_dir, dtype, offload: bool):
    """What slime's two ways of gathering give during a sync, and what a plain merge gives."""
    from slime_plugins.lora.slime.hooks import merged_sync as hooks
    from slime_plugins.lora.slime.hooks.policies import Policies

    common = slime_stand_ins.install()
    common.named_params_and_buffers = hooks.base_parameters(slime_stand_ins.named_params_and_buffers)
    gather_one = hooks.merging_one(slime_stand_ins.all_gather_param)
    asked = []

    def full_params(infos, weights):
        asked.extend(infos)
        return [slime_stand_ins.all_gather_param(i, _like(weights[i], live[i])) for i in infos if i in live]

    gather_bucket = hooks.merging_bucket(full_params)
    model = model_of(layout, hf_dir, dtype=dtype)
    args = Namespace(offload_train=offload)
    store = Policies(args, model)
    store.backup("actor")
    live = dict(common.named_params_and_buffers(args, model))
    before = base_sum(model)
    with merged(model):
        expected = {name: slime_stand_ins.all_gather_param(name, p).clone() for name, p in live.items()}
    if offload:  # DDP's buffers are gone while slime has the trainer's memory
        for linear in iter_adapters(model):
            linear.lora_A.data.fill_(float("nan"))
            linear.lora_B.data.fill_(float("nan"))
    outside = {name: slime_stand_ins.all_gather_param(name, p).clone() for name, p in live.items()}
    not_sending = {name: gather_one(name, p) for name, p in live.items()}
    names = sorted(live)
    results = {}
    with hooks.sending(model, store) as one:
        results["one by one"] = {name: gather_one(name, p).clone() for name, p in live.items()}
    with hooks.sending(model, store) as bucket:
        # as slime's colocated transport asks: a mapping from the store
        got = [gather_bucket(chunk, store.get("actor")) for chunk in (names[:3], names[3:])]
    results["bucket"] = dict(zip(names, itertools.chain(*got)))
    if not offload:
        with hooks.sending(model, store):  # as the disk transport does: a dict of live parameters
            results["dict"] = dict(zip(names, gather_bucket(names, dict(live))))
    adapted_names = {name for name, p in live.items() if any(p is linear.weight for linear in iter_linears(model))}
    return {
        "equal": {way: {n: torch.equal(t, expected[n]) for n, t in got.items()} for way, got in results.items()},
        "untouched": base_sum(model) == before and all(torch.equal(outside[n], not_sending[n]) for n in live),
        "changed": sorted(n for n in live if not torch.equal(expected[n], outside[n])) == sorted(adapted_names),
        "adapters seen": [name for name in live if "lora_" in name],
        "lazy": sorted(asked) == sorted(names * (1 if offload else 2)),
        "bytes": [one.bytes, bucket.bytes, sum(t.numel() * t.element_size() for t in expected.values())],
        "merged": [len(one.merged), len(adapted_names)],
        "lost": [float(one.rounding.lost), float(one.rounding.size)],
        "freed": store._on_device is None,
    }


def _like(tensor: torch.Tensor, parameter) -> torch.nn.Parameter:
    shard = torch.nn.Parameter(tensor, requires_grad=False)
    shard.__dict__.update(parameter.__dict__)
    return shard


def loading(layout: Layout, hf_dir, work, missing: str | None):
    """Load, warm-start, save and resume through the hooks, on loaders that stand for slime's."""
    from slime_plugins.lora.slime.hooks import checkpoints

    args = Namespace(
        load=str(hf_dir), ref_load=str(hf_dir), hf_checkpoint=str(hf_dir), ckpt_step=None, ref_ckpt_step=None,
        finetune=True, no_load_optim=True, no_load_rng=True, no_save_optim=False, lora_adapter_path=None,
        save=str(Path(work) / "ckpt"), save_hf=str(Path(work) / "hf_{rollout_id}"), lora_export_dir=None,
        lora_save_merged=False, offload_train=False,
    )  # fmt: skip
    slime_stand_ins.install(args)
    seen = []

    def load_checkpoint(ddp_model, optimizer, opt_param_scheduler, checkpointing_context):
        """Base values from the name, so that any rank and parallelism has the same."""
        seen.append((args.load, args.finetune, args.no_load_optim, optimizer is None))
        for chunk in ddp_model:
            for name, parameter in chunk.named_parameters():
                assert "lora_" not in name, name
                if missing is None or missing not in name:
                    parameter.data.copy_(base[name])
        return 7, 0

    def save_checkpoint(iteration, model, optimizer, opt_param_scheduler):
        raise AssertionError("slime's own save would write the base")

    load, save = checkpoints.loading(load_checkpoint), checkpoints.saving(save_checkpoint)
    save_hf = checkpoints.saving_hf(lambda args, where, model: (_ for _ in ()).throw(AssertionError("whole model")))

    def fresh():
        chunks = adapted.adapted_chunks(hf_dir, CONFIG, sp=layout.sp, dtype=torch.bfloat16)
        model = adapted.wrap(chunks)
        return model, adapted.optimizer_for(model, bf16=True)

    model, optimizer = fresh()
    base = {n: p.detach().clone() for n, p in model[0].named_parameters() if "lora_" not in n}
    first = load(model, optimizer, None, {})
    adapted.randomize(model)
    optimizer.reload_model_params()
    adapted.train_step(model, optimizer, tokens())
    save(5, model, optimizer, None)
    save_hf(args, Path(work) / "hf", model)
    adapted.train_step(model, optimizer, tokens())
    expected = adapter_values(model)

    args.load, args.finetune, args.no_load_optim, args.no_load_rng = args.save, False, False, False
    resumed, resumed_optimizer = fresh()
    second = load(resumed, resumed_optimizer, None, {})
    adapted.train_step(resumed, resumed_optimizer, tokens())
    same = all(torch.equal(a, b) for a, b in zip(expected, adapter_values(resumed)))
    resumed_from = args.load, args.finetune

    args.no_load_optim = True
    unmoved, fresh_optimizer = fresh()
    load(unmoved, fresh_optimizer, None, {})
    at_save = adapter_values(unmoved)
    evaluated, _ = fresh()
    load(evaluated, None, None, {})  # slime's --num-rollout 0: an actor without an optimizer
    eval_only = [all(torch.equal(a, b) for a, b in zip(at_save, adapter_values(evaluated)))]

    args.load, args.finetune = str(hf_dir), True
    args.lora_adapter_path = str(Path(work) / "hf")
    warm, warm_optimizer = fresh()
    load(warm, warm_optimizer, None, {})
    from_peft = adapter_values(warm)
    evaluated, _ = fresh()
    load(evaluated, None, None, {})
    eval_only.append(all(torch.equal(a, b) for a, b in zip(from_peft, adapter_values(evaluated))))
    for group in warm_optimizer.param_groups:
        group["lr"] = 0.0
    adapted.train_step(warm, warm_optimizer, tokens())
    with checkpoints.another_policy():  # slime's load_other_checkpoint
        others = load(warm, None, None, {})
    return {
        "returned": [first, second, others],
        "asked": seen,
        "resumed from": resumed_from,
        "eval only": eval_only,
        "same step": same,
        "peft equals checkpoint": all(torch.equal(a, b) for a, b in zip(at_save, from_peft)),
        "step at lr 0": all(torch.equal(a, b) for a, b in zip(from_peft, adapter_values(warm))),
        "non-zero": all(bool(t.any()) for t in from_peft),
    }


def adapter_values(model) -> list[torch.Tensor]:
    return [p.detach().clone() for linear in iter_adapters(model) for p in (linear.lora_A, linear.lora_B)]


def provider(layout: Layout, hf_dir, targets, role: str, lora_critic: bool):
    """``model_provider`` around a provider that builds one chunk at a time, as slime's does under a virtual size."""
    from slime_plugins.lora.slime.hooks.launch import model_provider

    built = iter(adapted.build_chunks(hf_dir, dtype=torch.float32, vpp=layout.vpp))
    args = _flags(targets)
    args.virtual_pipeline_model_parallel_size, args.lora_critic = layout.vpp, lora_critic

    @model_provider
    def get_model_provider_func(args, role="actor"):
        def provide(pre_process=True, post_process=True, vp_stage=None):
            chunk = next(built)
            if role == "critic" and post_process:
                chunk.output_layer = torch.nn.Linear(8, 1)
            return chunk

        return provide

    provide = get_model_provider_func(args, role)
    chunks = [provide(post_process=mpu.is_pipeline_last_stage()) for _ in range(layout.vpp or 1)]
    return {
        "adapted": sorted({linear.lora.name for linear in iter_adapters(chunks)}),
        "trainable": sorted(n for c in chunks for n, p in c.named_parameters() if p.requires_grad),
        "total": sum(1 for c in chunks for _ in c.parameters()),
    }


def _flags(targets) -> Namespace:
    import argparse

    from slime_plugins.lora import add_lora_arguments

    parser = argparse.ArgumentParser()
    add_lora_arguments(parser)
    return parser.parse_args(["--use-lora", "--lora-r", "2", "--lora-target-modules", *targets])


def metrics(layout: Layout, hf_dir):
    """The step's numbers, and the same from whole matrices."""
    from slime_plugins.lora.ends.export import gather_projections
    from slime_plugins.lora.slime.hooks.merged_sync import Sync
    from slime_plugins.lora.slime.hooks.metrics import measure, measuring

    slime_stand_ins.install()
    model = model_of(layout, hf_dir)
    whole = gather_projections(model)
    expected = None
    if whole is not None:
        expected = sum((p.scaling * p.B.double() @ p.A.double()).square().sum() for p in whole).sqrt().item()
    measured = measure(model)
    with torch.no_grad():
        for linear in iter_adapters(model):
            if linear.lora.name == "decoder.layers.1.mlp.linear_fc2":
                linear.lora_B.zero_()
    dead = measure(model)["dead"]
    rounding = Rounding(size=4.0, lost=1.0)
    state_of(model).last_sync = Sync(None, {}, bytes=10.0, seconds=2.0, rounding=rounding, merged={1})
    last = mpu.is_pipeline_last_stage()
    step = measuring(lambda args, rollout_id, model: ({"loss": 1.0} if last else {}, 0.5))
    losses, grad_norm = step(None, 3, model)
    return {"expected": expected, "measured": measured, "dead": dead, "losses": losses, "grad_norm": grad_norm}


class Engine:
    """A rollout engine that remembers what it was asked; ``_make_request.remote`` as on a Ray handle."""

    def __init__(self, answer=None):
        self.requests, self.proofs, self.answer = [], [], answer
        self._make_request = types.SimpleNamespace(remote=self._ask)

    def _ask(self, endpoint, payload):
        if endpoint != "generate":
            self.requests.append((endpoint, payload))
        else:
            self.proofs.append(payload["lora_path"])
        loaded = {payload["lora_name"]: "x"} if endpoint.startswith("load") else {}
        return self.answer if self.answer is not None else {"success": True, "loaded_adapters": loaded}


def adapter_sync(layout: Layout, hf_dir, work, colocate: bool, answer):
    """Four syncs, an engine joining before the last; returns what engines were asked and what they got."""
    import base64
    import pickle

    import sglang_stand_in  # an SGLang with the LoRA requests

    from slime_plugins.lora.ends.export import export_peft
    from slime_plugins.lora.peft.directory import AdapterTensors
    from slime_plugins.lora.slime.hooks import merged_sync as sync_hooks
    from slime_plugins.lora.slime.hooks.adapter_sync import AdapterUpdater
    from slime_plugins.lora.slime.hooks.policies import Policies

    slime_stand_ins.install()
    model = model_of(layout, hf_dir, dtype=torch.bfloat16)
    args = _of_a_sync(hf_dir, colocate, None if colocate else str(work))
    store = Policies(args, model)
    first, second = Engine(answer), Engine()
    updater = AdapterUpdater(args, model, None, model_name="", quantization_config=None, policies=store)
    names, equal, sent = [], [], []
    actor = types.SimpleNamespace(
        rollout_manager=types.SimpleNamespace(use_lora_adapter=types.SimpleNamespace(remote=names.append))
    )
    for version in range(1, 5):
        store.backup("actor")
        out = export_peft(model, Path(work) / f"peft{version}", hf_checkpoint=hf_dir)
        if version in (1, 4):
            updater.connect_rollout_engines([first] if version == 1 else [first, second], None)
        with sync_hooks.sending(model, store) as sync:
            updater.update_weights()
        updater.announce(actor)
        sent.append(sync.bytes)
        if dist.get_rank() == 0:
            _, payload = next(r for r in reversed(first.requests) if r[0].startswith("load"))
            if colocate:
                data = payload["serialized_named_tensors"]
                assert len(data) == 2, "a payload per rank of the engine"
                got = sglang_stand_in.tensors_of(pickle.loads(base64.b64decode(data[1])))
                want = AdapterTensors(out / "adapter_model.safetensors")
                equal.append(got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in got))
        _step(model)
    return {
        "asked": [[(e, p.get("lora_name")) for e, p in engine.requests] for engine in (first, second)],
        "names": names,
        "proofs": first.proofs,
        "equal": equal,
        "sent": sent,
        "left": sorted(p.name for p in Path(work).iterdir() if not p.name.startswith("peft")),
    }


def _of_a_sync(hf_dir, colocate: bool, folder: str | None) -> Namespace:
    return Namespace(
        colocate=colocate, lora_sync_dir=folder, hf_checkpoint=str(hf_dir), offload_train=colocate,
        offload_rollout=False, sglang_tp_size=2, lora_sync_timeout=10.0, lora_sync_lag=None,
    )  # fmt: skip


class HostCopy:
    """Stands for an adapter's copy in host memory; ``on_device`` are those of all copies that are there now."""

    on_device: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def to(self, device) -> torch.Tensor:
        moved = self._tensor.clone()
        HostCopy.on_device.add(moved)
        HostCopy.most = max(HostCopy.most, len(HostCopy.on_device))
        return moved


def adapter_sync_costs(layout: Layout, hf_dir, work):
    """Three syncs of offloaded adapters, the base touched before the last: what is held and read on the way."""
    import sglang_stand_in  # noqa: F401  # an SGLang with the LoRA requests

    from slime_plugins.lora.base import checkpoint
    from slime_plugins.lora.slime.hooks import merged_sync as sync_hooks
    from slime_plugins.lora.slime.hooks.adapter_sync import AdapterUpdater
    from slime_plugins.lora.slime.hooks.policies import Policies

    slime_stand_ins.install()
    mine = Path(work) / f"base-{dist.get_rank()}"
    shutil.copytree(hf_dir, mine)
    model = model_of(layout, mine, dtype=torch.bfloat16)
    args = _of_a_sync(mine, True, None)
    store = Policies(args, model)
    store.backup("actor")
    store._adapters["actor"] = [
        {name: HostCopy(copy) for name, copy in copies.items()} for copies in store._adapters["actor"]
    ]
    updater = AdapterUpdater(args, model, None, model_name="", quantization_config=None, policies=store)
    updater.connect_rollout_engines([Engine()], None)
    read, reads, header = [], [], checkpoint.read_header
    checkpoint.read_header = lambda path: (read.append(path), header(path))[1]
    try:
        for touched in (False, False, True):
            if touched:
                for file in mine.glob("*.safetensors"):
                    file.touch()
            with sync_hooks.sending(model, store):
                updater.update_weights()
            reads.append(len(read))
    finally:
        checkpoint.read_header = header
    most, HostCopy.most = HostCopy.most, 0
    return {"most": most, "left": len(HostCopy.on_device), "headers": reads}
