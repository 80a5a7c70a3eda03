"""What a forward keeps for its backward, tensor by tensor. Pure arithmetic.

Frozen linears keep no input: with adapters it is the adapted ones that do, the local shard of it, and h = x A^T. One
that runs fused with its adapter (``layers.fused``) keeps h alone behind a norm of its own, which has its input, and
behind the SwiGLU of an MLP, which makes it again (``layers.remade``; not in a layer that is made again as a whole).
What does not depend on what is trained: inputs of norms, of attention and of the activation function.

Routed experts: every rank is taken to receive its share of the tokens. What a router sends elsewhere shows on no rank
here, and on some rank of a run.

Shape letters in comments: T tokens of a microbatch on a tensor-parallel group, S those that sequence parallelism
leaves on a rank, N rows of the routed experts on a rank, H hidden, F width of an MLP on a rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from slime_plugins.lora.cost.memory import Adapter, Trained, adapters_of, vocabulary_rows
from slime_plugins.lora.cost.model import BYTES, Model, Split, layer_of, shards_of
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import megatron_name

RECOMPUTE = ("none", "selective", "full")
"""Megatron's ``--recompute-granularity``: nothing, core attention, whole layers one by one."""
_FP32, _INT64 = 4, 8
_LAYER = "model.layers.0.self_attn"


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What computes, which is what decides about copies."""

    flash: bool = True
    """Attention that keeps no scores."""
    te: bool = True
    """TransformerEngine's norms, in the linears after them or alone. False: torch's, as in the rehearsal."""
    fused: bool = True
    """Megatron's fused SwiGLU and rotary embedding, and slime's loss. False: one operation after the other."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One microbatch of one tensor-parallel group."""

    tokens: int
    sequence: int | None = None
    """Tokens of one sequence, for attention that keeps its scores; None: all of them are one."""


@dataclass(frozen=True)
class StageActivations:
    """Bytes on a rank of one pipeline stage, of one microbatch unless said otherwise."""

    kept: int
    """Of layers and norms, from forward to backward."""
    in_flight: int
    """Microbatches whose ``kept`` lie there at once (1F1B)."""
    work: int
    """What comes on top at the fullest moment: logits and loss, or a layer in backward."""
    logits: int
    """What the loss keeps for its backward, float32; a part of ``work``, if the loss is the fullest moment."""

    @property
    def total(self) -> int:
        """At the fullest moment."""
        return self.kept * self.in_flight + self.work


def stage_activations(
    model: Model,
    trained: Trained,
    split: Split,
    batch: Batch,
    *,
    recompute: str,
    dtype: str = "bfloat16",
    kernels: Kernels | None = None,
) -> list[StageActivations]:
    """Of a rank of each pipeline stage.

    Args:
        recompute: one of ``RECOMPUTE``.
    Raises:
        UsageError: as ``memory.cost_of``; tokens that sequence parallelism cannot cut.
    """
    if batch.tokens % (split.tp if split.sp else 1):
        raise UsageError(f"--tokens {batch.tokens} is no multiple of --tp {split.tp}; sequence parallelism needs one")
    reckoning = _Reckoning(model, trained, split, batch, recompute, BYTES[dtype], kernels or Kernels())
    return [reckoning.stage(stage) for stage in range(split.pp)]


class _Layer:
    """Bytes of one decoder layer."""

    def __init__(self, rest: int, core: int, core_inputs: int, work: int):
        self.rest, self.core, self.core_inputs, self.work = rest, core, core_inputs, work

    def kept(self, recompute: str, layer_input: int) -> int:
        if recompute == "full":
            return layer_input
        return self.rest + (self.core_inputs if recompute == "selective" else self.core)

    def again(self, recompute: str, layer_input: int) -> int:
        """What is there a second time while the layer is in backward."""
        if recompute == "none":
            return 0
        return self.kept("none", 0) - self.kept(recompute, layer_input) if recompute == "full" else self.core


