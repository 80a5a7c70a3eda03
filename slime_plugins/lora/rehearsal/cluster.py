"""A private Ray on this machine: one process per Megatron rank, one for rollouts, and none left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slime_plugins.lora.rehearsal import reaper
from slime_plugins.lora.rehearsal.settings import Settings


@contextlib.contextmanager
def ray_cluster(settings: Settings, device: str, *, show_logs: bool = False) -> Iterator[Cluster]:
    """Start Ray and the actors; on the way out, also by Ctrl-C, SIGTERM or an error, end every process of it."""
    import ray

    store_dir = tempfile.mkdtemp(prefix="slime-lora-")
    if not show_logs:
        logging.getLogger("ray").setLevel(logging.ERROR)
    with _environment(device), reaper.watching(store_dir):
        try:
            _start_ray(settings.world_size + 1, show_logs)
            # Ray sets a handler of its own, that ends this process on the spot.
            _set_handler(signal.SIGTERM, _interrupt)
            yield Cluster(settings, device, os.path.join(store_dir, "store"))
        finally:
            with _no_interrupts():
                ray.shutdown()
                shutil.rmtree(store_dir, ignore_errors=True)


def _start_ray(num_processes: int, show_logs: bool, attempts: int = 3) -> None:
    """``ray.init``, again where Ray's fixed 30 seconds for its own processes have not been enough."""
    import ray

    for attempt in range(attempts):
        try:
            ray.init(
                address="local",  # never somebody else's cluster
                num_cpus=num_processes,
                num_gpus=0,  # actors choose their GPU by rank
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                configure_logging=show_logs,
                log_to_driver=show_logs,
            )
            return
        except Exception as error:  # Ray raises no narrower one
            # What has been started of this attempt ends with this process, if not now.
            ray.shutdown()
            if attempt == attempts - 1:
                raise OSError(f"Ray did not start in {attempts} attempts: {_first_line(error)}") from error


class Cluster:
    """Handles on the actors. Every call raises what the actor raised, or ValueError naming the one that died."""

    def __init__(self, settings: Settings, device: str, store: str):
        """Start the processes and wait until all have their models."""
        import ray

        from slime_plugins.lora.rehearsal.rollout import Rollout
        from slime_plugins.lora.rehearsal.trainer import RankTrainer

        cores = os.cpu_count() or 1
        self._ranks = [ray.remote(RankTrainer).remote() for _ in range(settings.world_size)]
        self._rollout = ray.remote(Rollout).remote()
        threads = max(1, cores // settings.world_size)
        calls = {f"rank {i}": rank.setup.remote(settings, i, store, threads) for i, rank in enumerate(self._ranks)}
        # Ranks wait while the rollout runs: it may have all cores.
        calls["rollout"] = self._rollout.setup.remote(settings, device, cores)
        _wait(calls)

    def ranks(self, method: str, *args) -> list[Any]:
        """Call a method on every rank; results in rank order."""
        import ray

        shared = [ray.put(arg) for arg in args]
        return _wait({f"rank {i}": getattr(rank, method).remote(*shared) for i, rank in enumerate(self._ranks)})

    def rollout(self, method: str, *args, **kwargs) -> Any:
        """Call a method of the rollout process."""
        return _wait({"rollout": getattr(self._rollout, method).remote(*args, **kwargs)})[0]


def _wait(calls: dict[str, Any]) -> list[Any]:
    """Results in order; the first failure ends the wait, as the other ranks may be stuck in a collective with it."""
    import ray

    if _due:
        raise _due[-1]
    names = {ref: name for name, ref in calls.items()}
    results, pending = {}, list(calls.values())
    while pending:
        (done,), pending = ray.wait(pending, num_returns=1)
        try:
            results[done] = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (ValueError, OSError)):
                raise error.cause from error
            raise
        except ray.exceptions.RayActorError as error:
            raise ValueError(f"the process of {names[done]} died ({_first_line(error)})") from error
    return [results[ref] for ref in calls.values()]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _environment(device: str) -> contextlib.AbstractContextManager[None]:
    """What Ray's processes inherit: where the package is, no GPU on ``cpu``, GPUs unmanaged on ``cuda``."""
    package_root = str(Path(__file__).parents[3])
    changes = {
        "PYTHONPATH": os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")])),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if device == "cpu":
        changes["CUDA_VISIBLE_DEVICES"] = ""
    else:
        changes["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    return reaper.environment(changes)


class Terminated(KeyboardInterrupt):
    """SIGTERM."""

    exit_code = 143


_due: list[type[KeyboardInterrupt]] = []
"""The interrupt that was raised. It may have landed in a destructor, where Python prints and forgets it."""


def _interrupt(number, frame) -> None:
    _due.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
    raise _due[-1]


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that it leaves no process and no temporary directory either."""
    _due.clear()
    with _handler(signal.SIGTERM, _interrupt), _handler(signal.SIGINT, _interrupt):
        yield


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """A second, impatient Ctrl-C must not stop the cleaning up."""
    with _handler(signal.SIGINT, signal.SIG_IGN), _handler(signal.SIGTERM, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handler(number: int, handler) -> Iterator[None]:
    before = _set_handler(number, handler)
    try:
        yield
    finally:
        _set_handler(number, before)


def _set_handler(number: int, handler) -> Any:
    """The handler before; does nothing outside the main thread, where none can be set."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(number, handler)
    return None
