"""Worker pools, started at most once per session and only when a test asks for that size."""

import os
import sys

import pytest
from harness import WorkerPool

if os.environ.get("MEGATRON_DIR"):  # the workers' Megatron, for what the test modules themselves import
    sys.path.insert(0, os.environ["MEGATRON_DIR"])


@pytest.fixture(scope="session")
def pool1():
    yield from _pool(1)


@pytest.fixture(scope="session")
def pool2():
    yield from _pool(2)


@pytest.fixture(scope="session")
def pool4():
    yield from _pool(4)


def _pool(world_size: int):
    pool = WorkerPool(world_size)
    yield pool
    pool.stop()
