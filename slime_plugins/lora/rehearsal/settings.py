"""Everything one rehearsal is told, every value filled in, and every check of it that needs no file."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slime_plugins.lora.arguments import base_args, check_lora_plus, lora_args
from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.control.arguments import plateau_of
from slime_plugins.lora.control.plateau import EVAL, VAL_LOSS, Plateau
from slime_plugins.lora.cost.model import Split
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.objectives import OBJECTIVES, make_objective, objective_class, option_names

if TYPE_CHECKING:
    from slime_plugins.lora.objectives.objective import Objective

MICRO_BATCH_TOKENS = 4096
"""Tokens, padding included, that one forward pass may hold unless ``--micro-batch-size`` says otherwise."""

EVAL_REWARD = f"{EVAL}reward"
"""Name of the reward on held-out prompts among the metrics that a plateau can be of."""

MAX_COUNT = 1_000_000_000
"""Of anything; more is a slip of the finger."""
MAX_PROCESSES = 64
"""On one machine; more would bring it down."""

_COUNTS = (
    *(
        "tp",
        "pp",
        "dp",
        "vpp",
        "ep",
        "etp",
        "steps",
        "rollout_batch_size",
        "n_samples_per_prompt",
        "rollout_max_response_len",
    ),
    *("num_steps_per_rollout", "micro_batch_size", "save_interval", "eval_interval", "val_interval", "gkd_chunk_size"),
)

_BUILTIN = {"steps": 70, "rollout_batch_size": 32, "rollout_max_response_len": 4, "lr": 5e-3}
_OWN = {"steps": 20, "rollout_batch_size": 8, "rollout_max_response_len": 128, "lr": 1e-4}
_GKD = {"n_samples_per_prompt": 1, "num_steps_per_rollout": 1}
BUILTIN_TEACHER = "{label} {label} {label} {label} {label} {prompt}"
"""Before the prompt of the built-in task: what the digits shown are likely to be answered with, the right one most."""
DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({**_BUILTIN, "n_samples_per_prompt": 16}, {**_OWN, "n_samples_per_prompt": 8}),
    "sft": (
        {**_BUILTIN, "rollout_batch_size": 128, "n_samples_per_prompt": 1, "num_steps_per_rollout": 1},
        {**_OWN, "rollout_batch_size": 16, "n_samples_per_prompt": 1, "num_steps_per_rollout": 1},
    ),
    "gkd": (
        {**_BUILTIN, **_GKD, "steps": 200, "rollout_batch_size": 128, "gkd_teacher_prompt_template": BUILTIN_TEACHER},
        {**_OWN, **_GKD, "rollout_batch_size": 16},
    ),
}
"""Objective -> what differs from the fields' own defaults for the built-in base and task, and for one's own.

