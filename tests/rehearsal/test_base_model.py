"""The Megatron base built from a Hugging Face checkpoint computes what transformers computes, and refuses bad ones.

pytest tests/rehearsal/test_base_model.py
MEGATRON_DIR=/path/to/Megatron-LM pytest tests/rehearsal/test_base_model.py
"""

import json
import os
import time

import families
import pytest
import torch
from harness import Layout, WorkerError

from slime_plugins.lora.rehearsal.tiny import FAMILIES, WITH_EXPERTS, WITH_LINEAR, make_tiny

MORE = tuple(dict.fromkeys((*WITH_EXPERTS, *WITH_LINEAR)))
"""Families with routed experts, linear attention, or both."""

VOCAB = 131  # odd: the embedding has to be padded at TP 2
TOKENS = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def base_logits(layout: Layout, hf_dir) -> torch.Tensor | None:
    """Full logits [batch, tokens, vocab] on ranks of the last stage, through Megatron's forward-only schedule."""
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from slime_plugins.lora.rehearsal.model import build_chunks

    chunks = build_chunks(hf_dir, sequence_parallel=layout.sp, vpp=layout.vpp)
    tokens = TOKENS
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    outputs = []

    def step(_, chunk):
        def keep(logits):
            outputs.append(gather_from_tensor_model_parallel_region(logits)[..., :VOCAB])
            return torch.zeros(()), {}

        return chunk(tokens, positions, None), keep

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(chunks),
            model=chunks,
            num_microbatches=layout.pp,  # the interleaved schedule wants a multiple of the stages
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
        )
    return outputs[0] if mpu.is_pipeline_last_stage() else None


def hf_logits(hf_dir) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(TOKENS).logits


def assert_same_logits(pool, hf_dir, **layout):
    expected = hf_logits(hf_dir)
    results = [x for x in pool.run(base_logits, hf_dir, **layout) if x is not None]
    assert results
    for logits in results:
        error = (logits - expected).abs().max() / expected.abs().max()
        assert error <= 1e-5, f"relative error {error:.2e}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    # Wrong pairs of sizes cannot match: 4 heads of 12 in a hidden size of 40, four layers for PP 2 with VPP 2.
    sizes = {"hidden": 40, "head_dim": 12, "ffn": 56, "num_layers": 4, "vocab_size": VOCAB, "tokenizer": False}
    made = {
        family: make_tiny(root / family, family, **(sizes if family != "qwen2" else sizes | {"hidden": 48}))
        for family in FAMILIES
    }
    # transformers' grouped products want an expert's channels in multiples of 16 bytes.
    made |= {family: make_tiny(root / family, family, **(sizes | {"ffn": 64})) for family in MORE}
    made["qwen3-untied-sharded"] = make_tiny(root / "s", "qwen3", **sizes, tied=False, max_shard_size="40KB")
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_tp1(pool1, checkpoints, family):
    assert_same_logits(pool1, checkpoints[family])


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tp2(pool2, checkpoints, family, sp):
    assert_same_logits(pool2, checkpoints[family], tp=2, sp=sp)


@pytest.mark.parametrize("vpp", [None, 2])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_pp2(pool2, checkpoints, family, vpp):
    assert_same_logits(pool2, checkpoints[family], pp=2, vpp=vpp)


@pytest.mark.parametrize("family", MORE)
def test_experts_and_linear_attention(pool2, checkpoints, family):
    """Whole on every rank; cut with sequence parallelism; over stages of two chunks, where layers differ."""
    assert_same_logits(pool2, checkpoints[family])
    assert_same_logits(pool2, checkpoints[family], tp=2, sp=True)
    assert_same_logits(pool2, checkpoints[family], pp=2, vpp=2)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_experts_on_two_ranks(pool2, checkpoints, family):
    assert_same_logits(pool2, checkpoints[family], ep=2, etp=1)
    assert_same_logits(pool2, checkpoints[family], tp=2, sp=True, ep=2, etp=1)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_language_model_of_a_vision_base(pool2, tmp_path, name):
    """Refused as it is on the hub, and taken as the refusal says to write it: experts stacked, then."""
    from transformers import AutoModelForCausalLM

    from slime_plugins.lora.base.decoder import HFBase

    whole = families.make(tmp_path / "whole", name, text={"vocab_size": VOCAB, "moe_intermediate_size": 16})
    with pytest.raises(ValueError, match=r"sees images, .* save_original_format=False") as error:
        HFBase.read(whole)
    assert "\n" not in str(error.value)
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path / "named otherwise")
    with pytest.raises(ValueError, match=r"layers lie under model\.language_model\.layers, as"):
        HFBase.read(tmp_path / "named otherwise")
    model.save_pretrained(tmp_path / "text", save_original_format=False)
    assert_same_logits(pool2, tmp_path / "text", **({"ep": 2, "etp": 1} if "moe" in name else {"tp": 2}))


