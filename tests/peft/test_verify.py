"""``slime-lora verify`` says what is wrong with an adapter, all of it, one line each, naming the tensor.

Run: python -m pytest tests/peft/test_verify.py
"""

import json
import re
import shutil

import adapter_dirs
import pytest
import torch
from safetensors.torch import save_file
from test_peft_files import Q0_A, Q0_B, SPOILED, spoil_absent_target

from slime_plugins.lora.cli import main
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.peft.config import key_of
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.verify import verify_adapter


@pytest.fixture
def base(tmp_path):
    return adapter_dirs.base_checkpoint(tmp_path / "base", shards=3)


def foreign(directory, config, tensors):
    """An adapter as other tools write it: no checks, no checksums."""
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


def test_a_good_adapter_is_counted(tmp_path, base):
    config, tensors = adapter_dirs.adapter(dtype=torch.bfloat16)
    write_adapter(tmp_path / "a", config, tensors, base=base)
    report = verify_adapter(tmp_path / "a", base)
    assert report.ok
    assert report.problems == report.warnings == []
    assert (report.lora_A, report.lora_B, report.other) == (14, 14, 0)
    assert report.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert report.bytes == 2 * report.parameters
    assert (report.rank, report.alpha, report.scalings) == (3, 6, [2.0])
    assert (report.expected_modules, report.checksums, report.dtypes) == (14, 28, ["bfloat16"])
    assert report.largest_B == max(t.abs().max().item() for key, t in tensors.items() if "lora_B" in key)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_a_foreign_adapter_has_no_checksums(tmp_path, base):
    report = verify_adapter(foreign(tmp_path / "a", *adapter_dirs.adapter()), base)
    assert report.ok
    assert report.checksums is None


READ = [case for case in SPOILED if case[0] is not spoil_absent_target]


@pytest.mark.parametrize("spoil, message", READ, ids=[spoil.__name__ for spoil, _ in READ])
def test_everything_that_is_not_written_is_found_when_read(tmp_path, base, spoil, message):
    config, tensors = adapter_dirs.adapter()
    spoil(config, tensors)
    report = verify_adapter(foreign(tmp_path / "a", config, tensors), base)
    assert not report.ok
    pattern = message.partition(r" \(and")[0]
    assert any(re.search(pattern, problem.message) for problem in report.problems), report.problems
    assert all("\n" not in problem.message for problem in report.problems)


def test_zero3_without_gathering_is_diagnosed(tmp_path):
    """Every tensor of size 0; and, with small parameters kept whole by DeepSpeed, only some of them."""
    config, tensors = adapter_dirs.adapter()
    for keep in (0, 10):
        ungathered = {key: t if i < keep else torch.empty(0) for i, (key, t) in enumerate(tensors.items())}
        report = verify_adapter(foreign(tmp_path / f"a{keep}", config, ungathered))
        zero = [problem for problem in report.problems if problem.kind == "zero_size"]
        assert len(zero) == 28 - keep
        assert {problem.tensor for problem in zero} == set(list(tensors)[keep:])
        assert "ZeRO-3" in zero[0].message
        assert "run `slime-lora convert-zero CHECKPOINT_DIR --out DIR`" in zero[0].message


def test_the_40_byte_file_is_diagnosed(tmp_path):
    directory = foreign(tmp_path / "a", adapter_dirs.adapter()[0], {})
    assert (directory / "adapter_model.safetensors").stat().st_size == 40
    (problem,) = verify_adapter(directory).problems
    assert problem.kind == "empty"
    assert "convert-zero" in problem.message


def test_never_trained(tmp_path):
    config, tensors = adapter_dirs.adapter()
    for key in tensors:
        if "lora_B" in key:
            tensors[key].zero_()
    (problem,) = verify_adapter(foreign(tmp_path / "all", config, tensors)).problems
    assert problem.kind == "untrained"
    assert "never trained" in problem.message

    config, tensors = adapter_dirs.adapter()
    tensors[Q0_B].zero_()
    (problem,) = verify_adapter(foreign(tmp_path / "one", config, tensors)).problems
    assert (problem.kind, problem.tensor) == ("untrained", Q0_B)


def test_every_problem_is_listed(tmp_path):
    config, tensors = adapter_dirs.adapter()
    tensors[Q0_A][0, 0] = float("nan")
    del tensors[key_of("model.layers.1.mlp.up_proj", "B")]
    tensors["lm_head.weight"] = torch.ones(2, 2)
    tensors[key_of("model.layers.1.mlp.down_proj", "A")] = torch.empty(0)
    kinds = sorted(problem.kind for problem in verify_adapter(foreign(tmp_path / "a", config, tensors)).problems)
    assert kinds == ["missing", "not_finite", "unknown_key", "zero_size"]


