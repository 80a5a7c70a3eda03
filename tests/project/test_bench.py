"""The benchmarks run, and adapters send what the design allows and no byte more. pytest tests/project/test_bench.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


def bench(script: str, out: Path, *flags: str) -> tuple[dict, str]:
    command = [sys.executable, BENCH / script, "--json", out, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def test_bytes_on_the_wire_are_the_rank_sized_ones(tmp_path):
    """TP=2+SP: by taps an all-gather and a reduce-scatter of h per linear, fused the latter per column-parallel one;
    and one sum of the replicated halves' gradients."""
    sizes = ("--hidden", "256", "--layers", "1", "--tokens", "32", "--rank", "3")
    report, text = bench("comm_bytes.py", tmp_path / "bytes.json", "--settings", "TP=2+SP", *sizes)
    ways = [(result["layout"], result["linears"]) for result in report["results"]]
    assert ways == [(layout, linears) for layout in ("fused", "split") for linears in ("fused", "taps")]
    for result in report["results"]:
        assert result["extra"] == result["allowed"] > 0
    assert "TOO MUCH" not in text


def test_traffic_stays_within_the_design(tmp_path):
    """Kernels, bytes and elements sent, of every form of linear; the script fails for what is over its limits."""
    report, _ = bench("traffic.py", tmp_path / "traffic.json", "--settings", "TP=1", "TP=2+SP")
    found = {(r["setting"], r["implementation"], r["linears"]) for r in report["results"]}
    for setting in ("TP=1", "TP=2+SP"):
        assert {(setting, kind, way) for kind in ("local", "te") for way in ("fused", "taps")} <= found
    assert ("TP=1", "te experts", "taps") in found
    peft = next(r for r in report["results"] if r["implementation"] == "peft")
    passes = {side: peft["forward"][side] + peft["backward"][side] for side in ("NI", "NO")}
    assert passes == {"NI": 6, "NO": 10}  # read out of PEFT's source by hand


def test_gpu_script_runs_without_a_gpu(tmp_path):
    """Every section and form of it, at sizes that take no time."""
    report, text = bench("gpu.py", tmp_path / "gpu.json", "--device", "cpu", "--small")
    assert {name: section["status"] for name, section in report["sections"].items()} == dict.fromkeys(
        ("linears", "model", "experts", "profile"), "done"
    )
    assert [section["not_measured"] for section in report["sections"].values()] == [[]] * 4
    rows = {name: section["rows"] for name, section in report["sections"].items()}
    assert len(rows["linears"]) == 2 * 4 and len(rows["experts"]) == 2 * 2
    plain = {"frozen", "lora", "lora taps", "peft"}
    te = {"te frozen", "te lora", "te lora taps"}
    for row in rows["linears"]:
        assert row["forms"].keys() == (plain | te if row["linear"] in ("linear_qkv", "linear_fc1") else plain)
    none, full = rows["model"]
    assert (none["recompute"], full["recompute"]) == ("none", "full")
    for row in rows["model"]:
        assert row["forms"].keys() == plain | te | {"full", "lora split"}
    for name, form in none["forms"].items():
        assert full["forms"][name]["saved_bytes"] < form["saved_bytes"]
    saved = {name: form["saved_bytes"] for name, form in none["forms"].items()}
    assert saved["frozen"] < saved["lora"] <= saved["lora taps"] <= saved["peft"]
    assert saved["te lora"] < saved["te lora taps"]
    # Of four linears h alone, 16 tokens of rank 8 in bf16, and of two norms 1 / rms, which the stand-in makes again.
    # The frozen form trains the final norm, for want of another parameter, and keeps its product in float32.
    assert saved["te lora"] - saved["te frozen"] == 4 * 16 * 8 * 2 + 2 * 16 * 4 - 16 * 64 * 4
    assert all(row["forms"] for row in rows["profile"]) and "aten::mm" in text
    assert (tmp_path / "gpu.txt").read_text() in text


def test_gpu_script_says_what_failed_and_goes_on(tmp_path, monkeypatch):
    """A section whose process died, and a case that raises; without a device nothing is begun."""
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu
    from _gpu_clock import Budget

    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"sections": {"linears": {"status": "begun", "rows": [], "not_measured": []}}}))
    assert gpu.note_what_ended(out, ["linears", "model"], -6) == ["model"]
    assert gpu.note_what_ended(out, ["model"], 1) == []
    sections = json.loads(out.read_text())["sections"]
    assert "code -6" in sections["linears"]["status"] and "code 1" in sections["model"]["status"]

    budget = Budget(60.0)
    with budget.attempt("one"):
        raise ValueError("of no use\nat all")
    with budget.attempt("two"):
        raise torch.OutOfMemoryError("too large")
    assert budget.failed == ["one: ValueError: of no use"]  # too little memory is a finding, not a failure
    assert budget.not_measured == [*budget.failed, "two: OutOfMemoryError: too large"]
    assert budget.allows("three") and not Budget(0.0).allows("three")

    if not torch.cuda.is_available():
        command = [sys.executable, BENCH / "gpu.py", "--json", out]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and done.stderr.startswith("error: torch finds no CUDA device")


def test_collectives_of_a_sync_do_not_grow_with_experts(tmp_path):
    """EP 2 x TP 2: a gather over tensor-parallel ranks per linear, and one over expert ranks per linear of experts."""
    found = []
    for experts in (4, 12):
        sizes = ("--layers", "1", "--experts", str(experts), "--repeats", "1", "--seconds", "60")
        found.append(bench("sync.py", tmp_path / f"{experts}.json", *sizes)[0])
    few, many = found
    assert many["tensors"] - few["tensors"] == 8 * 6  # gate, up and down, A and B of eight experts more
    assert few["calls"] == many["calls"] == {"allgather_": 4, "gather_": 2}
    assert few["per_layer"] == 6 and many["in_flight"] < 1


@pytest.mark.slow
def test_step_time(tmp_path):
    flags = ("--hidden", "256", "--layers", "1", "--tokens", "64", "--rounds", "2", "--settings", "TP=1", "TP=2+SP")
    report, text = bench("step_time.py", tmp_path / "time.json", *flags)
    assert [result["setting"] for result in report["results"]] == ["TP=1", "TP=2+SP"]
    for result in report["results"]:
        assert result["cpu"]["lora_over_frozen"]["median"] > 0
        # The inputs of the linears are kept for A's gradient, and nothing like a second output.
        assert (
            result["saved_mib_rank0"]["frozen"] < result["saved_mib_rank0"]["lora"] < result["saved_mib_rank0"]["full"]
        )
    assert "LoRA/frozen" in text


@pytest.mark.slow
def test_experts(tmp_path):
    """The script itself refuses to compare two forms of LoRA that compute different models."""
    sizes = (
        "--hidden",
        "64",
        "--expert-ffn",
        "32",
        "--experts",
        "6",
        "--topk",
        "2",
        "--layers",
        "1",
        "--tokens",
        "40",
    )
    report, text = bench("experts.py", tmp_path / "experts.json", *sizes, "--rounds", "2")
    assert set(report["over_frozen"]) == {"lora", "loop"} and report["over_frozen"]["lora"]["median"] > 0
    assert "1.15" in text
