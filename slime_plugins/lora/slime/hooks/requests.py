"""``lora_path`` in every request of the rollout processes, with ``--lora-sync adapter``. Stdlib only.

The trainer announces the adapter that the engines have loaded to slime's RolloutManager; from then on requests to
its router name that adapter. A name is used for one version of the weights only, so that no prefix cache answers for
an older one.
"""

from __future__ import annotations

import functools
from urllib.parse import urlsplit

_ENDPOINTS = ("/generate", "/v1/completions", "/v1/chat/completions")
_announced: tuple[str, str] | None = None
"""Router (host:port) and adapter name of this process's requests. slime's request functions know no adapter."""


def use_lora_adapter(self, name: str) -> str:
    """Method of slime's RolloutManager: requests to the router of the trained model name this adapter from now on."""
    global _announced
    server = self._get_updatable_server()
    ip = getattr(server, "router_ip", None) or self.args.sglang_router_ip
    port = getattr(server, "router_port", None) or self.args.sglang_router_port
    _announced = urlsplit(f"http://{ip}:{port}").netloc, name
    return name


def request_fields(url: str) -> dict[str, str]:
    """What a request to this URL must also say: the adapter, if it goes to the trained model."""
    if _announced is None:
        return {}
    router, name = _announced
    parts = urlsplit(str(url))
    return {"lora_path": name} if parts.netloc == router and parts.path.endswith(_ENDPOINTS) else {}


def naming_adapter(post):
    """Hook: slime's ``post``, through which rollout functions talk to the router."""

    @functools.wraps(post)
    async def hooked(url, payload, *args, **kwargs):
        fields = request_fields(url)
        if fields and isinstance(payload, dict) and payload.get("lora_path") is None:
            payload = {**payload, **fields}
        return await post(url, payload, *args, **kwargs)

    return hooked
