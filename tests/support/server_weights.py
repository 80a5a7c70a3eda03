"""A checkpoint through SGLang's and vLLM's own loading: which files, which tensors, and their vocabulary layers.

Real, out of the wheels: the choice of files by the index, the reading of them, embedding and output layer with their
padding, sharding and lookup, and SGLang's ``load_weights`` of Qwen3. Ours: process groups, and a parameter for every
other weight that takes note of what it was given.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import os
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import tqdm
from sglang_worker import Quiet, _divide
from wheels import Wheel, unpacked, vllm

from slime_plugins.lora.base.checkpoint import INDEX

LIBRARIES: dict[str, Any] = dict(
    os=os, json=json, re=re, fnmatch=fnmatch, torch=torch, F=torch.nn.functional, Parameter=torch.nn.Parameter,
    UninitializedParameter=torch.nn.parameter.UninitializedParameter, dataclass=dataclass, safetensors=safetensors,
    safe_open=safetensors.safe_open, tqdm=tqdm.tqdm,
)  # fmt: skip
"""What the modules import at their top and have on any machine."""
LAYERS = (
    "DEFAULT_VOCAB_PADDING_SIZE", "pad_vocab_size", "vocab_range_from_per_partition_vocab_size",
    "vocab_range_from_global_vocab_size", "VocabParallelEmbeddingShardIndices", "get_masked_input_and_mask",
    "VocabParallelEmbedding", "ParallelLMHead",
)  # fmt: skip


class Pluggable(torch.nn.Module):
    """vLLM's base of layers that others can take the place of; here nobody does."""

    @staticmethod
    def register(name: str):
        return lambda cls: cls


class Server:
    """One version of one of them."""

    def __init__(self, name: str, version: str) -> None:
        self.name, self.version = name, version
        self.wheel = Wheel(vllm() if name == "vllm" else unpacked(name, version), name)
        self.root = "vllm.model_executor" if name == "vllm" else "sglang.srt"

    def tensors(self, hf_dir: Path) -> dict[str, torch.Tensor]:
        """Name -> weight, of the files that it would read."""
        logger = logging.getLogger("quiet")
        logger.info_once = logger.warning_once = logger.info  # type: ignore[attr-defined]
        names = ["filter_duplicate_safetensors_files", "filter_files_not_needed_for_inference"]
        names += ["safetensors_weights_iterator"]
        names += ["enable_tqdm", "_natural_sort_key"] if self.name == "vllm" else []
        own = self.wheel.take(
            f"{self.root}.model_loader.weight_utils", *names, **LIBRARIES, logger=logger,
            BAR_FORMAT=None, _BAR_FORMAT=None, should_skip_weight=lambda name, experts: False,
            _get_fs_type=lambda files: "ext4", _get_checkpoints_size_bytes=lambda files: 0,
            _get_available_ram_bytes=lambda: 1, DEFAULT_SAFETENSORS_PREFETCH_NUM_THREADS=1,
            DEFAULT_SAFETENSORS_PREFETCH_BLOCK_SIZE=1,
        )  # fmt: skip
        files = sorted(str(file) for file in Path(hf_dir).glob("*.safetensors"))
        files = own.filter_duplicate_safetensors_files(files, str(hf_dir), INDEX)
        files = own.filter_files_not_needed_for_inference(files)
        found: dict[str, torch.Tensor] = {}
        for name, tensor in own.safetensors_weights_iterator(files, False):
            assert name not in found, f"{name} is read twice"
            found[name] = tensor
        return found

    def layers(self, tp: int, rank: int) -> types.SimpleNamespace:
        """Its classes of embedding and output layer, on one rank."""
        module = f"{self.root}.layers.vocab_parallel_embedding"
        where = module if self.name == "vllm" else f"{self.root}.layers.quantization.unquant"
        utils = f"{self.root}.utils" if self.name == "vllm" else f"{self.root}.utils.common"
        platform = Quiet(simple_compile_backend="eager", is_cuda=lambda: False, use_sync_weight_loader=lambda: False)
        self.wheel.give("vllm.platforms", current_platform=platform)
        attributes = self.wheel.take(utils, "set_weight_attrs").set_weight_attrs
        given: dict[str, Any] = LIBRARIES | dict(set_weight_attrs=attributes, QuantizeMethodBase=object)
        method = self.wheel.take(where, "UnquantizedEmbeddingMethod", **given).UnquantizedEmbeddingMethod
        parallel = Quiet(tp_rank=rank, tp_size=tp, tp_group=None)
        given |= dict(
            divide=_divide, get_parallel=lambda: parallel, UnquantizedEmbeddingMethod=method,
            get_tensor_model_parallel_rank=lambda: rank, get_tensor_model_parallel_world_size=lambda: tp,
            tensor_model_parallel_all_reduce=lambda x: x, method_has_implemented_embedding=lambda cls: True,
            current_platform=platform, BasevLLMParameter=type("BasevLLMParameter", (), {}),
            is_fp8=lambda dtype: False, get_compiler_backend=lambda: "eager", _is_npu=True, _is_cpu=False,
            _is_cpu_amx_available=False, maybe_detect_oob=lambda *args: None, get_tp_group=lambda: None,
            use_symmetric_memory=lambda *args, **kwargs: contextlib.nullcontext(),
            is_allocation_symmetric=lambda: False, get_attn_tp_context=lambda: Quiet(input_scattered=False),
            _resolve_linear_group=lambda name: None, PluggableLayer=Pluggable,
        )  # fmt: skip
        return self.wheel.take(module, *LAYERS, **given)


