"""One rank of SGLang's LoRA serving out of its wheel, on CPU tensors: its manager, memory pool, adapter normalisation
and slicing are its own. Ours: a model of the same module names with layers that know their sizes and compute nothing.

``served`` reads back, from the buffers that its kernels would read, the update of every projection.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import json
import logging
import types
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from wheels import Wheel, library, unpacked

REAL = tuple(
    f"sglang.srt.{name}"
    for name in (
        "lora.eviction_policy", "lora.layers", "lora.lora", "lora.lora_config", "lora.lora_manager",
        "lora.lora_registry", "lora.mem_pool", "lora.utils", "layers.utils.common", "utils.aio_rwlock",
    )
)  # fmt: skip


RUNNER_CLASSES = {
    "0.5.15.post1": ("MoeRunnerBackend",),
    "0.5.23": ("_MoeRunnerBackendPredicates", "MoeRunnerBackend"),
}


class Layer(torch.nn.Module):
    """A linear that knows the attributes which SGLang's LoRA code reads."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.tp_group: Any = None
        for name, value in sizes.items():
            setattr(self, name, value)


class ColumnParallelLinear(Layer):
    pass


class MergedColumnParallelLinear(ColumnParallelLinear):
    pass


class QKVParallelLinear(ColumnParallelLinear):
    pass


class RowParallelLinear(Layer):
    pass


class ReplicatedLinear(Layer):
    pass


class FusedMoE(Layer):
    pass


class VocabParallelEmbedding(Layer):
    pass


class ParallelLMHead(VocabParallelEmbedding):
    pass


class Quiet(types.SimpleNamespace):
    """Settings; one that is not there is an AttributeError."""


class Backend:
    """In place of the Triton kernels: holds the batch, runs nothing."""

    skip_inactive_lora_batches = False
    supports_dp_attention = supports_prefill_cuda_graph = False
    is_moe_lora = False
    name = "csgmv"

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def validate_lora_targets(self, base_model, target_modules) -> None:
        """Kernels for every target."""


class NoPinning:
    """torch, on a machine whose memory cannot be pinned."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **kwargs)


@contextlib.contextmanager
def unpinned() -> Iterator[None]:
    """Inside, pinning leaves a tensor where it is, if there is no device that it could be pinned for."""
    plain = torch.Tensor.pin_memory
    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda self, *args: self
    try:
        yield
    finally:
        torch.Tensor.pin_memory = plain


@functools.cache
def wheel_of(version: str, tp: int = 1, rank: int = 0, strict: bool = True) -> Wheel:
    """SGLang's LoRA modules, with what they need from the rest of it. Skips the test where there is no wheel."""
    wheel = Wheel(unpacked("sglang", version), "sglang", REAL)
    library("msgspec")
    common = wheel.take("sglang.srt.utils.common", "ConcurrentCounter", "replace_submodule", asyncio=asyncio)
    flag = types.SimpleNamespace(get=lambda: False)
    parallel = Quiet(
        tp_size=tp, tp_rank=rank, attn_tp_size=tp, attn_tp_rank=rank, attn_cp_size=1, attn_dp_enabled=False, dp_size=1,
        moe_tp_size=tp, moe_tp_rank=rank, moe_ep_size=1, moe_ep_rank=0, dcp_replicate_q_proj=False,
        pp_group=Quiet(is_last_rank=True),
    )  # fmt: skip
    lora = Quiet(
        enable_lora_overlap_loading=False, lora_eviction_policy="lru", experts_shared_outer_loras=None,
        lora_use_virtual_experts=False, lora_strict_loading=strict, enable_lora=True, max_loaded_loras=None,
    )  # fmt: skip
    runners = wheel.take("sglang.srt.layers.moe.utils", *RUNNER_CLASSES[version], Enum=Enum).MoeRunnerBackend
    give: Callable[..., None] = wheel.give
    give("sglang.srt.utils", **vars(common), is_pin_memory_available=lambda: False, get_available_gpu_memory=_memory)
    give("sglang.srt.environ", envs=Quiet(SGLANG_EXPERIMENTAL_LORA_OPTI=flag))
    give("sglang.srt.layers.utils", get_layer_id=wheel.module("sglang.srt.layers.utils.common").get_layer_id)
    give(
        "sglang.srt.layers.linear",
        **{
            cls.__name__: cls
            for cls in (
                ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear,
                ReplicatedLinear,
            )
        },
    )  # fmt: skip
    give("sglang.srt.layers.moe.fused_moe_triton.layer", FusedMoE=FusedMoE)
    give(
        "sglang.srt.layers.vocab_parallel_embedding",
        ParallelLMHead=ParallelLMHead,
        VocabParallelEmbedding=VocabParallelEmbedding,
    )
    give("sglang.srt.layers.moe", MoeRunnerBackend=runners)
    give("sglang.srt.layers.moe.utils", get_moe_runner_backend=lambda: runners.TRITON)
    give("sglang.srt.layers.moe.moe_runner.runner", MoeRunner=lambda *args, **kwargs: None)
    give("sglang.srt.lora.backend.lora_registry", get_backend_from_name=lambda name: Backend)
    give(
        "sglang.srt.distributed",
        divide=_divide,
        get_moe_expert_parallel_world_size=lambda: 1,
        get_moe_expert_parallel_rank=lambda: 0,
        get_moe_tensor_parallel_world_size=lambda: tp,
        get_moe_tensor_parallel_rank=lambda: rank,
    )
    if version != "0.5.15.post1":
        give("sglang.srt.distributed.utils", **vars(wheel.take("sglang.srt.distributed.utils", "get_group_rank_size")))
    give("sglang.srt.managers.io_struct", LoRAUpdateOutput=Quiet)
    give("sglang.srt.models.inkling_common.dense_mlp", InklingBatchDenseMLP=type("InklingBatchDenseMLP", (), {}))
    give(
        "sglang.srt.runtime_context",
        get_parallel=lambda: parallel,
        get_lora=lambda: lora,
        get_spec=lambda: Quiet(speculative_algorithm=None),
    )
    wheel.module("sglang.srt.lora.layers").__dict__["torch"] = NoPinning()
    for name in REAL:
        logging.getLogger(wheel.module(name).__name__).setLevel(logging.ERROR)
    return wheel


