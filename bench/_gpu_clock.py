"""Time, memory and kernels of calls on a CUDA device, and the same of a CPU as far as it has them.

A time is the device's own, between two events, with the host a queue ahead where that is asked for: a short call then
costs what its kernels cost and not what their launches do. What the host takes is measured beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]
"""Runs something once. A float that it returns is the seconds of host time that count, if not all of them do."""
_CYCLES_PER_MS = 2_000_000  # of ``torch.cuda._sleep``: no GPU is clocked higher by much, a slower one sleeps longer
_FLUSH_BYTES = 256 << 20


@dataclasses.dataclass
class Times:
    """Milliseconds per call, one entry a round."""

    device: list[float] = dataclasses.field(default_factory=list)
    host: list[float] = dataclasses.field(default_factory=list)

    @property
    def ms(self) -> float:
        return statistics.median(self.device)

    @property
    def host_ms(self) -> float:
        return statistics.median(self.host)


class Clock:
    """Measures on the device of this process: CUDA, or a CPU, where a time is wall time and memory is not known."""

    def __init__(self, *, on_cpu: bool) -> None:
        self.on_cpu = on_cpu
        self._scratch: torch.Tensor | None = None

    def turns(
        self, calls: Mapping[str, Call], *, rounds: int, warmup: int = 2, repeats: int = 1, alone: bool = False
    ) -> dict[str, Times]:
        """Calls take turns, ``repeats`` of each at a time, so that what else happens on the machine hits all.

        Args:
            alone: every call starts with an L2 that has none of its operands, and the host ahead of the device.
        """
        times = {name: Times() for name in calls}
        for round_number in range(warmup + rounds):
            for name, call in calls.items():
                device, host = self._measure(call, repeats, alone and round_number >= warmup, times[name])
                if round_number >= warmup:
                    times[name].device.append(device)
                    times[name].host.append(host)
        return times

    def _measure(self, call: Call, repeats: int, alone: bool, before: Times) -> tuple[float, float]:
        if self.on_cpu:
            host = sum(self._host(call) for _ in range(repeats)) / repeats
            return host, host
        torch.cuda.synchronize()
        if alone:
            expected = before.host[-1] if before.host else 2.0
            torch.cuda._sleep(int(_CYCLES_PER_MS * min(1.5 * repeats * expected + 0.2, 50)))
        events, host = [], 0.0
        for _ in range(repeats):
            if alone:
                self._flush()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            host += self._host(call)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / repeats, host / repeats

    @staticmethod
    def _host(call: Call) -> float:
        begun = time.perf_counter()
        seconds = call()
        return 1e3 * (seconds if isinstance(seconds, float) else time.perf_counter() - begun)

    def _flush(self) -> None:
        """Fill the L2 by reading: what is written would have to be written back while the call is timed."""
        if self._scratch is None:
            self._scratch = torch.ones(_FLUSH_BYTES // 4, device="cuda")
        self._scratch.sum()

    def allocated(self) -> int:
        """Bytes on the device; 0 on a CPU."""
        return 0 if self.on_cpu else torch.cuda.memory_allocated()

    def peak(self, call: Call) -> int | None:
        """Bytes that a call allocates at its fullest, over what there was before; None on a CPU."""
        if self.on_cpu:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kernels(self, call: Call) -> dict[str, tuple[int, float]]:
        """Name -> launches and milliseconds, of one call, copies among them. On a CPU: torch's operators."""
        cpu, cuda = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
        if self.on_cpu:
            return self._profile(call, [cpu])
        # Without the host's events it is cheaper, if the profiler that is there can do that.
        return self._profile(call, [cuda]) or self._profile(call, [cpu, cuda])

    def _profile(self, call: Call, activities: list[Any]) -> dict[str, tuple[int, float]]:
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        found: dict[str, tuple[int, float]] = {}
        for event in profile.key_averages():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            if (
                event.key.startswith("aten::")
                if self.on_cpu
                else on_device and not getattr(event, "is_user_annotation", False)
            ):
                us = event.self_cpu_time_total if self.on_cpu else event.self_device_time_total
                found[event.key] = event.count, us / 1e3
        return found

    def ceilings(self, *, small: bool) -> dict[str, float]:
        """What this device reaches: GB/s of a copy, reads and writes counted, and TFLOP/s of a product in bf16."""
        size, side = (1 << 20, 256) if small else (1 << 30, 8192)
        device = "cpu" if self.on_cpu else "cuda"
        a, b = torch.empty(2, size, dtype=torch.uint8, device=device)
        m = torch.randn(side, side, device=device).bfloat16()
        times = self.turns({"copy": lambda: b.copy_(a), "product": lambda: m @ m}, rounds=5)
        return {
            "copy_gb_s": 2 * size / times["copy"].ms / 1e6,
            "bf16_tflop_s": 2 * side**3 / times["product"].ms / 1e9,
        }

    def clean_up(self) -> None:
        """Give back what is no longer referred to."""
        self._scratch = None
        gc.collect()
        if not self.on_cpu:
            torch.cuda.empty_cache()


class Budget:
    """Seconds of a section: once they are spent no new case is begun. What was not measured is said, and why."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds
        self.not_measured: list[str] = []
        self.failed: list[str] = []
        """Of those, what should have been: not for want of time or memory."""

    def allows(self, case: str) -> bool:
        if time.perf_counter() < self._end:
            return True
        self.not_measured.append(f"{case}: no time left")
        return False

    @contextlib.contextmanager
    def attempt(self, case: str):
        """Inside, whatever goes wrong with a case costs that case alone."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the other cases are still to be measured
            said = f"{case}: {type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
            self.not_measured.append(said)
            if not isinstance(error, torch.OutOfMemoryError):
                self.failed.append(said)
                traceback.print_exc()
