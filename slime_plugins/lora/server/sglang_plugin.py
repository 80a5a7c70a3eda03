"""A plugin of SGLang's server: no request to an engine of ``--lora-sync adapter`` gets the base in silence.

SGLang serves the base to every request that names no adapter. Here such a request gets the adapter that was loaded
last; ``slime-lora-base`` asks for the base; a name that is not loaded, or no adapter at all yet, is an error. Found by
SGLang through the entry-point group ``sglang.srt.plugins``; other servers on the machine are left as they are.

On SGLang 0.5.15 a request that fails between the adapter's count and the scheduler (too long an input) is counted as
under way for ever, and the unload of its adapter waits for it: here it is counted off.
"""

from __future__ import annotations

import logging
from typing import Any

from slime_plugins.lora.server.names import BASE, MARK, PREFIX

logger = logging.getLogger(__name__)

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_HEALTH_CHECK = "HEALTH_CHECK"
"""Request ids of SGLang's own /health_generate begin with it; that asks whether the engine computes at all."""


def register() -> None:
    """Entry point: put the hooks in place. They do nothing on a server that was not started for slime-lora."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_MANAGER}.__init__", started, HookType.AFTER)
    HookRegistry.register(f"{_MANAGER}._validate_and_resolve_lora", resolving, HookType.AROUND)
    HookRegistry.register(f"{_MANAGER}.load_lora_adapter", loading, HookType.AROUND)
    HookRegistry.register(f"{_MANAGER}.load_lora_adapter_from_tensors", loading, HookType.AROUND)
    if not hasattr(TokenizerManager, "_release_lora_once"):  # SGLang after 0.5.15 counts them off itself
        HookRegistry.register(f"{_MANAGER}._discard_pending_req_states", discarding, HookType.BEFORE)


def started(result: None, manager: Any, server_args: Any, *more: Any, **kwargs: Any) -> None:
    """After the server's start: is it one of ours?"""
    version = str(getattr(server_args, "weight_version", ""))
    manager.slime_lora = version == MARK
    manager.slime_lora_current = None
    if manager.slime_lora:
        logger.info("slime-lora: requests without lora_path get the current adapter; %r asks for the base", BASE)


async def loading(load: Any, manager: Any, obj: Any, *more: Any, **kwargs: Any) -> Any:
    """Around the loading of an adapter: the last of the trainer's is the current one."""
    result = await load(manager, obj, *more, **kwargs)
    if getattr(manager, "slime_lora", False) and result.success and obj.lora_name.startswith(PREFIX):
        manager.slime_lora_current = obj.lora_name
    return result


async def resolving(resolve: Any, manager: Any, obj: Any, *more: Any, **kwargs: Any) -> Any:
    """Around the look-up of a request's adapter.

    Raises:
        ValueError: no adapter has been loaded yet, or one that is not loaded is named; SGLang answers 400.
    """
    if getattr(manager, "slime_lora", False) and not _is_health_check(obj):
        names = obj.lora_path if isinstance(obj.lora_path, list) else [obj.lora_path]
        found = [_name_for(manager, name) for name in names]
        if isinstance(obj.lora_path, list):
            obj.lora_path = found if any(found) else None
        elif getattr(obj, "is_single", True):
            obj.lora_path = found[0]
        else:  # SGLang has made a list of everything else by now
            obj.lora_path = None if found[0] is None else found * len(obj.rid)
        for i, part in vars(obj).get("_sub_obj_cache", {}).items():
            part.lora_path = obj.lora_path[i] if isinstance(obj.lora_path, list) else obj.lora_path
    return await resolve(manager, obj, *more, **kwargs)


def _is_health_check(obj: Any) -> bool:
    rid = getattr(obj, "rid", None)
    return not obj.lora_path and isinstance(rid, str) and rid.startswith(_HEALTH_CHECK)


def _name_for(manager: Any, name: str | None) -> str | None:
    """The adapter of a request that names ``name``; None is the base."""
    if name == BASE:
        return None
    current = manager.slime_lora_current
    if not name:
        if current is None:
            raise ValueError(
                f"slime-lora: this engine has no adapter yet (it has just started; the next weight sync brings it); "
                f'to ask for the base, send "lora_path": "{BASE}"'
            )
        return current
    loaded = manager.lora_registry.get_all_adapters()
    if name not in loaded:
        raise ValueError(
            f"slime-lora: adapter {name!r} is not loaded here (loaded: {', '.join(sorted(loaded)) or 'none'}); a "
            "later weight sync has replaced it, or it never was: leave lora_path out for the current one, or send "
            f'"{BASE}" for the base'
        )
    return name


def discarding(manager: Any, obj: Any, *more: Any, **kwargs: Any) -> None:
    """Before SGLang drops the state of a request that never reached the scheduler: count it off its adapter."""
    import asyncio

    rids, ids = obj.rid, getattr(obj, "lora_id", None)
    if not isinstance(rids, list):
        rids, ids = [rids], [ids]
    elif not isinstance(ids, list):
        ids = [ids] * len(rids)
    for rid, lora_id in zip(rids, ids):
        if lora_id is not None and rid in manager.rid_to_state:
            task = asyncio.ensure_future(manager.lora_registry.release(lora_id))
            _releases.add(task)
            task.add_done_callback(_releases.discard)


_releases: set[Any] = set()
"""Tasks under way; asyncio itself keeps no hold of them."""
