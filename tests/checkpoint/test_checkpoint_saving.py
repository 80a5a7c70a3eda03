"""How a checkpoint is written: once, at its size, in Megatron's format, while training goes on.

pytest tests/checkpoint/test_checkpoint_saving.py
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading

import adapted
import checkpoint_runs as runs
import pytest
import torch
from checkpoint_runs import SAVED_AT, STEPS, Run
from harness import Layout
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.checkpoint import storage
from slime_plugins.lora.checkpoint.load import load_adapter
from slime_plugins.lora.checkpoint.reader import AdapterCheckpoint
from slime_plugins.lora.checkpoint.save import save_adapter
from slime_plugins.lora.layers import hide_adapters
from slime_plugins.lora.rehearsal.tiny import make_tiny

FUSED = LoRAConfig(rank=3, alpha=12)
PARTIAL = LoRAConfig(rank=3, alpha=12, target_modules=("q_proj", "v_proj", "up_proj", "*.layers.2.*.linear_proj"))


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return tiny(tmp_path_factory)


def size_of(layout: Layout, hf_dir, config, path):
    run = Run(layout, hf_dir, config, bf16=True)
    run.start()
    run.train(0, 1)
    save_adapter(run.model, path, optimizer=run.optimizer, scheduler=run.scheduler, step=1)


def test_size(pool1, pool2, pool4, tmp_path):
    """14 bytes a parameter: bf16 weight 2, float32 master 4, two moments of 4; once, whatever DP is."""
    base = make_tiny(
        tmp_path / "base", "llama", num_layers=1, hidden=1024, num_heads=8, num_kv_heads=8, ffn=1536, tokenizer=False
    )
    config = LoRAConfig(rank=32, alpha=32)
    layouts = [(pool1, {}), (pool2, {}), (pool4, {}), (pool2, {"tp": 2}), (pool4, {"tp": 2})]
    data = []
    for number, (pool, sizes) in enumerate(layouts):
        path = tmp_path / str(number)
        pool.run(size_of, base, config, path, **sizes)
        parameters = sum(p.A.numel() + p.B.numel() for p in AdapterCheckpoint(path).projections())
        shared_A = 3 * 32 * 1024  # q, k, v are trained with one A, and gate, up: it is saved once
        files = [p for p in path.rglob("*") if p.is_file()]
        total = sum(p.stat().st_size for p in files)
        assert total == pytest.approx(14 * (parameters - shared_A), rel=0.03), (total, parameters)
        assert total >= 14 * (parameters - shared_A)
        data.append(sum(p.stat().st_size for p in files if p.suffix == ".distcp"))
    assert data[0] == data[1] == data[2] and data[3] == data[4]  # to the byte


def whole_of_shards(layout: Layout, hf_dir, config, path):
    """Save by Megatron's own functions, whole model; then what our checkpoint is to Megatron's reader."""
    from megatron.core import dist_checkpointing

    multiprocessing.current_process()._config["daemon"] = False  # Megatron's writer starts processes
    run = Run(layout, hf_dir, config)
    run.start()
    run.train(0, 2)
    metadata = {"dp_cp_group": adapted.mpu.get_data_parallel_group(with_context_parallel=True)}
    chunks = [chunk.module for chunk in run.model]
    state = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    if torch.distributed.get_rank() == 0:
        (path / "megatron").mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(path / "megatron"))
    with hide_adapters(chunks[0]):
        hidden = [key for key in chunks[0].sharded_state_dict(metadata=metadata) if "lora" in key]
    save_adapter(run.model, path / "ours", step=2)
    plain = dist_checkpointing.load_plain_tensors(str(path / "ours" / "iter_0000002"))
    return runs.whole(run.model), hidden, plain


def load_by_megatron(layout: Layout, hf_dir, config, path):
    from megatron.core import dist_checkpointing

    run = Run(layout, hf_dir, config)
    metadata = {"dp_cp_group": adapted.mpu.get_data_parallel_group(with_context_parallel=True)}
    chunks = [chunk.module for chunk in run.model]
    state = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(state, str(path / "megatron"))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=True)
    return runs.whole(run.model)


@pytest.mark.parametrize("config", [FUSED, PARTIAL], ids=["all", "partial"])
def test_megatrons_own_checkpoint(pool1, pool2, hf_dir, tmp_path, config):
    """Design hazard 10: Megatron's save of the whole model keeps every tensor-parallel shard of the adapters."""
    saved, hidden, plain = pool2.run(whole_of_shards, hf_dir, config, tmp_path, tp=2)[0]
    assert hidden == []
    for pool, sizes in ((pool1, {}), (pool2, {"tp": 2}), (pool2, {"pp": 2})):
        found = pool.run(load_by_megatron, hf_dir, config, tmp_path, **sizes)[0]
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[key], saved[key]) for key in saved), sizes
    reader = storage.TensorReader.open(tmp_path / "ours" / "iter_0000002")
    assert plain.keys() - reader.index.keys() == {"iteration", "optimizer_scalars", "scheduler", "rng"}
    assert all(torch.equal(plain[key], reader.read(key)) for key in reader.index)


