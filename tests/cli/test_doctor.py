"""``slime-lora doctor`` on the example scripts' arguments, and on combinations that cannot work.

pytest tests/cli/test_doctor.py
"""

from __future__ import annotations

import json
import sys

import pytest
from launch_scripts import SCRIPTS, Machine, free_ports

from slime_plugins.lora import cli
from slime_plugins.lora.slime import checkup

GOOD = "--use-lora --lr 1e-5 --num-layers 4 --colocate --rollout-batch-size 32 --sglang-mem-fraction-static 0.7"
MOE = "--num-experts 8 --moe-shared-expert-intermediate-size 64"
MLA = "--multi-latent-attention"
BAD = [
    ("--no-lora-only-trainable", "drop it"),
    ("--only-train-params-name-list linear_qkv", "--lora-target-modules"),
    ("--enable-mtp-training", "drop one of them"),
    ("--fp8-param-gather", "drop it"),
    ("--megatron-to-hf-mode bridge", "raw"),
    ("--optimizer-cpu-offload", "--no-save-optim"),
    ("--lora-critic", "--advantage-estimator ppo"),
    ("--lora-save-merged", "give --save-hf too"),
    ("--lr-plateau-metric val_loss --save s", "needs --val-data and --val-interval"),
    ("--lora-r 0", "expected"),
    ("--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3", "--moe-router-bias-update-rate 0"),
    ("--update-weight-mode delta --lora-adapter-path a", "--update-weight-mode full"),
    ("--use-transformer-engine-op-fuser", "drop it"),
    (f"{MOE} --moe-shared-expert-overlap", "--lora-exclude-modules"),
    ("--megatron-deepgemm-forward-layers all", "drop them"),
    ("--delay-wgrad-compute", "drop it"),
    (f"{MOE} --overlap-moe-expert-parallel-comm --fp8-format hybrid", "--lora-exclude-modules experts"),
    ("--cuda-graph-impl local", "drop them"),
    ("--lora-sync adapter --no-colocate", "--lora-sync-dir"),
    ("--lora-sync adapter --sglang-dp-size 4", "--lora-sync merged"),
    ("--lora-sync adapter --sglang-speculative-algorithm EAGLE", "--lora-sync merged"),
    ("--lora-sync adapter --sglang-tokenizer-worker-num 2", "--lora-sync merged"),
    (f"--lora-sync adapter {MOE} --sglang-moe-runner-backend flashinfer_cutlass", "use triton"),
    (f"--lora-sync adapter {MOE} --sglang-moe-a2a-backend deepep", "--lora-sync merged"),
    ("--lora-sync adapter --check-weight-update-equal", "drop it"),
    ("--lora-sync adapter --lora-target-modules q_proj", "target linear_qkv"),
    ("--lora-sync adapter --lora-target-modules up_proj down_proj", "target linear_fc1"),
    (f"--lora-sync adapter {MLA}", "--lora-exclude-modules"),
    (f"--lora-sync adapter {MLA} --q-lora-rank 8 --lora-target-modules kv_a_proj_with_mqa", "target both"),
    ("--lora-sync adapter --sglang-max-lora-rank 4", "has rank 8"),
    ("--lora-sync adapter --sglang-max-loras-per-batch 1", "at least that"),
]


def doctor(capsys, *words: str) -> tuple[int, str]:
    code = cli.main(["doctor", *words])
    return code, capsys.readouterr().out


def wrong(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("WRONG")]


@pytest.fixture
def versions(monkeypatch):
    """What is installed, as the test says."""
    known = {"torch": "2.9.0", "megatron-core": "0.16.1", "sglang": "0.5.15.post1", "ray": "2.50"}
    known["transformers"] = "5.0"

    def version(name):
        if name not in known:
            raise checkup.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(checkup, "version", version)
    monkeypatch.setattr("slime_plugins.lora.slime.hooks.refusal.version", version)
    return known


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_example_scripts_are_clean(script, tmp_path, capsys, versions):
    machine = Machine(tmp_path / "machine", free_ports())
    done = machine.run(script)
    assert done.returncode == 0 and machine.jobs, done.stderr
    for job in machine.jobs:
        code, out = doctor(capsys, "--", *job)
        assert (code, wrong(out)) == (0, []) and "warning" not in out, out
        assert "none refused" in out and out.endswith("ok\n")


def test_there_are_at_least_twenty_bad_combinations():
    assert len(BAD) >= 20 and len(SCRIPTS) == 6


def test_the_good_one_is_good(capsys, versions):
    for words in (GOOD, f"{GOOD} --lora-sync adapter", f"{GOOD} {MOE} --lora-sync adapter"):
        code, out = doctor(capsys, "--", *words.split())
        assert code == 0, out


