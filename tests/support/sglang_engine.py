"""An engine that says no: SGLang's own handling of requests, adapters and plugins out of its wheel, on one CPU rank.

Its own are: the request classes and their validation, the unpickler, the registry that counts requests under way,
loading and unloading, the path of a request up to the scheduler, the plugin framework, and on the rank everything of
``sglang_worker``. Ours: tokenising (a length limit) and the scheduler (a token at once, or when it is told to).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import importlib.metadata
import pickle
import sys
import threading
import types
import typing
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomllib
import torch
from sglang_worker import Quiet, Worker
from wheels import library

ROOT = Path(__file__).parents[2]
MANAGER = "sglang.srt.managers.tokenizer_manager"
CONTROL = "sglang.srt.managers.tokenizer_control_mixin"
BUCKET = "sglang.srt.weight_sync.tensor_bucket"
LENGTH = 8
"""Longest input, in tokens."""
_REQUESTS = (
    "BaseReq", "LoadLoRAAdapterReqInput", "UnloadLoRAAdapterReqInput", "LoadLoRAAdapterFromTensorsReqInput",
    "LoRAUpdateOutput", "UpdateWeightVersionReqInput", "GenerateReqInput",
)  # fmt: skip


class HTTPError(Exception):
    """What ``requests`` raises in slime's engine actor for a status that is not 200."""


class Engine:
    """One engine; ``_make_request.remote(endpoint, payload)`` as on slime's actor, its answer a future."""

    running: typing.ClassVar[list[Engine]] = []

    def __init__(
        self, version: str, hf_dir: Path, target_modules: list[str], max_rank: int, *, plugin=True, marked=True
    ) -> None:
        self.worker = Worker(version, hf_dir, target_modules, max_rank)
        self.asked: list[str] = []
        """Endpoints."""
        self.served: list[str | None] = []
        """The adapter of every answered request; None is the base."""
        self.hold = False
        """Requests stay under way until ``finish``."""
        self.delay = 0.0
        """Seconds before any answer."""
        self.break_at: str | None = None
        """The endpoint that answers with HTTP 500."""
        self._make_request = types.SimpleNamespace(remote=self.request)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        Engine.running.append(self)
        self._version = version
        self._reqs = request_classes(self.worker.wheel)
        with installed(self, plugin):
            arguments = Quiet(
                weight_version="slime-lora" if marked else "default", enable_lora=True, dp_size=1,
                max_loaded_loras=None, lora_paths=None, language_only=False,
            )  # fmt: skip
            self.manager = self._run(self._started(arguments))

    def close(self) -> None:
        """End it, with whatever it was about to answer."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _started(self, arguments: Quiet) -> Any:
        return self.manager_class(arguments, self)

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def request(self, endpoint: str, payload: Any) -> Any:
        """A POST; returns a ``concurrent.futures.Future`` of the answer."""
        return asyncio.run_coroutine_threadsafe(self._answer(endpoint, copy.deepcopy(payload)), self._loop)

    async def _answer(self, endpoint: str, payload: dict) -> Any:
        self.asked.append(endpoint)
        await asyncio.sleep(self.delay)
        if endpoint == self.break_at:
            raise HTTPError("500 Server Error: Internal Server Error")
        if endpoint == "generate":
            return await self._generate(payload)
        if endpoint == "update_weight_version":
            self.received(endpoint, payload)
            return {"success": True}
        result = await getattr(self.manager, endpoint)(self.received(endpoint, payload))
        answer = {"success": result.success, "error_message": getattr(result, "error_message", None)}
        answer["loaded_adapters"] = getattr(result, "loaded_adapters", None)
        if not result.success:
            error = HTTPError("400 Client Error: Bad Request")
            error.add_note(f"response.text={answer!r}")
            raise error
        return answer

    def received(self, endpoint: str, payload: dict) -> Any:
        """The body as the server's framework makes its request class of it. Raises what that raises."""
        return validated(self._reqs[endpoint], payload)

    async def _generate(self, payload: dict) -> Any:
        obj = self._reqs["generate"](**payload)
        try:
            async for response in self.manager.generate_request(obj):
                return response
        except ValueError as error:
            refusal = HTTPError("400 Client Error: Bad Request")
            refusal.add_note(f"response.text={error}")
            raise refusal from None

    def generate(self, **fields: Any) -> Any:
        """A client's request, of three tokens; returns a future."""
        return self.request("generate", {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 1}, **fields})

    def finish(self) -> None:
        """Let the requests under way end."""
        self.hold = False
        self._loop.call_soon_threadsafe(self.manager.done.set)

    def in_flight(self) -> int:
        """Requests that the registry counts, over all adapters."""
        return sum(counter._count for counter in self.manager.lora_registry._counters.values())


