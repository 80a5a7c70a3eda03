"""One directory with a base and an adapter, as ``transformers serve`` wants them: links, no copy."""

from __future__ import annotations

import os
from pathlib import Path

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files.atomic import replaced_directory
from slime_plugins.lora.peft.directory import BIN, CONFIG, SAFETENSORS

_ADAPTER_FILES = (CONFIG, SAFETENSORS, BIN)


def make_serve_dir(base: str | os.PathLike, adapter: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Fill ``out`` with links to the files of a base checkpoint and of a PEFT adapter. Returns ``out``.

    ``transformers serve OUT`` then answers with the adapter applied. Later exports to ``adapter`` show at the next
    start of the server. An ``out`` that holds links alone, from an earlier call, is replaced.

    Raises:
        UsageError: ``base`` or ``adapter`` is not what it should be, or ``out`` holds files of its own.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    if not (base / "config.json").is_file():
        raise UsageError(f"{base} has no config.json; expected the directory of a Hugging Face checkpoint")
    files = [adapter / name for name in _ADAPTER_FILES if (adapter / name).is_file()]
    if not (adapter / CONFIG).is_file() or len(files) < 2:
        raise UsageError(f"{adapter} has no {CONFIG} with {SAFETENSORS}; expected the directory of a PEFT adapter")
    if out.exists() and not (out.is_dir() and all(entry.is_symlink() for entry in out.iterdir())):
        raise UsageError(f"{out} exists and is not a directory of links; name another place for the serve directory")
    files += [
        entry
        for entry in sorted(base.iterdir())
        if entry.is_file() and not entry.name.startswith(".") and entry.name not in _ADAPTER_FILES
    ]
    old = tuple(entry.name for entry in out.iterdir()) if out.is_dir() else ()
    with replaced_directory(out, drop=old) as new:
        for file in files:
            os.symlink(os.path.abspath(file), new / file.name)
    return out
