"""Kill -9 at 20 random moments of a save: the last checkpoint always loads, and no half of one is ever chosen.

pytest tests/checkpoint/test_crash.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slime_plugins.lora.rehearsal.tiny import make_tiny

SAVER = Path(__file__).with_name("crash_saver.py")


@pytest.mark.parametrize("seed", [20260101])
def test_kill_during_save(tmp_path, seed):
    hf_dir = make_tiny(tmp_path / "base", "qwen3", num_layers=2)
    root = tmp_path / "run"
    root.mkdir()
    done = subprocess.run(
        [sys.executable, str(SAVER), str(hf_dir), str(root), str(seed), "20"],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trials = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(trials) == 20
    for trial in trials:
        assert trial["whole"]
        assert trial["latest"] >= trial["returned"]
        assert trial["latest"] in trial["published"]
        # A writer that died leaves one directory, which the next save removes; and perhaps its unfinished tracker.
        assert len([name for name in trial["leftovers"] if ".tmp-" in name]) <= 1
    # Else the kills have all missed: nothing was tried.
    assert sum(any(".tmp-" in name for name in trial["leftovers"]) for trial in trials) >= 2