def test_another_base(tmp_path, base):
    config, tensors = adapter_dirs.adapter()
    write_adapter(tmp_path / "a", config, tensors, base=base)

    renamed = {name.replace("model.", "transformer."): shape for name, shape in adapter_dirs.modules().items()}
    (fingerprint, none) = verify_adapter(
        tmp_path / "a", adapter_dirs.base_checkpoint(tmp_path / "renamed", renamed)
    ).problems
    assert "is for another base: none of its 14 modules" in none.message
    assert "other weights" in fingerprint.message

    wider = {**adapter_dirs.modules(), "model.layers.1.mlp.up_proj": (20, 9), "model.layers.0.mlp.up_proj": (19, 8)}
    problems = verify_adapter(tmp_path / "a", adapter_dirs.base_checkpoint(tmp_path / "wider", wider)).problems[1:]
    assert [problem.message for problem in problems] == [
        f"{key_of('model.layers.0.mlp.up_proj', 'B')} has shape [20, 3], where the base has 19 outputs",
        f"{key_of('model.layers.1.mlp.up_proj', 'A')} has shape [3, 8], where the base has 9 inputs",
    ]

    deeper = adapter_dirs.base_checkpoint(tmp_path / "deeper", adapter_dirs.modules(layers=3))
    problems = verify_adapter(tmp_path / "a", deeper).problems[1:]
    assert len(problems) == 7
    assert {problem.kind for problem in problems} == {"missing"}
    assert problems[0].tensor == key_of("model.layers.2.mlp.down_proj", "A")

    shallower = adapter_dirs.base_checkpoint(tmp_path / "shallower", adapter_dirs.modules(layers=1))
    problems = verify_adapter(tmp_path / "a", shallower).problems[1:]
    assert [problem.kind for problem in problems] == ["base"] * 7
    assert "model.layers.1.mlp.down_proj is adapted, but the base has no such linear" in problems[0].message


def test_another_fine_tune_of_equal_shapes(tmp_path, base):
    config, tensors = adapter_dirs.adapter()
    write_adapter(tmp_path / "a", config, tensors, base=base)
    assert verify_adapter(tmp_path / "a", adapter_dirs.base_checkpoint(tmp_path / "whole", shards=1)).ok
    other = adapter_dirs.base_checkpoint(tmp_path / "other", seed=1)
    (problem,) = verify_adapter(tmp_path / "a", other).problems
    assert problem.kind == "base"
    assert "made for a base with other weights" in problem.message


def test_a_lost_layer_without_a_base_is_a_warning(tmp_path, base):
    linears = adapter_dirs.modules()
    del linears["model.layers.1.self_attn.v_proj"]
    directory = foreign(tmp_path / "a", *adapter_dirs.adapter(linears))
    report = verify_adapter(directory)
    assert report.ok
    assert "model.layers.*.self_attn.v_proj is adapted in 1 of 2 layers, not in 1" in report.warnings[0].message
    (problem,) = verify_adapter(directory, base).problems
    assert problem.tensor == key_of("model.layers.1.self_attn.v_proj", "A")


def test_a_target_without_tensors(tmp_path, base):
    """PEFT takes names that the model lacks, so it is a fault only if the base has them."""
    config, tensors = adapter_dirs.adapter(adapter_dirs.modules(("self_attn.q_proj",)))
    config["target_modules"].append("c_attn")
    directory = foreign(tmp_path / "a", config, tensors)
    report = verify_adapter(directory)
    assert report.ok
    assert "target_modules names 'c_attn', for which there is no tensor" in report.warnings[0].message
    assert verify_adapter(directory, base).ok
    config["target_modules"].append("v_proj")
    problems = verify_adapter(foreign(tmp_path / "b", config, tensors), base).problems
    assert [problem.tensor for problem in problems] == [
        key_of(f"model.layers.{layer}.self_attn.v_proj", "A") for layer in range(2)
    ]


def test_per_expert_names(tmp_path):
    linears = {
        f"model.layers.{i}.mlp.experts.{e}.{leaf}": shape
        for i in range(2)
        for e in range(3)
        for leaf, shape in (("gate_proj", (5, 8)), ("up_proj", (5, 8)), ("down_proj", (8, 5)))
    }
    base = adapter_dirs.base_checkpoint(tmp_path / "base", linears)
    config, tensors = adapter_dirs.adapter(linears)
    idle = key_of("model.layers.0.mlp.experts.1.up_proj", "B")
    tensors[idle].zero_()  # an expert that no token was routed to
    report = verify_adapter(foreign(tmp_path / "a", config, tensors), base)
    assert report.ok
    assert report.expected_modules == 18
    assert idle in report.warnings[0].message
    tensors.pop(idle)
    tensors.pop(idle.replace("lora_B", "lora_A"))
    (problem,) = verify_adapter(foreign(tmp_path / "b", config, tensors), base).problems
    assert problem.tensor == idle.replace("lora_B", "lora_A")


