"""slime's own train.py with ``--use-lora``, on a CPU: Ray actors, Megatron, DDP, checkpoints, engines that record.

    SLIME_DIR=~/slime MEGATRON_DIR=~/megatron-with-slimes-patch SLIME_CPU_DIR=~/slime_cpu SLIME_PYTHON=~/v/bin/python \
        pytest -m "" tests/slime/real  # twelve runs of a minute or two; SLIME_REV=main for another

The harness's model: 4 layers, hidden 64, bf16, tied embeddings; rewards come from a file or pseudo-random answers.
"""

from __future__ import annotations

import json

import pytest
from peft_merged import merge_and_unload
from runs import LORA, Run, rollout_requests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def check_learning(run: Run, steps: int) -> None:
    """Adapters train, the base does not, and the reference is the base."""
    assert len(run.steps) == steps
    kl = run.of("kl_loss")
    assert kl[0] == 0.0 and all(value > 0 for value in kl[1:]), kl
    assert all(value > 0 for value in run.of("grad_norm")) and set(run.of("lora/dead")) == {0.0}
    by_rank: dict[int, set] = {}
    for probe in run.probes:
        by_rank.setdefault(probe["rank"], set()).add(probe["base"])
        assert list(probe["copies"]) == ["actor"], "a policy other than the actor has a copy in host memory"
    assert by_rank and all(len(bits) == 1 for bits in by_rank.values()), "the base has changed"


def check_going_on(resumed: Run, straight: Run) -> None:
    """The last two of four steps, in another split: bf16 sums in another order.

    A resume from random adapters or fresh moments is off by far more. The KL moves most (3.7 % seen of experts): a
    row-parallel linear rounds its adapter's part with each rank's partial sum. In float32: test_slime_rows.py.
    """
    for key, rel in (("kl_loss", 0.05), ("grad_norm", 0.005), ("lora/update_norm", 1e-3)):
        assert resumed.of(key) == pytest.approx(straight.of(key)[2:], rel=rel), key


@pytest.fixture(scope="session")
def straight(run):
    """Four steps, saved after the second and the fourth."""
    return run("--steps", "4", "--save-interval", "2", extra=f"{LORA} --save-hf hf_{{rollout_id}}")


def test_without_use_lora_the_patched_checkout_is_slime(run, plain_slime):
    plain, patched = run("--steps", "2", slime=plain_slime), run("--steps", "2")
    assert plain.steps == patched.steps and len(plain.steps) == 2


def test_train(straight):
    check_learning(straight, 4)
    assert "trainable params: 13,312 || all params: 194,240" in straight.log


def test_resumed_steps_are_those_of_the_run_that_went_on(run, straight):
    resumed = run("--steps", "4", "--save-interval", "2", "--resume", extra=f"{LORA} --ckpt-step 1", of=straight)
    assert resumed.steps == straight.steps[2:]


def test_resume_at_another_tensor_parallel_size(run, straight):
    words = ("--tp", "2", "--steps", "4", "--save-interval", "2", "--resume")
    resumed = run(*words, extra=f"{LORA} --ckpt-step 1", of=straight)
    assert resumed.of("step") == [2, 3]
    check_going_on(resumed, straight)


def test_resume_experts_at_another_split(run):
    """EP 2 x TP 1 to EP 1 x TP 2."""
    words, extra = (
        ("--model", "qwen3moe", "--steps", "4", "--save-interval", "2"),
        f"{LORA} --save-hf hf_{{rollout_id}}",
    )
    straight = run(*words, "--ep", "2", extra=extra)
    check_learning(straight, 4)
    resumed = run(*words, "--tp", "2", "--resume", extra=f"{LORA} --ckpt-step 1", of=straight)
    check_going_on(resumed, straight)


