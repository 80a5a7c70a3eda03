"""What an adapter is: the one dataclass that flags, checkpoints and PEFT files are read into."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slime_plugins.lora.base.tokens import runs
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.targets import matches

LAYOUTS = ("fused", "split")
INITS = ("kaiming", "gaussian")
DTYPES = ("float32", "bfloat16", "float16")
LINEARS = ("auto", "fused", "taps")
"""How a linear runs its adapter (``layers.choice``). No part of what an adapter is, so no field below."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """An adapter: y = x W^T + scaling * drop(x) A^T B^T (Hu et al. 2021, arXiv:2106.09685).

    Raises:
        UsageError: on construction, naming the field, for values that cannot work.
    """

    rank: int = 8
    """Width of the bottleneck; the same at every tensor-parallel size, never sharded."""
    alpha: float = 16.0
    """scaling = alpha / rank, or alpha / sqrt(rank) with ``use_rslora``."""
    dropout: float = 0.0
    """Probability of dropping an input of A while training, in [0, 1)."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Megatron or Hugging Face names, ``all-linear``, or wildcards on full names. See ``targets``."""
    exclude_modules: tuple[str, ...] = ()
    """The same vocabulary; taken away from the targets."""
    trainable_token_indices: tuple[int, ...] = ()
    """Vocabulary ids whose rows of embedding and output layer train, beside the adapters (PEFT's name). With them,
    ``target_modules`` may be empty: the rows alone."""
    layout: str = "fused"
    """``fused``: one A for a fused linear. ``split``: one A per Hugging Face projection, as PEFT has it."""
    use_rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    init: str = "kaiming"
    """Of A: ``kaiming`` = uniform(+-1/sqrt(in)), PEFT's default; ``gaussian`` = N(0, 1/rank^2). B is zero."""
    dtype: str | None = None
    """Adapter dtype (``float32``, ``bfloat16``, ``float16``); None takes the base weight's."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Name -> rank where it differs from ``rank``. A projection's name (``q_proj``) needs layout ``split``."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Name -> alpha where it differs from ``alpha``."""
    seed: int = 1234
    """Seed of A: equal seeds give equal full matrices at every parallelism."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "trainable_token_indices", _ids(self.trainable_token_indices))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        _check_rank("rank", self.rank)
        _check_alpha("alpha", self.alpha)
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{key!r}]", alpha)
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"LoRA dropout is {self.dropout}; expected a probability in [0, 1)")
        if not (self.target_modules or self.trainable_token_indices) or not all(self.target_modules):
            raise UsageError("LoRA target_modules is empty; name at least one linear, or 'all-linear'")
        for name, allowed in (("layout", LAYOUTS), ("init", INITS), ("dtype", (None, *DTYPES))):
            if getattr(self, name) not in allowed:
                known = ", ".join(str(value) for value in allowed)
                raise UsageError(f"LoRA {name} is {getattr(self, name)!r}; expected one of: {known}")

    def rank_of(self, *names: str) -> int:
        """Rank of a module known under any of ``names`` (Megatron's and Hugging Face's full names)."""
        return _lookup(self.rank_pattern, names, self.rank)

    def alpha_of(self, *names: str) -> float:
        """Alpha of a module known under any of ``names``."""
        return _lookup(self.alpha_pattern, names, self.alpha)

    def scaling(self, *names: str) -> float:
        """Factor on B A for a module known under any of ``names``; without a name, the config's own."""
        rank = self.rank_of(*names)
        return self.alpha_of(*names) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; ``LoRAConfig(**d)`` reads it back."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        if not self.trainable_token_indices:  # as versions that did not know them wrote it
            del values["trainable_token_indices"]
        return values

    @classmethod
    def from_args(cls, args) -> LoRAConfig:
        """Read the flags of ``add_lora_arguments`` from a parsed namespace; A's seed is ``args.seed``."""
        targets, rows = _names(args.lora_target_modules), _of_ranges(getattr(args, "trainable_token_indices", ()))
        if getattr(args, "freeze_llm", False):
            if not rows:
                raise UsageError("--freeze-llm without rows to train; name them with --trainable-token-indices")
            if targets != cls.target_modules:
                raise UsageError(
                    f"--freeze-llm: no linear is adapted, --lora-target-modules {' '.join(targets)} is not"
                )
            targets = ()
        return cls(
            rank=args.lora_r,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            target_modules=targets,
            exclude_modules=_names(args.lora_exclude_modules),
            layout=args.lora_layout,
            use_rslora=args.lora_rslora,
            init=args.lora_init,
            dtype=args.lora_dtype,
            rank_pattern=args.lora_rank_pattern,
            alpha_pattern=args.lora_alpha_pattern,
            trainable_token_indices=rows,
            seed=getattr(args, "seed", cls.seed),
        )

    @classmethod
    def from_peft(cls, adapter_dir, layout: str | None = None) -> LoRAConfig:
        """Of a model that holds this PEFT adapter exactly. Raises ValueError on what Megatron cannot hold.

        Args:
            layout: ``split``, or ``fused``, where different As of one linear are stacked at the sum of their ranks;
                None takes ``fused`` if the projections of every linear share their A, as those of a fused export do.
        """
        from slime_plugins.lora.peft.read import config_options

        return cls(**config_options(adapter_dir, layout))

    def to_peft(self, *, base_model: str, target_modules: list[str], rank: int, alpha: float) -> dict[str, Any]:
        """The flat ``adapter_config.json`` that PEFT, transformers, vLLM and SGLang read alike.

        SGLang ignores ``use_rslora`` and the patterns, so scaling is baked into ``alpha`` and ranks are padded by
        the exporter; ``rank`` and ``alpha`` here are the exported ones.
        """
        from slime_plugins.lora.peft.form import flat_config

        return flat_config(
            base_model=base_model, target_modules=target_modules, rank=rank, alpha=alpha, dropout=self.dropout
        )


def _names(values: list[str] | str) -> tuple[str, ...]:
    values = [values] if isinstance(values, str) else values
    return tuple(name for value in values for name in value.split(",") if name)


def _of_ranges(words: Iterable[str]) -> tuple[int, ...]:
    """``["5", "63-70"]`` -> ids; separated by commas too. Raises UsageError naming the word that is none."""
    found: list[int] = []
    for word in filter(None, ",".join(words).split(",")):
        first, dash, last = word.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or int(last or first) < int(first):
            raise UsageError(f"--trainable-token-indices {word}: expected an id, or a range such as 151665-152432")
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def as_ranges(ids: Iterable[int]) -> list[str]:
    """The inverse: ids in order -> the shortest words."""
    return [str(run.start) if len(run) == 1 else f"{run.start}-{run[-1]}" for run in runs(ids)]


def _ids(values: Any) -> tuple[int, ...]:
    """Token ids in order. Raises UsageError for what is none, or is there twice."""
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, int) or value < 0]
    twice = [value for value, count in Counter(values).items() if count > 1]
    if wrong or twice:
        what = f"{wrong[0]!r}; expected whole numbers from 0" if wrong else f"{twice[0]} twice"
        raise UsageError(f"LoRA trainable_token_indices has {what}")
    return tuple(sorted(values))


def _check_rank(name: str, rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
        raise UsageError(f"LoRA {name} is {rank!r}; expected a whole number of at least 1")


def _check_alpha(name: str, alpha: Any) -> None:
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha <= 0:
        raise UsageError(
            f"LoRA {name} is {alpha!r}; expected a positive number (0 would switch the adapter off in silence)"
        )


def _lookup(pattern: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    for key, value in pattern.items():
        if any(matches(key, name) for name in names):
            return value
    return default