def request_classes(wheel: Any) -> dict[str, Any]:
    """SGLang's classes of request bodies, by endpoint."""
    msgspec = library("msgspec")
    with_msgspec = wheel.module("sglang.srt.utils.msgspec_utils")
    given = {name: getattr(typing, name) for name in ("Annotated", "Any", "Dict", "List", "Optional", "Union")}
    given |= dict(msgspec=msgspec, uuid=uuid, dataclass=dataclasses.dataclass, field=dataclasses.field)
    # Hidden states are not asked for here.
    given |= dict(get_return_hidden_states_mode=lambda mode: Quiet(need_capture=lambda: False))
    given |= dict(LoRARef=wheel.module("sglang.srt.lora.lora_registry").LoRARef)
    given |= {name: getattr(with_msgspec, name) for name in ("Base64Bytes", "msgspec_struct_pydantic_core_schema")}
    found = wheel.take("sglang.srt.managers.io_struct", *_REQUESTS, **given)
    return {
        "load_lora_adapter": found.LoadLoRAAdapterReqInput,
        "load_lora_adapter_from_tensors": found.LoadLoRAAdapterFromTensorsReqInput,
        "unload_lora_adapter": found.UnloadLoRAAdapterReqInput,
        "update_weight_version": found.UpdateWeightVersionReqInput,
        "generate": found.GenerateReqInput,
        "answer": found.LoRAUpdateOutput,
    }


def validated(cls: Any, payload: dict) -> Any:
    """What FastAPI does with a JSON body and this class."""
    import json

    import pydantic

    return pydantic.TypeAdapter(cls).validate_python(json.loads(json.dumps(payload)))


def unpickler(wheel: Any) -> Any:
    """SGLang's class that reads tensors out of request bodies."""
    import io

    names = [n for n in ("_safe_load_torch_storage", "SafeUnpickler") if _has(wheel, "sglang.srt.utils.common", n)]
    return wheel.take("sglang.srt.utils.common", *names, pickle=pickle, torch=torch, io=io).SafeUnpickler


def _has(wheel: Any, module: str, name: str) -> bool:
    return f"def {name}" in (text := wheel.path(module).read_text()) or f"class {name}" in text


@contextlib.contextmanager
def installed(engine: Engine, plugin: bool) -> Iterator[None]:
    """Inside, this wheel's modules are ``sglang``'s, and its plugins have been loaded as its server loads them."""
    wheel = engine.worker.wheel
    manager = types.ModuleType(MANAGER)
    manager.TokenizerManager = engine.manager_class = manager_class(wheel)
    bucket = wheel.module(BUCKET)
    bucket.FlattenedTensorMetadata.__module__ = BUCKET
    registry = wheel.module("sglang.srt.plugins.hook_registry")
    registry.HookRegistry.reset()
    modules = {MANAGER: manager, BUCKET: bucket, "sglang.srt.plugins.hook_registry": registry}
    wheel.give("sglang.srt.environ", envs=_Environ())
    wheel.real.add("sglang.srt.plugins.hook_registry")
    plugins = wheel.module("sglang.srt.plugins")
    with in_sys_modules(modules):
        plugins.entry_points = lambda group: entry_points(group) if plugin else []
        plugins._plugins_loaded = False
        plugins.load_plugins()
        yield


