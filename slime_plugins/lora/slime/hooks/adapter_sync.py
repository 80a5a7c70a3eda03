"""``--lora-sync adapter``: the rollout engines keep the base they started with and get the adapter alone.

Every sync is an adapter of a new name on every engine: engines that have joined or come back since get it too, and no
cache answers for an older one (SGLang's loading into a name that is there already is not used for that reason). Older
versions stay loaded, for requests under way, as long as ``refusals.versions_kept`` says.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import logging
import os
import pickle
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from slime_plugins.lora.adapters import config_of, has_adapters
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.ends.export import gather_projections
from slime_plugins.lora.peft.dialect import for_sglang
from slime_plugins.lora.peft.directory import validate_adapter, write_adapter
from slime_plugins.lora.peft.form import to_peft
from slime_plugins.lora.server.names import PREFIX
from slime_plugins.lora.slime.hooks import gkd, merged_sync, requests
from slime_plugins.lora.slime.hooks.base_check import refuse_other_base
from slime_plugins.lora.slime.hooks.policies import Policies
from slime_plugins.lora.slime.hooks.refusals import versions_kept

logger = logging.getLogger(__name__)


def weight_updater(actor, update_weight_cls):
    """Hook: the class that slime sends weights with. slime's own unless the adapter alone is to be sent.

    The actor has its adapters and its other policies by now, of which a teacher is made.
    """
    if getattr(actor.args, "use_gkd", False) and has_adapters(actor.model):
        gkd.begin(actor)
    if not has_adapters(actor.model) or actor.args.lora_sync != "adapter" or actor.args.debug_train_only:
        return update_weight_cls
    refuse_other_base(actor.model, actor.args.hf_checkpoint)
    return functools.partial(AdapterUpdater, policies=actor.weights_backuper)


class AdapterUpdater:
    """What slime's actor expects of a weight updater, for adapters."""

    def __init__(self, args, model, weights_getter, *, model_name, quantization_config, policies: Policies) -> None:
        self.args = args
        self.model = model
        self.weight_version = 0
        self.update_weight_metrics: dict[str, float] = {}
        self.rollout_engines: list = []
        self._policies = policies
        self._run = uuid.uuid4().hex[:8]  # external engines may still hold another run's adapters
        self._loaded: list[tuple[str, list]] = []
        """Adapters on engines and which engines those are, the oldest first."""
        self._to_announce: str | None = None
        self._known_base: BaseCheckpoint | None = None

    def connect_rollout_engines(self, rollout_engines, rollout_engine_lock, *more, **kwargs) -> None:
        """Take the engines that there are now; no process group is needed."""
        self.rollout_engines = list(rollout_engines)

    def disconnect_rollout_engines(self) -> None:
        """Nothing is held open."""

    def pop_metrics(self) -> dict[str, float]:
        """slime drains these into its log; the sync's are measured with the step's."""
        return {}

    @torch.no_grad()
    def update_weights(self) -> None:
        """Gather the adapter, load it on every engine, check every answer. Call on all ranks.

        Raises:
            RuntimeError: an engine did not take it, on every rank.
        """
        self.weight_version += 1
        if config_of(self.model).trainable_token_indices:
            raise RuntimeError("trained vocabulary rows cannot be sent as an adapter; use --lora-sync merged")
        projections = gather_projections(self.model, self._policies.adapter_values)
        problem = None
        if dist.get_rank() == 0:
            try:
                base = self._base()
                config, tensors = to_peft(projections or [], base, dropout=config_of(self.model).dropout)
                validate_adapter(config, tensors)
                config, tensors = for_sglang(config, tensors, base)
                size = sum(t.numel() * t.element_size() for t in tensors.values())
                self._load(f"{PREFIX}{self._run}-v{self.weight_version:06d}", config, tensors)
                merged_sync.count_bytes(size)
            except Exception as error:
                logger.exception("LoRA: the engines did not get the adapter")
                problem = f"{type(error).__name__}: {error}"
        _raise_everywhere(problem)

    def announce(self, actor) -> None:
        """Let requests name what has been loaded. slime's actor knows the RolloutManager that sends them."""
        if self._to_announce is not None:
            import ray

            ray.get(actor.rollout_manager.use_lora_adapter.remote(self._to_announce))
            self._to_announce = None

    def _base(self) -> BaseCheckpoint:
        """``--hf-checkpoint``, read once; again only if its files are others by now."""
        if self._known_base is not None and (changed := self._known_base.changed()):
            logger.warning(
                "LoRA: %s has changed since it was read: it is read again; an engine that starts from now on may hold "
                "another base than the one that trains",
                changed[0],
            )
            self._known_base = None
        if self._known_base is None:
            self._known_base = BaseCheckpoint(self.args.hf_checkpoint)
        return self._known_base

    def _load(self, name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Unload what no request may name any more, load this. ``tensors`` is emptied on the way."""
        while len(self._loaded) >= versions_kept(self.args):
            old, engines = self._loaded.pop(0)
            # An engine that has left is nobody's business.
            self._unload(old, [engine for engine in engines if engine in self.rollout_engines])
        start = time.perf_counter()
        with self._payload(name, config, tensors) as (endpoint, payload):
            self._ask(endpoint, payload, self.rollout_engines, loads=name)
        # SGLang would abort what runs; here older versions stay loaded for it.
        version = {"new_version": str(self.weight_version), "abort_all_requests": False}
        self._ask("update_weight_version", version, self.rollout_engines)
        if not self.args.offload_rollout:  # else they cannot compute yet: the rollout does it
            requests.prove(self.rollout_engines, name, self.args.lora_sync_timeout)
        logger.info(
            "LoRA: %s on %d engines in %.2f s (%s)",
            name,
            len(self.rollout_engines),
            time.perf_counter() - start,
            endpoint,
        )
        self._loaded.append((name, self.rollout_engines))
        self._to_announce = name

    def _unload(self, name: str, engines: list) -> None:
        try:
            self._ask("unload_lora_adapter", {"lora_name": name}, engines)
        except RuntimeError as error:
            if f"{name} does not exist" not in str(error):
                raise
            logger.warning("LoRA: %s; it has been restarted, and gets the new version", error)

    @contextlib.contextmanager
    def _payload(self, name: str, config: dict, tensors: dict) -> Iterator[tuple[str, Any]]:
        """Endpoint and body. Files go when the engines have answered: by then they hold the adapter in memory."""
        folder = self.args.lora_sync_dir
        if folder is None and self.args.colocate:
            folder = memory_folder(tensors)
        if folder is None:
            import ray

            body = tensor_payload(name, config, tensors, self.args)
            tensors.clear()
            yield "load_lora_adapter_from_tensors", ray.put(body)  # once, not once per engine
            return
        where = Path(folder) / name
        try:
            write_adapter(where, config, tensors, validated=True)
            self._after_writing(where)
            yield "load_lora_adapter", {"lora_name": name, "lora_path": str(where.resolve())}
        finally:
            shutil.rmtree(where, ignore_errors=True)

    def _after_writing(self, where: Path) -> None:
        """slime's hook for shared file systems where a written file is not there for others until it is published."""
        path = getattr(self.args, "custom_update_weight_post_write_path", None)
        if path:
            from slime.utils.misc import load_function

            load_function(path)(self.args, str(where), list(self.rollout_engines))

    def _ask(self, endpoint: str, payload: Any, engines: list, loads: str | None = None) -> None:
        """Post to engines and check what each says.

        Raises:
            RuntimeError: naming the engine, the endpoint and the answer, or that there was none.
        """
        answers = [engine._make_request.remote(endpoint, payload) for engine in engines]
        for i, answer in enumerate(answers):
            who = f"engine {i} of {len(engines)}, {endpoint}"
            check_answer(who, requests.answer_of(who, answer, self.args.lora_sync_timeout), loads)


def check_answer(who: str, answer: Any, loads: str | None = None) -> None:
    """Raise RuntimeError unless an engine says that it has done what it was asked.

    Args:
        loads: the adapter that must be among the loaded ones afterwards.
    """
    if not isinstance(answer, dict) or answer.get("success") is not True:
        raise RuntimeError(f"{who}: the answer is {answer!r}, expected success; is it an SGLang with --enable-lora?")
    loaded = answer.get("loaded_adapters")
    if loads is not None and loaded is not None and loads not in loaded:
        raise RuntimeError(f"{who}: {loads} is not among the loaded adapters {sorted(loaded)}")


def memory_folder(tensors: dict[str, torch.Tensor]) -> str | None:
    """A folder in memory that every engine of a job on one machine can read; None where there is none, or no room.

    Colocated engines then read the adapter as files out of memory, instead of gigabytes of JSON per engine.
    """
    import ray

    folder = Path("/dev/shm")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if sum(node["Alive"] for node in ray.nodes()) != 1 or not os.access(folder, os.W_OK):
        return None
    return str(folder) if shutil.disk_usage(folder).free > 2 * size else None


def tensor_payload(name: str, config: dict, tensors: dict[str, torch.Tensor], args) -> dict[str, Any]:
    """Body of a ``load_lora_adapter_from_tensors`` request, in the form that the installed SGLang reads.

    All tensors in one, as SGLang's own weight updates have them: pickled with its contents, which any number of
    processes may read, by names that its unpickler lets through. SGLang up to 0.5.15 reads one payload on every
    tensor-parallel rank, later ones a payload per rank.
    """
    from sglang.srt.managers import io_struct
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    bucket = FlattenedTensorBucket(named_tensors=[(key, tensor.contiguous()) for key, tensor in tensors.items()])
    flat = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    data = base64.b64encode(pickle.dumps(flat)).decode()
    request = getattr(io_struct, "LoadLoRAAdapterFromTensorsReqInput", None)
    body: dict[str, Any] = {"lora_name": name, "config_dict": config, "load_format": "flattened_bucket"}
    if "serialized_named_tensors" in _fields(request):
        body["serialized_named_tensors"] = [data] * args.sglang_tp_size
    else:
        body["serialized_tensors"] = data
    return body


def _fields(cls) -> list[str]:
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return list(getattr(cls, "__struct_fields__", ()) or getattr(cls, "__annotations__", ()))


def _raise_everywhere(problem: str | None) -> None:
    from slime.utils.distributed_utils import get_gloo_group

    box = [problem]
    dist.broadcast_object_list(box, src=0, group=get_gloo_group())
    if box[0] is not None:
        raise RuntimeError(box[0])
