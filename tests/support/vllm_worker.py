"""vLLM's LoRA serving out of its wheel, on CPU tensors: reading an adapter, mapping its names, packing and handing its
weights to the modules are its own code. Ours: modules that keep what they are handed and compute nothing, under the
names under which vLLM's own maps put the base's files.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from wheels import Wheel, cache

from slime_plugins.lora.base.checkpoint import BaseCheckpoint

VERSION = "0.33.0"
_REAL = tuple(f"vllm.lora.{name}" for name in ("lora_model", "lora_weights", "peft_helper"))
_MODELS = "vllm.model_executor.models"
_OF_LORA = {
    "packed_modules_mapping", "hf_to_vllm_mapper", "is_3d_moe_weight", "is_non_gated_moe", "lora_skip_prefixes",
    "supports_multimodal", "supports_tower_connector_lora", "get_mm_mapping",
}  # fmt: skip
"""What vLLM's LoRA code reads of a model's class."""
_LANGUAGE = {
    "Qwen2VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3MoeForCausalLM",
}
"""Classes that take their packed modules from that of their language model."""
_METHODS = (
    "_create_lora_modules", "register_module", "_register_packed_modules", "_get_punica_wrapper", "_add_adapter",
    "_create_merged_loras_inplace", "_restrict_to_local_experts", "_stack_moe_lora_weights", "_slice_moe_lora_ep",
    "_get_lora_layer_weights", "_get_text_lora_name", "_get_text_lora_names", "_pop_lora_weights",
    "_validate_moe_lora_format", "_validate_classification_head_lora", "activate_adapter",
)  # fmt: skip


class LinearBase(torch.nn.Module):
    """A linear of the base."""


class MoERunner(torch.nn.Module):
    """The routed experts of a layer."""

    num_experts = 0


class BaseLayerWithLoRA(torch.nn.Module):
    """What has taken a module's place, and keeps what it is handed."""

    handed: tuple[Any, Any] | None = None

    def set_mapping(self, wrapper: Any) -> None:
        """Of requests to adapters."""

    def reset_lora(self, index: int) -> None:
        self.handed = None

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        self.handed = lora_a, lora_b


class FusedMoEWithLoRA(BaseLayerWithLoRA):
    use_ep = False


class FusedMoE3DWithLoRA(FusedMoEWithLoRA):
    ep_rank = 0

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.global_num_experts, self.w13_lora_a_stacked = experts, [torch.zeros(1, experts)]


class _Log:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


@functools.cache
def wheel() -> Wheel:
    """Skips the test where there is none: 336 MB that ``make contracts`` fetches only when it is asked to."""
    root = cache() / f"vllm-{VERSION}"
    if not root.is_dir():
        pytest.skip(f"needs vLLM {VERSION} in {cache()}: make contracts FETCH_ARGS=--vllm")
    found = Wheel(root, "vllm", _REAL)
    found.give("vllm.logger", init_logger=lambda name: _Log())
    found.give("vllm.utils.torch_utils", PIN_MEMORY=False)
    found.give("vllm.model_executor.models.utils", **vars(_mapper(found)))
    names = (
        "_GLOBAL_LORA_ID", "get_lora_id", "parse_fine_tuned_lora_name", "is_base_embedding_weights",
        "get_supported_lora_modules", "is_supported_lora_module", "is_in_target_modules",
        "get_adapter_absolute_path", "is_moe_model", "process_packed_modules_mapping", "replace_submodule",
    )  # fmt: skip
    packed = found.take("vllm.model_executor.utils", "get_packed_modules_mapping", copy=copy)
    given = dict(
        LinearBase=LinearBase, MoERunner=MoERunner, VocabParallelEmbedding=type("VocabParallelEmbedding", (), {}),
        BaseLayerWithLoRA=BaseLayerWithLoRA, maybe_get_oot_by_class=lambda cls: cls, logger=_Log(),
        get_moe_expert_mapping=_expert_mapping, **vars(packed),
    )  # fmt: skip
    found.give("vllm.lora.utils", **vars(found.take("vllm.lora.utils", *names, **given)))
    return found


def _mapper(found: Wheel) -> types.SimpleNamespace:
    given = dict(dataclass=dataclasses.dataclass, field=dataclasses.field, replace=dataclasses.replace, logger=_Log())
    return found.take("vllm.model_executor.models.utils", "WeightsMapper", **given)


def _expert_mapping(model: torch.nn.Module) -> list[tuple[str, str, int, str]]:
    """vLLM's own order of the experts' projections."""
    experts = next(module for module in model.modules() if isinstance(module, MoERunner)).num_experts
    balancer = types.SimpleNamespace(build_initial_global_physical_to_logical_map=lambda count, more: range(count))
    module = "vllm.model_executor.layers.fused_moe.routed_experts"
    build = wheel().take(module, "RoutedExperts.build_expert_params_mapping", EplbState=balancer)
    return build.build_expert_params_mapping("gate_proj", "down_proj", "up_proj", experts, routed_experts_prefix="")


