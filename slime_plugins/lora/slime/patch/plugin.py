"""What lies at ``slime_plugins/lora`` of a checkout: ours or somebody's, put there and removed. Stdlib only.

A copy is made beside its place and renamed, a removal renames first and deletes then: whoever is killed leaves a
directory of a name of ours, which the next ``apply`` or ``revert`` deletes, and never half a plugin.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PLUGIN = Path("slime_plugins") / "lora"
COPY_MARK = ".slime-lora-copy.json"
"""In a copied plugin: path -> SHA-256 of every file as it was copied, so that somebody's changes can be told."""

_STAGED = ".lora.slime-lora-new"
_REMOVED = ".lora.slime-lora-old"


def package_dir() -> Path:
    """The directory of the ``slime_plugins.lora`` that runs."""
    return Path(os.path.realpath(__file__)).parents[2]


def state(root: Path) -> str:
    """What lies there.

    absent, link (to a plugin), copy (made by apply), half (a copy that was cut off: no mark, but nothing that is not
    ours), running (the plugin in use is this very directory) or foreign.
    """
    target = root / PLUGIN
    if target.is_symlink():
        return "link" if _is_ours(target) else "foreign"
    if not os.path.lexists(target):
        return "absent"
    if not target.is_dir():
        return "foreign"
    if os.path.lexists(target / COPY_MARK):
        return "copy"
    if _runs_from(target):
        return "running"
    have, ours = inventory(target), inventory(package_dir())
    return "half" if have and all(ours.get(path) == entry for path, entry in have.items()) else "foreign"


def reason_against(root: Path, *, copy: bool = False) -> str | None:
    """Why ``apply`` would not put the plugin there; None if it would."""
    target, now = root / PLUGIN, state(root)
    if os.path.realpath(target.parent) != str(target.parent):
        return f"{target.parent} leads to {os.path.realpath(target.parent)}; name the checkout that it belongs to"
    if now == "foreign":
        return f"{target} is neither a link to this plugin nor a copy made by it; move it away"
    if now == "running" or (now == "copy" and _runs_from(target) and not copy):
        return f"slime-lora runs from {target} itself; run the one that is installed elsewhere"
    if now == "copy":
        return reason_to_keep(root)
    return None


def reason_to_keep(root: Path) -> str | None:
    """What would be lost with a copied plugin: files that were added or changed since; None if nothing."""
    target = root / PLUGIN
    try:
        wanted = json.loads((target / COPY_MARK).read_bytes()) if (target / COPY_MARK).is_file() else None
    except (ValueError, RecursionError):
        wanted = None
    if not isinstance(wanted, dict) or not all(isinstance(value, str) for value in wanted.values()):
        problem = f"{target / COPY_MARK} is damaged: what is yours in this copy cannot be told"
    else:
        changed = sorted(path for path, entry in inventory(target).items() if entry != ("file", wanted.get(path)))
        if not changed:
            return None
        listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        problem = f"{target} has been changed since it was copied ({listed})"
    return f"{problem}; move away what you want to keep, then revert --force deletes the rest"


def put(root: Path, *, copy: bool) -> str | None:
    """Link or copy the plugin into its place, in place of a former one of ours. Returns what was done, if anything.

    Raises:
        OSError: it could not be written; what was there is there still.
    """
    target, now = root / PLUGIN, state(root)
    if copy and now == "copy" and (_runs_from(target) or _files(target) == _files(package_dir())):
        return None
    if not copy and now == "link" and _runs_from(target):
        return None
    staged = root / PLUGIN.parent / _STAGED
    try:
        _stage(staged, copy)
        _move_away(root)
        os.rename(staged, target)
    except BaseException:
        _bring_back(root)
        raise
    remove_leftovers(root)
    return f"{'copied' if copy else 'linked'} {PLUGIN}"


def remove(root: Path) -> str | None:
    """Take the plugin out, if it is a link, a copy or half a copy. Returns what was done, if anything."""
    target, now = root / PLUGIN, state(root)
    if now not in ("link", "copy", "half"):
        return None
    led_to = f", which pointed to {os.readlink(target)}" if now == "link" and not _runs_from(target) else ""
    _move_away(root)
    remove_leftovers(root)
    return f"removed {PLUGIN}{led_to}"


def remove_leftovers(root: Path) -> None:
    """Delete what a killed ``put`` or ``remove`` left beside the plugin's place."""
    for name in (_STAGED, _REMOVED):
        path = root / PLUGIN.parent / name
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def inventory(directory: Path) -> dict[str, tuple[str, str]]:
    """Path -> (file, SHA-256), (link, target) or (directory, ""), (special, "") of all that somebody may want to keep.

    Not the copy's mark, compiled Python, and directories that hold something.
    """
    return dict(_entries(directory))


def _entries(directory: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    for parent, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(parent, name)
            relative = str(path.relative_to(directory))
            if path.is_symlink():
                yield relative, ("link", os.readlink(path))
            elif path.is_dir():
                if name != "__pycache__" and not any(path.iterdir()):
                    yield relative, ("directory", "")
            elif not path.is_file():
                yield relative, ("special", "")
            elif relative != COPY_MARK and not (path.parent.name == "__pycache__" and path.suffix == ".pyc"):
                yield relative, ("file", hashlib.sha256(path.read_bytes()).hexdigest())


def _files(directory: Path) -> dict[str, str]:
    return {path: value for path, (kind, value) in inventory(directory).items() if kind == "file"}


def _is_ours(link: Path) -> bool:
    """Does a link lead to a plugin, this one or another? Of one that leads nowhere, the target's name decides."""
    if link.exists():
        return _runs_from(link) or any((link / "slime" / place).is_file() for place in ("patch/seams.py", "seams.py"))
    return Path(os.readlink(link)).parts[-2:] == PLUGIN.parts and os.path.realpath(link) != os.path.abspath(link)


def _runs_from(target: Path) -> bool:
    return os.path.realpath(target) == str(package_dir())


def _stage(staged: Path, copy: bool) -> None:
    if not copy:
        staged.symlink_to(package_dir(), target_is_directory=True)
        return
    shutil.copytree(package_dir(), staged, ignore=shutil.ignore_patterns("__pycache__", COPY_MARK), symlinks=True)
    _write_mark(staged)


def _write_mark(copied: Path) -> None:
    (copied / COPY_MARK).write_text(json.dumps(_files(copied), indent=0, sort_keys=True))


def _move_away(root: Path) -> None:
    if os.path.lexists(root / PLUGIN):
        os.rename(root / PLUGIN, root / PLUGIN.parent / _REMOVED)


def _bring_back(root: Path) -> None:
    removed = root / PLUGIN.parent / _REMOVED
    if os.path.lexists(removed) and not os.path.lexists(root / PLUGIN):
        os.rename(removed, root / PLUGIN)
    remove_leftovers(root)
