"""Set-up for all tests: one thread per process, no network, and gpu tests skipped with a reason on a CPU machine."""

import os
import sys
from pathlib import Path

import pytest

# Before torch is imported anywhere: the multi-process tests share few cores, and spinning OpenMP threads starve gloo.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# TE multiplies float32 in TF32 (10 bits) where it may, and tests on a GPU compare float32 with float32.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


if os.environ.get("MEGATRON_DIR"):  # the workers' Megatron, for what the test modules themselves import
    sys.path.insert(0, os.environ["MEGATRON_DIR"])

TE_STUB = (str(Path(__file__).parent / "te_stub"),)


@pytest.fixture(scope="session")
def pool1():
    yield from _pool(1)


@pytest.fixture(scope="session")
def pool2():
    yield from _pool(2)


@pytest.fixture(scope="session")
def pool4():
    yield from _pool(4)


@pytest.fixture(scope="session")
def te_pool2():
    """Processes that see the stand-in for TransformerEngine."""
    yield from _pool(2, path=TE_STUB)


@pytest.fixture(scope="session")
def te_pool4():
    yield from _pool(4, path=TE_STUB)


def _pool(world_size: int, path: tuple[str, ...] = ()):
    from harness import WorkerPool

    pool = WorkerPool(world_size, path)
    yield pool
    pool.stop()