@functools.cache
def model_class(architecture: str) -> type:
    """A model's class with what LoRA reads of it and nothing else."""
    tree = ast.parse(wheel().path(f"{_MODELS}.registry").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and key.value == architecture and isinstance(value, ast.Tuple):
                    module, name = ast.literal_eval(value)
                    return _skeleton(f"{_MODELS}.{module}", name)
    raise AssertionError(f"vLLM {VERSION} has no {architecture}")


@functools.cache
def _skeleton(module: str, name: str) -> Any:
    tree = ast.parse(wheel().path(module).read_text())
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None:
        return None
    known = lambda other: _resolve(tree, module, other)  # noqa: E731
    body, names = [], set()
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            statement = ast.copy_location(ast.Assign([statement.target], statement.value), statement)
        targets = [t.id for t in getattr(statement, "targets", []) if isinstance(t, ast.Name)]
        if _OF_LORA & {*targets, getattr(statement, "name", "")}:
            if isinstance(statement, ast.FunctionDef):
                statement.returns = None
            body.append(statement)
            names |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
    namespace = {other: known(other) for other in names if known(other) is not None}
    own: dict[str, Any] = {}
    code = ast.fix_missing_locations(ast.Module(body=body, type_ignores=[]))
    exec(compile(code, str(wheel().path(module)), "exec"), namespace, own)
    bases = [known(base.id) for base in node.bases if isinstance(base, ast.Name)]
    own |= {"init": staticmethod(_packing(node))}
    return type(name, tuple(base for base in bases if isinstance(base, type)), own)


def _resolve(tree: ast.Module, module: str, name: str) -> Any:
    """A class of vLLM's models, or what its maps are made of."""
    if name == "WeightsMapper":
        return wheel()._modules["vllm.model_executor.models.utils"].WeightsMapper
    if name == "MultiModelKeys":
        return wheel().module(f"{_MODELS}.module_mapping").MultiModelKeys
    if any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body):
        return _skeleton(module, name)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            source = f"{_MODELS}.{node.module}" if node.level == 1 else node.module or ""
            return _skeleton(source, name) if source.startswith(_MODELS) and wheel().path(source).is_file() else None
    return None


def _packing(node: ast.ClassDef) -> Any:
    """What a class's ``__init__`` adds to its packed modules, and the lines that this depends on."""
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    kept: list[ast.stmt] = []
    needed: set[str] = set()
    for statement in reversed(init.body if init else []):
        text = ast.unparse(statement)
        targets = {ast.unparse(t) for t in getattr(statement, "targets", [getattr(statement, "target", None)]) if t}
        if ("packed_modules_mapping" in text and "language_model" not in text) or targets & needed:
            kept.insert(0, statement)
            needed |= {ast.unparse(n) for n in ast.walk(statement) if isinstance(n, (ast.Name, ast.Attribute))}
    code = compile(ast.Module(body=kept, type_ignores=[]), node.name, "exec")

    def run(model: Any, config: Any) -> None:
        given = types.SimpleNamespace(hf_config=config, hf_text_config=config)
        exec(code, {"self": model, "vllm_config": types.SimpleNamespace(model_config=given, quant_config=None)})

    return run