@pytest.mark.parametrize(
    "words, extra",
    [
        ("--mode colocate --tp 2", ""),
        ("--mode distributed --pp 2", ""),
        ("--mode disk", ""),
        ("--model qwen3moe --mode colocate --tp 2 --ep 2", ""),
        ("--model qwen3moe --mode colocate --tp 2 --ep 2", "--sglang-ep-size 2"),  # each rank sends its own experts
        ("--model qwen3moe --mode disk --tp 2 --etp 2", ""),
        ("--model deepseek --mode distributed --tp 2 --ep 2", ""),
    ],
)
def test_engines_receive_the_merged_model(run, words, extra):
    import torch
    from safetensors.torch import load_file

    synced = run("--steps", "2", *words.split(), extra=f"{LORA} --save-hf hf_{{rollout_id}} {extra}")
    check_learning(synced, 2)
    first, *_, last = (load_file(file) for file in synced.received("weights_*.safetensors"))
    base = load_file(synced.work / "hf" / "model.safetensors")
    assert all(torch.equal(first[name], tensor) for name, tensor in base.items()), "before the first step B is zero"
    adapter = load_file(synced.work / "hf_1" / "adapter_model.safetensors")
    expected = merge_and_unload(synced.work / "hf", synced.work / "hf_1")
    assert expected.keys() - last.keys() <= {"lm_head.weight"} and last.keys() <= expected.keys()
    wrong = [name for name, tensor in last.items() if not torch.equal(tensor, expected[name])]
    assert wrong == []
    assert sum(not torch.equal(last[name], base[name]) for name in base) == len(adapter) // 2
    size = sum(t.numel() * t.element_size() for t in last.values())
    assert synced.of("lora/sync_bytes")[-1] == size
    print(f"bytes per sync, merged: {size}; lost to rounding: {synced.of('lora/sync_lost')[-1]:.4f}")


@pytest.mark.parametrize(
    "words, extra",
    [
        ("--mode colocate --tp 2", ""),
        ("--mode disk", "--lora-sync-dir sync"),
        ("--model qwen3moe --mode colocate --tp 2 --ep 2", ""),
    ],
)
def test_engines_receive_the_adapter_alone(run, words, extra):
    import torch
    from safetensors.torch import load_file

    synced = run(
        "--steps",
        "2",
        "--generate",
        *words.split(),
        extra=f"{LORA} --lora-sync adapter --save-hf hf_{{rollout_id}} {extra}",
    )
    check_learning(synced, 2)
    expected = load_file(synced.work / "hf_1" / "adapter_model.safetensors")
    size = sum(t.numel() * t.element_size() for t in expected.values())
    assert set(synced.of("lora/sync_bytes")) == {size}
    print(f"bytes per sync, adapter: {size}")
    requests = synced.requests()
    assert not [r for r in requests if r["endpoint"].startswith("update_weights")], "no weight is sent"
    loads = [r["payload"]["lora_name"] for r in requests if r["endpoint"].startswith("load_lora_adapter")]
    assert len(set(loads)) == 3
    named = [r["payload"].get("lora_path") for r in rollout_requests(requests)]
    assert set(named) == set(loads[:2]) and named == sorted(named), "an answer from an older adapter"
    if not extra:
        last = load_file(synced.received("lora_*.safetensors")[-1])
        assert last.keys() == expected.keys() and all(torch.equal(last[k], expected[k]) for k in last)


def test_async_training_lags_by_one_version_and_no_more(run):
    """train_async.py: the next rollout is under way while a step trains, and done before the sync."""
    words = ("--steps", "3", "--generate", "--mode", "disk", "--train-script", "train_async.py")
    asynchronous = run(*words, extra=f"{LORA} --lora-sync adapter --lora-sync-dir sync")
    assert len(asynchronous.steps) == 3
    requests = asynchronous.requests()
    loads = [r["payload"]["lora_name"] for r in requests if r["endpoint"] == "load_lora_adapter"]
    loaded: list[str] = []
    for request in requests:
        name = request["payload"].get("lora_name")
        loaded += [name] if request["endpoint"] == "load_lora_adapter" else []
        if request["endpoint"] == "unload_lora_adapter":
            loaded.remove(name)
        assert len(loaded) <= 2, "two in flight"
    named = [r["payload"]["lora_path"] for r in rollout_requests(requests)]
    assert named == sorted(named) and set(named) <= set(loads)
    # Three rollouts of 16 requests. The first two are of the first version: the second starts before the first step.
    assert [named.count(name) for name in loads[:2]] == [32, 16]
    assert not [r for r in requests if r["endpoint"] == "update_weight_version" and r["payload"]["abort_all_requests"]]


