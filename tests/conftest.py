"""Set-up for all tests: one thread per process, no network, and gpu tests skipped with a reason on a CPU machine."""

import os

import pytest

# Before torch is imported anywhere: the multi-process tests share few cores, and spinning OpenMP threads starve gloo.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
