"""Worker pools, started at most once per session and only when a test asks for that size."""

import pytest
from harness import WorkerPool


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
