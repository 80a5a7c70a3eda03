"""Training runs that are saved and resumed, for the checkpoint tests. Runs on every rank."""

from __future__ import annotations

import hashlib

import adapted
import torch
import torch.distributed as dist
from harness import Layout
from megatron.core import parallel_state as mpu
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.checkpoint.load import load_adapter
from slime_plugins.lora.checkpoint.save import save_adapter
from slime_plugins.lora.ends.export import gather_projections

SAVED_AT, STEPS = 3, 3
"""Steps before the save, and after it."""

# The layouts of the matrix, by name: world size, sizes.
LAYOUTS = {
    "tp1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2sp": (2, {"tp": 2, "sp": True}),
    "dp2": (2, {}),
    "tp2dp2": (4, {"tp": 2}),
    "vpp2": (2, {"pp": 2, "vpp": 2}),
}


class Run:
    """An adapted model with its optimizer and scheduler."""

    def __init__(self, layout: Layout, hf_dir, config: LoRAConfig, *, name="adam", bf16=False, distributed=None):
        dtype = torch.bfloat16 if bf16 else torch.float32
        distributed = name == "adam" if distributed is None else distributed
        chunks = adapted.adapted_chunks(hf_dir, config, sp=layout.sp, vpp=layout.vpp, dtype=dtype)
        self.model = adapted.wrap(chunks, distributed_optimizer=distributed)
        self.optimizer = adapted.optimizer_for(
            self.model, lr=LR[name], name=name, distributed_optimizer=distributed, bf16=bf16
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=LR[name],
            min_lr=0.0,
            lr_warmup_steps=2,
            lr_decay_steps=10,
            lr_decay_style="linear",
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=10,
            wd_incr_style="constant",
        )

    @torch.no_grad()
    def start(self) -> None:
        """Give every B values from which training can go anywhere; B is zero at first."""
        adapted.randomize(self.model)
        for linear in iter_adapters(self.model):
            for i, rank in enumerate(linear.lora.ranks):  # beyond its own rank, a projection is padded with zeros
                linear.lora_B[adapted.rows_of_B(linear, i), rank:] = 0
        self.optimizer.reload_model_params()

    def train(self, first: int, count: int) -> list[float]:
        """Steps on batches that depend on the step's number alone. Returns losses, on every rank."""
        losses = []
        for step in range(first, first + count):
            tokens = torch.randint(4, 128, (8, 17), generator=torch.Generator().manual_seed(step))
            loss, _ = adapted.train_step(self.model, self.optimizer, tokens, microbatches=2)
            self.scheduler.step(1)
            total = torch.zeros(2, dtype=torch.float64)
            if loss is not None and mpu.get_tensor_model_parallel_rank() == 0:
                total += torch.tensor([loss.item(), 1.0])
            dist.all_reduce(total)
            losses.append((total[0] / total[1]).item())
        return losses

    @torch.no_grad()
    def state(self) -> dict[str, torch.Tensor] | None:
        """Adapters, masters and moments whole, by projection, on rank 0. Shares no code with the checkpoint."""
        found = whole(self.model)
        weights = {
            p: p.detach().clone() for linear in iter_adapters(self.model) for p in (linear.lora_A, linear.lora_B)
        }
        states = {p: {k: v.detach().clone() for k, v in values.items()} for p, values in states_of(self.optimizer)}
        names = [None] * dist.get_world_size()  # every rank must make the same number of calls to ``whole``
        dist.all_gather_object(names, sorted({name for values in states.values() for name in values}))
        for name in sorted({n for part in names for n in part}):
            for p in weights:
                # In float32 for the gathering; the parameter itself must stay where the optimizer knows it.
                bits, p.data = p.data, states[p][name].float()
                states[p]["bits"] = bits
            part = whole(self.model)
            for p in weights:
                p.data = states[p]["bits"]
            found |= {f"{name} {key}": value for key, value in part.items()}
        assert all(torch.equal(p, weights[p]) for p in weights)
        return found if dist.get_rank() == 0 else None


LR = {"adam": 1e-2, "sgd": 0.1}


def whole(model) -> dict[str, torch.Tensor]:
    """Gathered by the exporter; {} on the later pipeline stages."""
    projections = gather_projections(model) or []
    return {f"{p.name}.{half}": getattr(p, half) for p in projections for half in "AB"}


def states_of(optimizer):
    """Model parameter -> its master and moments, shaped like it, by Megatron's own gathering."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(inner, "gbuf_ranges"):
            world = inner.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
            for index, buffer in enumerate(inner.buffers):
                (tensors,) = world[index].values()
                for param, (start, end, _) in buffer.param_index_map.items():
                    yield param, {name: tensors[name][start:end].view(param.shape) for name in MOMENTS}
        else:
            for group in inner.optimizer.param_groups:
                for main in group["params"]:
                    state = inner.optimizer.state.get(main, {})
                    yield (
                        master_to_model(inner).get(main, main),
                        {"param": main, **{k: v for k, v in state.items() if k in MOMENTS}},
                    )


MOMENTS = ("param", "exp_avg", "exp_avg_sq")


def master_to_model(inner):
    pairs = zip(getattr(inner, "fp32_from_float16_groups", []), getattr(inner, "float16_groups", []))
    return {main: model for mains, models in pairs for main, model in zip(mains, models)}


def save_run(layout: Layout, hf_dir, config, path, kwargs=None):
    """Train, save, train on. Returns the state at the save, later losses, and the last adapters (rank 0)."""
    run = Run(layout, hf_dir, config, **(kwargs or {}))
    run.start()
    run.train(0, SAVED_AT)
    state = run.state()
    save_adapter(run.model, path, optimizer=run.optimizer, scheduler=run.scheduler, step=SAVED_AT)
    losses = run.train(SAVED_AT, STEPS)
    return state, losses, run.state()


def resume_runs(layout: Layout, hf_dir, config, paths, kwargs=None):
    """Resume from each of several checkpoints. Per checkpoint: state after the load, losses, the last state."""
    results = []
    for path in paths:
        torch.manual_seed(99)
        run = Run(layout, hf_dir, config, **(kwargs or {}))
        loaded = load_adapter(run.model, path, optimizer=run.optimizer, scheduler=run.scheduler)
        assert loaded.step == SAVED_AT and loaded.optimizer and loaded.scheduler
        state = run.state()
        results.append((state, run.train(SAVED_AT, STEPS), run.state()))
    return results


def digest(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for key in sorted(tensors):
        sha.update(key.encode() + tensors[key].contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
