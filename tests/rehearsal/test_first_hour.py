"""A stranger's path: the commands of docs/rehearsal.md, taken from the page and run in an empty folder.

pytest tests/rehearsal/test_first_hour.py -m slow      # about a minute
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def commands() -> str:
    """The bash blocks of the section, one script."""
    page = (ROOT / "docs" / "rehearsal.md").read_text()
    (section,) = re.findall(r"^## A first hour.*?(?=^## )", page, re.MULTILINE | re.DOTALL)
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL))


def test_the_page_has_commands():
    script = commands()
    for command in ("rehearse --hf-checkpoint", "rehearse --config", "export", "verify", "transformers serve", "curl"):
        assert command in script


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_first_hour(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands().replace("8000", str(port))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=800,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HF_HOME": str(tmp_path / "hf"),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (
        json.loads((tmp_path / "runs" / name / "summary.json").read_text()) for name in ("first", "second")
    )
    assert (first["first_step"], first["last_step"]) == (1, 6)
    assert (second["first_step"], second["last_step"]) == (7, 12)
    assert second["eval_reward_first"] == first["eval_reward_last"], "the adapter that was saved is the one resumed"
    assert second["eval_reward_last"] > 2 * first["eval_reward_first"]
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    words = answer["choices"][0]["text"].split()
    assert words
    assert all(word.startswith("t") for word in words)
