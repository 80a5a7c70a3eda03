"""What can be wrong with an adapter, one line per fault. Used before one is written and when one is verified."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from slime_plugins.lora.peft.config import ADAPTER_NAME, is_target, key_of, module_rank, parse_key
from slime_plugins.lora.peft.patterns import pattern
from slime_plugins.lora.peft.rows import ALONE, EMBEDDING, ids_of, keys_by_leaf, row_key

ZERO3_HINT = (
    "this is what save_pretrained leaves under DeepSpeed ZeRO-3 when the shards are not gathered: the weights are "
    "still in the DeepSpeed checkpoint, run `slime-lora convert-zero CHECKPOINT_DIR --out DIR` on it"
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 2**31
"""No rank, alpha or layer number is larger."""

# Config fields with which lora_A and lora_B alone are not the whole change to the model.
UNSUPPORTED = {
    "use_dora": "DoRA scales every row of the weight too",
    "lora_bias": "lora_B has a bias too",
    "target_parameters": "parameters that are no linear are adapted too",
    "layer_replication": "layers of the base were replicated",
    "alora_invocation_tokens": "activated LoRA switches on in the middle of a sequence",
    "use_qalora": "QALoRA pools the inputs of lora_A",
    "use_bdlora": "block-diagonal LoRA is another product",
    "arrow_config": "Arrow chooses between adapters",
    "velora_config": "VeLoRA is another layer",
    "monteclora_config": "MonteCLoRA is another layer",
    "kasa_config": "KaSA scales the rank dimension too",
    "fan_in_fan_out": "weights are transposed (Conv1D)",
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One fault of an adapter."""

    kind: str
    """Stable word for programs: ``zero_size``, ``not_finite``, ``rank``, ``checksum``, ..."""
    message: str
    """One line for people; names the tensor where there is one."""
    tensor: str | None = None
    """Key in the file, if the fault is one tensor's."""

    def __str__(self) -> str:
        return self.message


def config_problems(config: Mapping[str, Any]) -> list[Problem]:
    """Faults of an ``adapter_config.json`` by itself; with any of these the tensors cannot be judged."""
    problems = []

    def wrong(field: str, expected: str) -> None:
        value = _brief(config[field]) if field in config else "missing"
        message = f"adapter_config.json: {field} is {value}, expected {expected}"
        problems.append(Problem(kind="config", message=message))

    try:
        ids_of(config)
    except ValueError as error:
        problems.append(Problem(kind="config", message=str(error)))
    if config.get("peft_type") == ALONE:
        return problems
    if config.get("peft_type") != "LORA":
        wrong("peft_type", "'LORA'")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _whole(rank) or rank < 1:
        wrong("r", "a whole number of at least 1")
    if not _number(alpha) or alpha <= 0:
        wrong("lora_alpha", "a number above 0")
    targets = config.get("target_modules")
    if not targets and not config.get("target_parameters"):
        wrong("target_modules", "the names of the adapted modules")
    for field in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern"):
        value = config.get(field)
        if isinstance(value, str) and (reason := _unfit(value)):
            wrong(field, f"a list of names or a regular expression: {reason}")
        elif value and not isinstance(value, str) and not _names(value):
            wrong(field, "a list of names or a regular expression")
    for name in _listed(config.get("layers_pattern")):
        if reason := _unfit(name):
            wrong("layers_pattern", f"regular expressions: {reason}")
    layers = config.get("layers_to_transform")
    if layers is not None and not (_whole(layers) or (isinstance(layers, list) and all(map(_whole, layers)))):
        wrong("layers_to_transform", "a layer's number, or a list of them")
    for field, valid in (("rank_pattern", _whole), ("alpha_pattern", _number)):
        patterns = config.get(field) or {}
        if not isinstance(patterns, Mapping) or not all(valid(value) and value > 0 for value in patterns.values()):
            wrong(field, "module names with a number above 0 each")
        elif reason := next(filter(None, map(_unfit, patterns)), None):
            wrong(field, f"regular expressions on module names: {reason}")
    if not isinstance(config.get("base_model_name_or_path"), (str, type(None))):
        wrong("base_model_name_or_path", "a name or a path")
    dropout = config.get("lora_dropout")
    if dropout is not None and not (_number(dropout) and 0 <= dropout < 1):
        wrong("lora_dropout", "a probability in [0, 1)")
    for field in ("use_rslora", *(flag for flag in UNSUPPORTED if flag.startswith("use_"))):
        if not isinstance(config.get(field), (bool, type(None))):
            wrong(field, "true or false")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        wrong("bias", "'none'")
    return problems


