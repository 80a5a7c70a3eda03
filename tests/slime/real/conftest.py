"""Real slime, where there is some. Without it every test here is skipped, saying what to set:

SLIME_DIR      a slime clone with its tags; its working tree is not touched
MEGATRON_DIR   Megatron-LM at slime's MEGATRON_COMMIT with slime's patch applied
SLIME_CPU_DIR  the harness that runs slime's train.py on a CPU (run.py, hooks/, stubs/)
SLIME_PYTHON   an interpreter with slime's requirements (numpy 1.x); this one by default
SLIME_REV      which version training runs use: v0.3.1 by default
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from checkouts import clone
from runs import Run, alone

from slime_plugins.lora.slime.patch import checkout

HERE = Path(__file__).parent


def required(name: str, *files: str) -> Path:
    """The directory that an environment variable names; skips the test if there is none."""
    value = os.environ.get(name)
    if not value:
        pytest.skip(f"needs real slime: set {name} (see tests/slime/real/conftest.py)")
    path = Path(value).resolve()
    missing = [file for file in files if not (path / file).exists()]
    assert not missing, f"{name}={value} has no {', '.join(missing)}"
    return path


@pytest.fixture(scope="session")
def slime_repo() -> Path:
    return required("SLIME_DIR", "slime/utils/arguments.py")


@pytest.fixture(scope="session")
def slime_rev() -> str:
    return os.environ.get("SLIME_REV", "v0.3.1")


@pytest.fixture(scope="session")
def harness_dir() -> Path:
    return required("SLIME_CPU_DIR", "run.py", "stubs", "hooks")


@pytest.fixture(scope="session")
def megatron_dir() -> Path:
    return required("MEGATRON_DIR", "megatron/training/arguments.py")


@pytest.fixture(scope="session")
def plain_slime(slime_repo, slime_rev, tmp_path_factory) -> Path:
    """slime as it is."""
    return clone(slime_repo, slime_rev, tmp_path_factory.mktemp("plain") / "slime")


@pytest.fixture(scope="session")
def patched_slime(slime_repo, slime_rev, tmp_path_factory) -> Path:
    """slime with the plugin in it."""
    root = clone(slime_repo, slime_rev, tmp_path_factory.mktemp("patched") / "slime")
    checkout.apply(checkout.plan(root))
    return root


@pytest.fixture(scope="session")
def slime_python() -> str:
    import sys

    python = os.environ.get("SLIME_PYTHON", sys.executable)
    probe = "import numpy, ray, transformers; assert numpy.__version__[0] == '1', 'slime wants numpy 1.x'"
    done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs an interpreter with slime's requirements: set SLIME_PYTHON ({done.stderr.strip()[-80:]})")
    return python


@pytest.fixture(scope="session")
def run(harness_dir, megatron_dir, slime_python, patched_slime, tmp_path_factory):
    """Run slime once per set of arguments and session; ``of`` names another run's directory to go on from, ``upset``
    what its engines do (``upset.py``), ``also`` more modules of this folder that every process imports."""
    done: dict[tuple, Run] = {}

    def start(
        *words: str, extra="", slime: Path = patched_slime, of: Run | None = None, upset="", fails=False, also=()
    ) -> Run:
        key = (words, extra, slime, of and of.work, upset, fails, also)
        if key not in done:
            work = tmp_path_factory.mktemp("run") / "work"
            if of is not None:
                shutil.copytree(of.work, work)
            command = [
                slime_python, harness_dir / "run.py", "--slime", slime, "--megatron", megatron_dir, "--work", work,
                "--pythonpath", HERE, "--plugin", "probe", "--plugin", "served", *words, "--extra", extra,
            ]  # fmt: skip
            for plugin in (*also, *(["upset"] if upset else [])):
                command[-2:-2] = ["--plugin", plugin]
            command, env = list(map(str, command)), {**os.environ, "SLIME_LORA_UPSET": upset}
            for _ in range(3):  # on a busy machine Ray may not come up in its time
                with alone():
                    finished = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
                log = (work / "log.txt").read_text()
                if "timed out during startup" not in log:
                    break
            assert (finished.returncode != 0) == fails, log[-4000:]
            steps = [] if fails else json.loads((work / "steps.json").read_text())["steps"]
            done[key] = Run(work, log, steps)
        return done[key]

    return start