def test_an_engine_without_the_server_plugin_ends_the_run_at_its_first_sync(run, monkeypatch):
    monkeypatch.setenv("SLIME_LORA_NO_SERVER_PLUGIN", "1")
    words = ("--steps", "1", "--generate", "--mode", "disk")
    log = run(*words, extra=f"{LORA} --lora-sync adapter --lora-sync-dir sync", fails=True).log
    assert "engine 0 of 1, generate with lora_path slime-lora-base" in log
    assert "has not loaded slime-lora's server plugin" in log


def test_eval_only_measures_the_adapter(run, patched_slime, tmp_path):
    """--num-rollout 0, where this slime has it: the engines get what a run that goes on from there would send."""
    from safetensors.torch import load_file

    if "num_rollout == 0" not in (patched_slime / "slime/backends/megatron_utils/model.py").read_text():
        pytest.skip("this slime has no eval-only runs; SLIME_REV=main has")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"input": "t4 t5", "label": "t3"}) + "\n")
    words = ("--steps", "2", "--mode", "disk", "--generate")
    trained = run(*words, "--save-interval", "2", extra=LORA)
    evaluate = f"--num-rollout 0 --eval-interval 1 --eval-prompt-data toy {prompts} --eval-max-response-len 8"
    alone = run(*words, "--resume", of=trained, extra=f"{LORA} {evaluate}")
    expected = load_file(trained.received("weights_3.safetensors")[0])
    got = load_file(alone.received("weights_1.safetensors")[0])
    assert not all(torch_equal(got[k], v) for k, v in load_file(trained.work / "hf" / "model.safetensors").items())
    assert got.keys() == expected.keys() and all(torch_equal(got[k], v) for k, v in expected.items())


def torch_equal(a, b) -> bool:
    import torch

    return torch.equal(a, b)


def test_host_memory(run, straight, plain_slime):
    full = run("--steps", "2", slime=plain_slime)
    of_slime, of_lora = full.probes[-1]["copies"], straight.probes[-1]["copies"]
    assert of_slime["actor"] == of_slime["ref"] == 2 * 180_928
    assert of_lora == {"actor": 2 * 13_312}
    print(f"host memory for policies: slime {of_slime}, LoRA {of_lora}")


def test_offload_recompute_old_actor_and_reference_updates(run):
    words = ("--steps", "3", "--mode", "colocate", "--tp", "2", "--offload")
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    run_ = run(*words, extra=f"{LORA} {recompute} --keep-old-actor --ref-update-interval 2")
    assert run_.of("kl_loss")[0] == 0.0 and run_.of("kl_loss")[1] > 0
    assert run_.of("kl_loss")[2] == 0.0, "after two steps the reference is the actor"
    copies = run_.probes[-1]["copies"]
    assert set(copies) == {"actor", "old_actor", "rollout_actor", "ref"} and len(set(copies.values())) == 1


def test_context_parallel_and_dynamic_batches(run, straight):
    """The first two steps of CP 1; bf16 sums in another order."""
    extra = f"{LORA} --use-dynamic-batch-size --max-tokens-per-gpu 256"
    split = run("--cp", "2", "--steps", "2", extra=extra)
    check_learning(split, 2)
    for key, rel in (("grad_norm", 0.005), ("lora/update_norm", 2e-3)):
        assert split.of(key) == pytest.approx(straight.of(key)[:2], rel=rel), key


