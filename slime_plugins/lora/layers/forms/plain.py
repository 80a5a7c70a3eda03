"""The LoRA form of torch's own linear, in modules that slime takes from Hugging Face."""

from __future__ import annotations

import torch

from slime_plugins.lora.layers.adapter import LoRALinear


class LoRAPlainLinear(LoRALinear, torch.nn.Linear):  # type: ignore[misc]  # forward takes more than its base's
    """W, A and B whole on every tensor-parallel rank, and all tokens too."""
