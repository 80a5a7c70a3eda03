"""Put adapters into a model and freeze its base, before DDP and the optimizer allocate anything for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.layers import (
    AdapterSpec,
    LoRALinear,
    adapt,
    adapted_class,
    check_gradients,
    linears_of_experts,
    spec_for,
    weight_shards,
)
from slime_plugins.lora.names import in_experts, is_known
from slime_plugins.lora.targets import Targets, check_all_matched, short_name

_LAYER = re.compile(r"^(?:module\.)*(decoder\.layers\.)(\d+)\.(.+)$")
_MTP = re.compile(r"^(?:module\.)*mtp\.")


@dataclass(frozen=True)
class AdaptedModule:
    """One line of the report."""

    name: str
    """Global Megatron name."""
    projections: tuple[str, ...]
    """Adapted Hugging Face leaves."""
    rank: int
    trainable: int
    """Adapter parameters over all tensor-parallel ranks, each replica counted once."""


@dataclass(frozen=True)
class LoRAReport:
    """What ``apply_lora`` did, over all tensor- and pipeline-parallel ranks; equal on every rank."""

    modules: tuple[AdaptedModule, ...]
    trainable_parameters: int
    total_parameters: int
    """Base and adapter parameters; tied embeddings and replicas counted once."""
    adapter_bytes: int
    not_adaptable: tuple[str, ...] = ()
    """Matrices of decoder layers for which there is no LoRA form, and why: layer numbers starred, each said once."""

    def __str__(self) -> str:
        groups: Counter = Counter()
        parameters: Counter = Counter()
        for module in self.modules:
            key = (short_name(module.name), ", ".join(module.projections), module.rank)
            groups[key] += 1
            parameters[key] += module.trainable
        header = ("module", "projections", "rank", "layers", "parameters")
        rows = [(leaf, hf, str(r), str(n), f"{parameters[leaf, hf, r]:,}") for (leaf, hf, r), n in groups.items()]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in (header, *rows)]
        share = 100 * self.trainable_parameters / self.total_parameters
        lines.append(
            f"trainable params: {self.trainable_parameters:,} || all params: {self.total_parameters:,} || "
            f"trainable%: {share:.4f} || adapter: {self.adapter_bytes / 2**20:.2f} MiB"
        )
        lines += [f"not adapted: {what}" for what in self.not_adaptable]
        return "LoRA\n" + "\n".join("  " + line.rstrip() for line in lines)


def apply_lora(model, config: LoRAConfig, *, freeze_base: bool = True) -> LoRAReport:
    """Adapt every target linear in place and freeze the rest. Call before DDP and the optimizer see the model.

    Base parameters keep their names; names that contain ``lora_`` are new. B is zero: outputs do not change. With
    activation recompute configured, the decoder's input is made to require a gradient, without which a frozen
    embedding leaves recomputed layers without any (design hazard 5).

    Args:
        model: a Megatron module, or the list of this rank's pipeline chunks.
        freeze_base: False trains the base too (``--no-lora-only-trainable``).
    Collectives:
        two all_gather_object over the pipeline group.
    Raises:
        UsageError: a target that matches nothing on any stage, a rank above a matrix's size, a layout that this
            parallelism cannot hold. Nothing has been changed then.
        ValueError: a linear of a class that has no LoRA form, a model that is wrapped or adapted already.
    """
    chunks = list(model) if isinstance(model, (list, tuple)) else [model]
    surveys = [_survey(chunk) for chunk in chunks]
    candidates = [item for survey in surveys for item in survey.candidates]
    plan, problem, matched = [], None, set()
    try:
        plan, matched = _plan(candidates, config)
    except ValueError as error:  # every stage must raise, or the others would wait for this one
        problem = error
    rest = [what for survey in surveys for what in survey.rest]
    stages = _all_gather((sorted(matched), [name for name, _ in candidates], problem, rest), pipeline_group())
    for _, _, stage_problem, _ in stages:
        if stage_problem is not None:
            raise stage_problem
    check_all_matched(
        Targets(config.target_modules, config.exclude_modules),
        {entry for entries, _, _, _ in stages for entry in entries},
        [name for _, names, _, _ in stages for name in names],
    )
    if freeze_base:
        for chunk in chunks:
            chunk.requires_grad_(False)
    for linear, lora_class, spec in plan:
        adapt(linear, lora_class, spec, getattr(torch, config.dtype) if config.dtype else None)
    for chunk in chunks:
        chunk.lora_config = config
        _let_recompute_see_gradients(chunk)
    return _report(
        chunks, [linear for linear, _, _ in plan], tuple(dict.fromkeys(what for s in stages for what in s[3]))
    )


@dataclass(frozen=True)
class _Survey:
    """The matrices of one chunk's layers."""

    candidates: list[tuple[str, torch.nn.Module]]
    """Global name and module of every linear that the name table knows."""
    rest: list[str]
    """As ``LoRAReport.not_adaptable``."""


def _survey(chunk: torch.nn.Module) -> _Survey:
    if hasattr(chunk, "ddp_config"):
        raise ValueError("apply_lora was given a model that DDP has wrapped already; apply it in the model provider")
    found = _Survey([], [])
    modules = dict(chunk.named_modules())
    for name, module in modules.items():
        if isinstance(module, LoRALinear):
            raise ValueError(f"{name} carries an adapter already; apply_lora once per model")
        match = _LAYER.match(name)
        if match:
            layer = modules[name[: match.end(2)]]
            found_here = _linears_at(match[3], module)
            found.candidates.extend(
                (f"{match[1]}{layer.layer_number - 1}.{path}", linear)  # layer_number: global, from 1
                for path, linear in found_here.items()
            )
            if found_here or not _has_matrix(module) or _is_one_of_experts(match[3], modules[name[: match.end(2)]]):
                continue
            found.rest.append(f"decoder.layers.*.{_starred(match[3])} ({type(module).__name__}) has no LoRA form")
        elif _MTP.match(name) and _has_matrix(module):
            found.rest.append("mtp.*, multi-token prediction is never adapted")
    return found


