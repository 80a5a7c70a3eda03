"""slime's own train.py with ``--use-lora``, on a CPU: Ray actors, Megatron, DDP, checkpoints, engines that record.

    SLIME_DIR=~/slime MEGATRON_DIR=~/megatron-with-slimes-patch SLIME_CPU_DIR=~/slime_cpu SLIME_PYTHON=~/v/bin/python \
        pytest -m "" tests/slime/real  # twelve runs of a minute or two; SLIME_REV=main for another

The harness's model: 4 layers, hidden 64, bf16, tied embeddings; rewards come from a file or pseudo-random answers.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from peft_merged import merge_and_unload

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

LORA = "--use-lora --lora-r 4 --lora-alpha 8"
HERE = Path(__file__).parent


@dataclass
class Run:
    """What a finished run left."""

    work: Path
    log: str
    steps: list[dict]

    def of(self, key: str) -> list[float]:
        return [step[f"train/{key}"] for step in self.steps]

    @property
    def probes(self) -> list[dict]:
        return [json.loads(text) for text in re.findall(r"PROBE (\{.*\})\s*$", self.log, re.M)]

    def received(self, pattern: str) -> list[Path]:
        return sorted((self.work / "engines").glob(f"*/{pattern}"))

    def requests(self) -> list[dict]:
        (file,) = (self.work / "engines").glob("*/requests.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def run(harness_dir, megatron_dir, slime_python, patched_slime, tmp_path_factory):
    """Run slime once per set of arguments and session; ``of`` names another run's directory to go on from."""
    done: dict[tuple, Run] = {}

    def start(*words: str, extra: str = "", slime: Path = patched_slime, of: Run | None = None) -> Run:
        key = (words, extra, slime, of and of.work)
        if key not in done:
            work = tmp_path_factory.mktemp("run") / "work"
            if of is not None:
                shutil.copytree(of.work, work)
            command = [
                slime_python, harness_dir / "run.py", "--slime", slime, "--megatron", megatron_dir, "--work", work,
                "--pythonpath", HERE, "--plugin", "probe", *words, "--extra", extra,
            ]  # fmt: skip
            for _ in range(3):  # on a busy machine Ray may not come up in its time
                finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
                log = (work / "log.txt").read_text()
                if "timed out during startup" not in log:
                    break
            assert finished.returncode == 0, log[-4000:]
            done[key] = Run(work, log, json.loads((work / "steps.json").read_text())["steps"])
        return done[key]

    return start


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

    A resume from random adapters or fresh moments is off by far more.
    """
    for key, rel in (("kl_loss", 0.03), ("grad_norm", 0.005), ("lora/update_norm", 1e-3)):
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
    named = [r["payload"].get("lora_path") for r in requests if r["endpoint"] == "generate"]
    assert set(named) == set(loads[:2]) and named == sorted(named), "an answer from an older adapter"
    if not extra:
        last = load_file(synced.received("lora_*.safetensors")[-1])
        assert last.keys() == expected.keys() and all(torch.equal(last[k], expected[k]) for k in last)


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
    asked = [r["payload"].get("lora_path") for r in evaluated.requests() if r["endpoint"] == "generate"]
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
