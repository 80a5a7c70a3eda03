"""One tiny checkpoint per family and test session: 4 layers, grouped queries, every dimension different."""

from __future__ import annotations

from slime_plugins.lora.rehearsal.tiny import make_tiny

_made: dict[str, object] = {}


def tiny(tmp_path_factory, family: str = "qwen3"):
    """Directory of the family's checkpoint."""
    if family not in _made:
        path = tmp_path_factory.mktemp(family)
        _made[family] = make_tiny(path, family, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=12, ffn=80)
    return _made[family]
