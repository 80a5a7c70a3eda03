"""Files from anyone: not unpacked, not repeated, not followed without end. Command: pytest tests/files"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile

import adapter_dirs
import pytest
import torch

from slime_plugins.lora.files.json_text import parse_json
from slime_plugins.lora.files.torch_file import TorchFile
from slime_plugins.lora.peft.directory import BIN, open_tensors


def packed(path, size=64 << 20):
    """A file of torch.save with its data deflated: a thousandth of what it unpacks to."""
    torch.save({"a": torch.zeros(size // 4)}, path.with_suffix(".plain"))
    with zipfile.ZipFile(path.with_suffix(".plain")) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for record in plain.infolist():
            out.writestr(record.filename, plain.read(record))
    os.unlink(path.with_suffix(".plain"))
    return path


def test_compressed_records_are_not_unpacked(tmp_path):
    path = packed(tmp_path / BIN)
    assert path.stat().st_size < 1 << 20
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"is compressed, which torch.save does not do"):
        TorchFile(path)
    assert time.perf_counter() - start < 2


def test_records_that_overlap(tmp_path):
    """Every entry of the directory at the same bytes."""
    torch.save({str(i): torch.zeros(1000) + i for i in range(8)}, tmp_path / BIN)
    data = bytearray((tmp_path / BIN).read_bytes())
    with zipfile.ZipFile(tmp_path / BIN) as archive:
        places = {r.filename: r.header_offset for r in archive.infolist()}
        sizes = {r.filename: r.file_size for r in archive.infolist()}
    first = next(name for name in places if name.endswith("data/0"))
    small = next(name for name in places if name.endswith("/version"))
    at = data.rindex(small.encode()) - 46  # its entry in the central directory
    data[at + 20 : at + 28] = 2 * (1 << 20).to_bytes(4, "little")
    (tmp_path / BIN).write_bytes(data)
    assert sizes[first] == 4000
    with pytest.raises(ValueError, match=r"larger than the file|truncated or damaged|cannot be loaded"):
        TorchFile(tmp_path / BIN)


def test_the_format_before_zip_says_so(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / BIN, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"is in the format of torch before 1.6.*save it again"):
        open_tensors(tmp_path)


def test_values_that_refer_to_each_other(tmp_path):
    """2**60 values when written out; and a list in itself."""
    nested: list = [1, 2]
    for _ in range(60):
        nested = [nested, nested]
    cyclic: list = []
    cyclic.append(cyclic)
    for name, value in (("nested", nested), ("cyclic", cyclic)):
        torch.save({"a": value}, tmp_path / name)
        with pytest.raises(ValueError, match=r"nested deeper|cannot be written out"):
            TorchFile(tmp_path / name)


def test_a_tensor_has_its_values_in_the_file(tmp_path):
    """A stride of 0 makes four bytes a terabyte."""
    torch.save({"a": torch.zeros(1).expand(1 << 38), "s": torch.eye(3).to_sparse()}, tmp_path / BIN)
    tensors = open_tensors(tmp_path)
    for key, words in (("a", "repeats the few values"), ("s", "not plain values")):
        with pytest.raises(ValueError, match=words):
            tensors[key]


def test_fifos_are_not_waited_for(tmp_path):
    config, _ = adapter_dirs.adapter()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for name in ("adapter_model.safetensors", BIN):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match="is a FIFO, expected a file"):
            open_tensors(tmp_path)
        os.unlink(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100 + "]" * 100, "nested deeper than 64"),
        ("[" * 200_000, "nested deeper than 64"),
        ('{"a": {"b": 1, "b": 2}}', "'b' is there twice"),
        ("1" * 5000, "limit"),
        ('"\\ud800"', "surrogate"),
        (b"\xff", "decode"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_json_that_is_read():
    assert parse_json('{"a": [1, 2.5, null, true, "\\ud83d\\ude00"]}') == {"a": [1, 2.5, None, True, "\U0001f600"]}


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as a full disk: a write fails, and names no file
from slime_plugins.lora.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verb", ["import", "merge", "export"])
def test_a_full_disk_names_the_place(tmp_path, verb):
    from slime_plugins.lora.cli import main
    from slime_plugins.lora.peft.directory import write_adapter

    base = adapter_dirs.base_checkpoint(tmp_path / "base")
    write_adapter(tmp_path / "adapter", *adapter_dirs.adapter(), base=base)
    argv = ["import", "--adapter", str(tmp_path / "adapter")]
    hf, out = ["--hf-checkpoint", str(base)], tmp_path / "out"
    if verb != "import":
        assert main([*argv, *hf, "--out", str(tmp_path / "run")]) == 0
        argv = ["export", "--checkpoint", str(tmp_path / "run"), *(["--merge"] if verb == "merge" else [])]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *argv, *hf, "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    error = done.stderr.strip().splitlines()
    assert len(error) == 1 and str(out) in error[0] and "File too large" in error[0], done.stderr
    assert not out.exists() or not list(out.iterdir())
