"""The benchmarks run, and adapters send what the design allows and no byte more. pytest tests/project/test_bench.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def bench(script: str, out: Path, *flags: str) -> tuple[dict, str]:
    command = [sys.executable, BENCH / script, "--json", out, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def test_bytes_on_the_wire_are_the_rank_sized_ones(tmp_path):
    """TP=2+SP: an all-gather and a reduce-scatter of h per linear, and one sum of the replicated halves' gradients."""
    sizes = ("--hidden", "256", "--layers", "1", "--tokens", "32", "--rank", "3")
    report, text = bench("comm_bytes.py", tmp_path / "bytes.json", "--settings", "TP=2+SP", *sizes)
    assert [result["layout"] for result in report["results"]] == ["fused", "split"]
    for result in report["results"]:
        assert result["extra"] == result["allowed"] > 0
    assert "TOO MUCH" not in text


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
