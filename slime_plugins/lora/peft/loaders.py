"""Who takes an adapter, who refuses it, and of which modules nobody would notice that they are left out. Pure.

What stands here was measured (tests/peft/test_families.py, tests/contracts/test_names.py): PEFT 0.21.2 with
transformers 5.23, SGLang 0.5.15 and 0.5.23, vLLM 0.33; or read: vLLM's issues 34186, 48019 and 48974. A server is
taken to be started with its defaults, and with the adapter's own targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.peft.experts_export import FUSED_ALONE
from slime_plugins.lora.peft.experts_form import experts_of

PEFT, LOAD_ADAPTER, VLLM, SGLANG = "PeftModel.from_pretrained", "load_adapter", "vLLM", "SGLang"

_BOTH_IN_VLLM = {"qwen2_vl", "qwen2_5_vl", "llava"}
"""Families whose map in vLLM has the names of the files and those of the modules."""
_BOTH_IN_PEFT = {"llava"}
"""Families of which PEFT renames the names of the files, too."""
_THREE_DIMENSIONS_IN_VLLM = {"qwen3_5_moe", "qwen3_vl_moe"}
"""Bases whose experts vLLM (0.33) has stacked (``is_3d_moe_weight``), so that it reads them fused alone."""
_LEAVES_OF_SGLANG = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Targets for which SGLang makes room whatever the model; of others it asks the model, and stops at a "no"."""


@dataclass(frozen=True)
class Adapted:
    """What an adapter holds, to a loader."""

    base: BaseCheckpoint
    modules: frozenset[str]
    """By their names in the adapter."""
    spelling: str
    """One of ``base.spelling.SPELLINGS``."""
    fused: bool
    """Are its experts in PEFT's fused form?"""

    @cached_property
    def leaves(self) -> frozenset[str]:
        """Last parts of the names: what a server takes for its targets."""
        return frozenset(module.rpartition(".")[2] for module in self.modules)

    @cached_property
    def experts_in_part(self) -> frozenset[str]:
        """``...mlp.experts`` of which something is adapted and, of some expert that the base has, a linear is not."""
        lost = map(experts_of, self.base.names(self.spelling).keys() - self.modules)
        adapted = set(map(experts_of, self.modules))
        return frozenset(experts for experts in lost if experts is not None and experts in adapted)

    def text_model(self) -> bool:
        """Is it for the language model alone of a base that sees images?"""
        return self.spelling == "text" and self.base.named(self.base.layer_prefix, "module") != "model.layers."

    def beside(self, module: str, leaf: str) -> bool:
        """Is the module ``leaf`` of the same parent adapted, too?"""
        return f"{module.rpartition('.')[0]}.{leaf}" in self.modules

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
    refuses: bool = False
    """Does the loader stop at them, with an error, instead of leaving them out?"""
    before: str | None = None
    """The version of the loader from which it does not hold any more."""


def left_out(adapted: Adapted) -> dict[str, dict[Rule, list[str]]]:
    """Loader -> rule -> modules that it leaves out, or at which it stops; {} for a loader that takes them all."""
    modules = sorted(adapted.modules)
    found: dict[str, dict[Rule, list[str]]] = {}
    for loader, rules in _RULES.items():
        reasons: dict[Rule, list[str]] = {}
        for module in modules:
            rule = next((rule for rule in rules if rule.holds(adapted, module)), None)
            if rule is not None:
                reasons.setdefault(rule, []).append(module)
        found[loader] = reasons
    return found


def misnamed(adapted: Adapted) -> list[str]:
    """Modules whose names PEFT does not find in the model that transformers makes of the base's files."""
    return sorted(m for m in adapted.modules if _peft_names(adapted, m) or _other_class(adapted, m))


def describe(reasons: dict[Rule, list[str]], count: int) -> str:
    """One loader's part of ``left_out`` in words, of an adapter of ``count`` modules."""
    return "; ".join(_words(rule, len(modules), count) for rule, modules in reasons.items()) or "takes all"


