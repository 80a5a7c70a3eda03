"""Adapter sync, the server plugin and clients against SGLang's own request handling. See support/sglang_engine.py.

make contracts
"""

from __future__ import annotations

import base64
import pickle
import sys
import time
import types
from argparse import Namespace

import pytest
import ray_stand_in
import serving_cases
import torch
from sglang_engine import BUCKET, Engine, HTTPError, in_sys_modules, request_classes, unpickler, validated
from sglang_worker import wheel_of
from wheels import SGLANG

from slime_plugins.lora.peft.form import to_peft
from slime_plugins.lora.server.names import BASE
from slime_plugins.lora.slime.hooks import adapter_sync, requests

pytestmark = pytest.mark.contracts
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return serving_cases.base(tmp_path_factory.mktemp("bases"), "qwen3")


@pytest.fixture(params=SGLANG)
def version(request):
    return request.param


@pytest.fixture
def ray(monkeypatch):
    ray = ray_stand_in.module(nodes=2)
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


@pytest.fixture(autouse=True)
def engines_end_with_their_test():
    yield
    while Engine.running:
        Engine.running.pop().close()


@pytest.fixture
def engine(version, hf_dir, ray):
    return Engine(version, hf_dir, TARGETS, serving_cases.RANK)


def updater_of(engines, hf_dir, version, **settings) -> adapter_sync.AdapterUpdater:
    """slime's weight updater, over these engines; ``sync`` sends random adapters of a seed."""
    args = Namespace(
        colocate=True, lora_sync_dir=None, hf_checkpoint=str(hf_dir), offload_rollout=False, sglang_tp_size=1,
        lora_sync_timeout=10.0, lora_sync_lag=None,
    )  # fmt: skip
    vars(args).update(settings)
    updater = adapter_sync.AdapterUpdater(args, [], None, model_name="", quantization_config=None, policies=None)
    updater.connect_rollout_engines(engines, None)
    return updater


def adapter(hf_dir, seed):
    args = serving_cases.arguments(hf_dir, "--lora-r", str(serving_cases.RANK))
    projections = serving_cases.adapter_of(args, hf_dir, seed)
    return projections, *to_peft(projections, hf_dir)


def sync(updater, hf_dir, seed: int = 0) -> str:
    """One weight sync; returns the adapter's name."""
    updater.weight_version += 1
    name = f"slime-test-v{updater.weight_version:06d}"
    _, config, tensors = adapter(hf_dir, seed)
    wheel = updater.rollout_engines[0].worker.wheel
    io_struct = types.ModuleType("io_struct")
    cls = request_classes(wheel)["load_lora_adapter_from_tensors"]
    io_struct.LoadLoRAAdapterFromTensorsReqInput = cls
    with in_sys_modules({BUCKET: wheel.module(BUCKET), "sglang.srt.managers.io_struct": io_struct}):
        updater._load(name, config, tensors)
    return name


@pytest.mark.parametrize("way", ["tensors", "shared directory", "memory of one machine"])
def test_a_sync_is_served_as_it_is(engine, ray, version, hf_dir, tmp_path, way):
    folder = str(tmp_path) if way == "shared directory" else None
    ray.nodes = lambda: [{"Alive": True}] * (1 if way.startswith("memory") else 2)
    updater = updater_of([engine], hf_dir, version, lora_sync_dir=folder)
    for seed in (1, 2, 3):
        name = sync(updater, hf_dir, seed)
        projections, *_ = adapter(hf_dir, seed)
        served = engine.worker.served(name)
        assert served.keys() == {p.name for p in projections}
        for p in projections:
            assert (served[p.name] - p.update()).abs().max() <= 0.02 * p.update().abs().max()
    assert list(tmp_path.iterdir()) == []
    kept = list(engine.manager.lora_registry.get_all_adapters())
    assert kept == ["slime-test-v000002", "slime-test-v000003"], "two in flight, the current one and the one before"
    loads = [endpoint for endpoint in engine.asked if endpoint.startswith("load")]
    assert set(loads) == {"load_lora_adapter_from_tensors" if way == "tensors" else "load_lora_adapter"}
    assert len(ray.puts) == (3 if way == "tensors" else 0)


def test_one_body_serves_all_engines(version, hf_dir, ray):
    engines = [Engine(version, hf_dir, TARGETS, serving_cases.RANK) for _ in range(2)]
    sync(updater_of(engines, hf_dir, version), hf_dir)
    assert len(ray.puts) == 1 and all(engine.served for engine in engines)