def test_eval_asks_the_adapter_of_its_step(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"t{i} t{i + 1}", "label": "t3"}) + "\n" for i in range(5)))
    evaluate = f"--eval-interval 1 --eval-prompt-data toy {prompts} --n-samples-per-eval-prompt 1"
    extra = f"{LORA} --lora-sync adapter --lora-sync-dir sync {evaluate} --eval-max-response-len 8"
    evaluated = run("--steps", "2", "--generate", "--mode", "disk", extra=extra)
    asked = [r["payload"].get("lora_path") for r in rollout_requests(evaluated.requests())]
    names = [r["payload"]["lora_name"] for r in evaluated.requests() if r["endpoint"] == "load_lora_adapter"]
    # Before each of two steps and after the second: 5 prompts to evaluate, 16 samples to learn from.
    assert asked == sorted(asked) and [asked.count(name) for name in names] == [5 + 16, 5 + 16, 5]


def test_the_base_as_teacher(run, straight):
    """On-policy distillation from the adapters switched off: no copy, and at step 0 nothing to learn from it."""
    teacher = f"--use-opd --opd-type megatron --opd-kl-coef 1.0 --opd-teacher-load {straight.work / 'hf'}"
    taught = run("--steps", "2", extra=f"{LORA} {teacher}")
    check_learning(taught, 2)
    assert taught.of("grad_norm")[0] == straight.of("grad_norm")[0]
    assert taught.of("grad_norm")[1] != straight.of("grad_norm")[1]


def test_rl_from_an_adapter(run, straight):
    """The start is the reference: KL 0 at step 0, then more; resumed at another size; without the flag it is the base.

    The start is the straight run's adapter after four steps, as PEFT has it.
    """
    extra = f"{LORA} --lora-adapter-path {straight.work / 'hf_3'} --lora-ref start"
    words = ("--steps", "3", "--save-interval", "2")
    started = run(*words, extra=extra)
    kl = started.of("kl_loss")
    assert kl[0] == 0.0 and all(value > 0 for value in kl[1:]), kl
    copies = started.probes[-1]["copies"]
    assert set(copies) == {"actor", "ref"} and copies["ref"] == copies["actor"]
    assert "the reference policy is the adapter that training started from" in started.log
    resumed = run(*words, "--tp", "2", "--resume", extra=f"{extra} --ckpt-step 1", of=started)
    assert resumed.of("kl_loss") == pytest.approx(kl[2:], rel=0.03), "bf16 sums in another order"


def test_lora_plus(run):
    """B's rate over A's in every step, through slime's own scheduler, its checkpoint and a resume."""
    words = ("--steps", "3", "--save-interval", "2")
    extra = f"{LORA} --lora-plus-ratio 8 --lr-decay-style linear"
    straight = run(*words, extra=extra)
    check_learning(straight, 3)
    A, B = straight.of("lr-pg_0"), straight.of("lr-pg_1")
    assert len(set(A)) == 3 and [8 * rate for rate in A] == pytest.approx(B)
    resumed = run(*words, "--resume", extra=f"{extra} --ckpt-step 1", of=straight)
    assert resumed.steps == straight.steps[2:]


def test_sft(run):
    extra = f"{LORA} --loss-type sft_loss --calculate-per-token-loss --disable-compute-advantages-and-returns"
    sft = run("--steps", "2", extra=extra)
    assert all(value > 0 for value in sft.of("grad_norm")) and set(sft.of("lora/dead")) == {0.0}


NF4 = f"{LORA} --lora-base-quant nf4 --lora-base-quant-exclude linear_proj"  # whose shards at TP 2 cut a block
"""Needs bitsandbytes where SLIME_PYTHON finds it."""


@pytest.mark.parametrize("words", [(), ("--tp", "2")])
def test_a_4_bit_base(run, words, tmp_path):
    """Engines get the dequantised weights first, bit for bit, and others after a step; the reference is the base."""
    from safetensors.torch import load_file

    from slime_plugins.lora.cli import main

    done = run("--mode", "colocate", "--steps", "2", *words, extra=NF4)
    check_learning(done, 2)
    assert "base in 4 bits" in done.log
    dequantize = ["dequantize", "--hf-checkpoint", str(done.work / "hf"), "--out", str(tmp_path / "dense")]
    assert main([*dequantize, "--lora-base-quant-exclude", "linear_proj"]) == 0
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    first, *_, last = (load_file(path) for path in done.received("weights_*.safetensors"))
    assert [name for name in first if not (first[name] == dense[name]).all()] == []
    assert [name for name in last if not (last[name] == dense[name]).all()]


