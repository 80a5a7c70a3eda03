"""Who takes an adapter, and of which of its modules nobody would notice that they are left out. Pure.

What stands here was measured (tests/peft/test_families.py, tests/contracts) or read: PEFT 0.21.2 with transformers
5.23, SGLang 0.5.15 and 0.5.23, vLLM's issues 34186, 48019 and 48974.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.peft.experts_export import FUSED_ALONE
from slime_plugins.lora.peft.experts_form import experts_of

PEFT, LOAD_ADAPTER, VLLM, SGLANG = "PeftModel.from_pretrained", "load_adapter", "vLLM", "SGLang"

_BOTH_IN_VLLM = {"qwen2_vl", "qwen2_5_vl", "llava"}
"""Families whose map in vLLM has the names of the files and those of the modules."""
_BOTH_IN_PEFT = {"llava"}
"""Families of which PEFT renames the names of the files, too."""
_THREE_DIMENSIONS_IN_VLLM = {"qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl_moe"}
"""Families whose experts vLLM (0.33) has stacked (``is_3d_moe_weight``), so that it reads fused adapters of them."""
_SLICED_BY_SGLANG = (".linear_attn.in_proj_qkv", ".linear_attn.in_proj_z")


@dataclass(frozen=True)
class Adapted:
    """What an adapter holds, to a loader."""

    base: BaseCheckpoint
    spelling: str
    """One of ``base.spelling.SPELLINGS``."""
    fused: bool
    """Are its experts in PEFT's fused form?"""

    def text_model(self) -> bool:
        """Is it for the language model alone of a base that sees images?"""
        return self.spelling == "text" and self.base.named(self.base.layer_prefix, "module") != "model.layers."

    def is_tower(self, module: str) -> bool:
        """Is a module (by its name in the adapter) in no layer of the language model, nor its head?"""
        stored = self.base.names(self.spelling).get(module)
        return stored is not None and self.base.named(stored, "text") is None


@dataclass(frozen=True)
class Rule:
    """Why a loader leaves modules out, and which."""

    why: str
    holds: Callable[[Adapted, str], bool]
    warns: bool = True
    """Is it news? False where it is a problem of its own (names), or what was asked for."""


def left_out(adapted: Adapted, modules: Iterable[str]) -> dict[str, dict[Rule, list[str]]]:
    """Loader -> rule -> modules that it leaves out without an error; {} for a loader that takes them all."""
    modules = sorted(modules)
    found: dict[str, dict[Rule, list[str]]] = {}
    for loader, rules in _RULES.items():
        reasons: dict[Rule, list[str]] = {}
        for module in modules:
            rule = next((rule for rule in rules if rule.holds(adapted, module)), None)
            if rule is not None:
                reasons.setdefault(rule, []).append(module)
        found[loader] = reasons
    return found


def misnamed(adapted: Adapted, modules: Iterable[str]) -> list[str]:
    """Modules whose names PEFT does not find in the model that transformers makes of the base's files."""
    return sorted(m for m in modules if _peft_names(adapted, m) or _other_class(adapted, m))


def describe(reasons: dict[Rule, list[str]], count: int) -> str:
    """One loader's part of ``left_out`` in words, of an adapter of ``count`` modules."""
    if not reasons:
        return "takes all"
    left = (f"leaves out {len(modules)} of {count} without an error: {rule.why}" for rule, modules in reasons.items())
    return "; ".join(left)


def warnings(found: dict[str, dict[Rule, list[str]]], count: int) -> list[str]:
    """One line for every rule that is news."""
    return [
        f"{loader} {describe({rule: modules}, count)} (first: {modules[0]})"
        for loader, reasons in found.items()
        for rule, modules in reasons.items()
        if rule.warns
    ]


def _renamed(adapted: Adapted, module: str, spelling: str) -> bool:
    """Does the base call this module otherwise in ``spelling`` than the adapter does?"""
    stored = adapted.base.names(adapted.spelling).get(module)
    return stored is not None and adapted.base.named(stored, spelling) != module


def _peft_names(adapted: Adapted, module: str) -> bool:
    if adapted.text_model():
        return False  # said of its own: it is for another class
    family_takes_files = adapted.base.model_type() in _BOTH_IN_PEFT and not _renamed(adapted, module, "checkpoint")
    return _renamed(adapted, module, "module") and not family_takes_files


def _other_class(adapted: Adapted, module: str) -> bool:
    return adapted.text_model() and _renamed(adapted, module, "module") and _renamed(adapted, module, "checkpoint")


def _load_adapter_names(adapted: Adapted, module: str) -> bool:
    return _renamed(adapted, module, "module") and _renamed(adapted, module, "checkpoint")


def _vllm_names(adapted: Adapted, module: str) -> bool:
    both = adapted.base.model_type() in _BOTH_IN_VLLM and not _renamed(adapted, module, "checkpoint")
    return _renamed(adapted, module, "module") and not both


def _experts_one_by_one(adapted: Adapted, module: str) -> bool:
    one_by_one = experts_of(module) is not None and not adapted.fused
    return one_by_one and adapted.base.model_type(adapted.spelling) in FUSED_ALONE


def _experts_fused(adapted: Adapted, module: str) -> bool:
    return experts_of(module) is not None and adapted.fused


def _other_form_than_vllms(adapted: Adapted, module: str) -> bool:
    stacked = adapted.base.model_type(adapted.spelling) in _THREE_DIMENSIONS_IN_VLLM
    return experts_of(module) is not None and adapted.fused is not stacked


_FOR_TEXT = Rule("named for the language model's own class, it acts on that alone", _other_class, warns=False)
_ONE_BY_ONE = Rule("of this family it reads fused experts alone: --moe-format fused", _experts_one_by_one)
_FUSED = Rule("it reads experts one by one: --moe-format per-expert", _experts_fused, warns=False)
_RULES: dict[str, tuple[Rule, ...]] = {
    PEFT: (_FOR_TEXT, Rule("it goes by the names of modules: --names module", _peft_names, warns=False), _ONE_BY_ONE),
    LOAD_ADAPTER: (
        _FOR_TEXT,
        Rule("it goes by the names of modules or files: --names module", _load_adapter_names, warns=False),
        _ONE_BY_ONE,
    ),
    VLLM: (
        Rule("its map has the names of modules alone: --names module", _vllm_names, warns=False),
        Rule("it serves the language model alone", Adapted.is_tower),
        Rule(
            "loaded and never applied (vllm issue 48974)",
            lambda adapted, module: module.endswith(".kv_b_proj"),
            warns=False,
        ),
        Rule("it reads the other form of this family's experts: --moe-format", _other_form_than_vllms, warns=False),
    ),
    SGLANG: (
        Rule("it serves the language model's layers alone", Adapted.is_tower),
        Rule(
            "it takes q, k and v of linear attention one by one: use --lora-sync, or merge the adapter into its base",
            lambda adapted, module: module.endswith(_SLICED_BY_SGLANG),
        ),
        _FUSED,
    ),
}
"""Loader -> why modules are left out."""
