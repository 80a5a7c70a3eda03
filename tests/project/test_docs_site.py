"""The site of ``make docs``: it builds without a warning, warnings fail it, and every public name is on the API page.

Needs the packages of the docs extra. Run: pytest tests/project/test_docs_site.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs pip install -e '.[docs]'")
pytest.importorskip("mkdocstrings_handlers.python", reason="needs pip install -e '.[docs]'")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path):
    """The pages and the package in a place where they can be damaged."""
    for name in ("docs", "slime_plugins"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def build(root):
    env = {**os.environ, "PYTHONPATH": str(root), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(root / "docs/site/mkdocs.yml")]
    return subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=120, check=False)


def test_the_site_builds_with_every_public_name(copy):
    from slime_plugins.lora import __all__ as public

    done = build(copy)
    assert done.returncode == 0, done.stderr
    page = (copy / "build/site/api/index.html").read_text()
    assert [name for name in public if f'.{name}"' not in page] == []
    assert (copy / "build/site/tutorial/index.html").is_file() and (copy / "build/site/readme/index.html").is_file()


@pytest.mark.parametrize(
    "file, old, new, reason",
    [
        ("docs/tutorial.md", "](slime.md)", "](slim.md)", "slim.md"),
        ("docs/tutorial.md", "](slime.md)", "](slime.md#no-such-heading)", "no-such-heading"),
        ("docs/site/mkdocs.yml", "      - tutorial.md\n", "", "tutorial.md"),
        ("slime_plugins/lora/inject.py", "        freeze_base: False", "        freeze_bass: False", "freeze_bass"),
    ],
    ids=["page", "heading", "page not in the menu", "argument"],
)
def test_a_warning_is_an_error(copy, file, old, new, reason):
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    done = build(copy)
    assert done.returncode != 0 and reason in done.stderr