class _Environ(types.SimpleNamespace):
    """SGLang's environment variables, none of them set."""

    def __getattr__(self, name: str) -> Any:
        return types.SimpleNamespace(get=lambda: None)


def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
    """This package's, as it will be installed."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"].get(group, {})
    return [importlib.metadata.EntryPoint(name, value, group) for name, value in declared.items()]


@contextlib.contextmanager
def in_sys_modules(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    """Inside, imports find these, and their parents."""
    before = {name: sys.modules.get(name) for name in list(sys.modules) if name.split(".")[0] == "sglang"}
    names = {name.rsplit(".", i)[0] for name in modules for i in range(1, 4)}
    for name in before:
        del sys.modules[name]
    for name in sorted(n for n in names if n.startswith("sglang")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    for name, module in modules.items():
        sys.modules[name] = module
        parent, leaf = name.rsplit(".", 1)
        setattr(sys.modules[parent], leaf, module)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
            del sys.modules[name]
        sys.modules.update(before)


def manager_class(wheel: Any) -> type:
    """TokenizerManager of SGLang's own methods, as far as adapters and the path of a request go."""
    own = ["generate_request", "_validate_and_resolve_lora", "_resolve_lora_path"]
    failed = ("_discard_pending_req_states", "_release_req_states_on_failure", "_release_lora_once")
    own += [name for name in failed if _has(wheel, MANAGER, name)]
    classes = request_classes(wheel)
    lora = Quiet(enable_lora=True, max_loaded_loras=None)
    given = dict(
        asyncio=asyncio, logger=Quiet(info=_nothing, warning=_nothing, debug=_nothing, exception=_nothing),
        GenerateReqInput=classes["generate"], get_disagg=lambda: Quiet(language_only=False), get_lora=lambda: lora,
        get_serving=lambda: Quiet(enable_strict_thinking=False),
        LoadLoRAAdapterReqInput=classes["load_lora_adapter"],
    )  # fmt: skip
    methods = wheel.take(MANAGER, *(f"TokenizerManager.{name}" for name in own), **given)
    control = ["load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter"]
    control.append("_unload_lora_adapter_locked")
    helpers = [n for n in ("_merge_lora_update_results", "_lora_load_needs_cleanup") if _has(wheel, CONTROL, n)]
    registry = wheel.module("sglang.srt.lora.lora_registry")
    names = ("normalize_serialized_named_tensor_payload", "normalize_serialized_named_tensor_payloads")
    known = [n for n in ("_looks_like_pickle_payload", *names) if _has(wheel, "sglang.srt.utils.common", n)]
    common = wheel.take("sglang.srt.utils.common", *known, pybase64=__import__("base64"), pickle=pickle)
    given = dict(
        logger=given["logger"], LoRARef=registry.LoRARef, get_lora=lambda: lora,
        get_parallel=lambda: Quiet(dp_size=1), UnloadLoRAAdapterReqInput=classes["unload_lora_adapter"],
        LoadLoRAAdapterReqOutput=classes["answer"], UnloadLoRAAdapterReqOutput=classes["answer"],
        LoadLoRAAdapterFromTensorsReqOutput=classes["answer"], LoRAUpdateOutput=classes["answer"], **vars(common),
    )  # fmt: skip
    mixin = wheel.take(CONTROL, *helpers, *(f"TokenizerControlMixin.{name}" for name in control), **given)
    body = {**vars(methods), **{name: getattr(mixin, name) for name in control}}
    body["lora_registry_class"] = registry.LoRARegistry
    body["rwlock_class"] = wheel.module("sglang.srt.utils.aio_rwlock").RWLock
    return type("TokenizerManager", (_Ours,), body)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _Ours:
    """What of a TokenizerManager stands for the rest of the server."""

    enable_lora, is_pause, elastic_worker_count = True, False, 1

    def __init__(self, server_args: Quiet, engine: Engine) -> None:
        self.server_args, self.engine = server_args, engine
        self.lora_registry = self.lora_registry_class(None)
        self.lora_ref_cache: dict[str, Any] = {}
        self.pending_lora_unloads: dict[str, Any] = {}
        self.lora_update_lock, self.model_update_lock = asyncio.Lock(), self.rwlock_class()
        self.is_pause_cond, self.done = asyncio.Condition(), asyncio.Event()
        self.rid_to_state: dict[str, Any] = OrderedDict()
        self.encoder_dispatch_ready: dict[str, Any] = {}
        self._lora_release_tasks: set[Any] = set()
        self.request_logger = Quiet(log_received_request=_nothing)
        self.tokenizer = None
        self.ranks = {"unpickler": unpickler(engine.worker.wheel)}

    def auto_create_handle_loop(self) -> None:
        """The loop runs."""

    _set_default_priority = _nothing

    def _init_req_state(self, obj: Any, request: Any = None) -> None:
        for part in [obj] if obj.is_single else [obj[i] for i in range(len(obj.rid))]:
            self.rid_to_state[part.rid] = Quiet(obj=part, lora_released=False, dispatched=False, prompt_token_ids=None)

    async def _tokenize_one_request(self, obj: Any) -> Any:
        if len(obj.input_ids) > LENGTH:
            raise ValueError(f"The input ({len(obj.input_ids)} tokens) is longer than the model's context length")
        return obj

    def _send_one_request(self, tokenized: Any) -> Any:
        self.rid_to_state[tokenized.rid].dispatched = True
        return _Done()  # awaited in some versions

    async def _wait_one_response(self, obj: Any, request: Any = None) -> Any:
        """The scheduler: its ranks take the adapter into their pool, then the answer comes."""
        name = obj.lora_path if not isinstance(obj.lora_path, list) else obj.lora_path[0]
        if obj.lora_id is not None:
            self.engine.worker.manager.fetch_new_loras({obj.lora_id})
        if self.engine.hold:
            await self.done.wait()
        state = self.rid_to_state.pop(obj.rid)
        if state.obj.lora_path:
            await self.lora_registry.release(state.obj.lora_id)
        self.engine.served.append(name)
        yield {"text": "t", "meta_info": {"id": obj.rid}}

    async def _handle_batch_request(self, obj: Any, *more: Any) -> Any:
        for i in range(len(obj.rid)):
            part = obj[i]
            await self._tokenize_one_request(part)
            self._send_one_request(part)
            async for _ in self._wait_one_response(part):
                pass
        yield []

    async def update_lora_adapter_communicator(self, obj: Any) -> list[Any]:
        """To the ranks and back."""
        manager, kind = self.engine.worker.manager, type(obj).__name__
        if kind == "UnloadLoRAAdapterReqInput":
            return [manager.unload_lora_adapter(obj.to_ref())]
        if kind == "LoadLoRAAdapterReqInput":
            return [self._load_files(obj)]
        return [self._load_tensors(obj)]

    def _load_tensors(self, obj: Any) -> Any:
        import base64
        import io

        data = getattr(obj, "serialized_tensors", None) or obj.serialized_named_tensors[0]
        data = base64.b64decode(data, validate=True) if isinstance(data, str) else data
        wheel = self.engine.worker.wheel
        with in_sys_modules({BUCKET: wheel.module(BUCKET)}):
            read = self.ranks["unpickler"](io.BytesIO(data)).load()
        if obj.load_format == "flattened_bucket":
            read = dict(wheel.module(BUCKET).FlattenedTensorBucket(**read).reconstruct_tensors())
        return self.engine.worker.manager.load_lora_adapter_from_tensors(
            obj.to_ref(), read, obj.config_dict, obj.added_tokens_config
        )

    def _load_files(self, obj: Any) -> Any:
        import json

        from safetensors.torch import load_file

        config = json.loads((Path(obj.lora_path) / "adapter_config.json").read_text())
        tensors = load_file(Path(obj.lora_path) / "adapter_model.safetensors")
        return self.engine.worker.manager.load_lora_adapter_from_tensors(obj.to_ref(), tensors, config, None)


class _Done:
    """Something that may be awaited, and need not."""

    def __await__(self) -> Any:
        return iter(())
