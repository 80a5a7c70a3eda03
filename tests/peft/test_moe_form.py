"""Adapters of routed experts, expert by expert and fused, are the same adapter; servers' rules for the names hold.

pytest tests/peft/test_moe_form.py
"""

from __future__ import annotations

import re

import pytest
import torch

from slime_plugins.lora.peft.config import key_of, target_list
from slime_plugins.lora.peft.experts_form import PerExpert, experts_of, per_expert, stack

E, R, H, I = 3, 2, 5, 4  # noqa: E741 - experts, rank, hidden, expert width
LAYER = "model.layers.1.mlp.experts"


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(hash(shape) % 1000))


def pairs(share_A: bool, leaves=("gate_proj", "up_proj", "down_proj")):
    torch.manual_seed(0)
    found = {}
    for expert in range(E):
        A = torch.randn(R, H)
        for leaf in leaves:
            down = leaf == "down_proj"
            own = torch.randn(R, I) if down else A if share_A else torch.randn(R, H)
            found[f"{LAYER}.{expert}.{leaf}"] = own, torch.randn(H if down else I, R)
    return found


def delta_of_parameter(A: torch.Tensor, B: torch.Tensor, rank: int) -> torch.Tensor:
    """What PEFT's ParamWrapper adds to a stacked parameter: [E, out, in] (tuners/lora/layer.py, get_delta_weight)."""
    A, B = A.reshape(E, rank, A.shape[1]), B.reshape(B.shape[0], rank, E)
    return torch.einsum("ore,eri->eoi", B, A)


@pytest.mark.parametrize("share_A", [True, False])
def test_fused_adds_the_same(share_A):
    one_by_one = pairs(share_A)
    fused, ranks = stack(one_by_one, lambda experts: E)
    assert ranks == {"gate_up_proj": R if share_A else 2 * R, "down_proj": R}
    assert fused.keys() == {f"{LAYER}.base_layer", LAYER}
    gate_up = delta_of_parameter(*fused[f"{LAYER}.base_layer"], ranks["gate_up_proj"])
    down = delta_of_parameter(*fused[LAYER], R)
    for expert in range(E):
        deltas = {leaf: B @ A for leaf in ("gate_proj", "up_proj", "down_proj")
                  for A, B in [one_by_one[f"{LAYER}.{expert}.{leaf}"]]}  # fmt: skip
        torch.testing.assert_close(gate_up[expert], torch.cat([deltas["gate_proj"], deltas["up_proj"]]))
        torch.testing.assert_close(down[expert], deltas["down_proj"])


CONFIG = {
    "peft_type": "LORA",
    "r": R,
    "lora_alpha": 6.0,
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.shared_expert.up_proj.weight"],
}


@pytest.mark.parametrize("share_A", [True, False])
def test_there_and_back(share_A):
    """Taken apart again, tensors are bit-equal, and the config says what they are."""
    one_by_one = pairs(share_A)
    fused = stack(one_by_one, lambda experts: E)[0]
    config = dict(CONFIG)
    if not share_A:
        config |= {"rank_pattern": {r".*\.gate_up_proj": 2 * R}, "alpha_pattern": {r".*\.gate_up_proj": 12.0}}
    tensors = {key_of(m, half): pair[i] for m, pair in fused.items() for i, half in enumerate("AB")}
    tensors[key_of("model.layers.1.mlp.shared_expert.up_proj", "A")] = draw(R, H)
    plain, view = per_expert(config, tensors)
    assert isinstance(view, PerExpert) and len(view) == len(list(view)) == 2 * len(one_by_one) + 1
    for name, (A, B) in one_by_one.items():
        assert torch.equal(view[key_of(name, "A")], A) and torch.equal(view[key_of(name, "B")], B)
    assert "target_parameters" not in plain and plain["rank_pattern"] == plain["alpha_pattern"] == {}
    assert {"q_proj", "mlp.shared_expert.up_proj", "mlp.experts.2.gate_proj"} <= set(plain["target_modules"])