class Vocabulary(torch.nn.Module):
    """Embedding and output layer of one rank, made as the servers' Qwen3 makes them, of what config.json says."""

    def __init__(self, server: Server, config: Any, tp: int, rank: int) -> None:
        super().__init__()
        layers = server.layers(tp, rank)
        self.embed_tokens = layers.VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.lm_head = self.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = layers.ParallelLMHead(config.vocab_size, config.hidden_size)

    def load(self, name: str, weight: torch.Tensor) -> None:
        """By the layer's own loader."""
        module = self.lm_head if name == "lm_head.weight" else self.embed_tokens
        module.weight_loader(module.weight, weight)


def sglang_loads(server: Server, config: Any, vocabulary: Vocabulary, tensors: dict[str, torch.Tensor]) -> set[str]:
    """SGLang's ``load_weights`` of Qwen3 on all tensors; names of those that are no matrix over the vocabulary."""
    taken: set[str] = set()

    def noting(name: str) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.weight_loader = lambda _, weight, part="": taken.add(f"{name} {part}")  # type: ignore[attr-defined]
        return parameter

    parameters = {
        "model.embed_tokens.weight": vocabulary.embed_tokens.weight,
        "model.norm.weight": noting("model.norm"),
    }
    if not config.tie_word_embeddings:
        parameters["lm_head.weight"] = vocabulary.lm_head.weight
    leaves = ("self_attn.qkv_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_up_proj")
    leaves += ("mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    for layer in range(config.num_hidden_layers):
        for leaf in leaves:
            name = f"model.layers.{layer}.{leaf}"
            parameters[f"{name}.weight"] = noting(name)
    common = server.wheel.take("sglang.srt.utils.common", "add_prefix")
    own = server.wheel.take(
        "sglang.srt.models.qwen3", "Qwen3ForCausalLM.load_weights", add_prefix=common.add_prefix,
        get_layer_id=server.wheel.module("sglang.srt.layers.utils.common").get_layer_id, default_weight_loader=None,
        supports_quantized_rl_reload=lambda method: method, logger=None,  # a tensor without a parameter is an error
    )  # fmt: skip
    model = Quiet(config=config, pp_group=Quiet(is_last_rank=True), model=Quiet(), named_parameters=parameters.items)
    own.load_weights(model, tensors.items())
    return taken