def _memory(*args: Any) -> float:
    return 0.0


def _divide(total: int, parts: int) -> int:
    assert total % parts == 0, f"{total} is not divisible by {parts}"
    return total // parts


class Worker:
    """A rank that serves one base."""

    def __init__(
        self,
        version: str,
        hf_dir: Path,
        target_modules: list[str],
        max_rank: int,
        *,
        tp: int = 1,
        rank: int = 0,
        fused_shared: bool = False,
        strict: bool = True,
    ) -> None:
        """``strict``: as ``--lora-sync adapter`` starts engines; False is the default of ``--lora-strict-loading``."""
        self.wheel = wheel_of(version, tp, rank, strict)
        config = json.loads((Path(hf_dir) / "config.json").read_text())
        self.config = types.SimpleNamespace(**config | (config.get("text_config") or {}))
        self.model = sglang_model(self.config, version, tp, rank, fused_shared=fused_shared)
        settings: dict[str, Any] = dict(
            base_model=self.model,
            base_hf_config=self.config,
            max_loras_per_batch=2,
            load_config=None,
            dtype=torch.bfloat16,
            server_args=Quiet(
                enable_lora_overlap_loading=False, lora_eviction_policy="lru", experts_shared_outer_loras=None,
                lora_use_virtual_experts=False, lora_strict_loading=strict,
            ),
            max_lora_rank=max_rank,
            target_modules=set(target_modules),
        )  # fmt: skip
        manager = self.wheel.module("sglang.srt.lora.lora_manager").LoRAManager
        if "tp_size" in manager.__init__.__code__.co_varnames[: manager.__init__.__code__.co_argcount]:
            settings |= dict(tp_size=tp, tp_rank=rank)
        with unpinned():
            self.manager = manager(**settings)
        self.refs: dict[str, Any] = {}

    def load(self, name: str, config: dict, tensors: dict[str, torch.Tensor]) -> None:
        """What a load request does on this rank. Raises RuntimeError with the server's own words."""
        ref = self.wheel.module("sglang.srt.lora.lora_registry").LoRARef(
            lora_name=name, lora_path="__tensor__", pinned=False
        )
        result = self.manager.load_lora_adapter_from_tensors(ref, tensors, config, None)
        if not result.success:
            raise RuntimeError(result.error_message)
        self.refs[name] = ref

    def generate(self, name: str) -> None:
        """What the first request of an adapter does: its weights into the GPU's pool. Raises what SGLang raises."""
        with unpinned():
            self.manager.fetch_new_loras({self.refs[name].lora_id})

    def served(self, name: str) -> dict[str, torch.Tensor]:
        """Hugging Face name -> scaling B A of this rank's shard, float32, out of the pool's buffers."""
        (uid,) = (ref.lora_id for ref in self.manager.lora_refs.values() if ref.lora_name == name)
        pool, adapter = self.manager.memory_pool, self.manager.loras[uid]
        slot = pool.uid_to_buffer_id[uid]
        found: dict[str, torch.Tensor] = {}
        for layer, modules in enumerate(self.manager.lora_modules):
            for path, module in modules.items():
                base = module.base_layer
                if isinstance(base, FusedMoE):
                    for which, leaves in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
                        A, B = pool.A_buffer[f"{which}_moe"][layer][slot], pool.B_buffer[f"{which}_moe"][layer][slot]
                        for expert in range(A.shape[0]):
                            place = f"{path}.{expert}"
                            found |= _updates(place, leaves, A[expert], B[expert], None, pool.max_lora_rank, 1.0)
                    continue
                leaf = path.rsplit(".", 1)[-1]
                A, B = pool.A_buffer[leaf][layer][slot], pool.B_buffer[leaf][layer][slot]
                found |= _updates(
                    path.rsplit(".", 1)[0], base.hf_leaves, A, B, base.rows, adapter.config.r, adapter.scaling
                )
        return found


