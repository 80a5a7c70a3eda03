"""DeepSpeed ZeRO checkpoints written by hand, in the file layout of DeepSpeed 0.19.8, without DeepSpeed.

``tests/zero/test_convert_zero.py`` holds the same reader against files that DeepSpeed itself wrote.
"""

import enum
import json
import math
import sys
import types
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch

PREFIX = "base_model.model."
TAG = "global_step7"


def trained(rank=5, leaves=("self_attn.q_proj", "mlp.up_proj"), layers=2, prefix=PREFIX, seed=0):
    """DeepSpeed names -> fp32 masters of an adapter; odd sizes, so that 2 and 3 ranks need padding."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for i, leaf in enumerate(leaves):
            name = f"{prefix}model.layers.{layer}.{leaf}"
            tensors[f"{name}.lora_A.default.weight"] = torch.randn(rank, 7 + i, generator=generator)
            tensors[f"{name}.lora_B.default.weight"] = torch.randn(11 + i, rank, generator=generator)
    return tensors


def frozen(leaves=("self_attn.q_proj", "mlp.up_proj", "mlp.gate_proj"), layers=2, prefix=PREFIX, adapted=2):
    """The base's weights; the first ``adapted`` leaves carry adapters."""
    names = [
        f"{prefix}model.layers.{layer}.{leaf}{'.base_layer' if i < adapted else ''}.weight"
        for layer in range(layers)
        for i, leaf in enumerate(leaves)
    ]
    return {name: torch.randn(13, 7) for name in [*names, f"{prefix}model.embed_tokens.weight"]}


@dataclass
class Zero:
    """What a run saves. ``groups`` are the optimizer's parameter groups."""

    groups: list[dict[str, torch.Tensor]]
    stage: int = 3
    ranks: int = 2
    dtype: torch.dtype = torch.bfloat16
    frozen: dict[str, torch.Tensor] | None = field(default_factory=frozen)
    step: int = 7
    lr: float = 1e-3
    sub_group: int = 0
    """Stage 3: greatest number of values in a flat tensor; 0 for one per group."""
    paddings: list[list[int]] | None = None
    """Stages 1, 2: ``param_alignment_paddings``, values after each parameter."""

    def write(self, directory: Path, config: dict | None = None) -> Path:
        """The checkpoint directory, with ``latest`` and, if given, ``adapter_config.json``."""
        tag = directory / TAG
        tag.mkdir(parents=True)
        (directory / "latest").write_text(TAG)
        if config is not None:
            (directory / "adapter_config.json").write_text(json.dumps(config))
        for rank in range(self.ranks):
            model = f"zero_pp_rank_{rank}_mp_rank_00" if self.stage == 3 else "mp_rank_00"
            if self.stage == 3 or rank == 0:
                torch.save(self._model(rank), tag / f"{model}_model_states.pt")
            bf16 = "bf16_" if self.dtype == torch.bfloat16 else ""
            if self.stage:
                name = f"{bf16}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
                with _deepspeed_names() as (stage_enum, scaler):
                    torch.save(self._optim(rank, stage_enum, scaler), tag / name)
        return directory

    def _model(self, rank: int) -> dict:
        everything = {name: value for group in self.groups for name, value in group.items()}
        kept = self.frozen or {}
        module = {name: value.to(self.dtype) for name, value in {**kept, **everything}.items()}
        fragments = {name: value.to(self.dtype) for name, value in kept.items()}
        if self.stage == 3:
            module = dict.fromkeys(module, torch.empty(0, dtype=self.dtype))
            fragments = {name: _piece(value.reshape(-1), rank, self.ranks) for name, value in fragments.items()}
        return {
            "module": OrderedDict(module),
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [
                OrderedDict((name, value.shape) for name, value in group.items()) for group in self.groups
            ],
            "frozen_param_shapes": OrderedDict((name, value.shape) for name, value in kept.items()) or None,
            "frozen_param_fragments": fragments or None,
            "shared_params": {},
            "global_steps": self.step,
            "skipped_steps": 0,
            "dp_world_size": self.ranks,
            "mp_world_size": 1,
            "ds_config": self._ds_config(),
            "ds_version": "0.19.8",
        }

    def _ds_config(self) -> dict:
        return {"zero_optimization": {"stage": self.stage}, "optimizer": {"lr": self.lr}}

    def _optim(self, rank: int, stage_enum: type, scaler: type) -> dict:
        flat = self._stage3(rank) if self.stage == 3 else self._stage2(rank)
        adam = {
            "state": {i: {"step": torch.tensor(float(self.step)), "exp_avg": t * 0.1} for i, t in enumerate(flat)},
            "param_groups": [{"lr": self.lr, "params": [i]} for i in range(len(flat))],
        }
        common = {"zero_stage": stage_enum(self.stage), "loss_scaler": scaler()}
        if self.stage == 3:
            state = {"fp32_flat_groups": flat, "optimizer_state_dict": adam, "partition_count": self.ranks}
        else:
            state = {
                "single_partition_of_fp32_groups": flat,
                "base_optimizer_state": adam,
                "partition_count": [self.ranks] * len(flat),
            }
            if self.paddings:
                state["param_alignment_paddings"] = self.paddings
        return {
            "optimizer_state_dict": {**common, **state},
            "ds_config": self._ds_config(),
            "ds_version": "0.19.8",
        }

    def _stage2(self, rank: int) -> list[torch.Tensor]:
        flats = []
        for index, group in enumerate(self.groups):
            after = self.paddings[index] if self.paddings else [0] * len(group)
            pieces = [torch.cat([v.reshape(-1), torch.zeros(n)]) for v, n in zip(group.values(), after)]
            flat = torch.cat(pieces)
            padding = -flat.numel() % (2 * self.ranks)
            flats.append(torch.cat([flat, torch.zeros(padding)]).chunk(self.ranks)[rank].clone())
        return flats

    def _stage3(self, rank: int) -> list[torch.Tensor]:
        flats = []
        for group in self.groups:
            flat = torch.cat([_piece(value.reshape(-1), rank, self.ranks) for value in group.values()])
            flats += [part.clone() for part in flat.split(self.sub_group or flat.numel())]
        return flats


def _piece(flat: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    size = math.ceil(flat.numel() / ranks)
    return torch.cat([flat, torch.full((size * ranks - flat.numel(),), 99.0)])[rank * size : (rank + 1) * size].clone()


class _deepspeed_names:  # noqa: N801  reads as a function in a with statement
    """Classes that pickle as DeepSpeed's, whether or not DeepSpeed is installed."""

    def __enter__(self):
        modules = {name: types.ModuleType(name) for name in ("deepspeed", "deepspeed.zero_config", "deepspeed.scaler")}
        stage = enum.IntEnum("ZeroStageEnum", {f"stage_{i}": i for i in range(1, 4)})
        stage.__module__ = "deepspeed.zero_config"
        scaler = type("LossScaler", (), {"__module__": "deepspeed.scaler", "__init__": _scaler_init})
        modules["deepspeed.zero_config"].ZeroStageEnum = stage
        modules["deepspeed.scaler"].LossScaler = scaler
        self.before = {name: sys.modules.get(name) for name in modules}
        sys.modules.update(modules)
        return stage, scaler

    def __exit__(self, *_):
        for name, module in self.before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _scaler_init(self):
    self.cur_scale = 1.0
