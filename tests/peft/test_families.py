"""Every family that the project knows: what is exported acts, under both loaders, and is all that they look for.

pytest tests/peft/test_families.py
"""

from __future__ import annotations

import warnings

import families
import pytest
import torch
from families import FAMILIES, PARTS, projections
from safetensors.torch import load_file, save_file

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.merge import merge_checkpoint
from slime_plugins.lora.cli.verify import table
from slime_plugins.lora.peft import form
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.form import to_peft
from slime_plugins.lora.peft.loaders import LOAD_ADAPTER, PEFT, SGLANG, VLLM
from slime_plugins.lora.peft.verify import verify_adapter
from slime_plugins.lora.projections import Projection

TOKENS = torch.tensor([[3, 5, 7, 11, 2, 9, 4, 8], [1, 2, 50, 9, 9, 33, 40, 7]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made: dict = {}

    def get(name):
        if name not in made:
            made[name] = families.make(tmp_path_factory.mktemp(name.replace(" ", "_")), name)
        return made[name]

    return get


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def through_peft(model, adapter_dir) -> torch.Tensor:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, adapter_dir)
        result = adapted.load_adapter(str(adapter_dir), "again")
    assert result.missing_keys == [] and result.unexpected_keys == []
    return logits(adapted)


def through_load_adapter(model, adapter_dir) -> torch.Tensor:
    result = model.load_adapter(str(adapter_dir))
    assert result.missing_keys == set() and result.unexpected_keys == set()
    assert not result.mismatched_keys
    return logits(model)


CASES = [(name, form) for name, family in FAMILIES.items() for form in family.forms]


@pytest.mark.parametrize("name, form", CASES, ids=[f"{n}-{f}" for n, f in CASES])
def test_an_export_acts_and_is_all_that_loaders_look_for(bases, tmp_path, name, form):
    path, spelling = bases(name), FAMILIES[name].spelling
    base = BaseCheckpoint(path)
    adapter = projections(base)
    assert len(adapter) > 10
    write_adapter(tmp_path / "adapter", *to_peft(adapter, base, moe_format=form, names=spelling), base=base)
    merge_checkpoint(adapter, base, tmp_path / "merged")
    before, expected = logits(families.load(path, name)), logits(families.load(tmp_path / "merged", name))
    assert (expected - before).abs().max() > 0.1, "or nothing is shown"
    for through in (through_peft, through_load_adapter):
        found = through(families.load(path, name), tmp_path / "adapter")
        assert (found - before).abs().max() > 0.1, "loaded without effect"
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    report = verify_adapter(tmp_path / "adapter", path, full=True, names=None if spelling == "module" else spelling)
    assert report.ok, report.problems
    assert report.expected_modules == len(adapter) and report.names == spelling
    if spelling == "module":
        assert report.loaders[PEFT] == report.loaders[LOAD_ADAPTER] == "takes all"


WRONG = [
    ("qwen2_vl", "checkpoint"), ("qwen2_5_vl", "checkpoint"), ("llava", "text"), ("qwen3_vl", "text"),
    ("qwen3_5", "text"), ("qwen3_5 as text", "module"),
]  # fmt: skip


@pytest.mark.parametrize("name, spelling", WRONG, ids=[f"{n}-{s}" for n, s in WRONG])
def test_one_that_loads_without_effect_is_noticed(bases, tmp_path, name, spelling):
    """The same adapter under names that the class does not have; what is said of it is so."""
    path = bases(name)
    base = BaseCheckpoint(path)
    write_adapter(tmp_path / "adapter", *to_peft(projections(base), base, names=spelling), base=base)
    with pytest.raises(UserWarning, match="Found missing adapter keys"):
        through_peft(families.load(path, name), tmp_path / "adapter")
    if name == "qwen3_5 as text":  # another class of the same files: they do not say which will be loaded
        return
    report = verify_adapter(tmp_path / "adapter", path)
    (problem,) = report.problems
    assert problem.kind == "names" and f"--names {report.names}" in problem.message
    count = len(projections(base))
    assert report.loaders[PEFT].startswith(f"leaves out {count} of {count} without an error")
    before, model = logits(families.load(path, name)), families.load(path, name)
    if report.loaders[LOAD_ADAPTER] == "takes all":
        assert (through_load_adapter(model, tmp_path / "adapter") - before).abs().max() > 0.1
    else:
        model.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_experts_one_by_one_that_peft_does_not_read(bases, tmp_path, name):
    path = bases(name)
    base = BaseCheckpoint(path)
    adapter = projections(base)
    write_adapter(tmp_path / "adapter", *to_peft(adapter, base), base=base)
    report = verify_adapter(tmp_path / "adapter", path)
    experts = sum(".experts." in p.name for p in adapter)
    assert report.ok
    assert table(report).splitlines()[-1] == (
        f"ok, but not whole in PeftModel.from_pretrained, load_adapter: {experts} of {len(adapter)} modules are left "
        "out without an error: experts of this family are read in the fused form alone: export it with --moe-format "
        "fused"
    )
    for loader in (PEFT, LOAD_ADAPTER):
        assert f"leaves out {experts} of {len(adapter)} without an error" in report.loaders[loader]
        assert any(w.message.startswith(loader) and "--moe-format fused" in w.message for w in report.warnings)
    model = families.load(path, name)
    unread = model.load_adapter(str(tmp_path / "adapter")).unexpected_keys
    assert unread and all(".experts" in key for key in unread)


NEVER = [
    ("qwen3_moe", r"mlp\.gate", "no adapter of the router"),
    ("qwen3_5_text", r"in_proj_[ab]", "no adapter of the gates"),
]


@pytest.mark.parametrize("name, only, why", NEVER, ids=[why for *_, why in NEVER])
def test_what_sglang_never_serves(bases, tmp_path, name, only, why):
    """Merged into the base, it is served: no other way is named."""
    base = BaseCheckpoint(bases(name))
    write_adapter(tmp_path / "adapter", *to_peft(projections(base, only), base), base=base)
    said = verify_adapter(tmp_path / "adapter", bases(name)).loaders[SGLANG]
    assert why in said and said.endswith("; merge the adapter into its base") and "--lora-sync" not in said


@pytest.mark.parametrize("name, only, outcome", PARTS, ids=[f"{name} {only}" for name, only, _ in PARTS])
def test_what_sglang_does_with_a_part(bases, tmp_path, name, only, outcome):
    """As its own code does: tests/contracts/test_names.py."""
    path = bases(name)
    base = BaseCheckpoint(path)
    write_adapter(tmp_path / "adapter", *to_peft(projections(base, only), base), base=base)
    report = verify_adapter(tmp_path / "adapter", path)
    assert report.ok
    said, last = report.loaders[SGLANG], table(report).splitlines()[-1]
    assert said.replace("refuses the adapter for", "refuses").startswith(outcome)
    assert last.startswith("ok, but not whole in SGLang: " if outcome.startswith("leaves out") else "ok")
    assert (last == "ok") is not outcome.startswith("leaves out")


def test_vllm_takes_no_part_of_a_layer_of_experts(bases, tmp_path):
    path = bases("qwen3_moe")
    base = BaseCheckpoint(path)
    for only, said in (
        (r"0\.mlp\.experts.*", "takes all"),  # all of one layer
        (r"experts\.\d\.(gate|up)_proj|o_proj", "refuses the adapter for 16 of 18: "),
        (r"0\.mlp\.experts\.[012]\..*|1\.mlp\.experts.*", "refuses the adapter for 9 of 21: "),
    ):
        config, tensors = to_peft(projections(base, only), base)
        write_adapter(tmp_path / "adapter", config, tensors, base=base)
        assert verify_adapter(tmp_path / "adapter", path).loaders[VLLM].startswith(said)


def test_what_servers_leave_out_is_said(bases, tmp_path):
    path = bases("qwen3_5")
    base = BaseCheckpoint(path)
    tower = "model.visual.blocks.0.attn.qkv"
    config, tensors = to_peft(projections(base), base)
    A, B = torch.randn(4, 16), torch.randn(48, 4)
    tensors |= {f"base_model.model.{tower}.lora_A.weight": A, f"base_model.model.{tower}.lora_B.weight": B}
    config["target_modules"].append("qkv")
    write_adapter(tmp_path / "adapter", config, tensors, base=base)
    report = verify_adapter(tmp_path / "adapter", path)
    assert report.ok
    said = "\n".join(warning.message for warning in report.warnings)
    assert "vLLM leaves out 1 of 14 without an error: it serves the language model alone" in said
    assert said.count(f"(first: {tower})") == 2 and "SGLang refuses the adapter for 1 of 14: it has no room" in said
    assert "SGLang refuses the adapter for 2 of 14: it takes q, k and v of linear attention one by one" in said
    assert "in_proj_qkv" not in report.loaders[PEFT]
    assert report.loaders[SGLANG].count("refuses the adapter") == 2


def test_a_convolution_of_the_same_leaf_is_no_target(bases, tmp_path):
    """``proj`` alone would name patch_embed.proj as well, a Conv3d, to which PEFT gives an adapter of its own."""
    path = bases("qwen2_5_vl")
    base = BaseCheckpoint(path)
    name = "model.visual.blocks.0.attn.proj"
    tower = Projection(name, torch.randn(4, 16), torch.randn(16, 4), 2.0)
    found = form.select([name, *(base.renamed(base.spelled(p.name), "module") for p in projections(base))], base)
    assert "attn.proj" in found["target_modules"] and "proj" not in found["target_modules"]
    pair = {f"base_model.model.{name}.lora_{half}.weight": getattr(tower, half) for half in "AB"}
    config, tensors = to_peft(projections(base), base)
    write_adapter(tmp_path / "adapter", config | {"exclude_modules": None} | found, tensors | pair, base=base)
    through_peft(families.load(path, "qwen2_5_vl"), tmp_path / "adapter")


def test_names_are_those_asked_for(bases, tmp_path):
    """Every spelling is read back as the same linears; a tower has none in the text model."""
    from slime_plugins.lora.errors import UsageError
    from slime_plugins.lora.peft.read import PeftAdapter

    path = bases("qwen2_5_vl")
    base = BaseCheckpoint(path)
    linears = []
    for spelling, prefix in (("module", "model.language_model."), ("checkpoint", "model."), ("text", "model.")):
        out = tmp_path / spelling
        write_adapter(out, *to_peft(projections(base), base, names=spelling), base=base)
        keys = load_file(out / "adapter_model.safetensors")
        assert all(key.startswith(f"base_model.model.{prefix}layers.") for key in keys)
        linears += [PeftAdapter(out, base).linears().keys(), PeftAdapter(out).linears().keys()]
    assert all(found == linears[0] for found in linears)
    with pytest.raises(UsageError, match=r"visual\.blocks\.0\.attn\.proj is no part of the language model"):
        base.renamed("model.visual.blocks.0.attn.proj", "text")
    assert base.renamed("visual.blocks.0.attn.proj", "module") == "model.visual.blocks.0.attn.proj"


def test_stacked_experts_are_read_whichever_way_they_lie(bases, tmp_path):
    """Also where one of the two parameters is square."""
    for name, transposed in (("qwen3_vl_moe", True), ("qwen3_5_moe", False)):
        base = BaseCheckpoint(bases(name))
        tensor = f"{base.layer_prefix}0.mlp.experts.down_proj"
        assert base.weights[tensor].shape == ((4, 12, 32) if transposed else (4, 32, 12))
        assert base.linear_shape(f"{base.layer_prefix}0.mlp.experts.3.down_proj") == (32, 12)
        place = base.stacks[f"{base.layer_prefix}0.mlp.experts.3.up_proj"]
        stack = base.read(place.tensor)
        expected = stack[3, :, 12:].t() if transposed else stack[3, 12:]
        assert place.shape == (12, 32) and torch.equal(place.view(stack), expected)
    square = tmp_path / "square"
    square.mkdir()
    (square / "config.json").write_text('{"hidden_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 1}')
    experts = "model.layers.0.mlp.experts"
    save_file(
        {f"{experts}.gate_up_proj": torch.zeros(2, 8, 16), f"{experts}.down_proj": torch.zeros(2, 8, 8)},
        square / "model.safetensors",
    )
    assert BaseCheckpoint(square).stacks[f"{experts}.1.up_proj"].transposed


def test_names_on_the_command_line(bases, tmp_path, capsys):
    """A spelling that was asked for is no problem; verbs that read an adapter refuse another than the one given."""
    from slime_plugins.lora.cli import main

    path = bases("qwen3_5")
    base = BaseCheckpoint(path)
    out = tmp_path / "adapter"
    write_adapter(out, *to_peft(projections(base), base, names="text"), base=base)
    verify = ["verify", str(out), "--hf-checkpoint", str(path)]
    assert main(verify) == 1 and main([*verify, "--names", "text"]) == 0
    assert "loads in      PeftModel.from_pretrained: leaves out" in capsys.readouterr().out
    for verb in (["import", "--adapter"], ["merge"]):
        command = [*verb, str(out), "--hf-checkpoint", str(path), "--out", str(tmp_path / verb[0])]
        assert main([*command, "--names", "module"]) == 1
        said = capsys.readouterr().err
        assert "is no name of --names module" in said and said.count("\n") == 1
        assert main([*command, "--names", "text"]) == 0
    assert main(["verify", str(out), "--names", "text"]) == 2


def test_a_hostile_base_is_no_hang(tmp_path):
    """A header may say any number of experts of no size, and a config anything for a width."""
    experts = "model.layers.0.mlp.experts"
    for i, config in enumerate(('{"hidden_size": {}, "moe_intermediate_size": {}}', '{"model_type": ["qwen2_vl"]}')):
        directory = tmp_path / str(i)
        directory.mkdir()
        (directory / "config.json").write_text(config)
        save_file(
            {f"{experts}.gate_up_proj": torch.zeros(10**9, 0, 4), f"{experts}.down_proj": torch.zeros(2, 4, 3)},
            directory / "model.safetensors",
        )
        base = BaseCheckpoint(directory)
        assert base.linears == {f"{experts}.0.down_proj", f"{experts}.1.down_proj"} and base.names("module")
