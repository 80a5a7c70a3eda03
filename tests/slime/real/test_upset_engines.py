r"""Adapter sync with engines and clients that do not do as they should, in slime's own train.py on a CPU.

    SLIME_DIR=... MEGATRON_DIR=... SLIME_CPU_DIR=... SLIME_PYTHON=... \
        pytest -m "" tests/slime/real/test_upset_engines.py

Each time every answer comes from the right weights, or the run stops and says why. A minute or two each.
"""

from __future__ import annotations

import pytest
from runs import LORA, Run, loads, rollout_requests, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ADAPTER = f"{LORA} --lora-sync adapter"
SHARED = f"{ADAPTER} --lora-sync-dir sync"
DISK = ("--generate", "--mode", "disk")
TWO_ENGINES = ("--generate", "--mode", "colocate", "--tp", "2")


def check_last_adapter(run: Run, engine: str = "*") -> None:
    """What the engine got last is what the trainer saved last."""
    import torch
    from safetensors.torch import load_file

    name = loads(run.requests(engine))[-1]
    (file,) = run.received(f"lora_{name}.safetensors") if engine == "*" else [
        run.work / "engines" / engine / f"lora_{name}.safetensors"
    ]  # fmt: skip
    got, expected = load_file(file), load_file(run.work / f"hf_{len(run.steps) - 1}" / "adapter_model.safetensors")
    assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)


def test_an_engine_restarted_between_two_syncs_gets_the_next_version(run):
    """Its server has lost every version by the time that one of them is to be unloaded."""
    synced = run("--steps", "3", *DISK, upset="forgets", extra=f"{SHARED} --save-hf hf_{{rollout_id}}")
    requests = synced.requests()
    assert [r["endpoint"] for r in requests].count("upset: restarted") == 1
    names = loads(requests)
    assert len(synced.steps) == 3 and len(set(names)) == 4
    assert served(requests) == [name for name in names[:3] for _ in range(16)]
    assert (
        f"LoRA with name {names[0]} does not exist" in synced.log
        and "it has been restarted, and gets the new version" in synced.log
    )
    check_last_adapter(synced)


def test_an_engine_restarted_within_a_rollout_serves_nothing_and_the_run_stops(run):
    stopped = run("--steps", "1", *DISK, upset="forgets-midway", extra=SHARED, fails=True)
    requests = stopped.requests()
    (name,) = loads(requests)
    assert set(served(requests)) == {name} and len(served(requests)) < 16, "an answer of other weights"
    assert f"slime-lora: adapter '{name}' is not loaded here (loaded: none)" in stopped.log


def test_an_engine_that_slime_replaces_gets_the_adapter_before_any_request(run):
    """slime's fault tolerance: the health check fails, the engine is killed, the next sync starts another."""
    health = "--use-fault-tolerance --rollout-health-check-interval 0.5 --rollout-health-check-timeout 5"
    extra = f"{ADAPTER} --save-hf hf_{{rollout_id}} --rollout-num-gpus-per-engine 1 {health}"
    synced = run("--steps", "2", *TWO_ENGINES, upset="hangs", extra=extra)
    assert len(synced.steps) == 2 and "Killing actor" in synced.log
    replaced, other = synced.requests("engine0"), synced.requests("engine1")
    names = loads(other)
    assert [r["endpoint"] for r in replaced].count("started") == 2
    assert len(set(names)) == 3 and loads(replaced) == names
    assert served(other)[:16] == [names[0]] * 16, "the one that was left did all of the first rollout"
    assert sorted(served(other)[16:] + served(replaced)) == [names[1]] * 16
    assert not [r for r in other + replaced if "REFUSED" in r["endpoint"]]
    check_last_adapter(synced, "engine0")
    check_last_adapter(synced, "engine1")


def test_a_rejected_request_is_asked_again_and_blocks_no_sync(run):
    synced = run("--steps", "3", *DISK, upset="rejects", extra=SHARED)
    requests = synced.requests()
    said = [(r["endpoint"], str(r["payload"])) for r in requests if r["endpoint"].startswith("generate ")]
    assert [endpoint for endpoint, _ in said] == ["generate REFUSED", "generate FAILED"]
    assert "upset: rejected" in synced.log and "upset: failed" in synced.log, "slime logs what the engine said"
    names = loads(requests)
    assert len(synced.steps) == 3 and len(set(names)) == 4
    assert served(requests) == [name for name in names[:3] for _ in range(16)]
    unloaded = [r["payload"]["lora_name"] for r in requests if r["endpoint"] == "unload_lora_adapter"]
    assert unloaded == names[:2]


def test_a_client_that_names_no_adapter_gets_the_current_one(run):
    own = "--custom-generate-function-path own_clients.with_httpx"
    synced = run("--steps", "2", *DISK, extra=f"{SHARED} {own}")
    requests = synced.requests()
    asked = [r["payload"].get("lora_path") for r in rollout_requests(requests)]
    assert asked.count(None) == 32 and asked.count("slime-lora-base") == 1
    names, answered = loads(requests), served(requests)
    assert answered.count(None) == 1, "the base, to the one who asked for it"
    assert [name for name in answered if name is not None] == [names[0]] * 16 + [names[1]] * 16


MODELS = {
    "policy": "  - name: policy\n    server_groups: [{worker_type: regular, num_gpus: 1, num_gpus_per_engine: 1}]\n",
    "judge": "  - name: judge\n    update_weights: false\n"
    "    server_groups: [{worker_type: regular, num_gpus: 1, num_gpus_per_engine: 1}]\n",
}


def two_models(tmp_path, *names: str) -> str:
    file = tmp_path / "models.yaml"
    file.write_text("sglang:\n" + "".join(MODELS[name] for name in names))
    return f"{ADAPTER} --sglang-config {file} --custom-generate-function-path own_clients.with_two_models"


def test_a_frozen_model_beside_the_trained_one_is_left_as_it_is(run, tmp_path):
    synced = run("--steps", "2", *TWO_ENGINES, extra=two_models(tmp_path, "policy", "judge"))
    trained, frozen = synced.requests("engine0"), synced.requests("engine1")
    names = loads(trained)
    assert len(synced.steps) == 2 and len(set(names)) == 3
    assert served(trained) == [names[0]] * 16 + [names[1]] * 16
    (arguments,) = (r["payload"] for r in trained if r["endpoint"] == "started")
    assert arguments["enable_lora"] and arguments["max_lora_rank"] == 4 and arguments["max_loras_per_batch"] == 2
    (arguments,) = (r["payload"] for r in frozen if r["endpoint"] == "started")
    assert not arguments["enable_lora"] and arguments["lora_target_modules"] is None
    assert arguments["max_loras_per_batch"] == 8
    assert loads(frozen) == [] and served(frozen) == [None] * 32
    assert {r["payload"].get("lora_path") for r in frozen if r["endpoint"] == "generate"} == {None}


def test_a_frozen_model_in_the_first_place_is_refused(run, tmp_path):
    """slime's rollouts ask the first model: they would learn from answers of weights that no sync reaches."""
    log = run("--steps", "1", *TWO_ENGINES, extra=two_models(tmp_path, "judge", "policy"), fails=True).log
    assert "--sglang-config: its first model gets no weights" in log
