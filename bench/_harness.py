"""What the benchmarks share: worker processes, models of given shapes with random weights, one training step.

Three forms of one model, each under Megatron's DDP and distributed optimizer:
    full      every parameter trains
    frozen    nothing trains but the final norm; gradients flow back to the input of every layer
    lora      rank-r adapters on all four linears, base frozen
The embedding's output asks for a gradient in all three, as it does in a run with activation recompute: so ``lora`` and
``frozen`` go through the very same base operations, and what differs is the adapters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _table import table as table  # for the scripts, which have it from here

VARIANTS = ("full", "frozen", "lora")
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # one core per rank
    # glibc keeps what is freed, as CUDA's caching allocator does. Else each megabyte of activations is mapped and
    # faulted in anew in every step, and that noise is larger than an adapter.
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}
OUT = Path(__file__).resolve().parent / "out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of one benchmarked model and batch, over all ranks."""

    hidden: int
    ffn: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    num_layers: int
    tokens: int
    dtype: str = "float32"

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Megatron leaf -> (in, out) features."""
        q, kv = self.num_heads * self.head_dim, self.num_query_groups * self.head_dim
        return {
            "linear_qkv": (self.hidden, q + 2 * kv),
            "linear_proj": (q, self.hidden),
            "linear_fc1": (self.hidden, 2 * self.ffn),
            "linear_fc2": (self.ffn, self.hidden),
        }


def cpu_shapes(hidden: int, *, num_layers: int, tokens: int) -> Shapes:
    """Qwen3-0.6B's proportions (hidden 1024 is its very layer), a vocabulary too small to hide the layers behind."""
    heads = hidden // 64
    return Shapes(
        hidden=hidden,
        ffn=3 * hidden,
        num_heads=heads,
        num_query_groups=heads // 2,
        head_dim=128,
        vocab_size=4096,
        num_layers=num_layers,
        tokens=tokens,
    )


