"""Clones of a slime repository at one revision, sharing its objects."""

from __future__ import annotations

import subprocess
from pathlib import Path

# Name of the patch -> revision. main is a commit of August 2026.
VERSIONS = {
    "v0.2.4": "v0.2.4",
    "v0.3.0": "v0.3.0",
    "v0.3.1": "v0.3.1",
    "main-624b824": "624b824a898ab0ec1fcb4d373004c7f3852bf515",
}


def git(root: Path, *command: str, **kwargs) -> str:
    done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True, **kwargs)
    return done.stdout


def has(repository: Path, revision: str) -> bool:
    try:
        git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except subprocess.CalledProcessError:
        return False
    return True


def clone(repository: Path, revision: str, where: Path) -> Path:
    """A working tree of its own; the objects are the repository's."""
    commit = git(repository, "rev-parse", f"{revision}^{{commit}}").strip()
    common = git(repository, "rev-parse", "--path-format=absolute", "--git-common-dir").strip()
    where.parent.mkdir(parents=True, exist_ok=True)
    git(where.parent, "clone", "-q", "--shared", "--no-checkout", common, str(where))
    git(where, "checkout", "-q", "--detach", commit)
    return where
