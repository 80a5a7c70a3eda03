"""What is reckoned against what a GPU allocates at its peak. pytest -m gpu tests/cost/test_gpu.py

Written on a machine without one, where the steps run and nothing is compared.
"""

from __future__ import annotations

import gc
from functools import partial

import adapted
import pytest
import torch
from saved_bytes import flash_spec

from slime_plugins.lora import LoRAConfig, apply_lora
from slime_plugins.lora.cost.activations import Batch, Kernels, stage_activations
from slime_plugins.lora.cost.memory import Trained, fullest, stage_costs
from slime_plugins.lora.cost.model import Model, Split
from slime_plugins.lora.rehearsal.model import build_chunks
from slime_plugins.lora.rehearsal.tiny import make_tiny

TOKENS = 2048
SIZES = dict(num_layers=8, hidden=1024, num_heads=16, num_kv_heads=8, head_dim=64, ffn=3072, vocab_size=8192)


def peak(hf_dir, trained: Trained, recompute: str) -> int:
    """Bytes at the fullest moment of the second forward and backward, in this process.

    The optimizer's state is there by then, its step is not in it: without TransformerEngine or Apex that is torch's
    own, which takes memory for the time of it that their fused one does not.
    """
    apply = partial(apply_lora, config=trained.lora) if trained.lora else None
    chunks = build_chunks(
        hf_dir,
        dtype=torch.bfloat16,
        recompute=None if recompute == "none" else recompute,
        layer_spec=flash_spec,
        apply=apply,
    )
    model = adapted.wrap(chunks)
    optimizer = adapted.optimizer_for(model, bf16=True)
    tokens = torch.randint(4, 8000, (1, TOKENS + 1), device=torch.cuda.current_device())
    adapted.train_step(model, optimizer, tokens)
    torch.cuda.reset_peak_memory_stats()
    adapted.train_step(model, None, tokens)
    return torch.cuda.max_memory_allocated()


def warmed_up() -> int:
    """Bytes that are taken before a test: cuBLAS's workspaces are torch's memory, one for each thread that multiplies.

    What an earlier test left must go now, not while this one is measured.
    """
    gc.collect()
    x = torch.ones(512, 512, device=torch.cuda.current_device(), dtype=torch.bfloat16, requires_grad=True)
    (x @ x).sum().backward()
    del x
    return torch.cuda.memory_allocated()


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_peak(tmp_path, method, recompute):
    from one_linear import single_process_groups

    trained = Trained(lora=LoRAConfig(rank=16)) if method == "lora" else Trained(base=True)
    path = make_tiny(tmp_path, "qwen3", **SIZES, dtype=torch.bfloat16, tokenizer=False)
    model = Model.read(path)
    kernels = Kernels(flash=True, te=False, fused=False)
    how = dict(recompute=recompute, kernels=kernels)
    [stage] = stage_activations(model, trained, Split(), Batch(tokens=TOKENS), **how)
    expected = fullest(stage_costs(model, trained, Split(), "bfloat16")).total + stage.total
    with single_process_groups("nccl"):
        before = warmed_up()
        assert expected == pytest.approx(peak(path, trained, recompute) - before, rel=0.05)
