"""Pools of gloo worker processes that run real Megatron, for tests.

Importing Megatron costs seconds, so the processes are started once and handed functions:

    from harness import Layout

    def logits(layout: Layout, hf_dir):           # top level, so that a worker can import it
        chunks = build_chunks(hf_dir, sequence_parallel=layout.sp, vpp=layout.vpp)
        ...
        return something_picklable                # plain values and CPU tensors

    def test_logits(pool2, tmp_path):             # pool1, pool2, pool4: fixtures of conftest.py
        per_rank = pool2.run(logits, tmp_path, tp=2, sp=True)

Every call gets Megatron's parallel state for its own sizes and freshly seeded generators. A rank that raises ends the
call with ``WorkerError`` (``.errors``: global rank -> (exception class name, message), tracebacks in the text); ranks
that then hang in a collective are killed, and the next call starts the pool again.

``MEGATRON_DIR=/path/to/Megatron-LM pytest tests/layers`` runs the same tests on that Megatron.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

_GRACE_S = 3.0
"""How long the other ranks may take to report after one has failed, before they count as hung."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the ranks of one call are laid out; the first argument of every function that a pool runs."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    sp: bool = False
    """Only told to the function: sequence parallelism is a property of the model, not of the process groups."""


class WorkerError(RuntimeError):
    """One or more ranks raised, died, or did not answer."""

    def __init__(self, errors: dict[int, tuple[str, str]], report: str):
        super().__init__(report)
        self.errors = errors


class WorkerPool:
    """``world_size`` processes, one per rank, one torch thread each.

    ``path``: put in front of the workers' import path, for stand-ins that Megatron looks for when it is imported.
    """

    def __init__(self, world_size: int, path: tuple[str, ...] = ()):
        self.world_size, self._path = world_size, path
        self._workers: list[tuple[multiprocessing.Process, Connection]] = []
        self._store = ""

    def run(self, fn: Callable, *args, timeout: float = 120.0, seed: int = 1234, **layout) -> list[Any]:
        """Call ``fn(Layout(**layout), *args)`` on every rank; returns the results in rank order.

        ``timeout`` in seconds counts from the call (starting the pool included, some 10 s on a busy machine).
        """
        if not self._workers:
            self._start()
        message = pickle.dumps((fn, args, Layout(**layout), seed))
        for _, connection in self._workers:
            connection.send_bytes(message)
        answers = self._collect(time.monotonic() + timeout)
        failed = {rank: answer for rank, answer in answers.items() if answer[0] != "ok"}
        missing = [rank for rank in range(self.world_size) if rank not in answers]
        if missing or any(kind == "died" for kind, _ in answers.values()):
            self.stop()
        if failed or missing:
            raise _worker_error(failed, missing, timeout)
        return [answers[rank][1] for rank in range(self.world_size)]

    def stop(self) -> None:
        """End the processes. The next ``run`` starts new ones."""
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []
        shutil.rmtree(self._store, ignore_errors=True)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # A file, not a port: any number of pools can start at the same time.
        self._store = tempfile.mkdtemp(prefix="slime-lora-test-")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker, args=(rank, self.world_size, self._store, theirs, self._path), daemon=True
            )
            process.start()
            theirs.close()  # so that the worker's death is an end of file here
            self._workers.append((process, ours))

    def _collect(self, deadline: float) -> dict[int, tuple[str, Any]]:
        pending = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        answers = {}
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(pending), timeout=left):
                rank = pending.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._workers[rank][0].join(timeout=5)
                    answers[rank] = ("died", f"process exited with code {self._workers[rank][0].exitcode}")
                if answers[rank][0] != "ok":
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        return answers


def _worker_error(failed: dict, missing: list[int], timeout: float) -> WorkerError:
    errors, report = {}, []
    for rank, (kind, detail) in sorted(failed.items()):
        errors[rank] = detail[:2] if kind == "error" else (kind, detail)
        report.append(f"--- rank {rank} ---\n{detail[2] if kind == 'error' else detail}")
    if missing:
        why = "was waiting for the others" if failed else f"gave no answer in {timeout:.0f} s"
        report.append(f"--- ranks {missing}: {why}; pool killed ---")
    return WorkerError(errors, "\n".join(report))


def _worker(rank: int, world_size: int, store: str, connection: Connection, path: tuple[str, ...]) -> None:
    """The life of one process: set up, then one message after the other until the parent closes the pipe."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if os.environ.get("MEGATRON_DIR"):
        sys.path.insert(0, os.environ["MEGATRON_DIR"])
    sys.path[:0] = path
    import torch

    from slime_plugins.lora.rehearsal import cpu

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron, on the absence of apex and Transformer Engine
        cpu.enable()
    ready = None
    for generation in range(1_000_000):
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            fn, args, layout, seed = pickle.loads(message)
            # After an error the ranks may have left a collective at different points: start from new groups.
            if ready != layout:
                _initialise(rank, world_size, f"{store}/{generation}", layout)
                ready = layout
            _seed(seed)
            answer = pickle.dumps(("ok", fn(layout, *args)))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            ready = None
            answer = pickle.dumps(("error", (type(error).__name__, str(error), traceback.format_exc())))
        connection.send_bytes(answer)


def _initialise(rank: int, world_size: int, store: str, layout: Layout) -> None:
    """New process groups for a layout."""
    import torch
    from megatron.core import parallel_state as mpu

    tp, pp, vpp, cp, ep, etp, _ = astuple(layout)
    if torch.distributed.is_initialized():
        mpu.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        _free_groups()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=300)
    )
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )


def _free_groups() -> None:
    """Let go of the groups of earlier calls, and so of the threads that each keeps.

    Models hold groups, and Megatron's DDP holds its model for ever: its hooks on gradient accumulators, which are not
    Python's, close a cycle that no garbage collector sees. A pool had 1,200 threads a process before this.
    """
    for wrapper in [o for o in gc.get_objects() if type(o).__name__ == "DistributedDataParallel"]:
        vars(wrapper).clear()
    gc.collect()


def _seed(seed: int) -> None:
    import random

    import torch
    from megatron.core import tensor_parallel

    random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