class Worker:
    """Serves one base; ``load`` an adapter, ``served`` says what reached which module."""

    def __init__(self, hf_dir: Path, max_rank: int) -> None:
        self.base = BaseCheckpoint(hf_dir)
        config = json.loads((Path(hf_dir) / "config.json").read_text())
        (architecture,) = config["architectures"]
        self.model = self._model(architecture, types.SimpleNamespace(**self.base.text_config))
        self.manager = self._manager()
        self.manager._create_lora_modules()
        self.settings = types.SimpleNamespace(max_lora_rank=max_rank, lora_dtype=torch.float32)

    def _model(self, architecture: str, config: Any) -> Any:
        cls = model_class(architecture)
        model = type(architecture, (torch.nn.Module, cls), {})()
        model.config = config
        packed = copy.deepcopy(getattr(model, "packed_modules_mapping", {}))
        if architecture in _LANGUAGE:
            packed |= model_class(_LANGUAGE[architecture]).packed_modules_mapping
        model.packed_modules_mapping = packed
        for one in reversed(cls.__mro__[:-1]):
            one.__dict__.get("init", lambda *args: None)(model, config)
        for stored in self.base.linears:
            name = self.place(model, stored)
            if name is not None and not name.endswith(("lm_head", "embed_tokens")):
                _put(model, name, MoERunner if name.endswith(".experts") else LinearBase)
        for module in model.modules():
            if isinstance(module, MoERunner):
                module.num_experts = len({m[1] for n in self.base.linears if (m := re.search(r"experts\.(\d+)\.", n))})
        return model

    @staticmethod
    def place(model: Any, stored: str) -> str | None:
        """vLLM's module of a linear in the base's files, by its own maps; None for what it does not load."""
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        if mapper is not None:
            stored = dataclasses.replace(mapper, orig_to_new_stacked={})._map_name(f"{stored}.weight")
            if stored is None:
                return None
            stored = stored.removesuffix(".weight")
        if (at := stored.find(".experts.")) >= 0:
            return stored[:at] + ".experts"
        parent, _, leaf = stored.rpartition(".")
        packed = next((one for one, leaves in model.packed_modules_mapping.items() if leaf in leaves), leaf)
        return f"{parent}.{packed}"

    def _manager(self) -> Any:
        utils = wheel()._modules["vllm.lora.utils"]
        functions = {name: getattr(utils, name) for name in vars(utils) if not name.startswith("_")}
        given = functions | dict(
            from_layer=_wrapped, logger=_Log(), torch=torch, FusedMoEWithLoRA=FusedMoEWithLoRA,
            FusedMoE3DWithLoRA=FusedMoE3DWithLoRA, BaseLayerWithLoRA=BaseLayerWithLoRA, MoERunner=MoERunner,
            BaseClassificationHeadWithLoRA=_Nothing, ClassificationHeadWithLoRA=_Nothing, PPMissingLayer=_Nothing,
            PackedLoRALayerWeights=wheel().module("vllm.lora.lora_weights").PackedLoRALayerWeights,
            DEFAULT_LANGUAGE_WRAPPER_KEY="language_model", PIN_MEMORY=False,
        )  # fmt: skip
        methods = wheel().take("vllm.lora.model_manager", *(f"LoRAModelManager.{name}" for name in _METHODS), **given)
        manager = type("LoRAModelManager", (), vars(methods))()
        model, experts = self.model, utils.is_moe_model(self.model)
        manager.model, manager.modules, manager.packed_modules = model, {}, {}
        manager.supported_lora_modules = utils.get_supported_lora_modules(model)
        manager.packed_modules_mapping = utils.process_packed_modules_mapping(model)
        manager.lora_config = types.SimpleNamespace(target_modules=None)  # whatever is supported
        manager.supports_mm = bool(getattr(model, "supports_multimodal", False)) and hasattr(model, "get_mm_mapping")
        manager.mm_mapping = model.get_mm_mapping() if manager.supports_mm else None
        language = manager.mm_mapping.language_model[0] if manager.supports_mm else "language_model"
        manager.punica_wrapper_mapping = {language: object()}
        manager.is_pooling_model, manager.supported_modules_to_save, manager._classification_head = False, set(), None
        manager._is_moe, manager._is_non_gated_moe = experts, False
        manager._is_3d_moe_model = experts and model.is_3d_moe_weight
        manager._enable_mixed_moe_lora_format = manager._enable_moe_shared_loras = False
        manager.moe_ep_load_spec, manager.lora_slots, manager.lora_index_to_id = None, 1, [None]
        manager._registered_adapters, manager._active_adapters = {}, {}
        return manager

    def load(self, adapter: Path) -> None:
        """What a request with a new adapter does. Raises what vLLM raises."""
        lora_model = wheel().module("vllm.lora.lora_model").LoRAModel
        given = dict(
            PEFTHelper=wheel().module("vllm.lora.peft_helper").PEFTHelper,
            get_adapter_absolute_path=str,
            LoRAAdapterNotFoundError=FileNotFoundError,
        )
        worker = types.SimpleNamespace(
            _adapter_manager=self.manager, lora_config=self.settings, _lora_model_cls=lora_model,
            max_position_embeddings=None, vocab_size=0,
        )  # fmt: skip
        load = wheel().take("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", **given)._load_adapter
        request = types.SimpleNamespace(lora_path=adapter, lora_int_id=1, lora_name="a", is_3d_lora_weight=False)
        self.manager._add_adapter(load(worker, request))
        self.manager.activate_adapter(1)

    def served(self, stored: str) -> torch.Tensor | None:
        """The update of a linear in the base's files, scaling B A, as its module was handed it; None: nothing."""
        name = self.place(self.model, stored)
        module = self.manager.modules.get(name)
        if module is None or module.handed is None:
            return None
        A, B = module.handed
        leaf, at = stored.rpartition(".")[2], 0
        if isinstance(module, FusedMoEWithLoRA):
            expert = int(re.search(r"\.experts\.(\d+)\.", stored)[1])
            if isinstance(module, FusedMoE3DWithLoRA):
                both = B[leaf == "down_proj"][expert] @ A[leaf == "down_proj"][expert]
                return both if leaf == "down_proj" else both.chunk(2)[leaf == "up_proj"]
            at = ("gate_proj", "down_proj", "up_proj").index(leaf)
            return B[at][expert] @ A[at][expert]
        if isinstance(A, list):
            at = self.manager.packed_modules_mapping[name.rpartition(".")[2]].index(leaf)
            return None if A[at] is None else B[at] @ A[at]
        return B @ A


class _Nothing:
    """No module is one."""


def _wrapped(layer: Any, slots: int, config: Any, packed: list[str], model_config: Any) -> BaseLayerWithLoRA:
    if not isinstance(layer, MoERunner):
        return BaseLayerWithLoRA()
    return FusedMoE3DWithLoRA(layer.num_experts) if packed == ["w13"] else FusedMoEWithLoRA()


def _put(model: torch.nn.Module, path: str, cls: type) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in model._modules:
            model.add_module(part, torch.nn.Module())
        model = model._modules[part]
    if leaf not in model._modules:
        model.add_module(leaf, cls())