def qwen3_4b(*, num_layers: int, tokens: int) -> Shapes:
    return Shapes(
        hidden=2560,
        ffn=9728,
        num_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=151936,
        num_layers=num_layers,
        tokens=tokens,
        dtype="bfloat16",
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    tp: int
    sequence_parallel: bool
    ep: int = 1
    """Expert-parallel size; experts are cut over ``tp`` ranks, too."""

    @property
    def ranks(self) -> int:
        return self.tp * self.ep

    def __str__(self) -> str:
        return f"TP={self.tp}" + ("+SP" if self.sequence_parallel else "") + (f" EP={self.ep}" if self.ep > 1 else "")


SETTINGS = (Setting(1, False), Setting(2, False), Setting(2, True))


def settings_here() -> tuple[Setting, ...]:
    """All settings on a CPU; with CUDA those that the devices suffice for."""
    if not torch.cuda.is_available():
        return SETTINGS
    return tuple(setting for setting in SETTINGS if setting.tp <= torch.cuda.device_count())


def run_ranks(function: Callable[..., Any], setting: Setting, *args: Any) -> list[Any]:
    """Call ``function(setting, *args)`` in ``setting.ranks`` fresh processes under a Megatron process group.

    Returns what each rank returned, by rank. Raises RuntimeError when a rank dies, after ending the others.
    """
    os.environ.update({k: os.environ.get(k, v) for k, v in WORKER_ENVIRONMENT.items()})  # inherited by the ranks
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        processes = [
            context.Process(target=_rank_main, args=(function, setting, args, rank, f"{folder}/store", results))
            for rank in range(setting.ranks)
        ]
        for process in processes:
            process.start()
        try:
            answers: dict[int, Any] = {}
            while len(answers) < len(processes):
                if results.empty():
                    if any(process.exitcode for process in processes):
                        codes = [process.exitcode for process in processes]
                        raise RuntimeError(f"{setting}: a rank died (its traceback is above), exit codes {codes}")
                    time.sleep(0.05)
                    continue
                rank, answer = results.get()
                answers[rank] = answer
        finally:
            for process in processes:
                if len(answers) < len(processes):
                    process.terminate()
                process.join()
    return [answers[rank] for rank in range(setting.ranks)]


def _rank_main(function, setting: Setting, args: tuple, rank: int, store: str, results) -> None:
    warnings.simplefilter("ignore")  # Megatron's, about optional packages
    init_rank(setting, rank, store)
    results.put((rank, function(setting, *args)))
    torch.distributed.destroy_process_group()


def init_rank(setting: Setting, rank: int, store: str) -> None:
    """Megatron's process groups in this process. ``store``: a file that does not exist yet."""
    from slime_plugins.lora.rehearsal import cpu

    on_cpu = cpu.enable()
    if on_cpu:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(
        "gloo" if on_cpu else "nccl", init_method=f"file://{store}", world_size=setting.ranks, rank=rank
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=setting.tp,
        expert_model_parallel_size=setting.ep,
        expert_tensor_parallel_size=setting.tp if setting.ep > 1 else None,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def trainer_of(
    variant: str,
    shapes: Shapes,
    setting: Setting,
    *,
    rank: int,
    layout: str = "fused",
    linears: str = "auto",
    embedding_gradient: bool = True,
) -> Trainer:
    """One form of the dense model of these shapes, ready to step."""
    model = build_model(shapes, setting)
    if variant == "frozen":
        freeze(model)
    elif variant == "lora":
        add_lora(model, linears=linears, rank=rank, layout=layout)
    if embedding_gradient or variant != "lora":
        model.embedding.register_forward_hook(require_grad)
    return Trainer(model, shapes.vocab_size, shapes.tokens)


class Trainer:
    """A model with its DDP, optimizer and batch: what may train in it is chosen already."""

    def __init__(self, model: torch.nn.Module, vocab_size: int, tokens: int) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(model.config, ddp_config, model)
        bf16 = model.config.bf16
        optimizer_config = OptimizerConfig(
            optimizer="adam", lr=1e-5, weight_decay=0.0, clip_grad=1.0, use_distributed_optimizer=True, bf16=bf16
        )
        self.optimizer = get_megatron_optimizer(optimizer_config, [self.model])
        self.draw_batch(vocab_size, tokens)

    def draw_batch(self, vocab_size: int, tokens: int) -> None:
        """One sequence of so many tokens, for the steps from now on."""
        generator = torch.Generator().manual_seed(0)
        device = torch.cuda.current_device()
        batch = torch.randint(0, vocab_size, (1, tokens + 1), generator=generator).to(device)
        self.tokens, self.labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        self.positions = torch.arange(tokens, device=device)[None]

    def forward(self) -> torch.Tensor:
        """Mean loss of the batch."""
        return self.model(self.tokens, self.positions, None, labels=self.labels).float().mean()

    def step(self) -> None:
        """Forward, backward, gradient reductions, clipping, Adam."""
        self.forward_backward()
        self.update()

    def forward_backward(self) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.forward().backward()

    def update(self) -> None:
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads([self.model])
        self.optimizer.step()


def build_model(
    shapes: Shapes, setting: Setting, layer: Callable[[Any, Any], Any] | None = None, **of_config: Any
) -> torch.nn.Module:
    """A GPTModel of these shapes, the same random weights at every call.

    Args:
        layer: makes the spec of a decoder layer, in place of the dense one, out of HFBase and TransformerConfig.
        of_config: more fields of the TransformerConfig.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from slime_plugins.lora.base.decoder import HFBase
    from slime_plugins.lora.rehearsal.model import RMSNorm, local_layer_spec, transformer_config

    base = HFBase(
        path=Path("random weights"),
        architecture="Qwen3ForCausalLM",
        num_layers=shapes.num_layers,
        hidden=shapes.hidden,
        ffn=shapes.ffn,
        num_heads=shapes.num_heads,
        num_query_groups=shapes.num_query_groups,
        head_dim=shapes.head_dim,
        vocab_size=shapes.vocab_size,
        norm_eps=1e-6,
        rope_theta=1e6,
        llama3_rope=None,
        tied=False,
        max_positions=shapes.tokens,
    )
    dtype = getattr(torch, shapes.dtype)
    config = transformer_config(
        base, dtype=dtype, sequence_parallel=setting.sequence_parallel, vpp=None, recompute=None
    )
    config = dataclasses.replace(config, **of_config)
    layers = [(layer or local_layer_spec)(base, config)] * shapes.num_layers
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layers, layer_norm=RMSNorm),
        vocab_size=shapes.vocab_size,
        max_sequence_length=shapes.tokens,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=base.rope_theta,
    )
    model.to(torch.cuda.current_device())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
    return model


def freeze(model: torch.nn.Module) -> None:
    """Nothing trains but the final norm: the optimizer must hold something, and ``hidden`` numbers cost nothing."""
    model.requires_grad_(False)
    model.decoder.final_layernorm.weight.requires_grad_(True)


def add_lora(model: torch.nn.Module, *, linears: str = "auto", **config: Any) -> None:
    """Adapters of some training's values: with B at zero the backward would multiply zeros. ``linears``: a path."""
    from slime_plugins.lora import LoRAConfig, apply_lora
    from slime_plugins.lora.adapters import iter_adapters

    apply_lora(model, LoRAConfig(alpha=2 * config["rank"], **config), linears=linears)
    with torch.no_grad():
        for linear in iter_adapters(model):
            linear.lora_B.normal_(0.0, 0.02)


def require_grad(module, inputs, output: torch.Tensor) -> None:
    """Forward hook: the output asks for a gradient, as under activation recompute."""
    if output.is_leaf:
        output.requires_grad_(True)


def saved_activation_bytes(trainer: Trainer) -> int:
    """Bytes that one forward keeps for its backward on this rank: each storage once, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    storages: dict[int, int] = {}
    keep_alive = []  # or the allocator would hand the same address out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            keep_alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.forward()  # and no backward: what is recomputed there is not kept
    return sum(storages.values())


def take_turns(trainers: dict[str, Trainer], rounds: int, warmup: int) -> dict[str, dict[str, list[float]]]:
    """This rank's seconds, one step of each form after the other: clock (wall, cpu) -> form -> list over rounds."""
    seconds = {"wall": {name: [] for name in trainers}, "cpu": {name: [] for name in trainers}}
    for round_number in range(warmup + rounds):
        for name, trainer in trainers.items():
            torch.distributed.barrier()
            torch.cuda.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            trainer.step()
            torch.cuda.synchronize()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if round_number >= warmup:
                seconds["wall"][name].append(wall)
                seconds["cpu"][name].append(cpu)
    return seconds


def paired_ratio(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    ratios = sorted(a / b for a, b in zip(numerators, denominators))
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def machine() -> dict[str, Any]:
    """What ran this: goes into every JSON."""
    cpu_name = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu_name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu_name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    load = os.getloadavg()[0]
    return {"cpu": cpu_name, "cores": os.cpu_count(), "device": device, "torch": torch.__version__, "load": load}


def commit() -> str:
    """The checkout's commit, with a plus where there are uncommitted changes; "unknown" outside git."""
    try:
        here = Path(__file__).parent
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here, capture_output=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.returncode else "") if head.returncode == 0 else "unknown"


def write_json(name: str, content: dict[str, Any], path: Path | None = None) -> Path:
    """Write ``content`` with machine, commit and command line; returns the path."""
    path = path or OUT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"command": " ".join(sys.argv), "commit": commit(), "machine": machine()}
    path.write_text(json.dumps({**header, **content}, indent=1) + "\n")
    return path