@pytest.mark.parametrize(
    "words, way",
    [
        ("--lora-sync adapter", "files in memory (/dev/shm) where the job is on one machine"),
        ("--lora-sync adapter --lora-sync-dir /shared/sync", "files in --lora-sync-dir /shared/sync"),
        ("", None),
    ],
)
def test_how_adapters_will_go_to_the_engines(capsys, versions, words, way):
    code, out = doctor(capsys, "--", *GOOD.split(), *words.split())
    found = [line for line in out.splitlines() if "adapters go to the engines as" in line]
    assert code == 0 and len(found) == (way is not None) and all(way in line for line in found), out


@pytest.mark.parametrize("words, way_out", BAD)
def test_a_bad_combination_is_named_with_the_way_out(capsys, versions, words, way_out):
    code, out = doctor(capsys, "--", *GOOD.split(), *words.split())
    assert code == 1 and len(wrong(out)) >= 1, out
    assert any(way_out in line for line in wrong(out)), out


def test_all_that_is_wrong_is_said_at_once(capsys, versions):
    words = "--lora-sync adapter --sglang-dp-size 2 --delay-wgrad-compute --fp8-param-gather"
    code, out = doctor(capsys, "--", *GOOD.split(), *words.split())
    assert code == 1 and len(wrong(out)) == 3 and "not ok: 3 findings" in out


def test_the_base_is_read_where_it_is(capsys, versions, tmp_path):
    config = {"text_config": {"model_type": "qwen3_next", "num_hidden_layers": 4, "layer_types": ["linear_attention"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = f"--use-lora --hf-checkpoint {tmp_path} --context-parallel-size 2 --lr 1e-5"
    code, out = doctor(capsys, "--", *words.split())
    assert code == 1 and "--context-parallel-size 1" in wrong(out)[0]
    _, out = doctor(capsys, "--", *words.replace(str(tmp_path), "/nowhere").split(), "--num-layers", "4")
    assert "unknown  base" in out


MODELS = """sglang:
  - name: judge
    {judge}
    server_groups: [{{worker_type: regular, num_gpus: 1}}]
  - name: policy
    server_groups: [{{worker_type: regular, num_gpus: 1}}]
"""


@pytest.mark.parametrize("judge, frozen", [("update_weights: false", True), ("model_path: other", True), ("", False)])
def test_the_first_model_of_several_is_the_one_that_trains(capsys, versions, tmp_path, judge, frozen):
    file = tmp_path / "models.yaml"
    file.write_text(MODELS.format(judge=judge))
    words = f"{GOOD} --hf-checkpoint base --sglang-config {file}".split()
    code, out = doctor(capsys, "--", *words)
    assert code == frozen and any("list the trained model first" in line for line in wrong(out)) == frozen
    code, out = doctor(capsys, "--", *words, "--debug-train-only")
    assert code == 0, "nothing rolls out"


def test_models_that_cannot_be_looked_at(capsys, versions, tmp_path, monkeypatch):
    words = f"{GOOD} --sglang-config {tmp_path / 'models.yaml'}".split()
    code, out = doctor(capsys, "--", *words)
    assert code == 0 and "unknown  models" in out and "cannot be read here (" in out
    (tmp_path / "models.yaml").write_text(MODELS.format(judge="update_weights: false"))
    monkeypatch.setitem(sys.modules, "yaml", None)
    code, out = doctor(capsys, "--", *words)
    assert code == 0 and "unknown  models" in out and "yaml" in out


def test_what_is_not_there_is_said(capsys, versions):
    code, out = doctor(capsys)
    assert code == 0 and "transformer-engine is not installed here" in out
    assert "unknown  checkout" in out and "unknown  arguments" in out
    versions["sglang"] = "0.5.3"
    versions["torch"] = "2.4"
    code, out = doctor(capsys)
    assert code == 1 and [line.split()[2] for line in wrong(out)] == ["torch", "sglang"]
    versions["torch"], versions["sglang"] = "2.9", "0.6.1"
    code, out = doctor(capsys)
    assert code == 0 and "newer than what has been tried" in out
    versions["sglang"] = "0.5.9"
    code, out = doctor(capsys, "--", *GOOD.split(), "--lora-sync", "adapter")
    assert code == 1 and "0.5.12 or newer" in wrong(out)[0]


def test_a_checkout_that_is_not_patched(capsys, versions, tmp_path):
    assert cli.main(["doctor", "--slime", str(tmp_path)]) == 2
    assert "is not a slime checkout" in capsys.readouterr().err


def test_a_forgotten_use_lora(capsys, versions):
    code, out = doctor(capsys, "--", *GOOD.replace("--use-lora ", "").split())
    assert code == 1 and "train the whole model" in wrong(out)[0]