def dropout_runs(layout: Layout, hf_dir, path, first):
    """With dropout the next steps depend on every rank's random state."""
    config = LoRAConfig(rank=3, alpha=12, dropout=0.3)
    torch.manual_seed(1 if first else 2)
    run = Run(layout, hf_dir, config)
    if first:
        run.start()
        run.train(0, SAVED_AT)
        save_adapter(run.model, path, optimizer=run.optimizer, scheduler=run.scheduler, step=SAVED_AT)
    else:
        run.train(0, 1)  # consumes random numbers
        loaded = load_adapter(run.model, path, optimizer=run.optimizer, scheduler=run.scheduler)
        assert loaded.rng == (layout.tp == 2)
    return run.train(SAVED_AT, STEPS), run.state()


@pytest.mark.parametrize("sizes", [{"tp": 2, "sp": True}, {}], ids=["tp2sp", "dp2"])
def test_random_states(pool2, hf_dir, tmp_path, sizes):
    """Restored at the parallelism of the save, left alone at another."""
    losses, state = pool2.run(dropout_runs, hf_dir, tmp_path, True, tp=2, sp=True)[0]
    new_losses, new_state = pool2.run(dropout_runs, hf_dir, tmp_path, False, **sizes)[0]
    same = sizes.get("tp") == 2
    assert (new_losses == losses) == same
    assert (runs.digest(new_state) == runs.digest(state)) == same


@contextlib.contextmanager
def writing_when_told():
    """Inside, each writer waits until the event is set: the disk is slower than a training step."""
    real, told = storage.write_shards, threading.Event()

    def write_shards(*args):
        assert told.wait(60)
        told.clear()
        return real(*args)

    storage.write_shards = write_shards
    try:
        yield told
    finally:
        storage.write_shards = real


def saves_beside_training(layout: Layout, hf_dir, path):
    """Two asynchronous saves, written after the next step: one finished by the next save, one by hand."""
    run = Run(layout, hf_dir, FUSED)
    run.start()
    run.train(0, 1)
    states = [run.state()]
    with writing_when_told() as write:
        first = save_adapter(run.model, path, optimizer=run.optimizer, step=1, async_save=True)
        unpublished = not first.path.exists()
        run.train(1, 1)
        states.append(run.state())
        write.set()
        second = save_adapter(run.model, path, optimizer=run.optimizer, step=2, async_save=True)
        seen = unpublished and first.finished and first.path.exists() and not second.finished
        run.train(2, 1)
        write.set()
        second.finish()
        second.finish()
    found = []
    for step in (1, 2):
        load_adapter(run.model, path / f"iter_{step:07d}", optimizer=run.optimizer)
        found.append(run.state())
    return seen, states, found


def test_asynchronous_saves(pool2, hf_dir, tmp_path):
    """What is saved is the moment of the call, whatever is trained meanwhile."""
    for rank, (seen, states, found) in enumerate(pool2.run(saves_beside_training, hf_dir, tmp_path, tp=2)):
        assert seen
        if rank == 0:
            assert [runs.digest(state) for state in found] == [runs.digest(state) for state in states]
            assert runs.digest(states[0]) != runs.digest(states[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iter_0000001",
        "iter_0000002",
        "latest_checkpointed_iteration.txt",
    ]


def saves_through_another_wrapper(layout: Layout, hf_dir, path):
    """The save is asked of the wrapped chunks; the next call is made with the chunks themselves."""
    run = Run(layout, hf_dir, FUSED)
    run.start()
    chunks = [chunk.module for chunk in run.model]
    with writing_when_told() as write:
        save = save_adapter(run.model, path, step=1, async_save=True)
        write.set()
        step = load_adapter(chunks, path / "iter_0000001").step
    return save.finished, step


def test_an_asynchronous_save_is_the_models_however_it_is_wrapped(pool2, hf_dir, tmp_path):
    assert pool2.run(saves_through_another_wrapper, hf_dir, tmp_path, tp=2) == [(True, 1)] * 2


def full_disk(layout: Layout, hf_dir, path, async_save):
    """The disk of rank 1 is full."""
    run = Run(layout, hf_dir, FUSED)
    run.start()
    save_adapter(run.model, path, step=1)
    real = storage.write_shards

    def write_shards(*args):
        if torch.distributed.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return real(*args)

    storage.write_shards = write_shards
    try:
        save_adapter(run.model, path, step=2, async_save=async_save).finish()
        return None
    except OSError as error:
        return error.strerror
    finally:
        storage.write_shards = real


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_rank_that_cannot_write(pool2, hf_dir, tmp_path, async_save):
    """Every rank raises; the checkpoint before stays the latest."""
    assert pool2.run(full_disk, hf_dir, tmp_path, async_save, tp=2) == ["No space left on device"] * 2
    assert AdapterCheckpoint(tmp_path).manifest.step == 1
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