The built-in base has a hidden size of 64 and takes a high rate; wide models want 1e-5 to 1e-4.
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of ``slime-lora rehearse``, named as slime names them where slime has them.

    The defaults are those of GRPO on the built-in base; ``resolve`` gives those of other runs.
    """

    objective: str = "grpo"
    """Name in ``objectives.OBJECTIVES``."""
    hf_checkpoint: str = ""
    """Base, of ``base.decoder.ARCHITECTURES``; empty for the built-in one, which ``preflight.prepare`` makes."""
    prompt_data: str = ""
    """jsonl of prompts and labels; given together with ``hf_checkpoint``."""
    input_key: str = "input"
    label_key: str = "label"
    response_key: str | None = None
    """Of the response to train on, where it is given; None takes ``label_key``."""
    metadata_key: str = "metadata"
    """Of an object that rewards of one's own see."""
    apply_chat_template: bool = False
    """Put text prompts through the tokenizer's chat template as one user message."""
    rm_type: str = "exact"
    """Name in ``rewards.RULES``."""
    custom_rm_path: str | None = None
    """``module.function``, slime's: (args, sample) -> reward, async or not; instead of ``rm_type``."""
    eval_data: str | None = None
    """jsonl of held-out prompts; the built-in task brings its own."""
    eval_interval: int | None = None
    """Steps between evaluations; None evaluates before the first step and after the last."""
    tp: int = 2
    pp: int = 1
    vpp: int | None = None
    """Pipeline chunks per stage (interleaved schedule)."""
    dp: int = 1
    ep: int = 1
    """Expert-parallel ranks: of the tp x dp ranks of a stage, each ep x etp share the experts."""
    etp: int | None = None
    """Expert-tensor-parallel ranks; None: as many as ``tp``, as Megatron has it."""
    sp: bool = False
    """Sequence parallelism, with tp > 1."""
    device: str = "auto"
    """``cuda`` (NCCL, one GPU per process), ``cpu`` (gloo), or ``auto``: cuda where there are GPUs enough."""
    dtype: str = "float32"
    recompute_granularity: str | None = None
    """Activation recompute: ``full`` or ``selective``."""
    steps: int = 70
    rollout_batch_size: int = 32
    """Prompts per step."""
    n_samples_per_prompt: int = 16
    rollout_max_response_len: int = 4
    """Tokens."""
    rollout_temperature: float = 1.0
    num_steps_per_rollout: int = 2
    """Optimizer steps per rollout. From the second on, samples are off-policy, and clipping acts."""
    micro_batch_size: int | None = None
    """Samples per forward pass; None takes what fits in ``MICRO_BATCH_TOKENS``."""
    lr: float = 5e-3
    """Constant. For adapters, so some 10 times that of full training."""
    lora_plus_ratio: float = 1.0
    lora_linears: str = "auto"
    """LoRA+: B's learning rate over A's, which is ``lr``."""
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    eps_clip: float = 0.2
    kl_loss_coef: float = 0.01
    val_data: str | None = None
    """jsonl of prompts and responses, to compute ``val_loss`` on, with an objective of given responses."""
    val_interval: int | None = None
    """Steps between validations; one comes after the last step too."""
    lr_plateau_metric: str | None = None
    """``val_loss`` or ``eval/reward``; with it, ``control.plateau`` decides."""
    greater_is_better: bool | None = None
    lr_plateau_factor: float = Plateau.factor
    lr_plateau_patience: int = Plateau.patience
    lr_plateau_threshold: float = Plateau.threshold
    lr_plateau_threshold_mode: str = Plateau.threshold_mode
    lr_plateau_cooldown: int = Plateau.cooldown
    stop_min_lr: float | None = None
    stop_metric: float | None = None
    gkd_beta: float = 0.5
    """0: KL(teacher || student); 1: KL(student || teacher); between, the generalised Jensen-Shannon divergence."""
    gkd_lmbda: float = 0.5
    """Share of steps on the student's own samples; the others take given responses."""
    gkd_temperature: float = 1.0
    """Of both policies in the divergence; of sampling it is ``rollout_temperature``."""
    sft_alpha: float = 0.0
    """Weight of the cross-entropy on given responses beside the divergence."""
    gkd_teacher: str = "base"
    """``base``, ``live``, ``ema``, or a directory of an adapter."""
    gkd_ema_decay: float | None = None
    """Of ``gkd_teacher`` ``ema``, per optimizer step; None takes 0.99."""
    gkd_teacher_prompt_template: str | None = None
    """What the teacher is shown: ``objectives.teacher_prompt``; None for the student's prompt."""
    gkd_chunk_size: int = 512
    """Tokens whose logits the divergence looks at at a time."""
    seed: int = 1234
    out: str = "runs/rehearsal"
    show_samples: int = 0
    """Samples of every step that are printed."""
    save: str | None = None
    """Directory for sharded checkpoints (adapters, optimizer, random states); the last step is always saved."""
    save_interval: int | None = None
    """Steps between them; None saves the last step alone."""
    load: str | None = None
    """Checkpoint, or a run's directory of them, to go on from, up to ``steps`` in all; any parallelism."""
    lora_ref: str | None = None
    """Reference policy of the KL: ``base``, which None is too, or ``start``, the adapter that training starts from."""
    lora_adapter_path: str | None = None
    """PEFT directory or checkpoint whose adapter is the start; step and optimizer start anew."""
    use_wandb: bool = False
    wandb_mode: str | None = None
    wandb_dir: str | None = None
    wandb_key: str | None = None
    wandb_host: str | None = None
    wandb_team: str | None = None
    wandb_group: str | None = None
    wandb_project: str | None = None
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    base_quant: BaseQuant | None = None
    """What the base is stored as, in training and in rollouts; None: dense."""

    @property
    def builtin(self) -> bool:
        """Is this a run on the built-in base and task, not made yet?"""
        return not self.hf_checkpoint

    @property
    def plateau(self) -> Plateau | None:
        """The rule, if there is one. Raises UsageError for flags that make none."""
        return plateau_of(self)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def samples_per_rank(self) -> int:
        """Samples of one optimizer step on one data-parallel rank."""
        return self.rollout_batch_size * self.n_samples_per_prompt // (self.num_steps_per_rollout * self.dp)

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UsageError: naming the flag.
        """
        if (not self.hf_checkpoint) != (not self.prompt_data):
            raise UsageError("--hf-checkpoint and --prompt-data go together; without both, the built-in ones are used")
        self._check_numbers()
        check_lora_plus(self.lora_plus_ratio)
        cls = objective_class(self.objective)
        if cls.rewarded and self.n_samples_per_prompt < 2:
            raise UsageError("--n-samples-per-prompt 1: GRPO compares the samples of one prompt, expected at least 2")
        if not cls.rollouts and self.n_samples_per_prompt != 1:
            raise UsageError(
                f"--n-samples-per-prompt {self.n_samples_per_prompt}: --objective {self.objective} trains on the one "
                "response that is given to each prompt, expected 1"
            )
        for name, needs in (("save_interval", "save"), ("eval_interval", "eval_data")):
            if getattr(self, name) is not None and not getattr(self, needs) and not (self.builtin and "eval" in name):
                raise UsageError(f"{flag(name)} without {flag(needs)}: {flag(needs)} says where")
        if self.load and self.lora_adapter_path:
            raise UsageError(
                "--load goes on with a run, --lora-adapter-path starts one from an adapter; leave one of them out"
            )
        given = [flag(name) for name, value in _wandb(self) if value is not None]
        if given and not self.use_wandb:
            raise UsageError(f"{', '.join(given)} without --use-wandb; add --use-wandb, or drop them")
        self._check_validation(cls.rollouts)
        objective = make_objective(self.objective, self)
        self._check_reference(objective)
        objective.check(
            copies=self.n_samples_per_prompt, start=self.load or self.lora_adapter_path, resumed=self.load is not None
        )
        self._check_parallel()

    def _check_reference(self, objective: Objective) -> None:
        if self.lora_ref is None:
            return
        measured = any(computed.model == "reference" for computed in objective.computed.values())
        if not measured or not self.kl_loss_coef:
            raise UsageError(
                f"--lora-ref {self.lora_ref} says what the KL is measured from, and there is none with --objective "
                f"{self.objective} and --kl-loss-coef {self.kl_loss_coef:g}; drop it"
            )
        if self.lora_ref == "start" and not (self.load or self.lora_adapter_path):
            raise UsageError(
                "--lora-ref start without --lora-adapter-path: training starts from the base, which is the reference "
                "anyway; give the adapter to start from, or drop it"
            )

    def _check_validation(self, rollouts: bool) -> None:
        """Is what a plateau goes by measured, and more than once?"""
        plateau = self.plateau
        if rollouts and (self.val_data or self.val_interval):
            raise UsageError(
                f"--val-data and --val-interval: the loss of given responses is not computed by --objective "
                f"{self.objective}; evaluate rewards (--eval-data, --eval-interval, --lr-plateau-metric {EVAL_REWARD})"
            )
        if self.val_data and not self.val_interval:
            raise UsageError("--val-data without --val-interval: how many steps lie between two validations?")
        if self.val_interval and not self.val_data and not self.builtin:
            raise UsageError("--val-interval without --val-data: there is nothing to validate on; add it")
        if plateau is None:
            return
        if plateau.metric not in (VAL_LOSS, EVAL_REWARD):
            raise UsageError(f"--lr-plateau-metric {plateau.metric}: a rehearsal has {VAL_LOSS} and {EVAL_REWARD}")
        interval, data = ("val_interval", "val_data") if plateau.metric == VAL_LOSS else ("eval_interval", "eval_data")
        if getattr(self, interval) is None:
            needed = flag(interval) if self.builtin else f"{flag(data)} and {flag(interval)}"
            raise UsageError(f"--lr-plateau-metric {plateau.metric} needs {needed}: it is not measured on the way")

    def _check_numbers(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_COUNT:
                raise UsageError(f"{flag(name)} {value}: expected a whole number from 1 to {MAX_COUNT:,}")
        for name, most in (("seed", 2**32 - 1), ("show_samples", MAX_COUNT)):
            if not 0 <= getattr(self, name) <= most:
                raise UsageError(f"{flag(name)} {getattr(self, name)}: expected a whole number from 0 to {most:,}")
        for name in ("lr", "rollout_temperature", "eps_clip", "gkd_temperature"):
            if not 0 < getattr(self, name) <= MAX_COUNT:
                raise UsageError(f"{flag(name)} {getattr(self, name)}: expected a number above 0, to {MAX_COUNT:,}")
        for name in ("kl_loss_coef", "weight_decay", "clip_grad", "sft_alpha"):
            if not 0 <= getattr(self, name) <= MAX_COUNT:
                raise UsageError(f"{flag(name)} {getattr(self, name)}: expected a number from 0 to {MAX_COUNT:,}")

    def _check_parallel(self) -> None:
        if self.sp and self.tp == 1:
            raise UsageError("--sp cuts sequences over tensor-parallel ranks; it needs --tp of at least 2")
        if self.vpp is not None and (self.vpp < 2 or self.pp < 2):
            raise UsageError(f"--vpp {self.vpp} --pp {self.pp}: the interleaved schedule needs both to be at least 2")
        Split(tp=self.tp, pp=self.pp, dp=self.dp, ep=self.ep, etp=self.etp)
        if self.world_size > MAX_PROCESSES:
            raise UsageError(
                f"--tp {self.tp} --pp {self.pp} --dp {self.dp}: {self.world_size:,} processes on this machine, "
                f"expected at most {MAX_PROCESSES}"
            )
        samples = self.rollout_batch_size * self.n_samples_per_prompt
        if samples > MAX_COUNT:
            raise UsageError(
                f"{samples:,} samples per step (--rollout-batch-size x --n-samples-per-prompt), expected at most "
                f"{MAX_COUNT:,}"
            )
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
            counts = list(_divisors(samples))
        counts = [count for count in counts if count % step == 0]
        if not counts:
            raise UsageError(
                f"--vpp: {samples} samples per rank do not make a multiple of --pp {self.pp} microbatches"
            )
        fitting = [
            count for count in counts if count >= self.pp and samples // count * seq_length <= MICRO_BATCH_TOKENS
        ]
        return min(fitting, default=max(counts))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without secrets, so that a directory of results can be handed on."""
        quant = None if self.base_quant is None else self.base_quant.to_dict()
        values = {**dataclasses.asdict(self), "lora": self.lora.to_dict(), "base_quant": quant}
        del values["wandb_key"]
        return values

    def namespace(self) -> argparse.Namespace:
        """As the parsed flags of a program: what rewards of one's own are given."""
        values = {name: value for name, value in self.to_dict().items() if name not in ("lora", "base_quant")}
        return argparse.Namespace(**values, **lora_args(self.lora), **base_args(self.base_quant), use_lora=True)


