"""slime's routing replay, kept out of passes that are not the policy's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_STAGE = "ROUTING_REPLAY_STAGE"


@contextlib.contextmanager
def no_replay() -> Iterator[None]:
    """Inside, experts are chosen by the router: slime's routing replay would replay the choice of another pass."""
    before = os.environ.get(_STAGE)
    os.environ[_STAGE] = "fallthrough"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_STAGE]
        else:
            os.environ[_STAGE] = before