def _linears_at(path: str, module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Path in the layer -> linear, of those that the name table knows. A SequentialMLP is two linears of experts."""
    found = {f"{path}.{leaf}": linear for leaf, linear in linears_of_experts(module).items()}
    return {known: linear for known, linear in {path: module, **found}.items() if is_known(known)}


def _has_matrix(module: torch.nn.Module) -> bool:
    return any(p.dim() > 1 and "weight" in name for name, p in module.named_parameters(recurse=False))


def _is_one_of_experts(path: str, layer: torch.nn.Module) -> bool:
    """Is this a linear inside a SequentialMLP that is adapted as a whole?"""
    head, mark, _ = path.partition(".local_experts.")
    return bool(mark) and bool(linears_of_experts(layer.get_submodule(head)))


def _starred(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _plan(candidates, config: LoRAConfig) -> tuple[list[tuple[torch.nn.Module, type, AdapterSpec]], set[str]]:
    targets = Targets(config.target_modules, config.exclude_modules)
    plan = []
    for name, linear in candidates:
        parts, found = targets.parts_of(name), adapted_class(linear)
        if found is not None:
            check_gradients(linear, name, found[1])
        if not parts:
            continue
        if found is None:
            raise ValueError(f"{name} is a {type(linear).__name__}, for which there is no LoRA form; exclude it")
        lora_class, parallel = found
        plan.append((linear, lora_class, spec_for(linear, name, parallel, parts, config)))
    return plan, targets.matched


def _let_recompute_see_gradients(chunk: torch.nn.Module) -> None:
    """Make inputs of recomputing blocks require a gradient: a checkpoint of inputs that need none has none to give.

    By attribute, not by class or name: whatever block can checkpoint its layers is hooked.
    """
    for module in chunk.modules():
        config = getattr(module, "config", None)
        if getattr(config, "recompute_granularity", None) and hasattr(module, "_checkpointed_forward"):
            module.register_forward_pre_hook(_require_input_grad, with_kwargs=True)


def _require_input_grad(module, args, kwargs):
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if torch.is_grad_enabled() and isinstance(hidden_states, torch.Tensor) and hidden_states.is_leaf:
        hidden_states.requires_grad_(True)


def pipeline_group():
    """The pipeline group if there is more than one stage, else None."""
    return _if_several(parallel_state.get_pipeline_model_parallel_group) if _model_parallel() else None


def expert_group():
    """The expert-parallel group if experts are spread over ranks, else None."""
    return _if_several(parallel_state.get_expert_model_parallel_group) if _model_parallel() else None


def _if_several(get_group):
    group = get_group()
    return group if group.size() > 1 else None


def _all_gather(value, group) -> list:
    if group is None:
        return [value]
    gathered = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _base_numel(chunk: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, int]]:
    """Base parameters of a chunk and their sizes over all tensor- and expert-parallel ranks."""
    tp_size, etp_size, ep_size = (
        (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
        )
        if _model_parallel()
        else (1, 1, 1)
    )
    for path, module in chunk.named_modules():
        of_experts = in_experts(path)
        shards = weight_shards(module, etp_size if of_experts else tp_size)
        for name, parameter in module.named_parameters(recurse=False):
            # The last stage's copy of tied embeddings is the first stage's parameter.
            copied = getattr(parameter, "shared_embedding", False) and not _owns_embedding(chunk)
            if not copied and not name.startswith("lora_"):
                sharded = name.startswith("weight") or getattr(parameter, "tensor_model_parallel", False)
                yield parameter, parameter.numel() * (shards if sharded else 1) * (ep_size if of_experts else 1)


def _report(
    chunks: Sequence[torch.nn.Module], linears: Sequence[LoRALinear], not_adaptable: tuple[str, ...]
) -> LoRAReport:
    modules, adapter_bytes = [], 0
    for linear in linears:
        projections, numel = tuple(part.name for part in linear.lora.parts), linear.lora_full_numel()
        adapter_bytes += numel * linear.lora_A.element_size()
        modules.append(AdaptedModule(linear.lora.name, projections, linear.lora.rank, numel))
    trainable = sum(module.trainable for module in modules)
    total = trainable
    for chunk in chunks:
        for parameter, numel in _base_numel(chunk):
            total += numel
            trainable += numel if parameter.requires_grad else 0
    stages = _all_gather((modules, trainable, total, adapter_bytes), pipeline_group())
    ordered = sorted((m for stage in stages for m in stage[0]), key=lambda m: _layer_order(m.name))
    sums = (sum(stage[i] for stage in stages) for i in (1, 2, 3))
    return LoRAReport(tuple(ordered), *sums, not_adaptable)


def _model_parallel() -> bool:
    return dist.is_initialized() and parallel_state.model_parallel_is_initialized()


def _owns_embedding(chunk: torch.nn.Module) -> bool:
    """Is this the pipeline chunk that owns the embedding?"""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return getattr(chunk, "pre_process", True)


def _layer_order(name: str) -> tuple:
    return tuple(int(piece) if piece.isdigit() else piece for piece in name.split("."))
