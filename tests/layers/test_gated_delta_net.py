"""Megatron's own GatedDeltaNet, which has no LoRA form: the report names it, and so does a refused target.

The class is Megatron's and so are its linears; its kernel (fla, on a GPU) is not needed to name them.

    pytest tests/layers/test_gated_delta_net.py
"""

from __future__ import annotations

import pytest
import torch
from harness import Layout, WorkerError
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig, apply_lora
from slime_plugins.lora.rehearsal.model import build_chunks

PATHS = ("self_attention.in_proj", "self_attention.out_proj")


def gated_delta_net(config) -> torch.nn.Module:
    """As Megatron's constructor leaves it, but for the sizes, and for parameters on no CUDA device."""
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.module import MegatronModule

    module = GatedDeltaNet.__new__(GatedDeltaNet)
    MegatronModule.__init__(module, config)
    width, hidden = 16, config.hidden_size
    common = dict(config=config, init_method=config.init_method, bias=False)
    module.in_proj = ColumnParallelLinear(hidden, 4 * width + 8, gather_output=False, **common)
    module.conv1d = torch.nn.Conv1d(3 * width, 3 * width, 4, groups=3 * width, bias=False)
    module.dt_bias, module.A_log = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    module.out_proj = RowParallelLinear(width, hidden, input_is_parallel=True, skip_bias_add=True, **common)
    return module


def adapt(layout: Layout, hf_dir, config):
    """In the first layer of the first stage, as in a hybrid. The report and the frozen linears' parameters."""
    from megatron.core import parallel_state

    reports = []

    def apply(chunks):
        if parallel_state.is_pipeline_first_stage():
            layer = chunks[0].decoder.layers[0]
            layer.self_attention = gated_delta_net(layer.config)
        reports.append(apply_lora(chunks, config))

    (chunk,) = build_chunks(hf_dir, apply=apply)
    inside = {n.rsplit(".", 2)[1] for n, p in chunk.named_parameters() if "_proj" in n and p.requires_grad}
    return reports[0], inside & {"in_proj", "out_proj"}


@pytest.mark.parametrize("sizes", [dict(tp=2), dict(pp=2)])
def test_the_report_names_it(pool2, tmp_path_factory, sizes):
    for report, training in pool2.run(adapt, tiny(tmp_path_factory), LoRAConfig(rank=2), **sizes):
        assert len(report.modules) == 14 and not training
        assert len(report.not_adaptable) == 2
        for path, line in zip(PATHS, report.not_adaptable, strict=True):
            assert f"not adapted: {line}" in str(report)
            assert line.startswith(f"decoder.layers.*.{path} (") and "Megatron's GatedDeltaNet" in line
            assert "slime_plugins.models.qwen3_next" in line


@pytest.mark.parametrize(
    "target, path",
    [
        ("in_proj", "in_proj"),
        ("self_attention.out_proj", "out_proj"),
        ("*.out_proj", "out_proj"),
        ("*.layers.0.self_attention.*", "in_proj"),  # which has nothing else
        ("in_proj_qkvz", "in_proj"),  # Hugging Face's names of what is in it
        ("linear_attn.out_proj", "out_proj"),
    ],
)
def test_a_target_is_refused_by_name(pool2, tmp_path_factory, target, path):
    config = LoRAConfig(rank=2, target_modules=("linear_fc1", target))
    with pytest.raises(WorkerError) as caught:
        pool2.run(adapt, tiny(tmp_path_factory), config, pp=2)
    assert {kind for kind, _ in caught.value.errors.values()} == {"UsageError"}
    for _, text in caught.value.errors.values():
        said = [line for line in text.splitlines() if f"LoRA target {target} names" in line][-1]
        assert f"decoder.layers.0.self_attention.{path} of Megatron's GatedDeltaNet" in said
        assert "slime_plugins.models.qwen3_next or qwen3_5" in said and f"or exclude {path}" in said


@pytest.mark.parametrize(
    "targets, excluded",
    [
        (("all-linear",), ()),
        (("*.layers.*",), ()),  # a wildcard over layers takes what can be adapted in them
        (("all-linear", "in_proj", "*.out_proj"), ("in_proj", "self_attention.out_proj")),
    ],
)
def test_what_does_not_name_it_passes(pool2, tmp_path_factory, targets, excluded):
    config = LoRAConfig(rank=2, target_modules=targets, exclude_modules=excluded)
    for report, _ in pool2.run(adapt, tiny(tmp_path_factory), config, pp=2):
        assert len(report.modules) == 14 and len(report.not_adaptable) == 2
