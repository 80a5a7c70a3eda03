"""Every flag of the launch scripts through slime's real parser and validation, the plugin's included.

    SLIME_DIR=... MEGATRON_DIR=... SLIME_CPU_DIR=... SLIME_PYTHON=... pytest tests/slime/real/test_scripts.py

One process of slime's imports for all scripts. Models are directories with a ``config.json`` that fits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch_scripts import SCRIPTS, Machine, free_ports

QWEN3 = dict(
    model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=151936, head_dim=128, num_key_value_heads=8,
    rms_norm_eps=1e-6, rope_theta=1000000, tie_word_embeddings=True, max_position_embeddings=40960,
)  # fmt: skip
MODELS = {
    "Qwen3-0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "Qwen3-4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    "Qwen3-30B-A3B": dict(
        model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], hidden_size=2048, intermediate_size=6144,
        num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, moe_intermediate_size=768,
        num_experts=128, num_experts_per_tok=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
PARSE = """
import argparse, json, sys, traceback
known = set()
plain = argparse.ArgumentParser.parse_known_args
def recording(self, args=None, namespace=None):
    known.update(self._option_string_actions)
    return plain(self, args, namespace)
argparse.ArgumentParser.parse_known_args = recording
from sglang.srt import server_args
if not any(field[0] == "enable_weights_cpu_backup" for field in server_args._FIELDS):  # SGLang's, since 0.5.3
    server_args._FIELDS.append(("enable_weights_cpu_backup", "--enable-weights-cpu-backup", "flag", False))
from slime.utils.arguments import parse_args
for job in json.load(sys.stdin):
    known.clear()
    sys.argv = job["argv"]
    try:
        args = parse_args()
        ours = ("lora", "use_lora", "gkd", "sglang_", "load", "loss_type")
        result = {k: v for k, v in vars(args).items() if k.startswith(ours)}
        result["unknown"] = [w for w in sys.argv if w.startswith("--") and w.split("=")[0] not in known]
    except (Exception, SystemExit):
        result = {"error": traceback.format_exc()}
    print("PARSED " + json.dumps({"script": job["script"], **result}, default=str), flush=True)
"""


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("base")
    for name, sizes in MODELS.items():
        for directory in (name, f"{name}-Base"):
            (root / directory).mkdir()
            (root / directory / "config.json").write_text(json.dumps({**QWEN3, **sizes}))
            converted = root / f"{directory}_torch_dist"
            (converted / "release").mkdir(parents=True)
            (converted / "latest_checkpointed_iteration.txt").write_text("release")
    return root


def jobs_of(script: Path, slime: Path, base_dir: Path, where: Path) -> list[list[str]]:
    """What a script hands to ``ray job submit``, slime's own model file sourced."""
    machine = Machine(where, free_ports(), slime, base_dir)
    done = machine.run(script)
    assert done.returncode == 0, done.stderr
    return [job[1:] for job in machine.jobs]


@pytest.fixture(scope="module")
def parsed(patched_slime, base_dir, harness_dir, megatron_dir, slime_python, tmp_path_factory) -> dict[str, list]:
    where = tmp_path_factory.mktemp("jobs")
    jobs = [
        {"script": script.name, "argv": argv}
        for script in SCRIPTS
        for argv in jobs_of(script, patched_slime, base_dir, where / script.stem)
    ]
    sys.path.insert(0, str(harness_dir))
    try:
        from run import environment
    finally:
        sys.path.remove(str(harness_dir))
    env = environment(patched_slime, megatron_dir, where) | {"SLIME_CPU_PLUGINS": ""}
    done = subprocess.run(
        [slime_python, "-c", PARSE], env=env, input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    lines = [line.removeprefix("PARSED ") for line in done.stdout.splitlines() if line.startswith("PARSED ")]
    assert len(lines) == len(jobs), done.stderr[-3000:]
    found: dict[str, list] = {}
    for line in lines:
        result = json.loads(line)
        found.setdefault(result["script"], []).append(result)
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_slime_takes_every_flag(parsed, script):
    assert len(parsed[script.name]) == (3 if "multi-task" in script.name else 1)
    for result in parsed[script.name]:
        assert "error" not in result, result["error"]
        assert result["unknown"] == [] and result["use_lora"]


@pytest.mark.timeout(900)
def test_what_follows_from_the_flags(parsed):
    (small,) = parsed["run-qwen3-0.6B-lora.sh"]
    assert small["sglang_enable_lora"] and small["sglang_max_lora_rank"] == 16
    assert small["sglang_enable_weights_cpu_backup"], "colocated engines are offloaded and keep their base"
    (large,) = parsed["run-qwen3-4B-lora.sh"]
    assert not large["sglang_enable_lora"] and large["load"].endswith("Qwen3-4B_torch_dist")
    (taught,) = parsed["run-qwen3-30B-A3B-gkd.sh"]
    assert (taught["lora_r"], taught["lora_alpha"], taught["lora_dropout"]) == (8, 16.0, 0.05)
    assert taught["lora_target_modules"] == ["all-linear"]
    assert taught["loss_type"] == "custom_loss"
    assert taught["gkd_teacher_prompt_template"].startswith("<|im_start|>system\\nA correct solution:")