def test_sharded_files_and_own_head(pool2, checkpoints):
    assert len(list(checkpoints["qwen3-untied-sharded"].glob("*.safetensors"))) > 1
    assert_same_logits(pool2, checkpoints["qwen3-untied-sharded"], tp=2)


def test_llama3_rope_matters(checkpoints, tmp_path):
    """The comparison above would catch a missing frequency scaling: without it transformers itself differs."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in checkpoints["llama"].iterdir():
        (plain / file.name).symlink_to(file)
    config = json.loads((plain / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    (plain / "config.json").unlink()
    (plain / "config.json").write_text(json.dumps(config))
    scaled = hf_logits(checkpoints["llama"])
    assert (hf_logits(plain) - scaled).abs().max() / scaled.abs().max() > 1e-3


def broken_copy(source, target, name, edit):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(edit(file.read_bytes()) if file.name == name else file.read_bytes())
    return target


def config_edit(**changes):
    return lambda raw: json.dumps(json.loads(raw) | changes).encode()


@pytest.mark.parametrize(
    "file, edit, kind, words",
    [
        (
            "config.json",
            config_edit(architectures=["GPT2LMHeadModel"]),
            ValueError,
            "GPT2LMHeadModel.*Qwen3ForCausalLM",
        ),
        ("config.json", config_edit(num_hidden_layers=5), ValueError, "missing: model.layers.4"),
        ("config.json", config_edit(num_hidden_layers=3), ValueError, "unexpected: model.layers.3"),
        ("config.json", config_edit(intermediate_size=64), ValueError, r"gate_proj.*\[56, 40\].*\[64, 40\]"),
        ("config.json", config_edit(rope_parameters={"rope_type": "yarn"}), ValueError, "yarn"),
        ("config.json", lambda raw: raw[:-9], ValueError, "config.json: not valid JSON"),
        ("model.safetensors", lambda raw: raw[:-9], ValueError, "model.safetensors: (truncated|not a whole)"),
        ("model.safetensors", lambda raw: b"", ValueError, "model.safetensors: (truncated|not a whole)"),
    ],
)
def test_bad_checkpoint(checkpoints, tmp_path, file, edit, kind, words):
    from slime_plugins.lora.base.decoder import HFBase

    path = broken_copy(checkpoints["qwen3"], tmp_path / "broken", file, edit)
    with pytest.raises(kind, match=words):
        HFBase.read(path)


def test_usage_errors(checkpoints, tmp_path):
    from slime_plugins.lora.base.decoder import HFBase
    from slime_plugins.lora.errors import UsageError

    with pytest.raises(UsageError, match=r"no config\.json"):
        HFBase.read(tmp_path)
    base = HFBase.read(checkpoints["qwen3"])
    with pytest.raises(UsageError, match="--tp 3: 4 attention heads"):
        base.check_parallel(tp=3)
    with pytest.raises(UsageError, match="--tp 4: 2 key/value heads"):
        base.check_parallel(tp=4)
    with pytest.raises(UsageError, match="--pp 3: 4 layers"):
        base.check_parallel(tp=1, pp=3)


def one_rank_fails(layout: Layout):
    if torch.distributed.get_rank() == 1:
        raise KeyError("rank one gives up")
    torch.distributed.barrier()


def exits(layout: Layout):
    os._exit(7)


def test_harness_failure_does_not_hang(pool2):
    """The tools of all these tests: a failing rank is named, the rank that waits for it is not waited for."""
    start = time.monotonic()
    with pytest.raises(WorkerError, match="rank one gives up") as info:
        pool2.run(one_rank_fails, timeout=60)
    assert info.value.errors == {1: ("KeyError", "'rank one gives up'")}
    with pytest.raises(WorkerError, match="code 7"):
        pool2.run(exits, timeout=60)
    assert time.monotonic() - start < 60
