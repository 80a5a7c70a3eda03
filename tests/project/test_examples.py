"""The launch scripts, run against stand-ins for ray and slime: what they submit, what they check, what they end.
Commands, code and names in README and docs.

Run: pytest tests/project/test_examples.py
"""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import warnings
from pathlib import Path

import pytest
from launch_scripts import EXAMPLES, HARMFUL, SCRIPTS, Machine, free_ports
from published_configs import write_config

from slime_plugins.lora.arguments import add_lora_arguments, validate_lora_args
from slime_plugins.lora.cli import _build_parser, main
from slime_plugins.lora.config import LoRAConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path):
    """Stand-ins for ray, slime, models and data, on two ports that nobody uses."""
    return Machine(tmp_path / "a machine", free_ports())


def flags_of(script: Path, group: str) -> list[str]:
    return re.findall(r"^\s*(--[\w-]+)", re.search(rf"^{group}=\((.*?)^\)", script.read_text(), re.M | re.S)[1], re.M)


def parser_with_lr() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--lr", type=float)
    return add_lora_arguments(parser)


def test_there_are_scripts():
    assert "run-qwen3-4B-lora.sh" in [script.name for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_script_is_bash(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_no_recompute_where_the_plan_says_that_it_fits(script, tmp_path, capsys):
    """On 8 GPUs of 80 GB, with half of one to spare. A router need not spread tokens as the plan has it."""
    text = script.read_text()

    def value(flag):
        return int(re.search(rf"^ +{flag} (\d+)$", text, re.M)[1])

    model = re.search(r"--hf-checkpoint \S*/(Qwen3-[\w.-]+)", text)[1].removesuffix("-Base")
    tp, ep = value("--tensor-model-parallel-size"), value("--expert-model-parallel-size")
    split = ["--tp", tp, "--dp", 8 // tp, "--ep", ep, "--etp", value("--expert-tensor-parallel-size")]
    tokens = ["--tokens", value("--max-tokens-per-gpu"), "--lora-r", value("--lora-r")]
    where = write_config(tmp_path, model)
    assert main(["plan", "--compare", "--json", "--hf-checkpoint", *map(str, [where, *split, *tokens])]) == 0
    methods = json.loads(capsys.readouterr().out)["models"][0]["methods"]
    peaks = next(m["peaks"] for m in methods if m["name"] == f"LoRA r={value('--lora-r')}")
    if "A3B" in model:
        assert "--recompute-granularity full\n" in text and peaks["none"]["total"] < 50e9
    else:
        assert not re.search(r"^ +--recompute", text, re.M) and peaks["none"]["total"] < 65e9


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_script_submits_flags_that_the_plugin_accepts(script, machine):
    from slime_plugins.lora.slime.hooks.launch import SLIME_FLAGS

    done = machine.run(script)
    assert done.returncode == 0, done.stderr
    assert len(machine.jobs) == (3 if "multi-task" in script.name else 1)
    assert [call[0] for call in machine.calls] == ["ray"] * (1 + len(machine.jobs))
    assert machine.calls[0][:3] == ["ray", "start", "--head"]
    for job in machine.jobs:
        assert job[:2] == ["python3", "train.py"] or job[:2] == ["python3", "train_async.py"]
        args, others = parser_with_lr().parse_known_args(job[2:])
        assert args.use_lora
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a learning rate meant for full training warns
            validate_lora_args(args)
        LoRAConfig.from_args(args)
        unknown = {flag for flag in others if flag.startswith("--lora")}
        assert unknown <= {"--" + name.replace("_", "-") for name in SLIME_FLAGS}
    # every block that the script has reaches a job
    text = script.read_text()
    blocks = [name for name in re.findall(r"^(\w+_ARGS)=\(", text, re.M) if name != "JOB_ARGS"]
    assert "LORA_ARGS" in blocks
    assert [flag for block in blocks for flag in flags_of(script, block) if flag not in machine.jobs[0]] == []
    assert "--num-layers" in machine.jobs[0]  # the model's block, from slime's own file


def test_the_qwen3_4B_script_trains_what_it_says(machine):
    machine.run(EXAMPLES / "run-qwen3-4B-lora.sh")
    args, _ = parser_with_lr().parse_known_args(machine.jobs[0])
    assert LoRAConfig.from_args(args).target_modules == ("all-linear",)
    assert 1e-5 <= args.lr <= 1e-4


WRITTEN = (
    *("Qwen3-4B_lora", "Qwen3-0.6B_lora", "Qwen3-30B-A3B_lora", "Qwen3-30B-A3B_lora_gkd", "Qwen3-4B-Base_lora_sft"),
    "Qwen3-4B_adapters",
)
MISSING = {
    "SLIME_DIR": lambda machine: shutil.rmtree(machine.slime),
    "scripts/models": lambda machine: shutil.rmtree(machine.slime / "scripts/models"),
    "patch apply --slime": lambda machine: shutil.rmtree(machine.slime / "slime_plugins/lora"),
    "no --use-lora": lambda machine: (machine.slime / "slime/utils/arguments.py").write_text("x = 1\n"),
    "MEGATRON_DIR": lambda machine: shutil.rmtree(machine.root / "Megatron-LM/megatron"),
    "--hf-checkpoint": lambda machine: remove(machine, "*/config.json"),
    "--ref-load": lambda machine: remove(machine, "*_torch_dist"),
    "--prompt-data": lambda machine: remove(machine, "**/*.jsonl", "**/*.parquet"),
    "--eval-prompt-data": lambda machine: remove(machine, "aime*/*", "gsm8k/test*"),
    "--save": lambda machine: [(machine.base / name).write_text("a file") for name in WRITTEN],
    "no GPU": lambda machine: (machine.root / "bin/nvidia-smi").write_text("#!/bin/bash\nexit 9\n"),
}


def remove(machine, *patterns):
    for path in [path for pattern in patterns for path in machine.base.glob(pattern)]:
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
@pytest.mark.parametrize("missing", MISSING)
def test_what_is_missing_is_named_before_anything_starts_or_stops(script, machine, missing):
    text = script.read_text()
    if (missing == "no GPU" and "NUM_GPUS=" in text) or (
        missing in ("--ref-load", "--eval-prompt-data")
        and not re.search(rf"{missing} .*(_torch_dist|test|aime)", text)
    ):
        pytest.skip("not for this script")
    earlier = leave_a_process(machine, "any")
    MISSING[missing](machine)
    done = machine.run(script)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and missing in done.stderr
    assert machine.calls == [] and earlier.poll() is None
    earlier.kill()


def leave_a_process(machine, run: str) -> subprocess.Popen:
    """A process with the mark of a run, as that run's Ray would leave it."""
    return subprocess.Popen(["sleep", "300"], env={**os.environ, "SLIME_LORA_RUN": run})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_only_what_the_same_run_left_is_stopped(script, machine):
    first = machine.run(script)
    assert first.returncode == 0
    save = Path(machine.jobs[0][machine.jobs[0].index("--save") + 1])
    run = save.parent if "multi-task" in script.name else save
    same, other = leave_a_process(machine, str(run)), leave_a_process(machine, f"{run}-2")
    unmarked = subprocess.Popen(["bash", "-c", "exec -a sglang sleep 300"])  # what slime's own scripts would end
    done = machine.run(script)
    assert done.returncode == 0 and f"stopping what an earlier start of {run} left: {same.pid}" in done.stdout
    assert same.wait(10) == -15
    assert other.poll() is None and unmarked.poll() is None
    other.kill(), unmarked.kill()
    assert not [call for call in machine.calls if call[0] in HARMFUL or call[:2] == ["ray", "stop"]]


@pytest.mark.parametrize("which", [0, 1])
def test_a_ray_of_somebody_else_is_left_alone(machine, which):
    with socket.socket() as somebody:
        somebody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        somebody.bind(("127.0.0.1", machine.ports[which]))
        somebody.listen()
        done = machine.run(SCRIPTS[0])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(machine.ports[which]) in done.stderr
    assert machine.calls == []


def test_a_cluster_that_is_there_is_used_and_none_started(machine):
    run = machine.base / "Qwen3-4B_lora"
    earlier = leave_a_process(machine, str(run))
    done = machine.run(EXAMPLES / "run-qwen3-4B-lora.sh", RAY_ADDRESS="http://head:8265")
    assert done.returncode == 0 and earlier.poll() is None
    earlier.kill()
    (call,) = machine.calls
    assert call[:4] == ["ray", "job", "submit", "--address=http://head:8265"]


def test_a_task_that_does_not_exist_is_named_first(machine):
    done = machine.run(EXAMPLES / "run-multi-task-lora.sh", "math", "mathe")
    assert done.returncode == 2 and "unknown task mathe" in done.stderr and machine.calls == []
    done = machine.run(EXAMPLES / "run-multi-task-lora.sh", "math")
    assert done.returncode == 0 and len(machine.jobs) == 1


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda s: s.name)
def test_no_script_ends_processes_by_name(script):
    code = re.sub(r"^\s*#.*", "", script.read_text(), flags=re.M)
    assert not re.search(r"\b(pkill|killall|fuser|ray stop|kill -9 -1)\b", code)


# README and docs -----------------------------------------------------------------------------------------------------

DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def code_blocks(file: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text(), re.M | re.S)


@pytest.mark.parametrize("file", DOCS, ids=lambda f: f.name)
def test_links_lead_somewhere(file):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text())
    assert [target for target in targets if not (file.parent / target).exists()] == []


@pytest.mark.parametrize("file", DOCS, ids=lambda f: f.name)
def test_make_targets_exist(file):
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", file.read_text(), re.M))
    assert named <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("file", DOCS, ids=lambda f: f.name)
def test_commands_are_understood(file):
    """Command lines in blocks parse; verbs and flags that a sentence names in backquotes exist."""
    text = file.read_text().replace("\\\n", " ")
    for command in re.findall(r"^\$? *(slime-lora .*)$", text, re.M):
        if not re.search(r"VERB|--help|[\[<]|\.\.\.", command):  # not a synopsis
            words = shlex.split(command.partition(" | ")[0], comments=True)
            _build_parser().parse_args(words[1:])
    verbs = _build_parser()._subparsers._group_actions[0].choices
    for verb, rest in re.findall(r"`slime-lora ([a-z][a-z-]*)([^`]*)`", text):
        assert set(re.findall(r"--[a-z-]+", rest)) <= verbs[verb]._option_string_actions.keys()


@pytest.mark.parametrize("file", DOCS, ids=lambda f: f.name)
def test_python_is_python_and_imports_what_is_there(file):
    for block in code_blocks(file, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("slime_plugins"):
                module = importlib.import_module(node.module)
                # __all__ where there is one: reading an attribute of the package may import Megatron.
                names = getattr(module, "__all__", None) or dir(module)
                assert {alias.name for alias in node.names} <= set(names)


@pytest.mark.parametrize("file", DOCS, ids=lambda f: f.name)
def test_files_that_are_named_exist(file):
    """`tests/layers/test_parity.py` in backquotes, relative to the root; in the design's table, to tests/."""
    rooms = "|".join(path.name for path in (ROOT / "tests").iterdir() if path.is_dir())
    pattern = rf"`((?:tests/)?(?:{rooms})/[\w./*-]*test_[\w*-]+\.\w+|(?:bench|examples)/[\w./*-]+\.\w+)`"
    named = re.findall(pattern, file.read_text())
    missing = [name for name in named if not (list(ROOT.glob(name)) or list((ROOT / "tests").glob(name)))]
    assert missing == []


def test_the_index_lists_every_page():
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert listed == {file.name for file in (ROOT / "docs").glob("*.md")} - {"index.md"}
