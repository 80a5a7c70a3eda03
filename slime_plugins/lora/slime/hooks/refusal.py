"""What a launch is, and what one combination that cannot work is. No torch. The tables: ``refusals``."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.version import Version

from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.names import LINEARS, Linear, hf_names, in_linear_attention
from slime_plugins.lora.slime.hooks.paths import resumed_step
from slime_plugins.lora.targets import Targets

ROUTER = "mlp.router"


@dataclass(frozen=True)
class Launch:
    """What a launch is: slime's arguments, the SGLang that is installed here, the base's ``config.json``."""

    args: Namespace
    sglang: Version | None = field(default_factory=lambda: installed_sglang())

    def given(self, name: str) -> Any:
        """An argument of slime's; None where this slime has none of that name."""
        return getattr(self.args, name, None)

    @property
    def adapter_sync(self) -> bool:
        """Is the adapter alone sent to engines that run?"""
        return self.given("lora_sync") == "adapter" and not self.given("debug_train_only")

    @property
    def resumes(self) -> bool:
        """Does it go on from a checkpoint of adapters?"""
        return resumed_step(self.args) is not None

    @cached_property
    def base(self) -> dict[str, Any]:
        """The base's Hugging Face config, the text model's where it has several; empty where there is none to read."""
        return _base_config(self.args)

    @cached_property
    def models(self) -> list[dict[str, Any]]:
        """What ``--sglang-config`` lists; empty without one.

        Raises:
            ValueError: it cannot be read here.
        """
        file = self.given("sglang_config")
        if not file:
            return []
        try:
            yaml = importlib.import_module("yaml")  # slime's own; not everyone who asks ``doctor`` has it
            models = yaml.safe_load(Path(file).read_text())["sglang"]
        except Exception as error:  # YAML has errors of its own, in a module that may not be there
            raise ValueError(
                f"--sglang-config {file} cannot be read here ({type(error).__name__}: {error})"
            ) from error
        return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []

    @cached_property
    def adapted(self) -> dict[str, set[str]]:
        """Path in a layer -> Hugging Face leaves that get adapters, the smallest set of any layer that gets some."""
        found: dict[str, set[str]] = {}
        for _, path, leaves in adapted_linears(self.args):
            found[path] = found[path] & leaves if path in found else leaves
        return found

    @property
    def moe(self) -> bool:
        """Are routed experts adapted?"""
        return any(path.startswith("mlp.experts.") for path in self.adapted)

    @property
    def shared(self) -> bool:
        """Are shared experts adapted?"""
        return any(path.startswith("mlp.shared_experts.") for path in self.adapted)


def installed_sglang() -> Version | None:
    """The version that is installed on this machine; engines elsewhere are taken to have the same."""
    try:
        return Version(version("sglang"))
    except PackageNotFoundError:
        return None


def _base_config(args: Namespace) -> dict[str, Any]:
    file = Path(getattr(args, "hf_checkpoint", None) or "") / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return config | (config.get("text_config") or {})


def linear_layers(config: dict[str, Any], layers: int) -> list[bool]:
    """Of every layer: has it linear attention? As slime finds it, from ``layer_types`` or the interval."""
    kinds = config.get("layer_types")
    if kinds:
        return [kind == "linear_attention" for kind in kinds[:layers]] + [False] * (layers - len(kinds))
    interval = config.get("full_attention_interval") or (4 if config.get("linear_num_key_heads") else 1)
    return [(layer + 1) % interval != 0 for layer in range(layers)]


def adapted_linears(args: Namespace) -> Iterator[tuple[int, str, set[str]]]:
    """(layer, path in the layer, Hugging Face leaves) of every linear of this model that gets an adapter."""
    config = LoRAConfig.from_args(args)
    targets = Targets(config.target_modules, config.exclude_modules)
    base = _base_config(args)
    linear_attention = linear_layers(base, args.num_layers)
    for path, linear in LINEARS.items():
        if not _in_model(linear, args):
            continue
        for layer in range(args.num_layers):
            if path.startswith("self_attention.") and not _in_layer(path, linear_attention[layer], base):
                continue
            name = f"decoder.layers.{layer}.{path}"
            leaves = {hf_names(name)[part].rsplit(".", 1)[-1] for part in targets.parts_of(name)}
            if leaves:
                yield layer, path, leaves


def _in_model(linear: Linear, args: Namespace) -> bool:
    """Can this model have such a linear? Dense layers of a model with experts cannot be told from its flags."""
    path, mla = linear.path, bool(getattr(args, "multi_latent_attention", False))
    if linear.mla is not None and linear.mla is not mla:
        return False
    if linear.mla:
        has_q_rank = bool(getattr(args, "q_lora_rank", None))
        direct = path.endswith("linear_q_proj")
        low_rank = path.endswith(("linear_q_down_proj", "linear_q_up_proj"))
        return not (direct and has_q_rank) and not (low_rank and not has_q_rank)
    if linear.is_expert or path == ROUTER:
        return bool(getattr(args, "num_experts", None))
    if path.startswith("mlp.shared_experts."):
        return bool(getattr(args, "moe_shared_expert_intermediate_size", None))
    return True


def _in_layer(path: str, linear_attention: bool, base: dict[str, Any]) -> bool:
    """Is this linear of attention one of a layer's?"""
    if not in_linear_attention(path):
        return not linear_attention
    next_leaves, leaf = {"in_proj_qkvz", "in_proj_ba", "out_proj"}, path.rsplit(".", 1)[1]
    is_next = base.get("model_type") == "qwen3_next"
    return linear_attention and (leaf == "out_proj" or (leaf in next_leaves) is is_next)


@dataclass(frozen=True)
class Refusal:
    """One combination that cannot work."""

    name: str
    when: Callable[[Launch], Any]
    reason: str
    """One line: what, why, the way out."""
