"""``slime-lora rehearse`` from the command line: what it leaves, that it serves, how it ends and how it refuses.

pytest tests/rehearsal/test_rehearse.py            # short runs; some 2 minutes
pytest tests/rehearsal/test_rehearse.py -m slow    # the whole default run, other layouts and families
"""

import json
import os
import shlex
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from rehearsals import TINY, Rehearsal
from safetensors.torch import load_file

from slime_plugins.lora.cli import main
from slime_plugins.lora.rehearsal.tiny import make_tiny


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """A short run at TP 2 with SP, its output and its directory."""
    out = tmp_path_factory.mktemp("runs") / "short"
    with Rehearsal(out, cache, "--sp", "--show-samples", "3", *TINY) as run:
        code, log = run.wait()
        assert code == 0, log
        assert not run.orphans()
    return out, log


def test_outputs(finished):
    out, log = finished
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["base_checksum_before"] == summary["base_checksum_after"]
    assert 0 < summary["logits_max_abs_diff"] <= 1e-4
    assert 0 < summary["trainable_parameters"] < summary["total_parameters"]
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert (summary["first_step"], summary["last_step"]) == (1, 2)
    assert steps[0]["reward"] == summary["reward_first"]
    assert summary["reward_window"] == sum(step["reward"] for step in steps) / 2
    assert steps[1]["eval_reward"] == summary["eval_reward_last"], "the built-in task brings held-out prompts"
    assert steps[0]["kl"] == 0.0, "the adapter starts as zero: policy and reference are the same numbers"
    assert steps[1]["kl"] > 0.0, "a reference with the adapters on would give zero here too"
    assert all(step["rollout_log_prob_abs_diff"] < 1e-5 for step in steps)
    assert "step 2/2  reward" in log
    assert "tokens/s" in log
    assert (out / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert any(file.name.startswith("events.") for file in (out / "tensorboard").iterdir())


def test_what_was_sampled_is_seen(finished):
    out, log = finished
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for step in steps:
        mine = [s for s in samples if s["step"] == step["step"] and not s["held_out"]]
        assert len(mine) == 8 * 4
        assert sum(s["reward"] for s in mine) / len(mine) == step["reward"]
    held_out = [s for s in samples if s["held_out"]]
    assert {s["step"] for s in held_out} == {0, 2}
    assert not {s["prompt"] for s in held_out} & {s["prompt"] for s in samples if not s["held_out"]}
    first = samples[len(held_out) // 2]
    assert f"  {first['prompt']!r} -> {first['response']!r}  reward {first['reward']:g}" in log
    assert log.count("  reward 0\n") + log.count("  reward 1\n") == 3 * 2


def test_adapter_is_good(finished, capsys):
    out, _ = finished
    base = json.loads((out / "settings.json").read_text())["hf_checkpoint"]
    assert main(["verify", str(out / "adapter"), "--hf-checkpoint", base]) == 0, capsys.readouterr()


def test_serves(finished, tmp_path):
    """The last line, run in a shell as it is printed, answers over HTTP."""
    out, log = finished
    command = log.strip().splitlines()[-1]
    assert command == json.loads((out / "summary.json").read_text())["serve_command"]
    port = int(command.rsplit(" ", 1)[1])
    request = {"model": str(out / "serve"), "prompt": "3 1 4 5 9 third", "max_tokens": 4, "temperature": 0}
    with open(tmp_path / "server.log", "w") as log_file:
        server = subprocess.Popen(
            command,
            shell=True,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "HF_HOME": str(tmp_path / "hf"),
                "PATH": f"{Path(os.sys.executable).parent}:/usr/bin:/bin",
            },
        )
    try:
        answer = _post(f"http://127.0.0.1:{port}/v1/completions", request, server, tmp_path / "server.log")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert answer["choices"][0]["text"].strip() in list("0123456789"), answer


def _post(url: str, body: dict, server: subprocess.Popen, log: Path, timeout: float = 120) -> dict:
    data = json.dumps(body).encode()
    deadline = time.monotonic() + timeout
    while True:
        try:
            request = urllib.request.Request(url, data, {"content-type": "application/json"})
            return json.load(urllib.request.urlopen(request, timeout=60))
        except ConnectionError as error:
            refused = error
        except urllib.error.URLError as error:
            refused = error
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"{refused}: {log.read_text()}"
        time.sleep(0.5)


@pytest.mark.parametrize(
    "end, code, word",
    [
        (Rehearsal.ctrl_c, 130, "interrupted"),
        pytest.param(Rehearsal.terminate, 143, "terminated", marks=pytest.mark.slow),  # see test_interrupts.py
    ],
)
def test_ends_in_order_when_told_to(cache, tmp_path, capsys, end, code, word):
    out, saved = tmp_path / "run", tmp_path / "saved"
    flags = ["--save", str(saved), "--save-interval", "1", "--steps", "1000", *TINY[2:]]
    with Rehearsal(out, cache, *flags) as run:
        run.wait_for("step 2/1000")
        assert any("RankTrainer" in command for command in run.processes().values())
        end(run)
        found, log = run.wait()
        assert found == code, log
        assert not run.orphans()
    *_, last = log.strip().splitlines()
    said, _, command = last.partition("; go on with: ")
    assert said == f"slime-lora: {word}"
    assert "Traceback" not in log
    assert "SIGTERM received" not in log, "Ray prints a stack of its own"
    # What has been learned until then is there,
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    # and the command printed goes on with this very run: with one step in all, it has none left to do.
    name, *argv = shlex.split(command)
    assert name == "slime-lora"
    assert main([*argv, "--steps", "1"]) == 2
    assert "--steps 1 leaves none to do" in capsys.readouterr().err


def test_nothing_outlives_a_killed_run(cache, tmp_path):
    """kill -9 while processes are starting, when Ray's own are the least aware of who started them."""
    with Rehearsal(tmp_path / "run", cache, "--steps", "1000", *TINY[2:]) as run:
        run.wait_for_processes("ray::")
        started = {pid: name for pid, name in run.processes().items() if "ray::" in name or "raylet" in name}
        # An agent that renamed itself over its environment had lost the mark, and stayed if it noticed nothing itself.
        assert started.keys() <= run.processes("SLIME_LORA_RUN").keys()
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()
        assert not run.orphans(patience=120)


def test_crashed_rank_ends_the_run(cache, tmp_path):
    with Rehearsal(tmp_path / "run", cache, "--steps", "1000", *TINY[2:]) as run:
        run.wait_for("step 1/1000")
        rank = next(pid for pid, command in run.processes().items() if "RankTrainer" in command)
        os.kill(rank, signal.SIGKILL)
        code, log = run.wait()
        assert code == 1, log
        assert "slime-lora: error: the process of rank" in log
        assert "Traceback" not in log
        assert not run.orphans()


def test_untrained_adapter_is_an_error(cache, tmp_path):
    """One answer in ten thousand is never right: no reward differs, nothing is learned, and the run says so."""
    base = make_tiny(tmp_path / "base", "llama")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"q": "t5 t6", "a": "no such answer"}\n')
    flags = ["--hf-checkpoint", str(base), "--prompt-data", str(prompts), "--input-key", "q", "--label-key", "a"]
    flags += ["--rollout-max-response-len", "3", "--tp", "1", *TINY]
    with Rehearsal(tmp_path / "run", cache, *flags) as run:
        code, log = run.wait()
        assert code == 1, log
        assert "never trained" in log
        assert "in 2 of 2 steps no reward differed" in log
        assert (
            log.count("nothing to learn from in this step: all 32 answers got reward 0 (the usual cause: a chat") == 1
        )
        assert log.index("has a chat template") < log.index("starting 1 Megatron rank"), "known before"
        assert not run.orphans()