def test_the_form_of_before_is_what_0_5_23_does_not_read(hf_dir):
    """A dict through torch.save, as this was once sent: one of the two versions takes it, plain pickle both."""
    import io

    tensors = {"a": torch.randn(2, 3, dtype=torch.bfloat16)}

    class ByValue:
        def __reduce__(self):
            buffer = io.BytesIO()
            torch.save(tensors, buffer)
            return torch.storage._load_from_bytes, (buffer.getvalue(),)

    old = {}
    for version in SGLANG:
        reader = unpickler(wheel_of(version))
        got = reader(io.BytesIO(pickle.dumps(tensors))).load()
        assert torch.equal(got["a"], tensors["a"])
        try:
            old[version] = reader(io.BytesIO(pickle.dumps(ByValue()))).load().keys() == tensors.keys()
        except Exception as error:  # noqa: BLE001
            old[version] = str(error)
    assert old["0.5.15.post1"] is True and "Expected a Torch storage, got dict" in old["0.5.23"]


def refused(future) -> str:
    with pytest.raises(HTTPError) as caught:
        future.result(10)
    return " ".join(caught.value.__notes__)


def test_a_client_without_lora_path_gets_the_adapter(engine, version, hf_dir):
    assert "has no adapter yet" in refused(engine.generate())
    assert engine.served == [], "the base, in silence"
    updater = updater_of([engine], hf_dir, version)
    first = sync(updater, hf_dir)
    engine.served.clear()
    engine.generate().result(10)
    engine.generate(lora_path=None).result(10)
    engine.generate(lora_path=first).result(10)
    engine.generate(lora_path=BASE).result(10)
    engine.generate(input_ids=[[1, 2], [3]]).result(10)
    assert engine.served == [first, first, first, None, first, first]
    second = sync(updater, hf_dir)
    engine.served.clear()
    engine.generate().result(10)
    assert engine.served == [second]
    third = sync(updater, hf_dir)
    said = refused(engine.generate(lora_path=first))
    assert first in said and third in said and "replaced" in said
    assert "slime-mine" in refused(engine.generate(lora_path="slime-mine"))


def test_health_checks_pass_before_the_first_sync(engine):
    engine.generate(rid="HEALTH_CHECK_1").result(10)
    assert engine.served == [None]


def test_other_servers_are_left_alone(version, hf_dir, ray):
    """slime-lora is installed, but this server was not started for it."""
    engine = Engine(version, hf_dir, TARGETS, serving_cases.RANK, marked=False)
    engine.generate().result(10)
    assert engine.served == [None]


@pytest.mark.parametrize("missing", ["plugin", "marked"])
def test_an_engine_without_the_plugin_ends_the_first_sync(version, hf_dir, ray, missing):
    engine = Engine(version, hf_dir, TARGETS, serving_cases.RANK, **{missing: False})
    with pytest.raises(RuntimeError, match=r"engine 0 of 1, generate.*has not loaded slime-lora's server plugin"):
        sync(updater_of([engine], hf_dir, version), hf_dir)


def test_a_rejected_request_does_not_block_later_syncs(engine, version, hf_dir):
    updater = updater_of([engine], hf_dir, version, lora_sync_timeout=3.0)
    name = sync(updater, hf_dir)
    for fields in ({}, {"lora_path": name}):
        assert "longer than the model's context" in refused(engine.generate(input_ids=[1] * 99, **fields))
    assert "longer than" in refused(engine.generate(input_ids=[[1], [1] * 99]))
    for seed in (1, 2, 3):
        sync(updater, hf_dir, seed)
    assert engine.in_flight() == 0


def test_without_the_plugin_a_rejected_request_blocks_0_5_15(hf_dir, ray):
    """Why the plugin counts it off."""
    engine = Engine("0.5.15.post1", hf_dir, TARGETS, serving_cases.RANK, plugin=False)
    _, config, tensors = adapter(hf_dir, 0)
    body = {"lora_name": "a", "config_dict": config, "serialized_tensors": _pickled(tensors)}
    engine.request("load_lora_adapter_from_tensors", body).result(10)
    refused(engine.generate(input_ids=[1] * 99, lora_path="a"))
    assert engine.in_flight() == 1
    with pytest.raises(TimeoutError):
        engine.request("unload_lora_adapter", {"lora_name": "a"}).result(1)


