"""``slime-lora dequantize``, the flags of a 4-bit base, and a rehearsal on one.

pytest tests/quant/test_dequantize.py
"""

from __future__ import annotations

import argparse
import json

import moe_models
import nf4_oracle
import pytest
import torch
from rehearsals import TINY, Rehearsal
from safetensors.torch import load_file

from slime_plugins.lora import BaseQuant, add_lora_arguments, validate_lora_args
from slime_plugins.lora.cli import main, rehearse
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.form import to_peft
from slime_plugins.lora.projections import Projection
from slime_plugins.lora.rehearsal.preflight import prepare


@pytest.mark.parametrize("flags, double_quant", [((), True), (("--no-bnb-4bit-use-double-quant",), False)])
def test_the_bits_of_bitsandbytes(tmp_path_factory, tmp_path, capsys, flags, double_quant):
    path = nf4_oracle.checkpoint(tmp_path_factory, dtype=torch.bfloat16)
    expected = nf4_oracle.dequantised(nf4_oracle.peft_model(path, torch.bfloat16, double_quant))
    assert main(["dequantize", "--hf-checkpoint", str(path), "--out", str(tmp_path / "out"), *flags]) == 0
    assert capsys.readouterr().out.endswith(f"14 matrices went through nf4 codes\n{tmp_path / 'out'}\n")
    before, after = (load_file(where / "model.safetensors") for where in (path, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, expected.get(name.removesuffix(".weight"), before[name])), name
    record = json.loads((tmp_path / "out" / "slime_lora_base.json").read_text())
    assert record["base_quant"] == BaseQuant(double_quant=double_quant).to_dict()


def test_experts_and_latent_attention(tmp_path, capsys):
    with moe_models.sizes(**nf4_oracle.MOE_SIZES):
        path = moe_models.make_checkpoint(tmp_path / "base", "deepseek_v3")
        expected = nf4_oracle.through_codes(path, moe_models.linears(path))
    assert main(["dequantize", "--hf-checkpoint", str(path), "--out", str(tmp_path / "out")]) == 0
    before, after = (load_file(where / "model.safetensors") for where in (path, tmp_path / "out"))
    for name, tensor in after.items():
        assert torch.equal(tensor, expected.get(name.removesuffix(".weight"), before[name])), name


def test_refused(tmp_path_factory, tmp_path, capsys):
    path = str(nf4_oracle.checkpoint(tmp_path_factory, ffn=96))
    run = ["dequantize", "--hf-checkpoint", path, "--out", str(tmp_path / "out")]
    for flags, words in (
        ((), "decoder.layers.0.mlp.linear_fc2: 96 inputs do not divide into NF4's blocks of 64; keep it dense with"),
        (("--lora-base-quant-exclude", "w2"), "match no module: w2"),
        (("--lora-base-quant-exclude", "q_proj"), "name k_proj, v_proj too"),
    ):
        assert main([*run, *flags]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main([*run, "--lora-base-quant-exclude", "linear_fc2"]) == 0


def parse(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fp8-format")
    parser.add_argument("--enable-cuda-graph", action="store_true")
    return add_lora_arguments(parser).parse_args(line.split())


def test_flags():
    assert BaseQuant.from_args(parse("--use-lora")) is None
    assert BaseQuant.from_args(parse("--use-lora --load-in-4bit")) == BaseQuant()
    args = parse("--use-lora --lora-base-quant nf4 --no-lora-base-double-quant --lora-base-quant-exclude a,b c")
    validate_lora_args(args)
    assert BaseQuant.from_args(args) == BaseQuant(double_quant=False, exclude=("a", "b", "c"))


@pytest.mark.parametrize(
    "line, words",
    [
        ("--load-in-4bit", "--lora-base-quant given without --use-lora"),
        ("--use-lora --lora-base-quant-exclude a", "--lora-base-quant-exclude given without --lora-base-quant nf4"),
        ("--use-lora --no-lora-base-double-quant", "--no-lora-base-double-quant given without"),
        ("--use-lora --load-in-4bit --no-lora-only-trainable", "--no-lora-only-trainable with --lora-base-quant nf4"),
        ("--use-lora --load-in-4bit --fp8-format e4m3", "--fp8-format with --lora-base-quant nf4: weights are"),
        ("--use-lora --load-in-4bit --enable-cuda-graph", "--enable-cuda-graph with --lora-base-quant nf4: a graph"),
    ],
)
def test_flags_that_do_not_go_together(line, words):
    with pytest.raises(UsageError, match=words):
        validate_lora_args(parse(line))


def test_plan_of_a_32b_model_at_home(tmp_path, capsys):
    """A user's 8 cards held 27.5 GB each; the base is 18 of them."""
    config = dict(
        architectures=["Qwen3ForCausalLM"],
        **dict(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, vocab_size=151936, head_dim=128),
        **dict(num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False),
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = [
        "plan",
        "--hf-checkpoint",
        str(tmp_path),
        "--dp",
        "8",
        "--lora-target-modules",
        "q_proj,k_proj,v_proj,o_proj",
    ]
    assert main([*plan, "--load-in-4bit", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert 17.8 < cost["lora"]["base_weights"] / 2**30 < 18.0
    assert main([*plan, "--lora-base-quant", "nf4", "--tp", "16", "--json"]) == 2
    assert "key/value heads" in capsys.readouterr().err


@pytest.fixture
def own(tmp_path_factory, tmp_path):
    """What a rehearsal on a base of one's own is given."""
    path = nf4_oracle.checkpoint(tmp_path_factory, head_dim=16, ffn=768)  # o_proj: 128 inputs
    (tmp_path / "prompts.jsonl").write_text('{"input": "t5 t6", "label": "t7"}\n')
    given = dict(hf_checkpoint=str(path), prompt_data=str(tmp_path / "prompts.jsonl"), rollout_max_response_len=8)
    return given | dict(out=str(tmp_path / "out"), tp=1)


def prepared(given: dict):
    lines: list[str] = []
    return prepare(given, lines.append), "\n".join(lines)


def test_a_rehearsal_knows_its_base(own, tmp_path):
    assert prepared(own)[0].base_quant is None
    nf4 = {**own, "lora_base_quant": "nf4"}
    assert prepared(nf4)[0].base_quant == BaseQuant()
    with pytest.raises(UsageError, match=r"linear_proj: 128 inputs cut in 4 .*-parallel size that divides 2"):
        prepared({**nf4, "tp": 4})
    settings, _ = prepared({**nf4, "tp": 4, "lora_base_quant_exclude": ["linear_proj"]})
    assert settings.base_quant == BaseQuant(exclude=("linear_proj",))
    (tmp_path / "settings.json").write_text(json.dumps(settings.to_dict()))
    assert prepared(rehearse._read_config(str(tmp_path / "settings.json")))[0] == settings
    assert settings.namespace().lora_base_quant == "nf4"
    with pytest.raises(UsageError, match="--lora-base-quant-exclude given without --lora-base-quant nf4"):
        prepared({**own, "lora_base_quant_exclude": ["linear_proj"]})


def test_a_start_brings_its_base(own, tmp_path):
    """An adapter of a 4-bit base, imported: the checkpoint says so, and a rehearsal goes on with that base."""
    base, plain = own["hf_checkpoint"], BaseQuant(double_quant=False)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    adapter = to_peft([Projection(n, torch.ones(2, 192), torch.ones(128, 2), 0.5) for n in names], base)
    write_adapter(tmp_path / "peft", *adapter, base=base, base_quant=plain)
    command = ["import", "--adapter", str(tmp_path / "peft"), "--hf-checkpoint", base, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    for start, path in (("load", "run"), ("lora_adapter_path", "run"), ("lora_adapter_path", "peft")):
        settings, said = prepared({**own, start: str(tmp_path / path)})
        assert settings.base_quant == plain
        assert "--lora-base-quant nf4 --no-lora-base-double-quant" in said
        with pytest.raises(UsageError, match="leave them out, or give: --lora-base-quant nf4 --no-lora-base-double-"):
            prepared({**own, start: str(tmp_path / path), "lora_base_quant": "nf4"})


@pytest.mark.slow  # test_nf4_checkpoints.py compares the same logits without a rehearsal
def test_a_rehearsal_on_codes(tmp_path):
    """Rollouts and training have one base: the logits agree as on a dense one."""
    quant = ("--lora-base-quant", "nf4", "--tp", "2", "--lora-base-quant-exclude", "linear_proj")
    with Rehearsal(tmp_path / "out", tmp_path / "cache", *TINY, *quant) as run:
        code, text = run.wait()
    assert code == 0, text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["logits_max_abs_diff"] <= 1e-5
    assert summary["settings"]["base_quant"] == BaseQuant(exclude=("linear_proj",)).to_dict()


@pytest.mark.slow
def test_a_rehearsal_on_codes_learns(tmp_path):
    with Rehearsal(tmp_path / "out", tmp_path / "cache", "--lora-base-quant", "nf4", "--tp", "1") as run:
        code, text = run.wait()
    assert code == 0, text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["reward_last"] >= 0.9 > 0.4 > summary["reward_first"]
