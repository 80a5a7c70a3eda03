"""Names that the trainer and the engines agree on."""

from __future__ import annotations

BASE = "slime-lora-base"
"""``lora_path`` of a request that means the base, without the adapter."""
MARK = "slime-lora"
"""``--weight-version`` that an engine of ``--lora-sync adapter`` starts with: what tells it to fail closed."""
PREFIX = "slime-"
"""What the names of the trainer's adapters begin with."""
QKV, Z = "in_proj_qkv", "in_proj_z"
"""Hugging Face's projections of linear attention that are one linear in SGLang."""


def served_leaf(leaf: str) -> str:
    """What SGLang calls the linear of a Hugging Face leaf, among its targets."""
    return "in_proj_qkvz" if leaf in (QKV, Z) else leaf
