"""This rank's shard of every parameter of a Megatron model, out of a Hugging Face checkpoint.

Shape letters: V vocabulary, T tensor-parallel size.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_model import GPTModel

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.decoder import HFBase
from slime_plugins.lora.layout import gated_parts, qkv_parts
from slime_plugins.lora.names import of_expert

_LAYER = re.compile(r"decoder\.layers\.\d+\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",  # TransformerEngine fuses these two
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}
"""Parameters that every rank has whole, but those of linear attention, whose names are Hugging Face's."""
_LINEAR_ATTENTION = "self_attention.linear_attn."


@dataclass(frozen=True)
class _Cut:
    """This rank's place on one axis."""

    rank: int
    size: int


@torch.no_grad()
def load_base(chunk: GPTModel, base: HFBase, weights: BaseCheckpoint) -> None:
    """Fill every parameter of a chunk, not yet adapted, with this rank's shard.

    Raises:
        ValueError: a parameter has no counterpart, or its shape differs from the shard's.
    """
    tp = _Cut(mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size())
    layer_numbers = {f"decoder.layers.{i}": layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
    reader = _Layers(base, weights, tp)
    for name, param in chunk.named_parameters():
        match = _LAYER.fullmatch(name)
        if match:
            prefix = f"model.layers.{layer_numbers[name[: match.start(1) - 1]]}."
            shard = reader.shard(match.group(1), prefix)
        elif name == "decoder.final_layernorm.weight":
            shard = weights.read("model.norm.weight")
        elif name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            of_embedding = base.tied or name.startswith("embedding")
            rows = padded_vocab_size(base.vocab_size, tp.size) // tp.size
            hf_name = "model.embed_tokens.weight" if of_embedding else "lm_head.weight"
            shard = weights.rows(hf_name, tp.rank * rows, (tp.rank + 1) * rows)
            shard = torch.nn.functional.pad(shard, (0, 0, 0, rows - len(shard)))
        else:
            shard = None
        if shard is None:
            raise ValueError(f"{base.path}: nothing in this checkpoint fills Megatron parameter {name}")
        if shard.shape != param.shape:
            raise ValueError(f"{name}: shape {list(param.shape)}, but the checkpoint gives {list(shard.shape)}")
        param.copy_(shard)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding in Megatron: each rank holds as many. Extra rows are zero; slice them off the logits."""
    return math.ceil(vocab_size / tp) * tp


@dataclass
class _Layers:
    """Reads parameters of decoder layers."""

    base: HFBase
    weights: BaseCheckpoint
    tp: _Cut
    _stacks: dict[str, torch.Tensor] = field(default_factory=dict)
    """The experts read last, whole, where a layer's lie in one tensor."""

    def shard(self, leaf: str, prefix: str) -> torch.Tensor | None:
        """This rank's value of one layer parameter, or None for a name that no Hugging Face tensor fills.

        Args:
            leaf: Megatron's name in the layer.
            prefix: ``model.layers.3.``
        """
        if leaf in _WHOLE:
            return self._read(prefix + _WHOLE[leaf])
        if leaf.startswith(_LINEAR_ATTENTION):
            return self._read(f"{prefix}linear_attn.{leaf.removeprefix(_LINEAR_ATTENTION)}")
        expert = _EXPERT.fullmatch(leaf)
        if expert:
            return self._expert(prefix, int(expert[1]), expert[2])
        if leaf == "self_attention.linear_proj.weight":
            return self._read(prefix + "self_attn.o_proj.weight", 1, self.tp)
        module, _, kind = leaf.rpartition(".")
        if module in ("mlp.linear_fc2", "mlp.shared_experts.linear_fc2"):
            return self._read(f"{prefix}{module.rpartition('.')[0]}.down_proj.weight", 1, self.tp)
        if module == "self_attention.linear_qkv":
            heads, groups = self.base.num_heads // self.tp.size, self.base.num_query_groups // self.tp.size
            parts = qkv_parts(heads, groups, self.base.head_dim, gated=self.base.gated)
            return self._fused(f"{prefix}self_attn", parts, kind, self.tp)
        if module == "mlp.linear_fc1":
            return self._fused(f"{prefix}mlp", gated_parts(2 * self.base.ffn // self.tp.size), kind, self.tp)
        if module == "mlp.shared_experts.linear_fc1" and self.base.experts is not None:
            parts = gated_parts(2 * self.base.experts.shared_ffn // self.tp.size)
            return self._fused(f"{prefix}mlp.shared_experts", parts, kind, self.tp)
        return None

    def _expert(self, prefix: str, local: int, leaf: str) -> torch.Tensor:
        experts = self.base.experts
        assert experts is not None
        etp = _Cut(mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size())
        here = experts.count // mpu.get_expert_model_parallel_world_size()
        number = mpu.get_expert_model_parallel_rank() * here + local
        if leaf == "linear_fc2":
            return self._read(of_expert(f"{prefix}mlp.experts.down_proj", number) + ".weight", 1, etp)
        return self._fused(f"{prefix}mlp.experts.{number}", gated_parts(2 * experts.ffn // etp.size), "weight", etp)

    def _fused(self, parent: str, parts: tuple, kind: str, cut: _Cut) -> torch.Tensor:
        pieces = [self._read(f"{parent}.{part.name}.{kind}", 0, cut) for part in parts]
        fused = torch.empty(sum(part.size for part in parts), *pieces[0].shape[1:], dtype=pieces[0].dtype)
        for part, piece in zip(parts, pieces, strict=True):
            part.put(fused, piece)
        return fused

    def _read(self, name: str, dim: int | None = None, cut: _Cut | None = None) -> torch.Tensor:
        """A tensor by its canonical name, or this rank's part of it along ``dim``."""
        stored, cut = self.weights.spelled(name), cut or _Cut(0, 1)
        place = self.weights.stacks.get(stored.removesuffix(".weight"))
        if place is None:
            return self.weights.read(stored, dim=dim, part=cut.rank, parts=cut.size)
        if place.tensor not in self._stacks:
            same_layer = place.tensor.rpartition(".")[0]
            self._stacks = {name: stack for name, stack in self._stacks.items() if name.startswith(f"{same_layer}.")}
            self._stacks[place.tensor] = self.weights.read(place.tensor)
        matrix = place.view(self._stacks[place.tensor])
        return matrix if dim is None else matrix.chunk(cut.size, dim)[cut.rank]
