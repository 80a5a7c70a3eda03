"""Sizes of published models, as their ``config.json`` on Hugging Face has them: Qwen's numbers, not ours.

python tests/support/published_configs.py DIR NAME ...     writes DIR/NAME/config.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "tie_word_embeddings"),
)
QWEN25 = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152064, False),
}
_QWEN3 = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 151936, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 151936, True),
    "Qwen3-30B-A3B": (2048, 6144, 48, 32, 4, 151936, False),
}
_EXPERTS = {"Qwen3-30B-A3B": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}}
NAMES = (*QWEN25, *_QWEN3)


def config_of(name: str) -> dict:
    """Of ``config.json``, what a plan reads."""
    sizes = dict(zip(_KEYS, (QWEN25 | _QWEN3)[name]))
    if name in QWEN25:
        return {"architectures": ["Qwen2ForCausalLM"], **sizes}
    kind = "Qwen3MoeForCausalLM" if name in _EXPERTS else "Qwen3ForCausalLM"
    return {"architectures": [kind], "head_dim": 128, **sizes, **_EXPERTS.get(name, {})}


def write_config(directory: str | Path, name: str) -> Path:
    """Write DIRECTORY/NAME/config.json; returns that directory."""
    path = Path(directory, name)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_of(name), indent=2) + "\n")
    return path


if __name__ == "__main__":
    for wanted in sys.argv[2:] or QWEN25:
        print(write_config(sys.argv[1], wanted))