def test_all_linear_and_tied_output_layer(tmp_path):
    tied = '{"tie_word_embeddings": true}'
    base = adapter_dirs.base_checkpoint(tmp_path / "base", config=tied)
    config, tensors = adapter_dirs.adapter()
    config["target_modules"] = "all-linear"
    assert verify_adapter(foreign(tmp_path / "a", config, tensors), base).ok
    config, tensors = adapter_dirs.adapter({**adapter_dirs.modules(), "lm_head": (11, 8)})
    assert verify_adapter(foreign(tmp_path / "b", config, tensors), base).ok
    tensors[key_of("lm_head", "B")] = torch.ones(12, 3)
    (problem,) = verify_adapter(foreign(tmp_path / "c", config, tensors), base).problems
    assert "12, 3" in problem.message


def test_patterns_rslora_and_dora(tmp_path):
    config, tensors = adapter_dirs.adapter()
    key = "model.layers.0.self_attn.q_proj"
    tensors[key_of(key, "A")], tensors[key_of(key, "B")] = torch.ones(5, 8), torch.ones(10, 5)
    config.update(rank_pattern={"layers.0.self_attn.q_proj": 5}, alpha_pattern={"q_proj": 7}, use_rslora=True)
    report = verify_adapter(foreign(tmp_path / "a", config, tensors))
    assert report.ok
    assert len(report.warnings) == 3
    assert report.scalings == sorted({7 / 5**0.5, 7 / 3**0.5, 6 / 3**0.5})
    config["use_dora"] = True
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(10)
    kinds = [problem.kind for problem in verify_adapter(foreign(tmp_path / "b", config, tensors)).problems]
    assert kinds == ["unknown_key", "unsupported"]


@pytest.mark.parametrize(
    "field, value", [("bias", "all"), ("init_lora_weights", "pissa_niter_4"), ("layer_replication", [[0, 2]])]
)
def test_what_lora_A_and_lora_B_cannot_show(tmp_path, field, value):
    config, tensors = adapter_dirs.adapter()
    (problem,) = verify_adapter(foreign(tmp_path / "a", {**config, field: value}, tensors)).problems
    assert problem.kind == "unsupported"
    assert f"{field} is {value!r}" in problem.message


def test_modules_to_save_are_allowed_and_checked(tmp_path):
    config, tensors = adapter_dirs.adapter()
    config["modules_to_save"] = ["score"]
    tensors["base_model.model.score.weight"] = torch.ones(1, 8)
    report = verify_adapter(foreign(tmp_path / "a", config, tensors))
    assert report.ok
    assert report.other == 1
    config["modules_to_save"] = ["score", "encoder"]
    (problem,) = verify_adapter(foreign(tmp_path / "c", config, tensors)).problems
    assert problem.kind == "missing" and "modules_to_save names encoder, but" in problem.message
    config["modules_to_save"] = ["score"]
    tensors["base_model.model.score.weight"] = torch.empty(0)  # peft issue 2450
    (problem,) = verify_adapter(foreign(tmp_path / "b", config, tensors)).problems
    assert (problem.kind, problem.tensor) == ("zero_size", "base_model.model.score.weight")


def test_flipped_byte_truncated_and_missing_files(tmp_path):
    config, tensors = adapter_dirs.adapter()
    write_adapter(tmp_path / "a", config, tensors)
    path = tmp_path / "a" / "adapter_model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 4
    path.write_bytes(whole)
    problems = verify_adapter(tmp_path / "a").problems
    assert [problem.kind for problem in problems] == ["checksum"]
    assert "checksum mismatch" in problems[0].message

    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        (problem,) = verify_adapter(tmp_path / "a").problems
        assert "not a whole safetensors file" in problem.message
    path.unlink()
    (problem,) = verify_adapter(tmp_path / "a").problems
    assert "no adapter_model.safetensors and no adapter_model.bin" in problem.message
    (tmp_path / "a" / "adapter_config.json").write_text('{"r": ')
    first, _ = verify_adapter(tmp_path / "a").problems
    assert "not valid JSON" in first.message


def test_config_of_another_run(tmp_path):
    config, tensors = adapter_dirs.adapter()
    write_adapter(tmp_path / "a", config, tensors)
    config["lora_alpha"] = 60
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    (problem,) = verify_adapter(tmp_path / "a").problems
    assert "lora_alpha is 60, but adapter_model.safetensors was written with 6" in problem.message


