"""What adapter sync asks of Ray, in one process: an answer is a value or a future; ``put`` hands back what it got."""

from __future__ import annotations

import concurrent.futures
import types
from typing import Any


class GetTimeoutError(Exception):
    """As Ray's."""


def module(nodes: int = 1) -> types.ModuleType:
    """A module ``ray`` of a job on so many machines; ``puts`` lists what has been put."""
    ray = types.ModuleType("ray")
    ray.exceptions = types.SimpleNamespace(GetTimeoutError=GetTimeoutError)
    ray.puts = []

    def get(answer: Any, timeout: float | None = None) -> Any:
        if not isinstance(answer, concurrent.futures.Future):
            return answer
        try:
            return answer.result(timeout)
        except concurrent.futures.TimeoutError:
            raise GetTimeoutError(f"Get timed out: {timeout} s") from None

    def put(value: Any) -> Any:
        ray.puts.append(value)
        return value

    ray.get, ray.put = get, put
    ray.nodes = lambda: [{"Alive": True}] * nodes
    return ray
