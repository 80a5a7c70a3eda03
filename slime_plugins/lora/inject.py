"""Put adapters into a model and freeze its base, before DDP and the optimizer allocate anything for it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from slime_plugins.lora.adapters import remember
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.layers import (
    AdapterSpec,
    FrozenLinear,
    LoRALinear,
    TokenRows,
    adapt,
    check_gradients,
    frozen_of,
    kind_of,
    linears_of_experts,
    shards_of,
    spec_for,
)
from slime_plugins.lora.layers.gated_delta_net import INSTEAD, OF, is_gated_delta_net, refuse_linears
from slime_plugins.lora.layers.guards import guard_frozen
from slime_plugins.lora.layers.towers import Tower, refuse_targets, towers_of
from slime_plugins.lora.names import IN_LAYER, in_experts, in_layer_order, is_adapter, is_known
from slime_plugins.lora.parallel import all_gather_over, chunks_of, model_parallel, pipeline_group, unwrapped
from slime_plugins.lora.targets import Targets, check_all_matched, short_name
from slime_plugins.lora.tokens import NO_VOCABULARY, add_token_rows, check_ids, vocabulary_of

_MTP = re.compile(r"^(?:module\.|language_model\.)*mtp\.")


@dataclass(frozen=True)
class AdaptedModule:
    """One line of the report."""

    name: str
    """Global Megatron name."""
    projections: tuple[str, ...]
    """Adapted Hugging Face leaves."""
    rank: int | None
    """None of trained rows."""
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
    frozen: tuple[tuple[str, int], ...] = ()
    """What there is beside the language model (``model.visual``), and its parameters, which never train."""
    by_taps: tuple[tuple[str, int], ...] = ()
    """Why linears do not run as one autograd function with their adapters (``layers.choice``), and how many; "" of
    those that do."""

    def __str__(self) -> str:
        groups: Counter = Counter()
        parameters: Counter = Counter()
        for module in self.modules:
            key = (short_name(module.name), ", ".join(module.projections), module.rank)
            groups[key] += 1
            parameters[key] += module.trainable
        header = ("module", "projections", "rank", "layers", "parameters")
        rows = [
            (leaf, hf, "-" if r is None else str(r), str(n), f"{parameters[leaf, hf, r]:,}")
            for (leaf, hf, r), n in groups.items()
        ]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in (header, *rows)]
        share = 100 * self.trainable_parameters / self.total_parameters
        lines.append(
            f"trainable params: {self.trainable_parameters:,} || all params: {self.total_parameters:,} || "
            f"trainable%: {share:.4f} || adapter: {self.adapter_bytes / 2**20:.2f} MiB"
        )
        lines += [f"frozen: {name} ({parameters:,} parameters)" for name, parameters in self.frozen]
        lines += [f"not adapted: {what}" for what in self.not_adaptable]
        lines += [
            f"by taps around the base: {count} linears ({why})" if why else f"fused with the base: {count} linears"
            for why, count in self.by_taps
        ]
        return "LoRA\n" + "\n".join("  " + line.rstrip() for line in lines)


def apply_lora(model, config: LoRAConfig, *, freeze_base: bool = True, linears: str = "auto") -> LoRAReport:
    """Adapt every target linear in place and freeze the rest. Call before DDP and the optimizer see the model.

    Base parameters keep their names; names that contain ``lora_`` are new. B is zero: outputs do not change. With
    activation recompute configured, the decoder's input is made to require a gradient, without which a frozen
    embedding leaves recomputed layers without any (design hazard 5).

    Args:
        model: a Megatron module, or the list of this rank's pipeline chunks.
        freeze_base: False trains the base too (``--no-lora-only-trainable``).
        linears: ``auto`` runs a linear and its adapter as one autograd function where nothing forbids it, and by taps
            around the linear elsewhere; ``fused`` and ``taps`` ask for one of them (``layers.choice``).
    Collectives:
        two all_gather_object over the pipeline group.
    Raises:
        UsageError: a target that matches nothing on any stage, a rank above a matrix's size, a layout that this
            parallelism cannot hold. Nothing has been changed then. ``fused`` where something forbids it.
        ValueError: a linear of a class that has no LoRA form, a model that is wrapped or adapted already.
    """
    chunks = chunks_of(model)
    surveys = [_survey(chunk) for chunk in chunks]
    candidates = [item for survey in surveys for item in survey.candidates]
    plan: list[_Planned] = []
    problem, matched = None, set[str]()
    ids, vocabulary = config.trainable_token_indices, NO_VOCABULARY
    try:
        plan, matched = _plan(candidates, config)
        if ids:
            vocabulary = vocabulary_of(chunks)
            check_ids(ids, vocabulary, chunks)
    except ValueError as error:  # every stage must raise, or the others would wait for this one
        problem = error
    rest = [what for survey in surveys for what in survey.rest]
    here = [tower for survey in surveys for tower in survey.towers]
    unformed = [name for survey in surveys for name in survey.of_gated_delta_nets]
    found = (sorted(matched), [name for name, _ in candidates], problem, rest, unformed, here)
    stages = all_gather_over(pipeline_group(), found)
    for _, _, stage_problem, *_ in stages:
        if stage_problem is not None:
            raise stage_problem
    if ids and not any(all_gather_over(pipeline_group(), vocabulary.embedding is not None)):
        raise ValueError("trained token rows: this model has no embedding.word_embeddings on any stage")
    matched = {entry for entries, *_ in stages for entry in entries}
    towers = [tower for *_, stage_towers in stages for tower in stage_towers]
    refuse_targets((entry for entry in config.target_modules if entry not in matched), towers)
    targets = Targets(config.target_modules, config.exclude_modules)
    check_all_matched(
        targets,
        matched | refuse_linears(targets, matched, [name for *_, names, _ in stages for name in names]),
        [name for _, names, *_ in stages for name in names],
    )
    if freeze_base:
        for chunk in chunks:
            chunk.requires_grad_(False)
        guard_frozen(chunks)
    dtype = getattr(torch, config.dtype) if config.dtype else None
    adapted = [adapt(planned.linear, planned.form, planned.base, planned.spec, dtype, linears) for planned in plan]
    rows = add_token_rows(vocabulary, ids, dtype) if ids else []
    remember(chunks, config)
    for chunk in chunks:
        _let_recompute_see_gradients(chunk)
    not_adaptable = tuple(dict.fromkeys(what for *_, stage_rest, _, _ in stages for what in stage_rest))
    frozen = tuple((tower.name, tower.parameters) for tower in towers)
    report = dataclasses.replace(_report(chunks, adapted, rows), not_adaptable=not_adaptable, frozen=frozen)
    if linears == "fused":
        _refuse_taps(report)
    return report


def _refuse_taps(report: LoRAReport) -> None:
    """Once all stages know of all: a stage that raised alone would leave the others waiting."""
    cannot = [f"{count} linears cannot ({why})" for why, count in report.by_taps if why]
    if cannot:
        raise UsageError(f"--lora-linears fused: {', '.join(cannot)}; use --lora-linears auto")


@dataclass(frozen=True)
class _Survey:
    """The matrices of one chunk's layers."""

    candidates: list[tuple[str, torch.nn.Module]]
    """Global name and module of every linear that the name table knows."""
    rest: list[str]
    """As ``LoRAReport.not_adaptable``."""
    of_gated_delta_nets: list[str]
    """Global names of the linears of Megatron's own linear attention."""
    towers: list[Tower]
    """What the chunk has beside its language model."""


