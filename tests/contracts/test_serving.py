"""Adapters through SGLang's own LoRA code, on CPU tensors: every cell is served right, or refused at launch.

make contracts
"""

from __future__ import annotations

import pytest
import serving_cases
import serving_table
from wheels import SGLANG, unpacked

pytestmark = pytest.mark.contracts


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def found(root):
    for version in SGLANG:
        unpacked("sglang", version)
    return serving_table.outcomes(root)


@pytest.mark.parametrize("version", SGLANG)
def test_what_sglang_does_not_serve_is_refused_and_nothing_else(found, version):
    wrong = {
        key: (result.trouble, [row.name for row in result.refusals])
        for key, result in found.items()
        if key[0] == version and result is not None and bool(result.trouble) != bool(result.refusals)
    }
    assert wrong == {}
    results = [result for key, result in found.items() if key[0] == version and result is not None]
    assert sum(result.trouble is None for result in results) > 40 and sum(bool(r.trouble) for r in results) > 10


def test_the_page_has_the_table(found):
    made = serving_table.table(found)
    assert serving_table.in_page(serving_table.PAGE.read_text()) == made, (
        "make it anew: PYTHONPATH=. python tests/contracts/serving_table.py"
    )


@pytest.mark.parametrize("version", SGLANG)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "glm4_moe", "deepseek_v3", "qwen3_5_moe_text"])
def test_shards_of_tensor_parallel_engines(root, version, family):
    result = serving_cases.outcome(root, version, family, "all-linear", tp=2)
    assert result.trouble is None


@pytest.mark.parametrize("version", SGLANG)
def test_fused_shared_experts_would_lose_theirs(root, version):
    """Why adapter sync turns the fusion off: with it, no module is left that their adapters could go to."""
    words = "shared_experts.linear_fc1 shared_experts.linear_fc2"
    assert serving_cases.outcome(root, version, "glm4_moe", words).trouble is None
    fused = serving_cases.outcome(root, version, "glm4_moe", words, fused_shared=True)
    assert "dropped in silence" in fused.trouble


@pytest.mark.parametrize("version", SGLANG)
def test_experts_of_one_linear_need_both_targets(root, version):
    """SGLang wraps experts only where it is told gate, up and down; so it is, for either linear."""
    hf_dir = serving_cases.base(root, "qwen3_moe")
    args = serving_cases.arguments(hf_dir, "--lora-r", "4", "--lora-target-modules", "experts.linear_fc1")
    adapters = serving_cases.adapter_of(args, hf_dir)
    args.sglang_lora_target_modules = ["gate_proj", "up_proj"]
    assert serving_cases._serve(args, hf_dir, version, adapters, 1, 0, False) is not None
    args.sglang_lora_target_modules = ["gate_proj", "up_proj", "down_proj"]
    assert serving_cases._serve(args, hf_dir, version, adapters, 1, 0, False) is None
