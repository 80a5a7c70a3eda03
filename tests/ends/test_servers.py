"""What vLLM and SGLang make of an exported adapter, by their own code. Needs SERVERS_DIR (docs/development.md).

pytest tests/ends/test_servers.py
"""

from __future__ import annotations

import re
import types

import moe_models
import pytest
from moe_runs import ALPHA, RANK
from safetensors import safe_open
from servers import Servers
from test_experts_files import checkpoints, exported  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def servers():
    return Servers.here()


@pytest.mark.parametrize("family", moe_models.FAMILIES)
def test_names_and_config(servers, te_pool4, checkpoints, tmp_path, family):  # noqa: F811
    values = exported(te_pool4, checkpoints(family), tmp_path, "tp2-ep2-etp2", layout="fused")
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    # PEFT needs to be told of Qwen2-MoE that its gate and up come to twice the rank; vLLM then makes room for that.
    check_vllm(servers, tmp_path, keys, set(values), max_rank=2 * RANK if family == "qwen2_moe" else RANK)
    check_sglang(servers, tmp_path, keys)


def check_vllm(servers, adapter, keys, modules, max_rank):
    helper = servers.PEFTHelper.from_local_dir(str(adapter), None)
    helper.validate_legal(types.SimpleNamespace(max_lora_rank=max_rank))
    seen: dict[bool, set] = {True: set(), False: set()}
    for key in keys:
        name, is_A = servers.parse_fine_tuned_lora_name(key)
        seen[is_A].add(name)
        assert helper.get_rank_and_scaling(name) == (RANK, ALPHA / RANK)
        if ".experts" in name:  # as lora_model.py (0.33.0) looks it up among the modules that it expects
            assert re.fullmatch(r"experts\.\d+\.(gate|up|down)_proj", name[name.find(".experts") + 1 :])
    assert seen[True] == seen[False] == modules


def check_sglang(servers, adapter, keys):
    """Scaling is lora_alpha / r whatever else the config says; each key must find a buffer by its target name."""
    config = servers.LoRAConfig(str(adapter))
    assert config.lora_alpha / config.r == ALPHA / RANK
    assert not config.hf_config.get("use_rslora")
    for pattern in (config.hf_config.get("alpha_pattern") or {}) | (config.hf_config.get("rank_pattern") or {}):
        assert not any(re.search(pattern, key) for key in keys), "it would be ignored"
    targets = servers.get_normalized_target_modules(config.target_modules)
    stacked = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}  # its names after stacking
    for key in keys:
        name = re.sub(r"\b(q|k|v|gate|up)_proj\b", lambda match: stacked[match[1]] + "_proj", key)
        name = re.sub(r"\b(q_a_proj|kv_a_proj_with_mqa)\b", "fused_qkv_a_proj_with_mqa", name)
        assert servers.get_target_module_name(name, targets) in name
