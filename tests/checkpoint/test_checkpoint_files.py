"""Checkpoint directories, tensor files and fingerprints, without Megatron or a process group.

pytest tests/checkpoint/test_checkpoint_files.py
"""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from slime_plugins.lora.base import fingerprint as base
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.checkpoint import directory, storage
from slime_plugins.lora.checkpoint.manifest import Manifest, adapter_differences
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files import atomic
from slime_plugins.lora.layout import gated_parts, qkv_parts
from slime_plugins.lora.projections import Adapter
from slime_plugins.lora.rehearsal.tiny import make_tiny


class Killed(BaseException):
    """Stands for SIGKILL: no handler may run."""


def save(root, step, text):
    """A complete checkpoint that says ``text``."""
    staged = directory.stage(root, step)
    (staged / directory.ADAPTER_JSON).write_text(text)
    return directory.publish(staged)


def read(root) -> str:
    return (directory.find(root) / directory.ADAPTER_JSON).read_text()


def kill_after(patch, count: int) -> None:
    """Let ``count`` changes of the file system happen, and no more."""
    done = 0

    def limited(real):
        def call(*args, **kwargs):
            nonlocal done
            done += 1
            if done > count:
                raise Killed
            return real(*args, **kwargs)

        return call

    for module, names in ((os, ("rename", "replace", "fsync", "mkdir")), (shutil, ("rmtree",))):
        for name in names:
            patch.setattr(module, name, limited(getattr(module, name)))


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("step", [5, 6], ids=["replaced", "new"])
def test_killed_at_every_step_of_a_save(tmp_path, monkeypatch, exchange, step):
    """Whatever came before the kill, a reader finds the old checkpoint or the new one, and the next save cleans."""
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    killed, point = True, 0
    while killed:
        root = tmp_path / str(point)
        save(root, 5, "old")
        with monkeypatch.context() as patch:
            kill_after(patch, point)
            try:
                save(root, step, "new")
                killed = False
            except Killed:
                point += 1
        if exchange or step == 6:
            assert read(root) in ("old", "new")
        save(root, 7, "later")
        assert read(root) == "later"
        assert [p.name for p in root.iterdir() if p.name.startswith(".")] == []
        assert (root / "iter_0000005" / directory.ADAPTER_JSON).is_file()
    assert point >= 6


def test_a_killed_writer_between_two_renames_is_repaired(tmp_path):
    """Where two names cannot be exchanged, the old one is at ``.old`` for a moment; the next save puts it back."""
    save(tmp_path, 5, "old")
    os.rename(tmp_path / "iter_0000005", tmp_path / ".iter_0000005.old")
    with pytest.raises(ValueError, match="names iter_0000005, which is no adapter checkpoint"):
        directory.find(tmp_path)
    directory.discard(directory.stage(tmp_path, 6))
    assert read(tmp_path) == "old"


def test_find(tmp_path):
    root = tmp_path / "run"
    with pytest.raises(UsageError, match="is no adapter checkpoint"):
        directory.find(root)
    save(root, None, "imported")
    assert directory.find(root).name == "release"
    save(root, 1, "one")
    save(root, 10, "ten")
    assert read(root) == "ten" and read(root / "iter_0000001") == "one"
    tracker = root / directory.TRACKER
    assert tracker.read_text() == "10\n"
    tracker.write_text("1\n")  # a user goes back
    assert read(root) == "one"
    tracker.write_text("10")  # as Megatron writes it
    assert read(root) == "ten"
    for damaged, message in (
        ("1", "may be cut from iter_0000010"),
        ("", "expected a number"),
        ("1x", "expected a number"),
        ("\xff", "expected a number"),
        ("30\n", "names iter_0000030, which is no adapter checkpoint"),
    ):
        tracker.write_bytes(damaged.encode("latin1"))
        with pytest.raises(ValueError, match=message):
            directory.find(root)
    tracker.unlink()
    with pytest.raises(ValueError, match="name one: release, iter_0000001, iter_0000010"):
        directory.find(root)