def _words(rule: Rule, left: int, count: int) -> str:
    what = (
        f"refuses the adapter for {left} of {count}"
        if rule.refuses
        else f"leaves out {left} of {count} without an error"
    )
    return f"{f'before {rule.before} ' if rule.before else ''}{what}: {rule.why}"


def warnings(found: dict[str, dict[Rule, list[str]]], count: int) -> list[str]:
    """One line for every rule that is news."""
    return [
        f"{loader} {describe({rule: modules}, count)} (first: {modules[0]})"
        for loader, reasons in found.items()
        for rule, modules in reasons.items()
        if rule.warns
    ]


def not_whole(found: dict[str, dict[Rule, list[str]]], count: int) -> list[str]:
    """Who leaves something out without an error that nobody has asked for: one line for every rule."""
    loaders: dict[tuple[Rule, int], list[str]] = {}
    for loader, reasons in found.items():
        for rule, modules in reasons.items():
            if rule.warns and not rule.refuses:
                loaders.setdefault((rule, len(modules)), []).append(loader)
    return [
        f"{', '.join(who)}: {left} of {count} modules are left out without an error: {rule.why}"
        for (rule, left), who in loaders.items()
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
    stacked = adapted.base.model_type() in _THREE_DIMENSIONS_IN_VLLM
    return experts_of(module) is not None and adapted.fused is not stacked


def _experts_in_part(adapted: Adapted, module: str) -> bool:
    return not adapted.fused and experts_of(module) in adapted.experts_in_part


def _stops_at_tower(adapted: Adapted, module: str) -> bool:
    """Has SGLang no room for its leaf, or does it take it for a layer of the language model?"""
    leaf_is_known = module.rpartition(".")[2] in _LEAVES_OF_SGLANG and ".layers." not in module
    return adapted.is_tower(module) and not leaf_is_known


def _linear_attention_in_pieces(adapted: Adapted, module: str) -> bool:
    return ".linear_attn.in_proj_" in module and adapted.base.text_config.get("model_type") != "qwen3_next"


def _gates_of_linear_attention(adapted: Adapted, module: str) -> bool:
    return ".linear_attn." in module and module.endswith((".in_proj_a", ".in_proj_b", ".in_proj_ba"))


def _no_room_in_qwen3_next(adapted: Adapted, module: str) -> bool:
    leaf = module.rpartition(".")[2]
    is_next = adapted.base.text_config.get("model_type") == "qwen3_next"
    return is_next and (".linear_attn." in module or leaf in ("q_proj", "k_proj", "v_proj"))


def _shared_of_qwen2(adapted: Adapted, module: str) -> bool:
    family = adapted.base.text_config.get("model_type")
    return ".shared_expert." in module and family in ("qwen2_moe", "qwen3_next")


def _part_of_qkv(adapted: Adapted, module: str) -> bool:
    """It makes zeros for k_proj where that is missing, and looks for v_proj beside every q_proj."""
    stacked = module.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj") and not adapted.base.mla
    return stacked and not (adapted.beside(module, "q_proj") and adapted.beside(module, "v_proj"))


def _up_without_gate(adapted: Adapted, module: str) -> bool:
    return module.endswith(".up_proj") and not adapted.beside(module, "gate_proj")


def _part_of_latent(adapted: Adapted, module: str) -> bool:
    """Where the query has a rank: without one there is no q_a_proj to stack with."""
    parts = ("q_a_proj", "kv_a_proj_with_mqa")
    stacked = module.rpartition(".")[2] in parts and bool(adapted.base.text_config.get("q_lora_rank"))
    return stacked and not all(adapted.beside(module, part) for part in parts)


def _latent_without_query_rank(adapted: Adapted, module: str) -> bool:
    direct = adapted.base.mla and not adapted.base.text_config.get("q_lora_rank")
    return direct and module.rpartition(".")[2] in ("q_proj", "kv_a_proj_with_mqa")


def _experts_by_half(adapted: Adapted, module: str) -> bool:
    """Its experts are one module, made ready where gate or up is a target, and down: anybody's, not only theirs."""
    if experts_of(module) is None:
        return False
    leaves = adapted.leaves
    return not (leaves & {"gate_proj", "up_proj"} and "down_proj" in leaves)


_FOR_TEXT = Rule("named for the language model's own class, it acts on that alone", _other_class, warns=False)
_ONE_BY_ONE = Rule(
    "experts of this family are read in the fused form alone: export it with --moe-format fused", _experts_one_by_one
)
_FUSED = Rule("it reads experts one by one: --moe-format per-expert", _experts_fused, warns=False, refuses=True)
_RULES: dict[str, tuple[Rule, ...]] = {
    PEFT: (_FOR_TEXT, Rule("it goes by the names of modules: --names module", _peft_names, warns=False), _ONE_BY_ONE),
    LOAD_ADAPTER: (
        _FOR_TEXT,
        Rule("it goes by the names of modules or files: --names module", _load_adapter_names, warns=False),
        _ONE_BY_ONE,
    ),
    VLLM: (
        Rule(
            "it reads the other form of this base's experts: --moe-format",
            _other_form_than_vllms,
            warns=False,
            refuses=True,
        ),
        Rule(
            "it packs all linears of all experts of a layer and stops where one has no adapter; merge the adapter "
            "into its base",
            _experts_in_part,
            refuses=True,
        ),
        Rule("its map had the names of modules alone: --names module", _vllm_names, warns=False, before="0.33"),
        Rule(
            "it serves the language model alone, unless it is started with --enable-tower-connector-lora",
            Adapted.is_tower,
        ),
        Rule(
            "loaded and never applied (vllm issue 48974)",
            lambda adapted, module: module.endswith(".kv_b_proj"),
            warns=False,
        ),
    ),
    SGLANG: (
        Rule("it has no room for adapters of such modules", _stops_at_tower, refuses=True),
        Rule("it serves the language model's layers alone", Adapted.is_tower),
        Rule(
            "it serves no adapter of the gates of linear attention; merge the adapter into its base",
            _gates_of_linear_attention,
            refuses=True,
        ),
        Rule(
            "it takes q, k and v of linear attention one by one: use --lora-sync, or merge the adapter into its base",
            _linear_attention_in_pieces,
            refuses=True,
        ),
        Rule(
            "it makes room for linear attention in Qwen3.5 alone, and none for the gate in Qwen3-Next's q_proj; merge "
            "the adapter into its base",
            _no_room_in_qwen3_next,
            refuses=True,
        ),
        Rule(
            "it sizes the shared expert by the wrong width; take a newer one, or merge the adapter into its base",
            _shared_of_qwen2,
            refuses=True,
            before="0.5.23",
        ),
        Rule(
            "it serves no adapter of the router; merge the adapter into its base",
            lambda adapted, m: m.endswith(".mlp.gate"),
            refuses=True,
        ),
        Rule(
            "it stacks q, k and v and takes an adapter of q_proj and v_proj at least; merge the adapter into its base",
            _part_of_qkv,
            refuses=True,
        ),
        Rule(
            "it stacks gate and up and takes no adapter of up_proj alone; merge the adapter into its base",
            _up_without_gate,
            refuses=True,
        ),
        Rule(
            "it stacks q_a_proj and kv_a_proj_with_mqa and takes an adapter of both or of neither; merge the adapter "
            "into its base",
            _part_of_latent,
            refuses=True,
        ),
        Rule(
            "of latent attention without q_lora_rank it takes no adapter of q_proj and kv_a_proj_with_mqa; merge the "
            "adapter into its base",
            _latent_without_query_rank,
            refuses=True,
        ),
        _FUSED,
        Rule(
            "it applies adapters of experts only where it is told all three linears: start it with "
            "--lora-target-modules, and gate_proj, up_proj and down_proj among them",
            _experts_by_half,
        ),
    ),
}
"""Loader -> why modules are left out, or refused."""
