"""The models that bench/gpu.py measures: one base of random weights, and the forms in which it is trained.

A form is a row of ``FORMS``. Those on ``te`` have Megatron's TransformerEngine layer on the stand-in of tests/te_stub,
whose norm is one kernel each way here as TE's own is, and whose products are torch's: TE itself is a wheel of 276 MB.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import Setting, Shapes, Trainer, add_lora, build_model, freeze, require_grad

STAND_IN = Path(__file__).resolve().parent.parent / "tests" / "te_stub"
ALONE = Setting(1, False)
LINEARS = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
"""Leaf -> path in a decoder layer."""


def _full(model: torch.nn.Module, *, rank: int) -> None:
    """Everything trains already."""


def _frozen(model: torch.nn.Module, *, rank: int) -> None:
    freeze(model)


def _peft(model: torch.nn.Module, *, rank: int) -> None:
    """PEFT's own LoRA layer around each linear, its weight shared: what it costs in a Hugging Face model."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["inner"], init_lora_weights=False)
    for layer in model.decoder.layers:
        for leaf, path in LINEARS.items():
            plain = _Plain(layer.get_submodule(path).weight)
            setattr(layer.get_submodule(path.rpartition(".")[0]), leaf, inject_adapter_in_model(config, plain))


class _Plain(torch.nn.Module):
    """torch's linear, called as Megatron calls its own."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.inner = torch.nn.Linear(columns, rows, bias=False, device="meta", dtype=weight.dtype)
        self.inner.weight = weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.inner(x), None


@dataclasses.dataclass(frozen=True)
class Form:
    """How a model is made ready to train: ``prepare(model, rank=...)``."""

    prepare: Callable[..., None]
    te: bool = False

    @property
    def floor(self) -> str:
        """The form that it is compared with."""
        return "te frozen" if self.te else "frozen"


FORMS = {
    "full": Form(_full),
    "frozen": Form(_frozen),
    "lora": Form(add_lora),
    "lora taps": Form(partial(add_lora, linears="taps")),
    "lora split": Form(partial(add_lora, layout="split")),
    "peft": Form(_peft),
    "te frozen": Form(_frozen, te=True),
    "te lora": Form(add_lora, te=True),
    "te lora taps": Form(partial(add_lora, linears="taps"), te=True),
}


class FlashAttention(torch.nn.Module):
    """torch's causal attention, which keeps no scores, where Megatron's layer has its own product."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_ignored):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask, **_ignored):
        """[s, b, heads, d] each; groups of query heads share a key and value head. Returns [s, b, heads * d]."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def local_layer(base, config):
    from slime_plugins.lora.rehearsal.model import local_layer_spec

    layer = local_layer_spec(base, config)
    layer.submodules.self_attention.submodules.core_attention = FlashAttention
    return layer


def te_layer(base, config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from slime_plugins.lora.rehearsal.model import RMSNorm

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=base.family.qk_norm)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention, attention.q_layernorm, attention.k_layernorm = FlashAttention, RMSNorm, RMSNorm
    return layer


class Kernels:
    """Which of the base's own kernels there are, tried once; what is not there is said in the report."""

    def __init__(self, *, on_cpu: bool) -> None:
        self.on_cpu, self.said = on_cpu, dict[str, str]()
        self.swiglu = self._try("swiglu", "compiled", self._compile_swiglu)
        self._try("attention", "flash", self._allow_flash_alone)
        _norms_in_one_kernel()

    def _try(self, what: str, name: str, attempt: Callable[[], None]) -> bool:
        problem = "torch's, a CPU is not measured" if self.on_cpu else ""
        if not problem:
            try:
                attempt()
            except Exception as error:  # noqa: BLE001 - whatever a compiler raises, torch's own is there
                problem = f"torch's, {name} failed: {(str(error) or type(error).__name__).splitlines()[0]}"
        self.said[what] = problem or name
        return not problem

    def _compile_swiglu(self) -> None:
        from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

        x = torch.randn(16, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        bias_swiglu_impl(x, None).sum().backward()

    def _allow_flash_alone(self) -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k = (torch.randn(1, heads, 64, 128, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        for others in ("cudnn", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{others}_sdp")(False)

    def build(self, name: str, shapes: Shapes, *, rank: int, base: torch.nn.Module | None = None) -> Trainer:
        """A form of the model, ready to step.

        Args:
            base: a model whose weights it shares, if it does not train them: three copies fit where one does.
        """
        form = FORMS[name]
        model = build_model(shapes, ALONE, te_layer if form.te else local_layer, bias_activation_fusion=self.swiglu)
        if base is not None and name != "full":
            of_base = dict(base.named_parameters())
            for path, parameter in model.named_parameters():
                if path in of_base:
                    parameter.data = of_base[path].data
        form.prepare(model, rank=rank)
        model.embedding.register_forward_hook(require_grad)
        return Trainer(model, shapes.vocab_size, shapes.tokens)


def put_stand_in_on_path() -> None:
    """Before Megatron is imported: it looks for TransformerEngine then."""
    sys.path.insert(0, str(STAND_IN))


def _norms_in_one_kernel() -> None:
    """What the stand-in computes in seven passes is one of torch's kernels."""
    from transformer_engine.pytorch import module as stand_in

    from slime_plugins.lora.layers.fused import Norm

    def norm(x: torch.Tensor, weight: torch.Tensor, bias: Any, module: Any) -> torch.Tensor:
        out, module.__dict__["rho"] = Norm(weight, module.eps)(x)
        return out

    def norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Any, module: Any):
        return Norm(weight, module.eps).backward(grad, x, module.__dict__["rho"]), None, None

    stand_in.norm, stand_in.norm_backward = norm, norm_backward


def set_recompute(trainer: Trainer, how: str) -> None:
    """``none`` or ``full``, every layer by itself."""
    config = trainer.model.module.config
    config.recompute_granularity = "full" if how == "full" else None
    config.recompute_method, config.recompute_num_layers = ("uniform", 1) if how == "full" else (None, None)


@contextlib.contextmanager
def one_rank(store: str, *, on_cpu: bool):
    """Megatron's groups for this process."""
    from _harness import init_rank

    put_stand_in_on_path()
    if not on_cpu:
        torch.cuda.init()
    init_rank(ALONE, 0, store)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