def bad_line(tmp_path):
    base = make_tiny(tmp_path / "base", "qwen3", num_layers=1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input": "t5", "label": "t6"}\n{"input": "t5"\n')
    return ["--hf-checkpoint", base, "--prompt-data", prompts], 1, "prompts.jsonl:2: not JSON"


def missing_key(tmp_path):
    flags, _, _ = bad_line(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"question": "t5", "label": "t6"}\n')
    return flags, 1, "prompts.jsonl:1: no key 'input' (--input-key), this line has: question, label"


def no_config(tmp_path):
    flags, _, _ = bad_line(tmp_path)
    (tmp_path / "base" / "config.json").unlink()
    return flags, 2, "base has no config.json"


def truncated_weights(tmp_path):
    flags, _, _ = bad_line(tmp_path)
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    return flags, 1, "model.safetensors: not a whole safetensors file"


def unsupported(tmp_path):
    flags, _, _ = bad_line(tmp_path)
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace("Qwen3ForCausalLM", "MambaForCausalLM"))
    return flags, 1, "MambaForCausalLM is not supported, only LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"


def too_many_ranks(tmp_path):
    flags, _, _ = bad_line(tmp_path)
    return [*flags, "--tp", "3"], 2, "--tp 3: 4 attention heads"


def unknown_target(tmp_path):
    flags, _, _ = bad_line(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"input": "t5", "label": "t6"}\n')
    return [*flags, "--lora-target-modules", "query"], 2, "match no module: query"


def foreign_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    return [], 2, "out: holds other files"


def flag(*flags, words):
    def case(tmp_path):
        return flags, 2, words

    case.__name__ = " ".join(flags)
    return case