@pytest.fixture(scope="module")
def dequantised(run, tmp_path_factory):
    """The harness's model as a 4-bit base multiplies with it, and the run that it was made from."""
    from slime_plugins.lora.cli import main

    whole = run("--steps", "4", "--save-interval", "2", extra=NF4)
    out = tmp_path_factory.mktemp("dense") / "hf"
    dequantize = ["dequantize", "--hf-checkpoint", str(whole.work / "hf"), "--out", str(out)]
    assert main([*dequantize, "--lora-base-quant-exclude", "linear_proj"]) == 0
    return out, whole


def test_a_4_bit_base_is_resumed(run, dequantised):
    """To the last digit what a dense base of the dequantised weights gives, resumed in another split too."""
    dense, whole = dequantised
    words, on_dense = ("--steps", "4", "--save-interval", "2"), f"{LORA} --hf-checkpoint {dense} --ref-load {dense}"
    same = run(*words, extra=on_dense)
    assert same.steps == whole.steps
    assert run(*words, "--resume", extra=f"{NF4} --ckpt-step 1", of=whole).steps == whole.steps[2:]
    split = (*words, "--tp", "2", "--resume")
    resumed = run(*split, extra=f"{NF4} --ckpt-step 1", of=whole)
    assert resumed.of("step") == [2, 3]
    assert resumed.steps == run(*split, extra=f"{on_dense} --ckpt-step 1", of=same).steps


def test_adapters_alone_to_engines_on_the_dequantised_base(run, dequantised):
    import torch
    from safetensors.torch import load_file

    dense, whole = dequantised
    adapter = f"{NF4} --lora-sync adapter --save-hf hf_{{rollout_id}}"
    words = ("--generate", "--mode", "colocate", "--steps", "2")
    on_dense = f"--hf-checkpoint {dense} --ref-load {whole.work / 'hf'}"
    synced = run(*words, extra=f"{adapter} {on_dense}")
    check_learning(synced, 2)
    requests = synced.requests()
    assert not [r for r in requests if r["endpoint"].startswith("update_weights")], "no weight is sent"
    expected = load_file(synced.work / "hf_1" / "adapter_model.safetensors")
    last = load_file(synced.received("lora_*.safetensors")[-1])
    assert last.keys() == expected.keys() and all(torch.equal(last[k], expected[k]) for k in last)
    refused = run(*words, extra=adapter, fails=True).log
    assert "which is not the base that trains" in refused and "`slime-lora dequantize`" in refused


def test_a_checkpoint_in_4_bit_codes(run, dequantised, tmp_path):
    """bitsandbytes' own: trained in its codes, and dense on the weights that they stand for, to the last digit."""
    import nf4_oracle

    from slime_plugins.lora.cli import main

    codes = nf4_oracle.saved_in_codes(dequantised[1].work / "hf", tmp_path / "codes")
    assert main(["dequantize", "--hf-checkpoint", str(codes), "--out", str(tmp_path / "dense")]) == 0
    words = ("--mode", "colocate", "--steps", "2", "--tp", "2")
    where = f"--hf-checkpoint {tmp_path / 'dense'} --ref-load {codes}"
    packed, dense = run(*words, extra=f"{NF4} {where}"), run(*words, extra=f"{LORA} {where}")
    check_learning(packed, 2)
    assert "base in 4 bits" in packed.log and "base in 4 bits" not in dense.log
    numbers = [
        [{k: v for k, v in step.items() if "seconds" not in k} for step in run.steps] for run in (packed, dense)
    ]
    assert numbers[0] == numbers[1]