def resolve(given: Mapping[str, Any], lora: LoRAConfig) -> Settings:
    """What was given, and the defaults of such a run for the rest. Not checked yet.

    Raises:
        UsageError: an unknown objective, and flags that only another one reads.
    """
    name = given.get("objective", "grpo")
    if name not in OBJECTIVES:
        raise UsageError(f"--objective {name}: expected one of {', '.join(OBJECTIVES)}")
    builtin, own = DEFAULTS[name]
    return Settings(**{**(own if given.get("hf_checkpoint") else builtin), **given, "lora": lora})


def refuse_unread(objective: str, given: Mapping[str, Any]) -> None:
    """Raise UsageError for flags that were typed but that this objective does not read."""
    own = objective_class(objective)
    for name in OBJECTIVES:
        for option in option_names(objective_class(name)):
            if option in given and option not in option_names(own):
                raise UsageError(f"{flag(option)} is read by --objective {name}, not by {objective}; drop it")
    for reads, unread, why in (
        (own.given, "response_key", "it trains on what it samples"),
        (own.rollouts, "show_samples", "its responses are given"),
    ):
        if not reads and unread in given:
            raise UsageError(f"{flag(unread)} is not read by --objective {objective}: {why}; drop it")


def flag(name: str) -> str:
    """A field as it is typed."""
    return "--" + name.replace("_", "-")


def _wandb(settings: Settings) -> Iterator[tuple[str, Any]]:
    names = (field.name for field in dataclasses.fields(settings) if field.name.startswith("wandb_"))
    return ((name, getattr(settings, name)) for name in names)


def _divisors(number: int) -> Iterator[int]:
    """In no order. By their smaller halves: a rank may have a million samples."""
    for small in range(1, math.isqrt(number) + 1):
        if number % small == 0:
            yield small
            if small != number // small:
                yield number // small