@pytest.mark.parametrize(
    "case",
    [
        *(bad_line, missing_key, no_config, truncated_weights, unsupported, too_many_ranks, unknown_target),
        foreign_out,
        flag("--lora-r", "0", words="LoRA rank is 0"),
        flag("--lora-alpha", "0", words="LoRA alpha is 0"),
        flag("--lora-dropout", "1.0", words="dropout is 1.0"),
        flag("--steps", "0", words="--steps 0"),
        flag("--n-samples-per-prompt", "1", words="at least 2"),
        flag("--micro-batch-size", "7", words="--micro-batch-size 7 does not divide"),
        flag("--tp", "1", "--sp", words="--sp"),
        flag("--pp", "2", "--vpp", "1", words="--vpp 1"),
        flag("--hf-checkpoint", "x", words="go together"),
        flag("--save-interval", "2", words="--save-interval without --save"),
        flag("--out", "", words="--out ''"),
        flag("--lr", "nan", words="--lr nan"),
        flag("--lora-alpha", "inf", words="LoRA alpha is inf"),
        flag("--steps", "9" * 20, words="--steps 99999999999999999999"),
        flag("--dp", "9" * 20, words="--dp 99999999999999999999"),
        flag("--seed", "9" * 20, words="--seed 99999999999999999999"),
        flag("--objective", "sft", "--eps-clip", "0.1", words="--eps-clip is read by --objective grpo"),
        flag("--load", "/nowhere", words="/nowhere is no adapter checkpoint"),
        flag("--no-lora-only-trainable", words="adapters alone"),
    ],
    ids=lambda case: case.__name__,
)
def test_refuses_in_one_line(case, tmp_path, capsys):
    """Before any process is started, and without leaving anything in ``--out``."""
    flags, code, words = case(tmp_path)
    out = tmp_path / "out"
    before = sorted(out.iterdir()) if out.exists() else None
    capsys.readouterr()  # of making the checkpoint
    assert main(["rehearse", "--out", str(out), *map(str, flags)]) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert (sorted(out.iterdir()) if out.exists() else None) == before


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("flags", [[], ["--sp"], ["--tp", "1", "--pp", "2"], ["--tp", "1", "--dp", "2"]], ids=" ".join)
def test_learns(cache, tmp_path, flags):
    """The promise of the README, at every layout of two processes."""
    with Rehearsal(tmp_path / "run", cache, *flags) as run:
        code, log = run.wait(timeout=800)
        assert code == 0, log
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reward_last"] > 0.8
    assert summary["reward_last"] >= 3 * summary["reward_first"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "sizes", [TINY[2:], ["--objective", "sft", "--rollout-batch-size", "32"]], ids=["grpo", "sft"]
)
def test_resumes_where_it_stopped(cache, tmp_path, sizes):
    """Two steps, saved, two more: bit for bit the four steps that never stopped; also at another parallelism."""
    saved = ["--save", str(tmp_path / "saved")]
    for name, flags in (
        ("whole", ["--steps", "4", "--save", str(tmp_path / "all"), "--save-interval", "2"]),
        ("half", ["--steps", "2", *saved]),
        ("rest", ["--steps", "4", *saved, "--load", str(tmp_path / "saved")]),
        ("pp", ["--steps", "4", "--load", str(tmp_path / "all" / "iter_0000002"), "--tp", "1", "--pp", "2"]),
    ):
        with Rehearsal(tmp_path / name, cache, *flags, *sizes) as run:
            code, log = run.wait()
            assert code == 0, log
    whole, rest, pp = (load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("whole", "rest", "pp"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, rest[name]), name
        # Adam with a learning rate of 5e-3 over two steps, sums in another order.
        assert (tensor - pp[name]).abs().max() < 1e-3 * 5e-3, name
    assert [json.loads(line)["step"] for line in (tmp_path / "rest" / "metrics.jsonl").open()] == [3, 4]
    summary = json.loads((tmp_path / "rest" / "summary.json").read_text())
    assert (summary["steps"], summary["first_step"], summary["last_step"]) == (2, 3, 4), "its own"
    assert main(["rehearse", "--out", str(tmp_path / "x"), "--steps", "4", "--load", str(tmp_path / "saved")]) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "family, layout",
    [
        ("llama", ["--sp", "--lora-layout", "split"]),
        ("qwen2", ["--tp", "1", "--pp", "2", "--vpp", "2", "--recompute-granularity", "full"]),
        ("qwen3", ["--pp", "2", "--sp", "--dtype", "bfloat16"]),
    ],
)
def test_other_bases(cache, tmp_path, family, layout):
    base = make_tiny(tmp_path / "base", family, num_layers=4)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"t{i} t9", "label": "t7"}) + "\n" for i in range(10, 40)))
    flags = ["--hf-checkpoint", str(base), "--prompt-data", str(prompts), "--rollout-max-response-len", "1", *layout]
    # One token out of 128 is right: with 512 samples some are.
    flags += ["--steps", "2", "--rollout-batch-size", "32", "--n-samples-per-prompt", "16"]
    with Rehearsal(tmp_path / "run", cache, *flags) as run:
        code, log = run.wait(timeout=500)
        assert code == 0, log
        assert not run.orphans()
