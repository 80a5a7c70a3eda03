"""How bases spell the names of their linears: in their files, as modules of a loaded model, in the text model. Pure.

    checkpoint   model.layers.3...                    as the base's files have it (Qwen2-VL, Qwen2.5-VL)
    module       model.language_model.layers.3...     as the model that transformers makes of them calls it
    text         model.layers.3...                    as the language model alone calls it (Qwen3_5ForCausalLM)

PEFT goes by the modules. Under other names it loads nothing, with a warning, and the model stays as it was.
"""

from __future__ import annotations

SPELLINGS = ("module", "checkpoint", "text")
"""The first is what PEFT wants, and the default."""
CANONICAL_LAYERS = "model.layers."
LAYER_PREFIXES = (CANONICAL_LAYERS, "model.language_model.layers.", "language_model.model.layers.")
"""What bases put before a layer's number: text models, and two generations of those that see images too."""

_QWEN_VL = {"model.": "model.language_model.", "visual.": "model.visual."}
_LLAVA = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
_MODULES = {"qwen2_vl": _QWEN_VL, "qwen2_5_vl": _QWEN_VL, "llava": _LLAVA}
"""model_type -> what names in its files begin with -> what the names of its modules begin with.

The modules are those of transformers from 4.52 on (5.23: ``conversion_mapping.py``). Of other types the two are one.
"""


def module_name(model_type: str | None, stored: str) -> str:
    """A name as the files of a base have it -> what it is called in the model that transformers makes of them."""
    prefixes = _MODULES.get(model_type or "", {})
    if not stored.startswith(tuple(prefixes.values())):
        for before, after in prefixes.items():
            if stored.startswith(before):
                return after + stored.removeprefix(before)
    return stored


def text_name(layer_prefix: str, stored: str) -> str | None:
    """A name as the files have it -> in the language model alone; None for what that does not have (a tower).

    Args:
        layer_prefix: the one of ``LAYER_PREFIXES`` that the files have.
    """
    language = layer_prefix.removesuffix("layers.")
    if stored.startswith(language):
        return "model." + stored.removeprefix(language)
    return "lm_head" if stored.rpartition(".")[2] == "lm_head" else None


def canonical_layers(name: str) -> str:
    """A linear's name under any prefix of a layer -> under the canonical one; others as they are."""
    prefix = next((prefix for prefix in LAYER_PREFIXES if name.startswith(prefix)), CANONICAL_LAYERS)
    return CANONICAL_LAYERS + name.removeprefix(prefix) if name.startswith(prefix) else name