def test_a_fused_adapter_that_peft_has_trained_keeps_its_rank():
    """No blocks of zeros: gate and up share the A of their expert, at the parameter's own rank and scaling."""
    config = CONFIG | {"rank_pattern": {"gate_up_proj": 4}, "alpha_pattern": {"gate_up_proj": 20.0}}
    A, B = draw(E * 4, H), draw(2 * I, 4 * E)
    tensors = {key_of(f"{LAYER}.base_layer", "A"): A, key_of(f"{LAYER}.base_layer", "B"): B}
    tensors |= {key_of(LAYER, "A"): draw(E * R, I), key_of(LAYER, "B"): draw(H, R * E)}
    plain, view = per_expert(config, tensors)
    whole = delta_of_parameter(A, B, 4)
    for i, leaf in enumerate(("gate_proj", "up_proj")):
        product = view[key_of(f"{LAYER}.1.{leaf}", "B")] @ view[key_of(f"{LAYER}.1.{leaf}", "A")]
        torch.testing.assert_close(product, whole[1, i * I : (i + 1) * I])
        assert plain["rank_pattern"][rf"experts\.\d+\.{leaf}"] == 4
        assert plain["alpha_pattern"][rf"experts\.\d+\.{leaf}"] == 20.0


def test_one_parameter_alone():
    down, _ = stack(pairs(True, ("down_proj",)), lambda experts: E)
    assert down.keys() == {LAYER}
    up, ranks = stack(pairs(True, ("up_proj",)), lambda experts: E)
    assert up.keys() == {LAYER} and ranks == {"gate_up_proj": R}
    assert not up[LAYER][1][:I].any(), "gate is left alone"
    config = CONFIG | {"target_parameters": ["mlp.experts.gate_up_proj"]}
    _, view = per_expert(config, {key_of(LAYER, half): up[LAYER][i] for i, half in enumerate("AB")})
    assert f"base_model.model.{LAYER}.0.up_proj.lora_A.weight" in view


def test_what_cannot_be_fused_or_taken_apart():
    some = pairs(True)
    del some[f"{LAYER}.1.up_proj"]
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj has no adapter"):
        stack(some, lambda experts: E)
    with pytest.raises(ValueError, match="7 rows, which is no whole number of experts of rank 2"):
        per_expert(CONFIG, {key_of(LAYER, "A"): draw(7, I), key_of(LAYER, "B"): draw(H, 6)})
    other = CONFIG | {"target_parameters": ["mlp.router.weight_of_something"]}
    assert per_expert(other, {}) == (other, {})


def test_target_list_says_which_mlp():
    base = {f"model.layers.{n}.mlp.{path}.up_proj" for n in (0, 1) for path in ("shared_expert", "experts.0")}
    base |= {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)}
    experts = {name for name in base if ".experts." in name}
    assert target_list(experts, base) == ["experts.0.up_proj"]
    assert target_list(base, base) == ["q_proj", "up_proj"]
    assert target_list({"model.layers.1.mlp.shared_expert.up_proj"}, base) == [
        "model.layers.1.mlp.shared_expert.up_proj"
    ]


def test_names_are_those_that_servers_parse():
    """Per-expert keys as vLLM and SGLang take them apart.

    vLLM (lora/lora_model.py at 0306474): the module is the key without prefix and the last two pieces; for a module
    with ".experts" what follows the first dot of it, "experts.3.gate_proj", must be one of its expected modules.
    SGLang (srt/lora/mem_pool.py at 00639c4): the expert is re.search(r"experts\\.(\\d+)\\."), the module a target name
    contained in the key; "shared_experts." goes to the dense path.
    """
    for name in pairs(True):
        key = key_of(name, "A")
        pieces = key.split(".")
        assert pieces[:2] == ["base_model", "model"] and pieces[-2:] == ["lora_A", "weight"]
        module = ".".join(pieces[2:-2])
        suffix = module[module.find(".experts") + 1 :]
        assert re.fullmatch(r"experts\.[0-2]\.(gate|up|down)_proj", suffix)
        assert re.search(r"experts\.(\d+)\.", key)[1] == suffix.split(".")[1]
        assert experts_of(name) == LAYER
    shared = key_of("model.layers.1.mlp.shared_experts.up_proj", "A")
    assert not re.search(r"experts\.(\d+)\.", shared) and experts_of(shared) is None