def _survey(chunk: torch.nn.Module) -> _Survey:
    if hasattr(chunk, "ddp_config"):
        raise ValueError("apply_lora was given a model that DDP has wrapped already; apply it in the model provider")
    found = _Survey([], [], [], towers_of(chunk))
    modules = dict(chunk.named_modules())
    for name, module in modules.items():
        if isinstance(module, LoRALinear):
            raise ValueError(f"{name} carries an adapter already; apply_lora once per model")
        match = IN_LAYER.match(name)
        if match and match[3]:
            layer = modules[name[: match.end(2)]]
            found_here = _linears_at(match[3], module)
            found.candidates.extend(
                (f"{match[1]}{layer.layer_number - 1}.{path}", linear)  # layer_number: global, from 1
                for path, linear in found_here.items()
            )
            if found_here or not _has_matrix(module) or _is_one_of_experts(match[3], modules[name[: match.end(2)]]):
                continue
            what = f"decoder.layers.*.{_starred(match[3])} ({type(module).__name__})"
            if is_gated_delta_net(modules[name.rpartition(".")[0]]):
                found.of_gated_delta_nets.append(f"{match[1]}{layer.layer_number - 1}.{match[3]}")
                found.rest.append(f"{what} of {OF} has no LoRA form; {INSTEAD}, has one")
                continue
            found.rest.append(f"{what} has no LoRA form")
        elif _MTP.match(name) and _has_matrix(module):
            found.rest.append("mtp.*, multi-token prediction is never adapted")
    return found


