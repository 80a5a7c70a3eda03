"""``lora_path`` in every request of the rollout processes, with ``--lora-sync adapter``. Stdlib only.

The trainer announces the adapter that the engines have loaded to slime's RolloutManager; from then on requests to
its router name that adapter. A name is used for one version of the weights only, so that no prefix cache answers for
an older one.

"Loaded" means that an engine has the tensors in host memory. That it serves them, and that its server plugin is there,
is proven by two requests of one token each, before any rollout.
"""

from __future__ import annotations

import functools
from typing import Any
from urllib.parse import urlsplit

from slime_plugins.lora.server.names import BASE

_ENDPOINTS = ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses")
_announced: tuple[str, str] | None = None
"""Router (host:port) and adapter name of this process's requests. slime's request functions know no adapter."""
_unproven: tuple[list, str, float] | None = None
"""Engines that could not compute when they were loaded, the adapter, and the seconds that each may take."""


def use_lora_adapter(self, name: str) -> str:
    """Method of slime's RolloutManager: requests to the router of the trained model name this adapter from now on."""
    global _announced, _unproven
    server = self._get_updatable_server()
    ip = getattr(server, "router_ip", None) or self.args.sglang_router_ip
    port = getattr(server, "router_port", None) or self.args.sglang_router_port
    _announced = urlsplit(f"http://{ip}:{port}").netloc, name
    if getattr(self.args, "offload_rollout", False):
        engines = [engine for engine in getattr(server, "engines", None) or () if engine is not None]
        _unproven = engines, name, self.args.lora_sync_timeout
    return name


def request_fields(url: str) -> dict[str, str]:
    """What a request to this URL must also say: the adapter, if it goes to the trained model.

    Raises:
        RuntimeError: an engine does not serve it; asked of every engine before the first request of a sync.
    """
    if _announced is None:
        return {}
    router, name = _announced
    parts = urlsplit(str(url))
    if parts.netloc != router or not parts.path.endswith(_ENDPOINTS):
        return {}
    _prove_once()
    return {"lora_path": name}


def naming_adapter(post):
    """Hook: slime's ``post``, through which rollout functions talk to the router.

    A request that names an adapter keeps it; ``slime-lora-base`` is the base.
    """

    @functools.wraps(post)
    async def hooked(url, payload, *args, **kwargs):
        fields = request_fields(url)
        if fields and isinstance(payload, dict) and payload.get("lora_path") is None:
            payload = {**payload, **fields}
        return await post(url, payload, *args, **kwargs)

    return hooked


def _prove_once() -> None:
    """The proof that had to wait for the engines' memory. It blocks: nothing else may be sent before it is done."""
    global _unproven
    if _unproven is not None:
        prove(*_unproven)
        _unproven = None


def prove(engines: list, name: str, timeout: float) -> None:
    """One token from the adapter and one from the base, by its name, of every engine.

    Raises:
        RuntimeError: naming the engine: it does not serve the adapter, or has no server plugin.
    """
    asked = [(engine, engine._make_request.remote("generate", _smoke(name))) for engine in engines]
    for i, (_, answer) in enumerate(asked):
        answer_of(f"engine {i} of {len(asked)}, generate with lora_path {name}", answer, timeout)
    asked = [(engine, engine._make_request.remote("generate", _smoke(BASE))) for engine in engines]
    for i, (_, answer) in enumerate(asked):
        try:
            answer_of(f"engine {i} of {len(asked)}, generate with lora_path {BASE}", answer, timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"{error}; the engine has not loaded slime-lora's server plugin, without which a request that names "
                "no adapter gets the base in silence: install slime-lora where the engine runs, leave SGLANG_PLUGINS "
                "unset or with slime_lora in it, and start external engines with --weight-version slime-lora"
            ) from None


def _smoke(name: str) -> dict[str, Any]:
    return {
        "input_ids": [1],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "lora_path": name,
    }


def answer_of(who: str, answer: Any, timeout: float) -> Any:
    """What an engine answers within so many seconds.

    Raises:
        RuntimeError: it did not, or refused, with its own words.
    """
    import ray

    try:
        return ray.get(answer, timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        raise RuntimeError(
            f"{who}: no answer within {timeout:g} s; the engine hangs, or waits for requests of an adapter that it is "
            "to unload; see its log, and --lora-sync-timeout"
        ) from None
    except Exception as error:  # noqa: BLE001 - Ray wraps whatever the engine's request raised
        cause = getattr(error, "cause", None) or error
        said = " ".join([str(cause), *getattr(cause, "__notes__", ())]).split()
        raise RuntimeError(f"{who}: {' '.join(said)[:600]}") from None
