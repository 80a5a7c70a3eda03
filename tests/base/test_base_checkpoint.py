"""A base of any origin: headers, config and index judged whole; names as it spells them; which base it is.

Command: pytest tests/base/test_base_checkpoint.py
"""

from __future__ import annotations

import json
import os
import struct
from types import SimpleNamespace

import adapter_dirs
import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_plugins.lora.base import fingerprint as base
from slime_plugins.lora.base import sums
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.decoder import HFBase
from slime_plugins.lora.base.merge import merge_checkpoint
from slime_plugins.lora.files import cache
from slime_plugins.lora.files.safetensors import read_header
from slime_plugins.lora.projections import Projection
from slime_plugins.lora.rehearsal.tiny import make_tiny

DEEP = "[" * 200_000 + "]" * 200_000
GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path, header, data=bytes(24)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(**changes):
    return {"a": {**GOOD["a"], **changes}}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (DEEP.encode(), "nested deeper"),
        (b'{"a": ' + DEEP.encode() + b"}", "nested deeper"),
        ([], "expected an object"),
        (b"{", "Expecting"),
        (b"\xff\xfe", "decode"),
        (b'{"a": 1, "a": 1}', "'a' is there twice"),
        (b'{"\\ud800": 1}', "surrogate"),
        ({"a": 1}, "no dtype, shape"),
        ({"__metadata__": {"x": 1}}, "__metadata__"),
        (entry(dtype="F33"), "dtype F33"),
        (entry(dtype=[]), "dtype []"),
        (entry(shape=[2, -3]), "shape [2, -3]"),
        (entry(shape=[2, True]), "shape [2, True]"),
        (entry(shape=[2.0, 3]), "shape [2.0, 3]"),
        (entry(shape=[2**40, 2**40]), "which no tensor has"),
        (entry(shape=[0, 2**70]), "which no tensor has"),
        (entry(shape=[2, 4]), "takes 32 bytes"),
        (entry(shape=6), "shape 6"),
        (entry(data_offsets=[0]), "expected two numbers"),
        (entry(data_offsets=[24, 0]), "takes 24 bytes"),
        (entry(data_offsets=[8, 32]), "gap or overlap"),
        (GOOD | {"b": GOOD["a"]}, "gap or overlap"),
        (GOOD | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}}, "gap or overlap"),
        ({}, "describes"),
    ],
)
def test_headers_that_are_none(tmp_path, header, words):
    path = write(tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match="not a whole safetensors file") as error:
        read_header(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    good = write(tmp_path / "good", GOOD)
    assert read_header(good).tensors["a"].read().shape == (2, 3)
    whole = good.read_bytes()
    (tmp_path / "short").write_bytes(whole[:-1])
    (tmp_path / "long").write_bytes(whole + b"0")
    (tmp_path / "huge").write_bytes(struct.pack("<Q", 2**63) + whole[8:])
    (tmp_path / "tiny").write_bytes(b"\0\0\0")
    (tmp_path / "lfs").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir").mkdir()
    for name, words in (
        ("short", "truncated"), ("long", "truncated"), ("huge", "header wants"), ("tiny", "no header"),
        ("lfs", "git lfs pull"), ("fifo", "is a FIFO"), ("dir", "is a directory"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            read_header(tmp_path / name)
    with pytest.raises(ValueError, match="is a device"):
        read_header("/dev/zero")


def test_reads_what_safetensors_wrote(tmp_path):
    tensors = {
        "m": torch.randn(6, 8), "h": torch.randn(3, 5).half(), "b": torch.randn(4).bfloat16(), "i": torch.arange(7),
        "e": torch.empty(0, 3), "s": torch.tensor(2.5), "f": torch.randn(2, 2).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x", {"format": "pt"})
    header = read_header(tmp_path / "x")
    assert header.metadata == {"format": "pt"} and header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = header.tensors[name].read()
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert torch.equal(
            read.view(torch.uint8) if read.dim() else read, tensor.view(torch.uint8) if read.dim() else tensor
        )
    m = header.tensors["m"]
    assert torch.equal(m.read(rows=slice(2, 5)), tensors["m"][2:5])
    assert torch.equal(m.read(rows=slice(4, 99)), tensors["m"][4:])
    assert m.read(rows=slice(9, 12)).shape == (0, 8)
    assert torch.equal(m.read(columns=slice(2, 4)), tensors["m"][:, 2:4])
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes() + b"0")
    with pytest.raises(ValueError, match="changed or replaced while it was read"):
        m.read()


@pytest.mark.parametrize(
    "text", ["true", "[]", "3", '"x"', "null", DEEP, '{"a": ' + DEEP + "}", '{"a":1,"a":2}', "{", ""]
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_of_any_shape_is_one_line(tmp_path, name, text):
    path = adapter_dirs.base_checkpoint(tmp_path / "base", shards=2)
    (path / name).write_text(text)
    with pytest.raises(ValueError, match=name) as error:
        BaseCheckpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ([], "gives no file name"),
        ({"a": 1}, "gives no file name"),
        ({"a": "../x.safetensors"}, "expected a .safetensors file beside it"),
        ({"a": "/x.safetensors"}, "expected a .safetensors file beside it"),
        ({"a": ".."}, "expected a .safetensors file beside it"),
        ({"a": "sub/x.safetensors"}, "expected a .safetensors file beside it"),
        ({"a": "x\0.safetensors"}, "expected a .safetensors file beside it"),
        ({"a": "config.json"}, "expected a .safetensors file beside it"),
        ({"a": "x.safetensors"}, "which is not there"),
        ({"a": "model-00001-of-00002.safetensors"}, "which has it not"),
    ],
)
def test_an_index_stays_in_its_directory(tmp_path, weight_map, words):
    path = adapter_dirs.base_checkpoint(tmp_path / "base", shards=2)
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=words):
        BaseCheckpoint(path)


def test_links_of_a_cache_are_followed_and_others_not_copied(tmp_path):
    """As Hugging Face's cache has them: snapshots/x/file -> ../../blobs/sha."""
    base_dir = make_tiny(tmp_path / "plain", tokenizer=False)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "x"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in base_dir.iterdir():
        file.rename(blobs / f"0{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/0{file.name}")
    name, (rows, columns) = (
        "model.layers.0.mlp.up_proj",
        BaseCheckpoint(snapshot).linear_shape("model.layers.0.mlp.up_proj"),
    )
    projection = Projection(name, torch.ones(2, columns), torch.ones(rows, 2), 1.0)
    merge_checkpoint([projection], snapshot, tmp_path / "merged")
    assert not (tmp_path / "merged" / "config.json").is_symlink() and BaseCheckpoint(tmp_path / "merged").weights
    (tmp_path / "secret").write_text("of the machine")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes.txt is a link to .*secret, outside of the checkpoint"):
        merge_checkpoint([projection], snapshot, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("value", ["64", -1, 0, 1.5, True, 10**20, [], {}, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
            "intermediate_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings"]
)  # fmt: skip
def test_numbers_of_a_config(key, value, tmp_path):
    config = {
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 128,
    }  # fmt: skip
    assert HFBase._from_config(config, tmp_path).head_dim == 16
    fits = (key in ("rms_norm_eps", "rope_theta") and value == 1.5) or (key == "tie_word_embeddings" and value is True)
    if fits:
        HFBase._from_config(config | {key: value}, tmp_path)
        return
    with pytest.raises(ValueError, match=f"config.json: {key} is"):
        HFBase._from_config(config | {key: value}, tmp_path)


@pytest.mark.parametrize("prefix", ["model.layers.", "model.language_model.layers.", "language_model.model.layers."])
@pytest.mark.parametrize("shared", ["shared_expert", "shared_experts"])
def test_names_meet_a_base(tmp_path, prefix, shared):
    """What merging, export, import, fingerprints and verify see of it is the same."""
    leaves = {f"mlp.{shared}.up_proj": (6, 8), "self_attn.q_proj": (4, 8)}
    linears = {f"{prefix}{n}.{leaf}": shape for n in range(2) for leaf, shape in leaves.items()}
    text = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "tie_word_embeddings": False}
    config = text if prefix == "model.layers." else {"text_config": text}
    path = adapter_dirs.base_checkpoint(tmp_path / "base", linears, config=json.dumps(config))
    checkpoint = BaseCheckpoint(path)
    canonical = "model.layers.1.mlp.shared_experts.up_proj"
    spelled = f"{prefix}1.mlp.{shared}.up_proj"
    assert checkpoint.layer_prefix == prefix and checkpoint.text_config == text
    assert checkpoint.spelled(canonical) == spelled and checkpoint.canonical(spelled) == canonical
    assert checkpoint.spelled(f"{canonical}.weight") == f"{spelled}.weight"
    assert checkpoint.canonical(canonical) == canonical
    assert base.architecture_of_hf(checkpoint)["kv_channels"] == 4
    expected = base.digits(
        sum(sums.checksum(load_file(path / "model.safetensors")[f"{n}.weight"]) for n in linears if "1." in n)
    )
    assert base.fingerprint_of_hf(checkpoint, "float32", [1])["layers"] == {"1": expected}
    merge_checkpoint([Projection(canonical, torch.ones(2, 8), torch.ones(6, 2), 0.5)], path, tmp_path / "merged")
    before, after = (load_file(d / "model.safetensors") for d in (path, tmp_path / "merged"))
    assert torch.allclose(after[f"{spelled}.weight"], before[f"{spelled}.weight"] + 1)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [f"{spelled}.weight"]


# config.json of the model, and what slime's script for it gives Megatron.
LATENT = {
    "DeepSeek-V3": (dict(num_hidden_layers=61, hidden_size=7168, intermediate_size=18432, num_attention_heads=128,
                         num_key_value_heads=128, n_routed_experts=256, q_lora_rank=1536, kv_lora_rank=512), 128),
    "Kimi-K2": (dict(num_hidden_layers=61, hidden_size=7168, intermediate_size=18432, num_attention_heads=64,
                     num_key_value_heads=64, n_routed_experts=384, q_lora_rank=1536, kv_lora_rank=512), 64),
    "Moonlight": (dict(num_hidden_layers=27, hidden_size=2048, intermediate_size=11264, num_attention_heads=16,
                       num_key_value_heads=16, n_routed_experts=64, q_lora_rank=None, kv_lora_rank=512), 128),
}  # fmt: skip


@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_has_no_kv_channels(name):
    """hidden / heads is 56, 112 and 128 there, slime's scripts give 128, 64 and 128; the right base is accepted."""
    config, kv_channels = LATENT[name]
    model = SimpleNamespace(
        num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"], kv_channels=kv_channels,
        ffn_hidden_size=config["intermediate_size"], num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_attention_heads"], num_moe_experts=config["n_routed_experts"],
        multi_latent_attention=True,
    )  # fmt: skip

    def of(architecture):
        return {"architecture": architecture, "dtype": "bfloat16", "layers": {}}

    here, there = of(base.architecture_of_model(model)), of(base.architecture_of_hf(config))
    assert base.differences(here, there) == base.differences(there, here) == []
    before = of(vars(model))  # as checkpoints of before have it
    assert base.differences(before, there) == base.differences(before, here) == []
    imported = of(there["architecture"] | {"kv_channels": config["hidden_size"] // config["num_attention_heads"]})
    assert base.differences(imported, here) == []
    other = of(base.architecture_of_hf(config | {"num_attention_heads": 8, "num_key_value_heads": 8}))
    assert "num_attention_heads" in base.differences(here, other)[0]
    del model.multi_latent_attention
    assert base.architecture_of_model(model)["kv_channels"] == kv_channels


def test_a_checksum_is_a_sum_of_bit_patterns():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        tensor = torch.randn(777, 131, generator=torch.Generator().manual_seed(1)).to(dtype)
        bits = tensor.float().view(torch.int32).flatten().tolist()
        expected = [sum(bits) % 2**64, sum(b * b for b in bits) % 2**64]
        assert base.digits(sums.checksum(tensor)) == "".join(f"{n:016x}" for n in expected)
        halves = [base.digits(sums.checksum(part)) for part in tensor.split(400)]
        assert base.added(halves) == base.digits(sums.checksum(tensor))


def test_every_tensor_counts(tmp_path):
    """One flipped bit in any tensor of a base is another base; named by what it is in."""
    path = make_tiny(tmp_path / "base", "qwen2", num_layers=2, tokenizer=False, tied=False)
    file = path / "model.safetensors"
    saved = base.fingerprint_of_hf(BaseCheckpoint(path), "float32", range(2))
    digest, whole = base.weights_digest(BaseCheckpoint(path)), file.read_bytes()
    said = set()
    for name, weight in BaseCheckpoint(path).weights.items():
        damaged = bytearray(whole)
        damaged[weight.end - 2] ^= 1
        file.write_bytes(damaged)
        other = BaseCheckpoint(path)
        found = base.differences(saved, base.fingerprint_of_hf(other, "float32", range(2)))
        assert len(found) == 1, (name, found)
        assert base.weights_digest(other) != digest
        said.add(found[0])
    assert said == {
        "base weights differ in 1 of 2 layers compared, from layer 0",
        "base weights differ in 1 of 2 layers compared, from layer 1",
        "norms or biases of the base differ in 1 layers, from layer 0",
        "norms or biases of the base differ in 1 layers, from layer 1",
        "the embedding of the base differs",
        "the output layer of the base differs",
        "the last norm of the base differs",
    }
    file.write_bytes(whole)
    before = {key: value for key, value in saved.items() if key != "rest"}
    assert base.differences(before, base.fingerprint_of_hf(BaseCheckpoint(path), "float32", range(2))) == []


def test_files_are_summed_once(tmp_path, monkeypatch):
    """Remembered by identity; a note that is damaged, foreign or about another file is not believed."""
    path = make_tiny(tmp_path / "base", tokenizer=False, max_shard_size="40KB")
    counted = []
    real = sums._sums
    monkeypatch.setattr(sums, "_sums", lambda weight, dtype: counted.append(weight) or real(weight, dtype))
    first = base.weights_digest(BaseCheckpoint(path))
    number = len(counted)
    assert number == len(BaseCheckpoint(path).weights)
    assert base.weights_digest(BaseCheckpoint(path)) == first and len(counted) == 2 * number  # too young to be noted
    monkeypatch.setattr(cache, "_RECENT", -10.0)
    assert base.weights_digest(BaseCheckpoint(path)) == first and len(counted) == 3 * number
    assert base.weights_digest(BaseCheckpoint(path)) == first and len(counted) == 3 * number
    notes = list((tmp_path / "cache" / "slime-lora" / "files").iterdir())
    assert len(notes) > 1
    for damage in (b"", b"{}", DEEP.encode(), None, b"\xff", "fifo"):
        text = notes[0].read_bytes() if notes[0].is_file() else b""
        notes[0].unlink()
        if damage == "fifo":
            os.mkfifo(notes[0])
        else:
            notes[0].write_bytes(text.replace(b"0", b"1") if damage is None else damage)
        seen = len(counted)
        assert base.weights_digest(BaseCheckpoint(path)) == first and len(counted) > seen
    file = sorted(path.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(data)
    os.utime(file, ns=times)  # the same size, inode and time of change of its content
    assert base.weights_digest(BaseCheckpoint(path)) != first