def _linears_at(path: str, module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Path in the layer -> linear, of those that the name table knows. A SequentialMLP is two linears of experts."""
    found = {f"{path}.{leaf}": linear for leaf, linear in linears_of_experts(module).items()}
    return {known: linear for known, linear in {path: module, **found}.items() if is_known(known)}


def _has_matrix(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.nn.Conv1d):  # of linear attention: a few weights per channel
        return False
    return any(p.dim() > 1 and "weight" in name for name, p in module.named_parameters(recurse=False))


def _is_one_of_experts(path: str, layer: torch.nn.Module) -> bool:
    """Is this a linear inside a SequentialMLP that is adapted as a whole?"""
    head, mark, _ = path.partition(".local_experts.")
    return bool(mark) and bool(linears_of_experts(layer.get_submodule(head)))


def _starred(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


@dataclass(frozen=True)
class _Planned:
    """One linear that is to be adapted."""

    linear: torch.nn.Module
    form: type[LoRALinear]
    base: FrozenLinear
    spec: AdapterSpec


def _plan(candidates: list[tuple[str, torch.nn.Module]], config: LoRAConfig) -> tuple[list[_Planned], set[str]]:
    targets = Targets(config.target_modules, config.exclude_modules)
    plan = []
    for name, linear in candidates:
        parts, kind, base = targets.parts_of(name), kind_of(linear), frozen_of(linear)
        if base is not None:
            check_gradients(base, name)
        if not parts:
            continue
        if kind is None or base is None:
            raise ValueError(f"{name} is a {type(linear).__name__}, for which there is no LoRA form; exclude it")
        plan.append(_Planned(linear, kind.form, base, spec_for(base, name, parts, config)))
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


def _base_numel(chunk: torch.nn.Module) -> Iterator[tuple[bool, int]]:
    """Of everything in the base of a chunk: does it train, and its size over all tensor- and expert-parallel ranks."""
    tp_size, etp_size, ep_size = (
        (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
        )
        if model_parallel()
        else (1, 1, 1)
    )
    for path, module in chunk.named_modules():
        copies = ep_size if in_experts(path) else 1
        base, shards = frozen_of(module), shards_of(module, etp_size if in_experts(path) else tp_size)
        counted = base.parameters if base is not None and base.owns_weights else []
        # The last stage's copy of tied embeddings is the first stage's parameter.
        if counted and not any(_is_copy(parameter, chunk) for parameter in counted):
            assert base is not None
            yield counted[0].requires_grad, base.count * math.prod(base.shape) * shards * copies
        for name, parameter in module.named_parameters(recurse=False):
            if is_adapter(name) or any(parameter is one for one in counted) or _is_copy(parameter, chunk):
                continue
            sharded = name.startswith("weight") or getattr(parameter, "tensor_model_parallel", False)
            yield parameter.requires_grad, parameter.numel() * (shards if sharded else 1) * copies


def _is_copy(parameter: torch.nn.Parameter, chunk: torch.nn.Module) -> bool:
    return getattr(parameter, "shared_embedding", False) and not getattr(unwrapped(chunk), "pre_process", True)


def _report(
    chunks: Sequence[torch.nn.Module], linears: Sequence[LoRALinear], token_rows: Sequence[TokenRows]
) -> LoRAReport:
    modules, adapter_bytes = [], sum(carrier.lora_bytes() for carrier in (*linears, *token_rows))
    for linear in linears:
        spec = linear.lora
        projections = tuple(part.name for part in spec.parts)
        modules.append(AdaptedModule(spec.name, projections, spec.rank, linear.lora_full_numel()))
    for carrier in token_rows:
        if carrier.lora_table and not carrier.lora_copy:
            rows = f"{len(carrier.lora_delta):,} rows"
            modules.append(AdaptedModule(carrier.lora_name, (rows,), None, carrier.lora_full_numel()))
    trainable = total = sum(module.trainable for module in modules)
    for chunk in chunks:
        for trains, numel in _base_numel(chunk):
            total += numel
            trainable += numel if trains else 0
    reasons = Counter(linear.lora_why_taps for linear in linears)
    stages = all_gather_over(pipeline_group(), (modules, trainable, total, adapter_bytes, reasons))
    by_taps: Counter[str] = sum((stage[4] for stage in stages), Counter())
    ordered = sorted((m for stage in stages for m in stage[0]), key=lambda m: in_layer_order(m.name))
    return LoRAReport(
        tuple(ordered),
        trainable_parameters=sum(stage[1] for stage in stages),
        total_parameters=sum(stage[2] for stage in stages),
        adapter_bytes=sum(stage[3] for stage in stages),
        by_taps=tuple(sorted(by_taps.items())),
    )