def test_other_peoples_directories_are_left_alone(tmp_path):
    """A full Megatron checkpoint of the same step; hidden files that are not ours."""
    (tmp_path / "iter_0000003").mkdir()
    (tmp_path / "iter_0000003" / "model.pt").write_text("8 billion parameters")
    (tmp_path / ".iter_notes").mkdir()
    with pytest.raises(ValueError, match="not overwritten"):
        directory.stage(tmp_path, 3)
    save(tmp_path, 4, "four")
    assert (tmp_path / "iter_0000003" / "model.pt").is_file() and (tmp_path / ".iter_notes").is_dir()


def write(path, shards_by_rank):
    path.mkdir()
    return storage.finish(
        path, [storage.write_shards(path, rank, shards) for rank, shards in enumerate(shards_by_rank)]
    )


def split(key, tensor, dim, parts):
    """A tensor as one shard per rank."""
    size = tensor.shape[dim] // parts
    for i in range(parts):
        offset = tuple(i * size if d == dim else 0 for d in range(tensor.dim()))
        yield storage.Shard(key, tensor.narrow(dim, i * size, size).contiguous().clone(), tuple(tensor.shape), offset)


def test_rectangles(tmp_path):
    a, b = torch.randn(12, 7), torch.randn(5, 24).bfloat16()
    shards = [[x, y] for x, y in zip(split("a", a, 0, 4), split("b", b, 1, 4))]
    write(tmp_path / "c", shards)
    reader = storage.TensorReader.open(tmp_path / "c")
    reader.check_files()
    assert torch.equal(reader.read("a"), a) and torch.equal(reader.read("b"), b)
    assert reader.read("b").dtype == torch.bfloat16
    for start, size in ((0, 12), (2, 5), (11, 1), (4, 4)):
        assert torch.equal(reader.read("a", (start, 2), (size, 3)), a[start : start + size, 2:5])
        assert torch.equal(reader.read("b", (1, start), (4, size)), b[1:5, start : start + size])


def test_shards_that_overlap_or_are_missing(tmp_path):
    a = torch.randn(8, 3)
    first, second = split("a", a, 0, 2)
    with pytest.raises(ValueError, match=r"a .* was to be written once"):
        write(tmp_path / "missing", [[first], []])
    with pytest.raises(ValueError, match=r"a .* was to be written once"):
        write(tmp_path / "twice", [[first, second], [first]])


def test_a_rank_on_another_disk(tmp_path):
    first, second = split("a", torch.randn(8, 3), 0, 2)
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    written = [
        storage.write_shards(tmp_path / "here", 0, [first]),
        storage.write_shards(tmp_path / "there", 1, [second]),
    ]
    with pytest.raises(ValueError, match="one shared file system"):
        storage.finish(tmp_path / "here", written)


def test_torch_reads_the_files(tmp_path):
    """The layout is torch.distributed.checkpoint's own."""
    import torch.distributed.checkpoint as dcp

    a = torch.randn(12, 7)
    write(tmp_path / "c", [[shard] for shard in split("a", a, 0, 3)])
    state = {"a": torch.zeros(12, 7)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "c"), no_dist=True)
    assert torch.equal(state["a"], a)


