"""Fetches the wheels whose code judges ours, without their dependencies, and unpacks their Python. Idempotent.

python tests/contracts/fetch.py [--vllm]        # 54 MB; with vLLM's 336 MB more
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from wheels import SGLANG, TRANSFORMER_ENGINE, TRL, VLLM, cache

# Only Python is read, so any machine may take the wheel for this one. pip takes a platform by its exact name: SGLang's
# wheels have the first, vLLM's the second.
PLATFORMS = ("--platform", "manylinux_2_34_x86_64", "--platform", "manylinux_2_28_x86_64")
ANY_MACHINE = (*PLATFORMS, "--python-version", "3.11", "--implementation", "cp")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", action="store_true", help=f"also vLLM {VLLM}, 336 MB")
    wanted = [*(("sglang", v) for v in SGLANG), *(("transformer-engine", v) for v in TRANSFORMER_ENGINE)]
    wanted += [("trl", version) for version in TRL]
    if parser.parse_args().vllm:
        wanted.append(("vllm", VLLM))
    for name, version in wanted:
        fetch(name, version)
    fetch_library("msgspec")
    print(cache())
    return 0


def fetch(name: str, version: str) -> None:
    where = cache() / f"{name}-{version}"
    if where.is_dir():
        return
    with tempfile.TemporaryDirectory() as folder:
        download(f"{name}=={version}", folder, *ANY_MACHINE)
        (wheel,) = Path(folder).glob("*.whl")
        print(f"{wheel.name} {wheel.stat().st_size / 1e6:.0f} MB", flush=True)
        unpack(wheel, where, ".py")


def fetch_library(name: str) -> None:
    """A compiled module that SGLang's message classes are made of, for this interpreter."""
    if (cache() / "lib" / name).is_dir():
        return
    with tempfile.TemporaryDirectory() as folder:
        download(name, folder)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(cache() / "lib")


def download(requirement: str, folder: str, *more: str) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-qq", "--no-deps"]
    subprocess.run([*pip, "--only-binary=:all:", *more, "-d", folder, requirement], check=True)


def unpack(wheel: Path, where: Path, suffix: str) -> None:
    """Files of one kind, whole or not at all."""
    where.parent.mkdir(parents=True, exist_ok=True)
    part = where.with_name(f"{where.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part, [n for n in archive.namelist() if n.endswith(suffix)])
        part.rename(where)
    finally:
        shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
