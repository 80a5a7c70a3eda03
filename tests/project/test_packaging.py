"""What pip builds and installs: the wheel's content, and the plugin beside a slime checkout's own slime_plugins.

Run: pytest tests/project/test_packaging.py
"""

import os
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest

from slime_plugins.lora.version import __version__

ROOT = Path(__file__).resolve().parents[2]
BUILD_FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the tree, so that no build folder is left in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "slime_plugins", copy / "slime_plugins", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    # --no-build-isolation: build with this environment's setuptools, without the network.
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", out, copy]
    subprocess.run(command, check=True, timeout=120)
    return next(out.glob("*.whl"))


def python(*args: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_wheel_holds_every_module_and_no_slime_plugins_init(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "slime_plugins").rglob("*.py")}
    assert sources <= names
    assert "slime_plugins/lora/py.typed" in names
    # An __init__.py there would hide slime's own plugins, or be hidden by them.
    assert "slime_plugins/__init__.py" not in names
    assert {name.split("/")[0] for name in names} == {"slime_plugins", f"slime_lora-{__version__}.dist-info"}


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for path in (ROOT / "slime_plugins" / "lora").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_wheel_metadata(wheel):
    text = {
        name.rpartition("/")[2]: zipfile.ZipFile(wheel).read(name).decode()
        for name in zipfile.ZipFile(wheel).namelist()
        if ".dist-info/" in name and "licenses" not in name
    }
    assert f"Version: {__version__}" in text["METADATA"]
    assert "License-Expression: Apache-2.0" in text["METADATA"]
    assert "slime-lora = slime_plugins.lora.cli:main" in text["entry_points.txt"]
    plain = [
        line for line in text["METADATA"].splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    # What a slime install already has, without upper bounds that could change it.
    assert plain == ["Requires-Dist: torch>=2.6", "Requires-Dist: safetensors", "Requires-Dist: packaging"]


def test_wheel_runs_where_there_is_no_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = python("-m", "slime_plugins.lora", "--version", cwd=tmp_path, path=tmp_path / "site")
    assert (done.stdout, done.returncode) == (f"slime-lora {__version__}\n", 0)


def test_editable_install_is_found_beside_slimes_own_slime_plugins(tmp_path):
    """slime's checkout has an empty slime_plugins/__init__.py; run from there, it is a regular package."""
    # All of them: the checkout's own egg-info is a distribution of that name too.
    files = [str(file) for found in metadata.distributions(name="slime-lora") for file in found.files or []]
    if not any("__editable__" in file for file in files):
        pytest.skip("slime-lora is not installed as `pip install -e .`")
    (tmp_path / "slime_plugins").mkdir()
    (tmp_path / "slime_plugins" / "__init__.py").touch()
    (tmp_path / "slime_plugins" / "other.py").touch()
    code = "import slime_plugins.other, slime_plugins.lora.version as v; print(slime_plugins.__file__, v.__version__)"
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout.split() == [str(tmp_path / "slime_plugins" / "__init__.py"), __version__], done.stderr


def test_drop_in_copy_runs_inside_a_checkout(tmp_path):
    (tmp_path / "slime_plugins").mkdir()
    (tmp_path / "slime_plugins" / "__init__.py").touch()
    shutil.copytree(ROOT / "slime_plugins" / "lora", tmp_path / "slime_plugins" / "lora")
    done = python("-S", "-m", "slime_plugins.lora", "--version", cwd=tmp_path)  # -S: without any site-packages
    assert (done.stdout, done.returncode) == (f"slime-lora {__version__}\n", 0), done.stderr


def test_pytest_looks_into_every_folder_that_has_tests(request):
    """pytest passes over some names by default, in silence: a suite that never runs looks like one that passes."""
    folders = {part for file in (ROOT / "tests").rglob("test_*.py") for part in file.relative_to(ROOT).parts[:-1]}
    skipped = [
        name for name in folders for pattern in request.config.getini("norecursedirs") if fnmatch(name, pattern)
    ]
    assert {"layers", "checkpoint", "peft", "patch"} <= folders
    assert skipped == []