def tensor_problems(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[Problem]:
    """Faults of the tensors and of their agreement with a config that has none. Loads one tensor at a time.

    Every lora_A [rank, in] has its lora_B [out, rank] with the rank that the config gives the module and is one of
    its targets, all values are finite, all tensors have one dtype, there is nothing else.
    """
    if not tensors:
        return [Problem(kind="empty", message=f"the adapter holds no tensor at all: {ZERO3_HINT}")]
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    problems: list[Problem] = []
    rows: dict[str, int] = {}
    dtypes: dict[torch.dtype, list[str]] = {}
    for key in tensors:
        parsed, of_rows = parse_key(key), row_key(key) is not None
        tensor = tensors[key]
        if parsed is None and not of_rows and not module_to_save(config, key):
            problems.append(_problem("unknown_key", key, "is not a lora_A or lora_B of a linear layer"))
            continue
        problems += value_problems(key, tensor, matrix=parsed is not None or of_rows)
        if of_rows:
            rows[key] = len(tensor) if tensor.ndim else 0
        if parsed in shapes:
            problems.append(_problem("unknown_key", key, "is there twice, with and without an adapter name"))
        if parsed is not None:
            shapes[parsed] = tuple(tensor.shape)
            dtypes.setdefault(tensor.dtype, []).append(key)
    problems = _hint_once(problems)
    named = [key for key in tensors if parse_key(key) and ADAPTER_NAME in key]
    if named:
        message = f"has an adapter's name in it, as {len(named)} keys have: vLLM refuses such a file"
        problems.append(_problem("key_name", named[0], f"{message}; drop '{ADAPTER_NAME}' from the keys"))
    problems += _row_problems(config, rows)
    problems += _pair_problems(config, shapes)
    problems += _target_problems(config, {module for module, _ in shapes})
    if len(dtypes) > 1:
        (common, _), *others = sorted(dtypes.items(), key=lambda item: -len(item[1]))
        for dtype, keys in others:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            message = f"is {_short(dtype)}{more} where the others are {_short(common)}"
            problems.append(_problem("dtype", keys[0], message))
    return problems


def value_problems(key: str, tensor: torch.Tensor, *, matrix: bool) -> list[Problem]:
    """Faults of one tensor that need no config: zero size, not floating point, not a matrix, not finite."""
    if tensor.numel() == 0:
        return [_problem("zero_size", key, f"has shape {list(tensor.shape)}, it holds nothing")]
    if tensor.dtype not in FLOATS:
        return [_problem("dtype", key, f"is {_short(tensor.dtype)}, expected float32, bfloat16 or float16")]
    if matrix and tensor.ndim != 2:
        return [_problem("shape", key, f"has shape {list(tensor.shape)}, expected a matrix")]
    # The sum is finite only if every term is; looking at each value costs a mask, so only do it to count them.
    if not math.isfinite(tensor.sum(dtype=torch.float64).item()):
        bad = int((~torch.isfinite(tensor)).sum())
        return [_problem("not_finite", key, f"has {bad} of {tensor.numel()} values that are not finite")]
    return []


def _hint_once(problems: list[Problem]) -> list[Problem]:
    """The way out goes with the first empty tensor: a model has hundreds."""
    for index, problem in enumerate(problems):
        if problem.kind == "zero_size":
            hinted = dataclasses.replace(problem, message=f"{problem.message}: {ZERO3_HINT}")
            return [*problems[:index], hinted, *problems[index + 1 :]]
    return problems


def _pair_problems(config: Mapping[str, Any], shapes: Mapping[tuple[str, str], tuple[int, ...]]) -> Iterable[Problem]:
    for (module, half), shape in shapes.items():
        key, other = key_of(module, half), "B" if half == "A" else "A"
        if (module, other) not in shapes:
            yield _problem("missing", key, f"has no lora_{other}: {key_of(module, other)} is missing")
        if len(shape) != 2 or 0 in shape:
            continue  # reported with the values
        rank, expected = shape[0] if half == "A" else shape[1], module_rank(config, module)
        if rank != expected:
            message = f"has shape {list(shape)}, rank {rank}, where adapter_config.json says rank {expected}"
            yield _problem("rank", key, message)


def _row_problems(config: Mapping[str, Any], rows: Mapping[str, int]) -> Iterable[Problem]:
    """Rows of the vocabulary that the config says are trained, and those that are there: key -> their number."""
    ids, found = ids_of(config), keys_by_leaf(rows)
    for leaf in ids.keys() - found.keys():
        message = f"adapter_config.json: rows of {leaf} are trained, and the adapter holds none"
        yield Problem(kind="missing", message=message)
    for leaf, key in found.items():
        wanted = ids.get(leaf) or (ids.get(EMBEDDING) if config.get("peft_type") == ALONE else None)
        if wanted is None:
            yield _problem("unknown_key", key, "holds rows that adapter_config.json does not name")
        elif rows[key] != len(wanted):
            yield _problem("shape", key, f"holds {rows[key]} rows of {len(wanted)} tokens")


def _target_problems(config: Mapping[str, Any], modules: set[str]) -> Iterable[Problem]:
    for module in sorted(modules):
        if not is_target(config, module):
            message = f"is not selected by target_modules {_brief(config.get('target_modules'))}: PEFT would ignore it"
            yield _problem("target", key_of(module, "A"), message)


def absent_targets(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Names in ``target_modules`` that none of the adapted modules has.

    PEFT takes a list of which some names are not in the model; but a lost projection looks like that, too.
    """
    targets, modules = config.get("target_modules"), list(modules)
    if not isinstance(targets, (list, tuple)):
        return []
    return [t for t in targets if not any(module == t or module.endswith(f".{t}") for module in modules)]


def unsupported(config: Mapping[str, Any]) -> list[Problem]:
    """What ``config`` says the adapter does beyond ``W + scaling * B A`` on linears of the base as it is published."""
    found = [(name, what) for name, what in UNSUPPORTED.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(("bias", "biases of the base were trained too"))
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "eva", "orthogonal"):
        found.append(("init_lora_weights", "the adapter belongs to a base that its initialisation changed"))
    return [
        Problem(kind="unsupported", message=f"adapter_config.json: {name} is {_brief(config[name])}: {what}")
        for name, what in found
    ]


def absent_modules(config: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Names of ``modules_to_save`` of which there is no tensor: lost, as ZeRO-3 loses what is sharded."""
    names, keys = config.get("modules_to_save") or (), list(keys)
    names = [names] if isinstance(names, str) else names
    return [name for name in names if not any(module_to_save({"modules_to_save": name}, key) for key in keys)]


def module_to_save(config: Mapping[str, Any], key: str) -> bool:
    """Is a tensor of this name one of ``modules_to_save``?"""
    names = config.get("modules_to_save") or ()
    names = [names] if isinstance(names, str) else names
    return any(f".{name}." in key for name in names)


def _problem(kind: str, key: str, what: str) -> Problem:
    return Problem(kind=kind, tensor=key, message=f"{key} {what}")


def _brief(names: Any) -> str:
    text = repr(names)
    return text if len(text) < 100 else f"{text[:97]}..."


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST


def _number(value: Any) -> TypeGuard[float]:
    """Finite, and no integer that a float cannot hold."""
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def _names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) and _names(value) else []


def _unfit(text: str) -> str | None:
    """Why this is no regular expression to match names with."""
    try:
        pattern(text)
    except ValueError as error:
        return str(error)
    return None