def manifest(**changes):
    fields = {
        "step": 3,
        "config": LoRAConfig(rank=4, alpha=2.5, rank_pattern={"linear_fc1": 2}),
        "adapters": {"decoder.layers.0.mlp.linear_fc1": Adapter(("up_proj",), (2,), (1.5,), "fused")},
        "base": {"architecture": {}, "dtype": "bfloat16", "layers": {}},
        "optimizer": {"states": ["exp_avg"], "scalars": {"step": 3.0}},
        "parallelism": {"world": 2, "tp": 2},
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def test_manifest_reads_what_it_wrote(tmp_path):
    (tmp_path / "common.pt").write_bytes(b"state")
    manifest().write(tmp_path)
    assert Manifest.read(tmp_path) == manifest()


@pytest.mark.parametrize(
    "old, new", [('"alpha": 2.5', '"alpha": 3.5'), ('"fused"', '"split"'), ('"step": 3,', '"step": 4,')]
)
def test_an_edited_manifest_is_refused(tmp_path, old, new):
    """An alpha changed by hand would give another adapter with the same tensors."""
    manifest().write(tmp_path)
    path = tmp_path / directory.ADAPTER_JSON
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match="was changed after it was written"):
        Manifest.read(tmp_path)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("slime_plugins.lora.checkpoint.manifest.FORMAT_VERSION", 2)
    manifest().write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format version 2, this is slime-lora for version 1"):
        Manifest.read(tmp_path)


def test_differences_are_all_listed():
    one = Adapter(("o_proj",), (4,), (2.0,), "fused")
    saved = {f"decoder.layers.{n}.self_attention.linear_proj": one for n in range(5)}
    model = dict(list(saved.items())[1:])
    model["decoder.layers.9.mlp.linear_fc2"] = one
    model["decoder.layers.3.self_attention.linear_proj"] = Adapter(("o_proj",), (8,), (1.0,), "fused")
    text = "; ".join(adapter_differences(saved, model))
    assert "the checkpoint has no adapter for decoder.layers.9.mlp.linear_fc2" in text
    assert "this model has no adapter for decoder.layers.0.self_attention.linear_proj" in text
    assert "ranks 4 in the checkpoint, 8 here" in text and "scalings 2.0 in the checkpoint, 1.0 here" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_does_not_depend_on_who_holds_what(dtype):
    q, k, v = (torch.randn(rows, 6).to(dtype) for rows in (16, 8, 8))
    fused = torch.empty(32, 6, dtype=dtype)
    for part, rows in zip(qkv_parts(4, 2, 4), (q, k, v)):
        part.put(fused, rows)
    apart = base.checksum(q) + base.checksum(k) + base.checksum(v)
    shards = sum(base.checksum(shard) for shard in fused.chunk(4, dim=1))
    assert base.digits(base.checksum(fused)) == base.digits(apart) == base.digits(shards)
    up = torch.randn(20, 6).to(dtype)
    both = torch.cat([up, up + 1])
    assert all(torch.equal(p.take(both), t) for p, t in zip(gated_parts(40), (up, up + 1)))
    changed = fused.clone()
    changed[3, 2] = (
        torch.nextafter(changed[3, 2].float(), torch.tensor(9.0)).to(dtype) if dtype == torch.float32 else 9.0
    )
    assert base.digits(base.checksum(changed)) != base.digits(apart)


def test_fingerprints_of_checkpoints(tmp_path):
    """Equal for one base in another sharding; unequal for another seed; silent about what one side does not know."""
    one = BaseCheckpoint(make_tiny(tmp_path / "one", tokenizer=False))
    many = BaseCheckpoint(make_tiny(tmp_path / "many", tokenizer=False, max_shard_size="30KB"))
    other = BaseCheckpoint(make_tiny(tmp_path / "other", tokenizer=False, seed=1))
    wide = BaseCheckpoint(make_tiny(tmp_path / "wide", tokenizer=False, ffn=128))
    saved = base.fingerprint_of_hf(one, "float32", range(2))
    assert base.differences(saved, base.fingerprint_of_hf(many, "float32", range(2))) == []
    assert "in 2 of 2 layers" in base.differences(saved, base.fingerprint_of_hf(other, "float32", range(2)))[0]
    assert "in 1 of 1 layers" in base.differences(saved, base.fingerprint_of_hf(other, "float32", [1]))[0]
    assert "ffn_hidden_size 96" in base.differences(saved, base.fingerprint_of_hf(wide, "float32", range(2)))[0]
    assert base.differences(saved, base.fingerprint_of_hf(other, "bfloat16", range(2))) == []
