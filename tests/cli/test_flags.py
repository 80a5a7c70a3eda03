"""Flags of export, import, verify and convert-zero that cannot be meant: one line, exit code 2, nothing written.

Command: pytest tests/cli/test_flags.py
"""

from __future__ import annotations

import os

import adapter_dirs
import pytest
import zero_checkpoints

from slime_plugins.lora.cli import main
from slime_plugins.lora.peft.directory import write_adapter


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A base, an adapter, a checkpoint of it and a ZeRO checkpoint; and the working directory is an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = adapter_dirs.base_checkpoint(tmp_path / "base")
    write_adapter(tmp_path / "adapter", *adapter_dirs.adapter(), base=base)
    argv = ["--adapter", str(tmp_path / "adapter"), "--hf-checkpoint", str(base)]
    assert main(["import", *argv, "--out", str(tmp_path / "run")]) == 0
    zero_checkpoints.Zero([zero_checkpoints.trained()]).write(tmp_path / "zero")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def refused(argv, capsys) -> str:
    capsys.readouterr()
    code = main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert code == 2, (argv, code, error)
    assert error.count("\n") == 1 and error.startswith("slime-lora: error: ")
    assert os.listdir() == []
    return error


def verbs(places):
    return {
        "export": ["export", "--checkpoint", places / "run", "--hf-checkpoint", places / "base"],
        "import": ["import", "--adapter", places / "adapter", "--hf-checkpoint", places / "base"],
        "convert-zero": ["convert-zero", places / "zero", "--lora-alpha", "8"],
    }


def test_empty_names_are_no_place(places, capsys):
    for argv in verbs(places).values():
        for nothing in ("", "  "):
            assert "names no place" in refused([*argv, "--out", nothing], capsys)
    for flag in ("--hf-checkpoint",):
        assert "names no place" in refused(["verify", places / "adapter", flag, ""], capsys)
    assert "names no place" in refused(["verify", ""], capsys)
    assert "names no place" in refused([*verbs(places)["convert-zero"], "--out", "x", "--extra", ""], capsys)


def test_what_is_read_is_not_written_over(places, capsys):
    before = {path: path.stat().st_mtime_ns for path in places.rglob("*") if path.is_file()}
    for verb, flags in (("export", ("run", "base")), ("import", ("adapter", "base")), ("convert-zero", ("zero",))):
        for name in flags:
            argv = [*verbs(places)[verb], "--out", places / name / "." / ""]
            error = refused([*argv, "--force"] if verb == "convert-zero" else argv, capsys)
            assert "which is read; name another place" in error
    argv = [*verbs(places)["export"], "--out", places / "new", "--serve-dir", places / "new"]
    assert "--serve-dir" in refused(argv, capsys)
    argv = [*verbs(places)["convert-zero"], "--out", places / "new", "--extra", places / "new"]
    assert "--extra" in refused(argv, capsys)
    (places / "extra.safetensors").write_text("mine")
    argv = [*verbs(places)["convert-zero"], "--out", places / "new", "--extra", places]
    assert "give --force to replace it" in refused(argv, capsys)
    (places / "extra.safetensors").unlink()
    assert before == {path: path.stat().st_mtime_ns for path in places.rglob("*") if path.is_file()}


@pytest.mark.parametrize("alpha", ["nan", "inf", "-inf", "0", "-1", "x", "", "1e400", "9" * 20])
def test_alpha_is_a_number(places, capsys, alpha):
    argv = ["convert-zero", places / "zero", f"--lora-alpha={alpha}", "--out", places / "new"]
    assert "is no number above 0" in refused(argv, capsys)


@pytest.mark.parametrize("base", ["not/there/at all", "/not/there", "./nothing", "a/b/c", "x\ny"])
def test_a_base_model_is_a_directory_or_a_name(places, capsys, base):
    argv = [*verbs(places)["convert-zero"], "--out", places / "new", "--base-model", base]
    assert "no such directory, and no name of a model" in refused(argv, capsys)


def test_a_base_model_that_is_no_model(places, capsys):
    """A directory that is there is looked at, not written into the config unseen."""
    (places / "empty").mkdir()
    argv = [*verbs(places)["convert-zero"], "--out", places / "new", "--base-model", places / "empty"]
    assert "no config.json" in refused(argv, capsys)
    assert not (places / "new").exists()
    assert main([*map(str, argv[:-1]), "owner/Name-4B"]) == 0
