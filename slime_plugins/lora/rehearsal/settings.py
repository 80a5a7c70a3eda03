"""Everything one rehearsal is told, and every check of it that needs no file."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError

MICRO_BATCH_TOKENS = 4096
"""Tokens, padding included, that one forward pass may hold unless ``--micro-batch-size`` says otherwise."""

_COUNTS = (
    *("tp", "pp", "dp", "vpp", "steps", "rollout_batch_size", "n_samples_per_prompt", "rollout_max_response_len"),
    *("num_steps_per_rollout", "micro_batch_size", "save_interval"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of ``slime-lora rehearse``, named as slime names them where slime has them.

    Fields that are None by default depend on whether the built-in base and task are used; ``resolved`` fills them.
    """

    hf_checkpoint: str | None = None
    """Base: Qwen2, Qwen3 or Llama directory; None makes and caches the built-in one."""
    prompt_data: str | None = None
    """jsonl of prompts and labels; given together with ``hf_checkpoint``."""
    input_key: str = "input"
    label_key: str = "label"
    apply_chat_template: bool = False
    """Put text prompts through the tokenizer's chat template as one user message."""
    rm_type: str = "exact"
    """Name in ``task.REWARDS``."""
    tp: int = 2
    pp: int = 1
    vpp: int | None = None
    """Pipeline chunks per stage (interleaved schedule)."""
    dp: int = 1
    sp: bool = False
    """Sequence parallelism, with tp > 1."""
    device: str = "auto"
    """``cuda`` (NCCL, one GPU per process), ``cpu`` (gloo), or ``auto``: cuda where there are GPUs enough."""
    dtype: str = "float32"
    recompute_granularity: str | None = None
    """Activation recompute: ``full`` or ``selective``."""
    steps: int | None = None
    rollout_batch_size: int | None = None
    """Prompts per step."""
    n_samples_per_prompt: int | None = None
    rollout_max_response_len: int | None = None
    """Tokens."""
    rollout_temperature: float = 1.0
    num_steps_per_rollout: int = 2
    """Optimizer steps per rollout. From the second on, samples are off-policy, and clipping acts."""
    micro_batch_size: int | None = None
    """Samples per forward pass; None takes what fits in ``MICRO_BATCH_TOKENS``."""
    lr: float | None = None
    """Constant. For adapters, so some 10 times that of full training."""
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    eps_clip: float = 0.2
    kl_loss_coef: float = 0.01
    seed: int = 1234
    out: str = "runs/rehearsal"
    save: str | None = None
    """Directory for sharded checkpoints (adapters, optimizer, random states); the last step is always saved."""
    save_interval: int | None = None
    """Steps between them; None saves the last step alone."""
    load: str | None = None
    """Checkpoint, or a run's directory of them, to go on from, up to ``steps`` in all; any parallelism."""
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    base_quant: BaseQuant | None = None
    """What the base is stored as, in training and in rollouts; None: dense."""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Settings:
        """From the parsed flags of ``cli.rehearse``."""
        names = [field.name for field in dataclasses.fields(cls) if field.name not in ("lora", "base_quant")]
        return cls(
            **{name: getattr(args, name) for name in names},
            lora=LoRAConfig.from_args(args),
            base_quant=BaseQuant.from_args(args),
        )

    @property
    def builtin(self) -> bool:
        """Is this a run on the built-in base and task?"""
        return self.hf_checkpoint is None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def samples_per_rank(self) -> int:
        """Samples of one optimizer step on one data-parallel rank."""
        return self.rollout_batch_size * self.n_samples_per_prompt // (self.num_steps_per_rollout * self.dp)

    def resolved(self) -> Settings:
        """With every default filled in."""
        if self.builtin:
            defaults = {
                "steps": 70,
                "lr": 5e-3,  # for a hidden size of 64; wide models want 1e-5 to 1e-4
                "rollout_batch_size": 32,
                "n_samples_per_prompt": 16,
                "rollout_max_response_len": 4,
            }
        else:
            defaults = {
                "steps": 20,
                "lr": 1e-4,
                "rollout_batch_size": 8,
                "n_samples_per_prompt": 8,
                "rollout_max_response_len": 128,
            }
        return dataclasses.replace(
            self, **{name: value for name, value in defaults.items() if getattr(self, name) is None}
        )

    def check(self) -> None:
        """Refuse what cannot work. Of ``resolved`` settings.

        Raises:
            UsageError: naming the flag.
        """
        if (self.hf_checkpoint is None) != (self.prompt_data is None):
            raise UsageError("--hf-checkpoint and --prompt-data go together; without both, the built-in ones are used")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_flag(name)} {value}: expected at least 1")
        if self.n_samples_per_prompt < 2:
            raise UsageError("--n-samples-per-prompt 1: GRPO compares the samples of one prompt, expected at least 2")
        for name in ("lr", "rollout_temperature", "eps_clip"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{_flag(name)} {getattr(self, name)}: expected more than 0")
        for name in ("kl_loss_coef", "weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise UsageError(f"{_flag(name)} {getattr(self, name)}: expected 0 or more")
        if self.save_interval is not None and self.save is None:
            raise UsageError("--save-interval without --save: where to?")
        self._check_parallel()

    def _check_parallel(self) -> None:
        if self.sp and self.tp == 1:
            raise UsageError("--sp cuts sequences over tensor-parallel ranks; it needs --tp of at least 2")
        if self.vpp is not None and (self.vpp < 2 or self.pp < 2):
            raise UsageError(f"--vpp {self.vpp} --pp {self.pp}: the interleaved schedule needs both to be at least 2")
        samples = self.rollout_batch_size * self.n_samples_per_prompt
        parts = self.num_steps_per_rollout * self.dp
        if samples % parts:
            raise UsageError(
                f"{samples} samples per step (--rollout-batch-size x --n-samples-per-prompt) do not divide into "
                f"{parts} (--num-steps-per-rollout x --dp) equal parts"
            )
        if self.micro_batch_size is not None and self.samples_per_rank % self.micro_batch_size:
            raise UsageError(
                f"--micro-batch-size {self.micro_batch_size} does not divide the {self.samples_per_rank} samples "
                "that a rank gets per optimizer step"
            )
        self.num_microbatches(self.samples_per_rank, 1)

    def num_microbatches(self, samples: int, seq_length: int) -> int:
        """Into how many forward passes a rank cuts ``samples`` rows of ``seq_length`` tokens.

        At least one per pipeline stage where that divides; the interleaved schedule wants a multiple of the stages.
        """
        step = self.pp if self.vpp else 1
        if self.micro_batch_size is not None:
            counts = [samples // self.micro_batch_size]
        else:
            counts = [count for count in range(1, samples + 1) if samples % count == 0]
        counts = [count for count in counts if count % step == 0]
        if not counts:
            raise UsageError(
                f"--vpp: {samples} samples per rank do not make a multiple of --pp {self.pp} microbatches"
            )
        fitting = [
            count for count in counts if count >= self.pp and samples // count * seq_length <= MICRO_BATCH_TOKENS
        ]
        return min(fitting, default=max(counts))

    def to_dict(self) -> dict:
        """JSON-ready."""
        return {**dataclasses.asdict(self), "lora": self.lora.to_dict()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
