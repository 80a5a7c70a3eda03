"""Regular expressions out of a config: those that people write, and those that never end."""

from __future__ import annotations

import re
import time

import adapter_dirs
import pytest

from slime_plugins.lora.peft.config import is_target
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.patterns import Pattern
from slime_plugins.lora.peft.verify import verify_adapter

NAMES = [
    *adapter_dirs.modules(), "model.decoder.block.0.layer.0.SelfAttention.q", "model.visual.blocks.3.attn.qkv",
    "model.language_model.layers.17.mlp.experts.7.gate_proj", "lm_head", "model.layers.10.self_attn.q_proj",
]  # fmt: skip
USED = [
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"^(?!.*visual).*(?:q_proj|k_proj)$",
    r"^(language_model|model)(?=\.).*\.(q_proj|v_proj)",
    r"model\.layers\.\d+\.(self_attn|mlp)\.\w+",
    r"model\.layers\.(0|[1-9][0-9]?)\..*proj",
    r".*\.[0-9]{1,3}\..*",
    r"(.*\.)?(experts\.\d+\.gate_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp).*?(?:q_proj|gate_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.(?:up_proj))",
]
ENDLESS = [
    r"(a+)+$", r"(a*)*b", r"(\w+\.?)*x", r"((a|b)*c)*d", r".*.*.*.*.*.*.*.*x", r"(a?){50}a{50}", r"(.)\1*x",
    r"(a{1,30}){1,30}b", r"(x+x+)+y", r"(ab|a|b)*c", "a?" * 40 + "a" * 40, r"(?=(a+)+b)a", "x" * 30_000,
]  # fmt: skip


@pytest.mark.parametrize("text", USED)
def test_what_people_write_matches_as_in_re(text):
    found = [name for name in NAMES if Pattern(text).fullmatch(name)]
    assert found == [name for name in NAMES if re.fullmatch(text, name)] and found


@pytest.mark.parametrize("text", [*ENDLESS, "("])
def test_what_could_take_forever_is_a_problem_of_the_config(tmp_path, text):
    config, tensors = adapter_dirs.adapter()
    write_adapter(tmp_path / "a", config, tensors)
    start = time.perf_counter()
    for field, value in (("target_modules", text), ("exclude_modules", text), ("rank_pattern", {text: 3})):
        with pytest.raises(ValueError, match=field) as error:
            write_adapter(tmp_path / "b", {**config, field: value}, tensors)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert time.perf_counter() - start < 2


def test_what_is_left_is_bounded():
    """The worst that is let through, on the longest name."""
    start = time.perf_counter()
    Pattern(".*.*.*.*.*x").fullmatch("a" * 128)
    assert time.perf_counter() - start < 20
    with pytest.raises(ValueError, match="has 129 characters"):
        is_target({"target_modules": ".*x"}, "a" * 129)


def test_verify_says_it(tmp_path):
    import json

    config, tensors = adapter_dirs.adapter()
    write_adapter(tmp_path / "a", config, tensors)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": "(a+)+$"}))
    (problem,) = verify_adapter(tmp_path / "a").problems
    assert problem.kind == "config" and "repetitions inside repetitions" in problem.message