def _pickled(tensors):
    return base64.b64encode(pickle.dumps(tensors)).decode()


def test_requests_under_way_keep_their_version_and_an_unload_waits_for_them(engine, version, hf_dir):
    updater = updater_of([engine], hf_dir, version, lora_sync_timeout=1.0)
    first = sync(updater, hf_dir)
    engine.served.clear()
    engine.hold = True
    running = engine.generate()
    while engine.in_flight() == 0:
        time.sleep(0.01)
    engine.hold = False
    second = sync(updater, hf_dir)
    assert not running.done(), "the sync ended a request under way"
    with pytest.raises(RuntimeError, match=r"engine 0 of 1, unload_lora_adapter: no answer within 1 s"):
        sync(updater, hf_dir)
    engine.finish()
    running.result(10)
    assert engine.served[-1] == first and second in engine.manager.lora_registry.get_all_adapters()


@pytest.mark.parametrize("endpoint", ["load_lora_adapter_from_tensors", "update_weight_version", "generate"])
def test_an_engine_that_is_slow_or_broken_is_named(engine, version, hf_dir, endpoint):
    engine.break_at = endpoint
    with pytest.raises(RuntimeError, match=rf"engine 0 of 1, {endpoint}.*500 Server Error"):
        sync(updater_of([engine], hf_dir, version), hf_dir)
    engine.break_at, engine.delay = None, 5.0
    with pytest.raises(RuntimeError, match=r"engine 0 of 1, load_lora_adapter_from_tensors: no answer within 0.2 s"):
        sync(updater_of([engine], hf_dir, version, lora_sync_timeout=0.2), hf_dir)


def test_an_adapter_that_does_not_fit_is_said_at_the_sync(version, hf_dir, ray):
    """SGLang answers success to a load and fails at the first request: so that is sent."""
    engine = Engine(version, hf_dir, TARGETS, serving_cases.RANK)
    updater = updater_of([engine], hf_dir, version)
    _, config, tensors = adapter(hf_dir, 0)
    wheel = engine.worker.wheel
    key = next(key for key in tensors if "o_proj.lora_A" in key)
    tensors[key] = tensors[key][:, :-1].contiguous()
    body = {"lora_name": "slime-x", "config_dict": config, "serialized_tensors": _pickled(tensors)}
    body["serialized_named_tensors"] = [body["serialized_tensors"]]
    cls = request_classes(wheel)["load_lora_adapter_from_tensors"]
    body = {k: v for k, v in body.items() if k in cls.__struct_fields__}
    assert engine.request("load_lora_adapter_from_tensors", body).result(10)["success"]
    with pytest.raises(RuntimeError, match=r"engine 0 of 1, generate with lora_path slime-x: .*does not match"):
        requests.prove(updater.rollout_engines, "slime-x", 10.0)


def test_an_engine_that_has_restarted_gets_the_adapter_with_the_next_sync(engine, version, hf_dir):
    updater = updater_of([engine], hf_dir, version)
    sync(updater, hf_dir)
    again = Engine(version, hf_dir, TARGETS, serving_cases.RANK)
    updater.connect_rollout_engines([again], None)
    assert "has no adapter yet" in refused(again.generate()), "a client in between gets the base"
    second = sync(updater, hf_dir)
    again.generate().result(10)
    assert again.served[-1] == second


def test_a_version_that_an_engine_has_lost_is_gone_already(engine, version, hf_dir):
    """An external engine that has come back under the same address."""
    updater = updater_of([engine], hf_dir, version)
    first = sync(updater, hf_dir)
    sync(updater, hf_dir)
    engine.request("unload_lora_adapter", {"lora_name": first}).result(10)
    third = sync(updater, hf_dir)
    assert third in engine.manager.lora_registry.get_all_adapters()


def test_bodies_have_the_fields_of_the_request_classes(version, hf_dir):
    """Each with no more and no less than SGLang's class knows; its framework validates them."""
    classes = request_classes(wheel_of(version))
    version_body = {"new_version": "3", "abort_all_requests": False}
    assert validated(classes["update_weight_version"], version_body).abort_all_requests is False
    assert classes["update_weight_version"](new_version="3").abort_all_requests is True, "the default"
    unload = validated(classes["unload_lora_adapter"], {"lora_name": "a"})
    assert unload.lora_name == "a"
    smoke = requests._smoke("a")
    assert set(smoke) <= {field.name for field in classes["generate"].__dataclass_fields__.values()}