class _Reckoning:
    """One model, one split, one microbatch."""

    def __init__(
        self,
        model: Model,
        trained: Trained,
        split: Split,
        batch: Batch,
        recompute: str,
        element: int,
        kernels: Kernels,
    ) -> None:
        self.model, self.trained, self.split, self.batch, self.recompute = model, trained, split, batch, recompute
        self.e, self.kernels = element, kernels
        self.T = batch.tokens
        self.S = self.T // (split.tp if split.sp else 1)
        adapters = adapters_of(model, trained.lora, split) if trained.lora else ()
        self.adapters: dict[tuple[int, str], Adapter] = {(a.layer, a.record.path): a for a in adapters}

    def stage(self, stage: int) -> StageActivations:
        """Of a rank of one pipeline stage."""
        recompute = self.recompute
        layers = [n for n in range(self.model.num_layers) if self.model.stage_of(n, self.split) == stage]
        hidden = self.S * self.model.hidden * self.e
        counted = [self._layer(number, frozen_input=number == 0 and recompute != "full") for number in layers]
        kept = sum(layer.kept(recompute, hidden) for layer in counted) + self._shared()
        work = max(layer.work + layer.again(recompute, hidden) for layer in counted) + self._dense_weight(layers)
        logits = 0
        if stage == self.split.pp - 1:
            kept += self._norm(self.S, self.model.hidden) + (hidden if self.trained.base else 0)
            values = self.T * vocabulary_rows(self.model, self.split)
            logits = values * _FP32
            # slime: float32 logits, their softmax and a temporary; elsewhere float32 logits, in which the loss works
            # in place, and at first those in the model's own dtype beside them.
            in_place = _FP32 + (self.e if self.e != _FP32 else 0)
            work = max(work, values * (3 * _FP32 if self.kernels.fused else in_place))
        return StageActivations(kept, self.split.pp - stage, work, logits)

    def _shared(self) -> int:
        """What all layers have together: the mask, and under recompute the angles of the rotary embedding."""
        sequence = self.batch.sequence or self.T
        dim = self.model.shapes[f"{_LAYER}.o_proj.weight"][1] // self.model.num_heads
        angles = self.T * dim * _FP32 if self.recompute == "full" else 0
        return angles + (0 if self.kernels.flash else sequence * sequence)

    def _layer(self, number: int, frozen_input: bool) -> _Layer:
        shapes = self.model.layer(number)
        rest, core, inputs = self._attention(number, shapes)
        hidden = self.model.hidden
        # Without recompute the embedding of a frozen base asks for no gradient, and the first norm keeps nothing.
        if not (frozen_input and not self.trained.base and not self.trained.new_tokens):
            rest += self._norm(self.S, hidden)
        rest += self._norm(self.S, hidden)
        mlp, work = self._mlps(number, shapes)
        return _Layer(rest + mlp, core, inputs, work + 2 * self.S * hidden * self.e)

    def _norm(self, rows: int, width: int, heads: int = 1, own_input: bool = True) -> int:
        """Input and 1 / rms; where one operation follows the other, also x / rms, for the gradient of the weight."""
        copies = own_input + (self.trained.base and not self.kernels.te)
        return rows * heads * (width * self.e * copies + _FP32)

    def _input(self, number: int, path: str, rows: int, width: int, behind: str = "") -> int:
        """What a linear keeps of its input, with h.

        Args:
            behind: ``norm``, which TransformerEngine has in the same module, or ``swiglu``.
        """
        adapter = self.adapters.get((number, path))
        if adapter is None:
            return rows * width * self.e if self.trained.base else 0
        lora = self.trained.lora
        assert lora is not None
        fused = not (adapter.record.is_expert or lora.dropout or self.trained.quant or self.trained.base)
        # By taps under sequence parallelism, a column-parallel linear has a rank's tokens for an input and all for h,
        # a row-parallel one the other way round. Fused, all for h.
        h_rows = self.S if adapter.record.parallel == "row" and not fused else self.T
        has_input = {"norm": self.kernels.te, "swiglu": self.recompute != "full"}.get(behind, False)
        kept = 0 if fused and has_input else rows * width
        return (kept + (rows if adapter.record.is_expert else h_rows) * adapter.width) * self.e

    def _attention(self, number: int, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, int]:
        """Beside core attention; in it; and what selective recompute keeps for it."""
        if self.model.mla:
            return self._latent(number, shapes)
        T, e, tp, hidden = self.T, self.e, self.split.tp, self.model.hidden
        q, kv = (shapes[f"self_attn.{p}_proj.weight"][0] // tp for p in "qk")
        out = shapes["self_attn.o_proj.weight"][1] // tp
        rest = self._input(number, "self_attention.linear_qkv", self.S, hidden, behind="norm")
        heads = self.model.num_heads // tp
        groups = heads * kv // out
        if "self_attn.q_norm.weight" in shapes:
            dim = out // heads
            rest += self._norm(T, dim, heads) + self._norm(T, dim, groups, own_input=False)
        if not self.kernels.fused:
            rest += 4 * T * (out // heads) * e  # cosines and sines, of queries and of keys
        normed = "self_attn.q_norm.weight" in shapes
        fused_output = T * (q + 2 * kv) * e  # v, and k before its norm, are views of it
        rest += fused_output if normed else 0
        rest += self._input(number, "self_attention.linear_proj", T, out)
        proj_keeps = self.trained.base or (number, "self_attention.linear_proj") in self.adapters
        own_v = 0 if normed else fused_output
        inputs = T * (out + kv) * e + own_v
        if self.kernels.flash:
            core = inputs + T * heads * _FP32 + (0 if proj_keeps else T * out * e)
        elif groups == heads:
            core = inputs + self._scores(heads)
        else:
            core = 3 * T * out * e + self._scores(heads)  # keys and values repeated for every head
        return rest, core, inputs

    def _scores(self, heads: int) -> int:
        """Softmax in float32, in the model's dtype too if that is another."""
        sequence = self.batch.sequence or self.T
        return self.T * sequence * heads * (_FP32 + (self.e if self.e != _FP32 else 0))

    def _latent(self, number: int, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, int]:
        T, e, tp, hidden = self.T, self.e, self.split.tp, self.model.hidden
        heads = self.model.num_heads // tp
        q_name = "q_b_proj" if "self_attn.q_b_proj.weight" in shapes else "q_proj"
        q = shapes[f"self_attn.{q_name}.weight"][0] // tp
        kv, latent = shapes["self_attn.kv_b_proj.weight"][0] // tp, shapes["self_attn.kv_b_proj.weight"][1]
        out = shapes["self_attn.o_proj.weight"][1] // tp
        low = shapes["self_attn.q_b_proj.weight"][1] if q_name == "q_b_proj" else 0
        paths = {"linear_q_proj": (self.S, hidden)} if not low else {"linear_q_down_proj": (self.S, hidden)}
        paths |= {"linear_kv_down_proj": (self.S, hidden), "linear_kv_up_proj": (self.S, latent)}
        paths |= {"linear_q_up_proj": (self.S, low)} if low else {}
        paths |= {"linear_proj": (T, out)}
        kept = {
            path: self._input(
                number, f"self_attention.{path}", *size, behind="norm" if path.endswith("up_proj") else ""
            )
            for path, size in paths.items()
        }
        first = ["linear_q_proj" if not low else "linear_q_down_proj", "linear_kv_down_proj"]
        shared = self.S * hidden * e if all(kept[path] >= self.S * hidden * e for path in first) else 0
        rest = sum(kept.values()) - shared  # one input of two linears
        rest += self._norm(self.S, latent) + (self._norm(self.S, low) if low else 0)
        inputs = T * (2 * q + kv) * e  # q and k with their rotary parts, v a view of what kv_b_proj gave
        if self.kernels.flash:
            return rest, inputs + T * heads * _FP32 + (0 if kept["linear_proj"] else T * out * e), inputs
        return rest, inputs + self._scores(heads), inputs

    def _mlps(self, number: int, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        """Kept, and the gradients that are there at once in backward."""
        if "mlp.gate_proj.weight" in shapes:
            return self._mlp(number, "mlp", shapes["mlp.gate_proj.weight"][0] // self.split.tp, self.S, self.T)
        T, S, hidden = self.T, self.S, self.model.hidden
        count, width = shapes["mlp.experts.gate_proj.weight"][:2]
        rows = S * self.model.top_k * self.split.experts_tp
        kept, work = self._mlp(number, "mlp.experts", width // self.split.experts_tp, rows, rows, routed=True)
        kept += S * hidden * self.e  # the router's input
        kept += S * count * _FP32 + S * self.model.top_k * 2 * _INT64
        if "mlp.shared_experts.gate_proj.weight" in shapes:
            shared = shapes["mlp.shared_experts.gate_proj.weight"][0] // self.split.tp
            more, more_work = self._mlp(number, "mlp.shared_experts", shared, S, T)
            fc1_input = S * hidden * self.e
            keeps_input = self.trained.base or (number, "mlp.shared_experts.linear_fc1") in self.adapters
            kept += more - (fc1_input if keeps_input else 0)  # the router has it already
            work = max(work, more_work)
        if "mlp.shared_expert_gate.weight" in shapes:
            kept += S * (hidden * self.e + _FP32)
        return kept, work

    def _mlp(
        self, number: int, path: str, width: int, in_rows: int, rows: int, routed: bool = False
    ) -> tuple[int, int]:
        e = self.e
        kept = self._input(
            number, f"{path}.linear_fc1", in_rows, self.model.hidden, behind="norm" if path == "mlp" else ""
        )
        kept += self._input(number, f"{path}.linear_fc2", rows, width, behind="swiglu")
        kept += rows * 2 * width * e
        if not self.kernels.fused:
            kept += rows * (3 if routed else 2) * width * e  # SiLU(gate), up + 0, and with experts their product
        return kept + (rows * _FP32 if routed else 0), rows * 3 * width * e

    def _dense_weight(self, layers: Collection[int | None]) -> int:
        """Of a 4-bit base, the linear that is dense while it multiplies; of experts all that a rank has."""
        if self.trained.quant is None:
            return 0
        sizes: dict[str, int] = {}
        for name, shape in self.model.linears().items():
            if layer_of(name) not in layers:
                continue
            owner = megatron_name(name, mla=self.model.mla)[0]
            shards = shards_of(f"{name}.weight", shape, self.model, self.split)
            sizes[owner] = sizes.get(owner, 0) + math.prod(shape) // shards
        return max(sizes.values(), default=0) * self.e