def test_command_line(tmp_path, base, capsys):
    config, tensors = adapter_dirs.adapter()
    write_adapter(tmp_path / "a", config, tensors, base=base)
    assert main(["verify", str(tmp_path / "a"), "--hf-checkpoint", str(base)]) == 0
    out = capsys.readouterr().out
    assert "14 lora_A, 14 lora_B, float32" in out
    assert "target_modules selects 14 modules" in out
    assert out.endswith("\nok\n")

    tensors[Q0_B][0, 0] = float("nan")
    foreign(tmp_path / "b", config, tensors)
    assert main(["verify", str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    assert f"PROBLEM       {Q0_B} has 1 of 30 values that are not finite\nnot ok: 1 problem\n" in out
    assert main(["verify", str(tmp_path / "b"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["problems"] == [
        {"kind": "not_finite", "message": f"{Q0_B} has 1 of 30 values that are not finite", "tensor": Q0_B}
    ]


def test_many_problems_are_shortened(tmp_path, capsys):
    config, tensors = adapter_dirs.adapter()
    foreign(tmp_path / "a", config, {key: torch.full_like(tensor, torch.nan) for key, tensor in tensors.items()})
    assert main(["verify", str(tmp_path / "a")]) == 1
    out = capsys.readouterr().out.splitlines()
    assert sum("are not finite" in line for line in out) == 8
    assert "PROBLEM       20 more of the kind 'not_finite'; --json lists them all" in out
    assert "not ok: 28 problems" in out


def test_wrong_usage(tmp_path, base, capsys):
    directory = foreign(tmp_path / "a", *adapter_dirs.adapter())
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert main(["verify", str(directory), "--hf-checkpoint", str(directory)]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    with pytest.raises(UsageError, match=r"has no config.json"):
        verify_adapter(directory, tmp_path)


def test_a_damaged_base_is_an_error_not_a_verdict(tmp_path, base, capsys):
    directory = foreign(tmp_path / "a", *adapter_dirs.adapter())
    shard = base / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        shard.write_bytes(whole[:size])
        assert main(["verify", str(directory), "--hf-checkpoint", str(base)]) == 1
        assert "model-00002-of-00003.safetensors" in capsys.readouterr().err
    shard.unlink()
    assert main(["verify", str(directory), "--hf-checkpoint", str(base)]) == 1
    assert "which is not there" in capsys.readouterr().err


def test_bin_adapters_are_verified(tmp_path, base):
    config, tensors = adapter_dirs.adapter()
    directory = foreign(tmp_path / "a", config, tensors)
    (directory / "adapter_model.safetensors").unlink()
    torch.save(tensors, directory / "adapter_model.bin")
    report = verify_adapter(directory, base)
    assert report.ok
    assert report.checksums == 28
    shutil.copy(directory / "adapter_config.json", directory / "adapter_model.bin")
    (problem,) = verify_adapter(directory, base).problems
    assert "not a whole torch.save file" in problem.message


def test_warnings_are_shortened_as_problems_are(tmp_path, capsys):
    """Experts that no token was routed to: thousands of them in a large model."""
    linears = {f"model.layers.{n}.mlp.experts.{e}.up_proj": (6, 8) for n in range(2) for e in range(40)}
    config, tensors = adapter_dirs.adapter(linears)
    for name in list(linears)[:70]:
        tensors[key_of(name, "B")].zero_()
    write_adapter(tmp_path / "a", config, tensors)
    assert main(["verify", str(tmp_path / "a")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("was never trained" in line for line in lines) == 8
    assert f"{'warning':<13} 62 more of the kind 'untrained'; --json lists them all" in lines
    assert main(["verify", str(tmp_path / "a"), "--json"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert len(warnings) == 70 and all(isinstance(warning, str) for warning in warnings)


def test_what_vllm_never_applies_is_said(tmp_path):
    """vLLM's attention over compressed keys never calls kv_b_proj (issue 48974 there)."""
    linears = {f"model.layers.{n}.self_attn.{leaf}": (12, 8) for n in (0, 1) for leaf in ("kv_b_proj", "o_proj")}
    report = verify_adapter(foreign(tmp_path / "a", *adapter_dirs.adapter(linears)))
    (warning,) = (w.message for w in report.warnings if w.kind == "server")
    assert warning.startswith("2 adapters of kv_b_proj: vLLM is reported to load them and never apply them")
    assert "SGLang 0.5.23" in warning and "\n" not in warning and report.ok
    without = {name: shape for name, shape in linears.items() if "kv_b" not in name}
    assert verify_adapter(foreign(tmp_path / "b", *adapter_dirs.adapter(without))).warnings == []