def _updates(place, leaves, A, B, rows, rank, scaling) -> dict[str, torch.Tensor]:
    """The parts of a stacked linear: A is stacked by rank, B by rows."""
    rows = rows or [B.shape[0] // len(leaves)] * len(leaves)
    parts, found = B.float().split(rows), {}
    for i, leaf in enumerate(leaves):
        low = A[i * rank : (i + 1) * rank].float()
        found[f"{place}.{leaf}"] = scaling * (parts[i][:, :rank] @ low)
    return found


def _sizes_of_qwen3_5(version: str) -> Callable:
    """SGLang's own method of its model that says how large every target is."""
    path = unpacked("sglang", version) / "sglang/srt/models/qwen3_5.py"
    tree = ast.parse(path.read_text())
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Qwen3_5ForCausalLM")
    method = next(node for node in cls.body if getattr(node, "name", "") == "get_hidden_dim")
    kinds = [node for node in tree.body if "_MOE_TEXT_MODEL_TYPES" in ast.unparse(node)[:60]]
    namespace: dict[str, Any] = {}
    exec(compile(ast.Module([*kinds, method], []), str(path), "exec"), namespace)
    return namespace["get_hidden_dim"]


def sglang_model(config: Any, version: str, tp: int, rank: int, *, fused_shared: bool = False) -> torch.nn.Module:
    """Modules under the names of SGLang's model files, for the families of ``moe_models`` and dense ones."""
    model = torch.nn.Module()
    model.config = config
    hidden, heads = config.hidden_size, config.num_attention_heads
    moe_from = getattr(config, "first_k_dense_replace", 0)
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in counts if getattr(config, name, None)), None)
    shared = getattr(config, "shared_expert_intermediate_size", None)
    spelling = "shared_expert" if shared else "shared_experts"
    if getattr(config, "n_shared_experts", None):
        shared = config.n_shared_experts * config.moe_intermediate_size

    def add(path: str, layer: torch.nn.Module) -> None:
        parent = model
        *parents, leaf = path.split(".")
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent._modules[part]
        parent.add_module(leaf, layer)

    for i in range(config.num_hidden_layers):
        attention = f"model.layers.{i}.self_attn"
        if (getattr(config, "layer_types", None) or [None] * (i + 1))[i] == "linear_attention":
            _add_linear_attention(add, f"model.layers.{i}.linear_attn", config, tp)
        elif getattr(config, "kv_lora_rank", None):
            _add_mla(add, attention, config, tp)
        else:
            head_dim = getattr(config, "head_dim", None) or hidden // heads
            gated = 2 if config.model_type.startswith(("qwen3_next", "qwen3_5")) else 1
            groups = config.num_key_value_heads
            replicas = max(1, tp // groups)
            q, kv = gated * heads * head_dim // tp, max(1, groups // tp) * head_dim
            layer = QKVParallelLinear(
                q_proj_shard_size=q, kv_proj_shard_size=kv, num_kv_head_replicas=replicas,
                output_sizes=[q * tp, kv * tp, kv * tp], output_partition_sizes=[q, kv, kv],
                input_size_per_partition=hidden, hf_leaves=("q_proj", "k_proj", "v_proj"), rows=[q, kv, kv],
                total_num_heads=gated * heads, total_num_kv_heads=groups, head_size=head_dim,
            )  # fmt: skip
            add(f"{attention}.qkv_proj", layer)
            add(f"{attention}.o_proj", _row(heads * head_dim, hidden, "o_proj", tp))
        mlp = f"model.layers.{i}.mlp"
        if experts is None or i < moe_from:
            _add_mlp(add, mlp, hidden, config.intermediate_size, tp)
            continue
        number = experts + (1 if fused_shared else 0)
        moe = FusedMoE(
            quant_method=Quiet(get_triton_quant_info=lambda layer: None, runner=None),
            moe_runner_config=Quiet(is_gated=True, gemm1_alpha=None), dispatcher=None, num_local_experts=number,
            should_fuse_routed_scaling_factor_in_topk=False, moe_tp_size=tp, moe_tp_rank=rank,
            intermediate_size_per_partition=config.moe_intermediate_size // tp, is_shared_fused_moe=False,
            hidden_size=hidden, num_experts=number, num_fused_shared_experts=0, top_k=config.num_experts_per_tok,
            runner=None,
        )  # fmt: skip
        add(f"{mlp}.experts", moe)
        if shared and not fused_shared:
            _add_mlp(add, f"{mlp}.{spelling}", hidden, shared, tp)
    if config.model_type.startswith("qwen3_5"):
        sizes = _sizes_of_qwen3_5(version)
        model.get_hidden_dim = functools.partial(sizes, model)
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module.tp_group = Quiet(rank_in_group=rank, world_size=tp)
            replicas = getattr(module, "num_kv_head_replicas", 1)
            module.kv_tp_group = Quiet(rank_in_group=rank // replicas, world_size=tp // replicas)
    return model


def _add_linear_attention(add, path: str, config: Any, tp: int) -> None:
    key = config.linear_num_key_heads * config.linear_key_head_dim
    value = config.linear_num_value_heads * config.linear_value_head_dim
    rows = [size // tp for size in (key, key, value, value)]
    leaves = ("in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z")
    layer = MergedColumnParallelLinear(
        output_sizes=[key, key, value, value], output_partition_sizes=rows, hf_leaves=leaves, rows=rows,
        input_size_per_partition=config.hidden_size,
    )  # fmt: skip
    add(f"{path}.in_proj_qkvz", layer)
    add(f"{path}.out_proj", _row(value, config.hidden_size, "out_proj", tp))


def _add_mla(add, attention: str, config: Any, tp: int) -> None:
    heads, rope, nope = config.num_attention_heads, config.qk_rope_head_dim, config.qk_nope_head_dim
    down = config.kv_lora_rank + rope
    if config.q_lora_rank:
        rows = [config.q_lora_rank, down]
        leaves: tuple[str, ...] = ("q_a_proj", "kv_a_proj_with_mqa")
        layer: Layer = ReplicatedLinear(
            output_size=sum(rows), hf_leaves=leaves, rows=rows, output_partition_sizes=[sum(rows)]
        )
        add(f"{attention}.fused_qkv_a_proj_with_mqa", layer)
        add(f"{attention}.q_b_proj", _column(heads * (nope + rope), "q_b_proj", tp))
    else:
        add(f"{attention}.q_proj", _column(heads * (nope + rope), "q_proj", tp))
        layer = ReplicatedLinear(
            output_size=down, hf_leaves=("kv_a_proj_with_mqa",), rows=[down], output_partition_sizes=[down]
        )
        add(f"{attention}.kv_a_proj_with_mqa", layer)
    add(f"{attention}.kv_b_proj", _column(heads * (nope + config.v_head_dim), "kv_b_proj", tp))
    add(f"{attention}.o_proj", _row(heads * config.v_head_dim, config.hidden_size, "o_proj", tp))


def _add_mlp(add, path: str, hidden: int, inner: int, tp: int) -> None:
    layer = MergedColumnParallelLinear(
        output_sizes=[inner, inner], output_partition_sizes=[inner // tp] * 2, hf_leaves=("gate_proj", "up_proj"),
        rows=[inner // tp] * 2, input_size_per_partition=hidden,
    )  # fmt: skip
    add(f"{path}.gate_up_proj", layer)
    add(f"{path}.down_proj", _row(inner, hidden, "down_proj", tp))


def _column(size: int, leaf: str, tp: int) -> ColumnParallelLinear:
    return ColumnParallelLinear(output_partition_sizes=[size // tp], hf_leaves=(leaf,), rows=[size // tp])


def _row(size: int, out: int, leaf: str, tp: int) -> RowParallelLinear:
    return RowParallelLinear(input_size_per_partition=size // tp, output_size=out, hf_leaves=(leaf,), rows=[out])
