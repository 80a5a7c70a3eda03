"""One Megatron rank: adapters on a frozen base, Megatron's DDP, distributed optimizer and schedules.

What it trains for is an ``Objective``; this file knows none of them.

All methods are collective: the driver calls them on every rank. Megatron is imported inside of them, once ``cpu`` has
made it fit for a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slime_plugins.lora.control.rates import scale_rates, with_lora_plus
from slime_plugins.lora.objectives import make_objective
from slime_plugins.lora.objectives.batch import Batch
from slime_plugins.lora.objectives.head import output_weight, without_head
from slime_plugins.lora.objectives.objective import Computed, ModelOutput
from slime_plugins.lora.rehearsal import cpu
from slime_plugins.lora.rehearsal.settings import Settings

if TYPE_CHECKING:
    from slime_plugins.lora.objectives.teacher import AnotherAdapter, Teacher


class RankTrainer:
    """The policy on one rank. Reference policy and teacher are the same model: adapters off, or other values."""

    teacher: Teacher | None = None
    reference: AnotherAdapter | None = None
    """None: the base."""

    def setup(self, settings: Settings, rank: int, store: str, num_threads: int) -> None:
        """Start the process group and build the model; returns when all ranks have.

        Not the constructor: what goes wrong in one reaches a Ray driver without its exception.
        """
        torch.set_num_threads(num_threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron, on the absence of apex and Transformer Engine
            _start(settings, rank, store)
            self.build(settings)

    def build(self, settings: Settings) -> None:
        """Model, adapters, DDP and optimizer, on process groups that are there."""
        from megatron.core import parallel_state as mpu
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.distributed import finalize_model_grads as finalize
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from slime_plugins.lora import apply_lora, quantize_base, summing_stages
        from slime_plugins.lora.base.decoder import HFBase
        from slime_plugins.lora.rehearsal.model import build_chunks

        self.settings = settings
        self.objective = make_objective(settings.objective, settings)
        dtype = getattr(torch, settings.dtype)
        self.vocab_size = HFBase.read(settings.hf_checkpoint).vocab_size
        self.is_last_stage = mpu.is_pipeline_last_stage()
        self.dp_rank = mpu.get_data_parallel_rank()

        def adapt(chunks):
            if settings.base_quant is not None:
                quantize_base(chunks, settings.base_quant, codes_of=settings.hf_checkpoint)
            self.base_before = base_checksum(chunks)
            self.report = apply_lora(chunks, settings.lora, linears=settings.lora_linears)

        self.chunks = build_chunks(
            settings.hf_checkpoint,
            dtype=dtype,
            sequence_parallel=settings.sp,
            vpp=settings.vpp,
            recompute=settings.recompute_granularity,
            apply=adapt,
        )
        self.config = self.chunks[0].config
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.model = [
            DistributedDataParallel(self.config, ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(self.chunks)
        ]
        self.optimizer = with_lora_plus(get_megatron_optimizer, settings.lora_plus_ratio)(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.lr,
                weight_decay=settings.weight_decay,
                clip_grad=settings.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
            ),
            self.model,
        )
        self.config.finalize_model_grads_func = summing_stages(finalize)
        self.config.grad_scale_func = self.optimizer.scale_loss

    def describe(self) -> dict:
        """What was built: the report as text, parameter counts, where this rank is."""
        return {
            "report": str(self.report),
            "trainable_parameters": self.report.trainable_parameters,
            "total_parameters": self.report.total_parameters,
            "parameters_of_a_rank": sum(param.numel() for chunk in self.chunks for param in chunk.parameters()),
            "device": str(self.device),
        }

    @property
    def device(self) -> torch.device:
        return next(self.chunks[0].parameters()).device

    def train(self, batch: Batch) -> dict | None:
        """What the objective wants computed, then the optimizer steps on one batch.

        Args:
            batch: the samples of all data-parallel ranks.
        Returns:
            On the last pipeline stage, metrics averaged over this rank's samples and the steps, and, if the objective
            has them, ``sampled_log_probs`` of its first samples; None on others. In rank order, the first is of the
            batch's start.
        """
        objective = self.objective
        parts = list(_split(batch, self.settings.num_steps_per_rollout))
        parts = [self._computed(objective.prepare(part)[self._my_rows(len(part))]) for part in parts]
        steps = [self._optimizer_step(part) for part in parts]
        if not self.is_last_stage:
            return None
        metrics: dict = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        metrics |= {name: steps[0][name] for name in objective.of_first_step}
        if objective.sampled_log_probs is not None:
            metrics["sampled_log_probs"] = parts[0].fields[objective.sampled_log_probs][:8].cpu()
        return metrics

    def validate(self, batch: Batch) -> tuple[float, float] | None:
        """Sum of -log p over this rank's response tokens, and their number; None but on the last pipeline stage.

        ``batch``: the samples of all data-parallel ranks, as many as one optimizer step has.
        """

        def keep(output: ModelOutput, micro: Batch):
            nll = -(output.log_probs * micro.mask).sum(dtype=torch.float64)
            return output.logits.new_zeros(()), {"nll": nll, "tokens": micro.mask.sum(dtype=torch.float64)}

        outputs = self._run(batch[self._my_rows(len(batch))], keep, forward_only=True)
        if not outputs:
            return None
        return sum(output["nll"].item() for output in outputs), sum(output["tokens"].item() for output in outputs)

    def scale_rates(self, factor: float) -> None:
        """Train with ``factor`` times the learning rate of the start from now on."""
        scale_rates(self.optimizer, factor)

    def export(self, out_dir: str) -> None:
        """Write the adapters as a PEFT directory."""
        from slime_plugins.lora import export_peft

        export_peft(self.chunks, out_dir, hf_checkpoint=self.settings.hf_checkpoint)

    def save(self, path: str, step: int) -> None:
        """Write a sharded checkpoint after ``step`` steps: adapters, optimizer, random states."""
        from slime_plugins.lora import save_adapter

        save_adapter(self.model, path, optimizer=self.optimizer, step=step)

    def load(self, path: str) -> int:
        """Read one, of any parallelism. Returns the number of steps it has seen: 0 for an imported adapter's.

        Without optimizer state, as an imported adapter's is, the optimizer starts anew.
        """
        from slime_plugins.lora import load_adapter
        from slime_plugins.lora.checkpoint import directory
        from slime_plugins.lora.checkpoint.manifest import Manifest

        bare = Manifest.read(directory.find(path)).optimizer is None
        return load_adapter(self.model, path, optimizer=self.optimizer, fresh_optimizer=bare).step or 0

    def start_from(self, path: str) -> None:
        """Take the adapter's values from a PEFT directory or a sharded checkpoint; the optimizer starts anew."""
        from slime_plugins.lora import import_peft, load_adapter

        if (Path(path) / "adapter_config.json").is_file():
            import_peft(self.chunks, path, optimizer=self.optimizer, carries=True)
        else:
            load_adapter(self.model, path, optimizer=self.optimizer, fresh_optimizer=True, restore_rng=False)

    def take_teacher(self, kind: str, ema_decay: float | None) -> None:
        """Make a teacher, once the adapters are what the run starts from. Arguments as ``Teacher`` has them."""
        from slime_plugins.lora.objectives.teacher import Teacher

        self.teacher = Teacher(self.chunks, kind, ema_decay)

    def take_reference(self, kept: str | None, save: str | None) -> None:
        """Make the adapters as they are now the reference policy, or those that a run has kept, and keep them."""
        from slime_plugins.lora import save_adapter
        from slime_plugins.lora.objectives.teacher import copy_of, read_another

        self.reference = copy_of(self.chunks) if kept is None else read_another(self.chunks, kept)
        if save is not None:
            with self.reference.worn():
                save_adapter(self.chunks, save)

    def export_teacher(self, out_dir: str) -> None:
        """Write the teacher's adapters as a PEFT directory."""
        assert self.teacher is not None
        with self.teacher.active():
            self.export(out_dir)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """float32 [N, S, vocab] on the last stage; ``S`` a multiple of TP, ``N`` of PP where there is VPP."""
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        def keep(output: ModelOutput, micro: Batch):
            full = gather_from_tensor_model_parallel_region(output.logits)[..., : self.vocab_size]
            return output.logits.new_zeros(()), {"logits": full.float().cpu()}

        batch = Batch(tokens, torch.zeros(tokens.shape))
        count = self.settings.pp if self.settings.vpp else 1
        outputs = self._run(batch, keep, forward_only=True, num_microbatches=count)
        return torch.cat([output["logits"] for output in outputs]) if outputs else None

    def base_checksums(self) -> tuple[str, str]:
        """SHA-256 of this rank's base parameters, when they were loaded and now."""
        return self.base_before, base_checksum(self.chunks)

    def _my_rows(self, size: int) -> slice:
        share = size // self.settings.dp
        return slice(self.dp_rank * share, (self.dp_rank + 1) * share)

    def _computed(self, batch: Batch) -> Batch:
        """With the fields that the objective wants computed; on the last stage, where the loss is."""
        fields = {}
        for name, computed in self.objective.computed.items():
            with self._model_as(computed.model):
                values = self._evaluate(computed.sees(batch), computed)
            if values is not None:
                fields[name] = values
        return batch.having(**fields)

    def _model_as(self, which: str) -> contextlib.AbstractContextManager:
        from slime_plugins.lora import adapters_disabled

        if which == "teacher":
            assert self.teacher is not None
            return self.teacher.active()
        if which == "reference":
            return adapters_disabled(self.chunks) if self.reference is None else self.reference.worn()
        return contextlib.nullcontext()

    def _evaluate(self, batch: Batch, computed: Computed) -> torch.Tensor | None:
        """[N, ...] on the last stage."""

        def keep(output: Any, micro: Batch):
            values = computed.of(output, micro)
            return values.new_zeros(()), {"values": values}

        with without_head(self.chunks[-1]) if computed.hidden else contextlib.nullcontext():
            outputs = self._run(batch, keep, forward_only=True, hidden=computed.hidden)
        return torch.cat([output["values"] for output in outputs]) if outputs else None

    def _whole_sequence(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, S, H] of what ``without_head`` makes the model give."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        if not self.config.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden.transpose(0, 1).contiguous()).transpose(0, 1)

    def _optimizer_step(self, batch: Batch) -> dict[str, float]:
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._run(batch, self.objective.loss, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        if self.teacher is not None:
            self.teacher.follow()
        if not outputs:
            return {}
        means = {name: sum(output[name].item() for output in outputs) / len(outputs) for name in outputs[0]}
        return {**means, "grad_norm": float(grad_norm)}

    def _output(self, micro: Batch, logits: torch.Tensor) -> ModelOutput:
        from megatron.core import parallel_state as mpu

        return ModelOutput(
            logits,
            first_column=mpu.get_tensor_model_parallel_rank() * logits.shape[-1],
            vocab_size=self.vocab_size,
            token_log_probs=lambda: self._token_log_probs(logits, micro.tokens),
            tp_group=mpu.get_tensor_model_parallel_group(),
            head=output_weight(self.chunks[-1]),
        )

    def _token_log_probs(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Log-prob of token t at position t, float32 [N, S], from this rank's shard of logits [N, S, V/T]."""
        from megatron.core import parallel_state as mpu
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        scaled = logits[:, :-1].float() / self.objective.temperature
        first = mpu.get_tensor_model_parallel_rank() * scaled.shape[-1]
        padding = first + torch.arange(scaled.shape[-1], device=scaled.device) >= self.vocab_size
        # Megatron's cross entropy overwrites its input: masked_fill hands it a copy.
        losses = vocab_parallel_cross_entropy(scaled.masked_fill(padding, float("-inf")), tokens[:, 1:])
        return torch.nn.functional.pad(-losses, (1, 0))

    def _run(
        self,
        batch: Batch,
        consume: Callable,
        *,
        forward_only: bool,
        num_microbatches: int | None = None,
        hidden: bool = False,
    ) -> list[dict]:
        """Megatron's schedule over a batch; ``consume(output, micro)`` gives a loss and a dict.

        ``hidden``: inside ``without_head``; the output is hidden states [N, S, H].

        Returns the dicts, on the last stage.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        size, seq_length = batch.tokens.shape
        count = num_microbatches or self.settings.num_microbatches(size, seq_length)
        micros = list(_split(batch.to(self.device), count))
        positions = torch.arange(seq_length, device=self.device)

        def forward_step(iterator: Iterator[Batch], chunk):
            micro = next(iterator)
            output = chunk(micro.tokens, positions.expand_as(micro.tokens), None)
            if hidden:
                return output, lambda output: consume(self._whole_sequence(output), micro)
            return output, lambda logits: consume(self._output(micro, logits), micro)

        for chunk in self.model:
            chunk.train(not forward_only)
        with torch.set_grad_enabled(not forward_only):
            outputs = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(micros) for _ in self.model],
                model=self.model,
                num_microbatches=count,
                seq_length=seq_length,
                micro_batch_size=size // count,
                forward_only=forward_only,
            )
        return outputs if self.is_last_stage else []


def base_checksum(chunks) -> str:
    """SHA-256 over the bits of every parameter of one rank that is not an adapter's."""
    from slime_plugins.lora.adapters import base_parameters

    digest = hashlib.sha256()
    for name, param in base_parameters(chunks):
        digest.update(name.encode())
        digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    size = len(batch) // parts
    return (batch[part * size : (part + 1) * size] for part in range(parts))


def _start(settings: Settings, rank: int, store: str) -> None:
    """Process group, Megatron's parallel state and random state."""
    if not cpu.enable():
        torch.cuda.set_device(rank)
    if Path("/sys/class/net/lo").exists():
        # All ranks are on this machine; gloo would look its host name up, which laptops and containers lack.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=settings.world_size,
    )
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=settings.tp,
        pipeline_model_parallel_size=settings.pp,
        virtual_pipeline_model_parallel_size=settings.vpp,
        expert_model_parallel_size=settings.ep,
        expert_tensor_parallel_size=settings.etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(settings.seed)
