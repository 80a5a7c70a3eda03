"""Worker pools, started at most once per session and only when a test asks for that size."""

import os
import sys
from pathlib import Path

import pytest
from harness import WorkerPool

if os.environ.get("MEGATRON_DIR"):  # the workers' Megatron, for what the test modules themselves import
    sys.path.insert(0, os.environ["MEGATRON_DIR"])

TE_STUB = (str(Path(__file__).parents[1] / "te_stub"),)


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
    pool = WorkerPool(world_size, path)
    yield pool
    pool.stop()
