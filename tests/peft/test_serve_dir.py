"""The directory of links that ``transformers serve`` reads. Command: pytest tests/peft/test_serve_dir.py"""

from __future__ import annotations

import pytest

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.peft.serve_dir import make_serve_dir


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", ".hidden"):
        (tmp_path / "base" / name).write_text(f"base {name}")
    return tmp_path / "base"


def make_adapter(path, names=("adapter_config.json", "adapter_model.safetensors")):
    path.mkdir()
    for name in names:
        (path / name).write_text(f"{path.name} {name}")
    return path


def test_links_to_base_and_adapter(base, tmp_path):
    out = make_serve_dir(base, make_adapter(tmp_path / "adapter"), tmp_path / "serve")
    assert {entry.name: entry.read_text() for entry in out.iterdir()} == {
        "config.json": "base config.json",
        "model.safetensors": "base model.safetensors",
        "tokenizer.json": "base tokenizer.json",
        "adapter_config.json": "adapter adapter_config.json",
        "adapter_model.safetensors": "adapter adapter_model.safetensors",
    }
    assert all(entry.is_symlink() for entry in out.iterdir())


def test_second_call_replaces_every_link(base, tmp_path):
    out = make_serve_dir(base, make_adapter(tmp_path / "old"), tmp_path / "serve")
    (base / "tokenizer.json").unlink()
    make_serve_dir(base, make_adapter(tmp_path / "new"), out)
    assert (out / "adapter_config.json").read_text() == "new adapter_config.json"
    assert not (out / "tokenizer.json").is_symlink()


def test_an_adapter_in_the_base_directory_is_left_out(base, tmp_path):
    (base / "adapter_config.json").write_text("of somebody else")
    out = make_serve_dir(base, make_adapter(tmp_path / "adapter"), tmp_path / "serve")
    assert (out / "adapter_config.json").read_text() == "adapter adapter_config.json"


def test_refuses_what_is_not_a_base_an_adapter_or_a_place(base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    half = make_adapter(tmp_path / "half", names=("adapter_config.json",))
    with pytest.raises(UsageError, match=r"no config\.json"):
        make_serve_dir(adapter, adapter, tmp_path / "serve")
    with pytest.raises(UsageError, match="PEFT adapter"):
        make_serve_dir(base, half, tmp_path / "serve")
    with pytest.raises(UsageError, match="not a directory of links"):
        make_serve_dir(base, adapter, base)
