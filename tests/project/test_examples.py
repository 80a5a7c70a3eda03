"""The launch scripts, run for real against stand-ins for ray and slime; commands, code and names in README and docs.

Run: pytest tests/project/test_examples.py
"""

import argparse
import ast
import importlib
import os
import re
import shlex
import subprocess
import warnings
from pathlib import Path

import pytest

from slime_plugins.lora.arguments import add_lora_arguments, validate_lora_args
from slime_plugins.lora.cli import _build_parser
from slime_plugins.lora.config import LoRAConfig

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "lora"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
STAND_INS = {
    # One argument per line, a blank line after each call.
    "ray": 'printf "%s\\n" "$@" "" >>"$CALLS"',
    "nvidia-smi": "for i in 0 1 2 3 4 5 6 7; do echo GPU $i: NV18; done",
    "pkill": "true",
    "sleep": "true",
    # Nothing but ray may start anything.
    "python3": "echo python3 called >&2; exit 9",
}


@pytest.fixture
def submitted(tmp_path):
    """Run a script; returns the arguments of every ``ray job submit``."""

    def run(script: Path) -> list[list[str]]:
        (tmp_path / "bin").mkdir()
        for name, body in STAND_INS.items():
            file = tmp_path / "bin" / name
            file.write_text(f"#!/bin/bash\n{body}\n")
            file.chmod(0o755)
        models = tmp_path / "slime" / "scripts" / "models"
        models.mkdir(parents=True)
        for name in re.findall(r"scripts/models/([\w.-]+\.sh)", script.read_text()):
            (models / name).write_text("MODEL_ARGS=(\n   --num-layers 36\n)\n")
        calls = tmp_path / "calls"
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls)}
        environment |= {"SLIME_DIR": str(tmp_path / "slime"), "BASE_DIR": "/models", "HOME": str(tmp_path)}
        done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        submits = [call.split("\n") for call in calls.read_text().split("\n\n") if call.strip()]
        return [call[call.index("--") + 1 :] for call in submits if call[:2] == ["job", "submit"]]

    return run


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
def test_script_submits_flags_that_the_plugin_accepts(script, submitted):
    jobs = submitted(script)
    assert jobs
    for job in jobs:
        assert job[:2] == ["python3", "train.py"] or job[:2] == ["python3", "train_async.py"]
        args, others = parser_with_lr().parse_known_args(job[2:])
        assert args.use_lora
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a learning rate meant for full training warns
            validate_lora_args(args)
        LoRAConfig.from_args(args)
        from slime_plugins.lora.slime.hooks.launch import SLIME_FLAGS

        unknown = {flag for flag in others if flag.startswith("--lora")}
        assert unknown <= {"--" + name.replace("_", "-") for name in SLIME_FLAGS}


def test_every_block_of_the_qwen3_4B_script_reaches_the_job(submitted):
    script = EXAMPLES / "run-qwen3-4B-lora.sh"
    (job,) = submitted(script)
    blocks = re.findall(r"^(\w+_ARGS)=\(", script.read_text(), re.M)
    assert "LORA_ARGS" in blocks
    assert [flag for block in blocks for flag in flags_of(script, block) if flag not in job] == []
    assert "--num-layers" in job  # the model's block, from slime's own file
    args, _ = parser_with_lr().parse_known_args(job)
    assert LoRAConfig.from_args(args).target_modules == ("all-linear",)
    assert 1e-5 <= args.lr <= 1e-4


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
