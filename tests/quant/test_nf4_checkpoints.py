"""bitsandbytes' own 4-bit checkpoints, as transformers writes them: the weights and logits that transformers has.

pytest tests/quant/test_nf4_checkpoints.py
"""

from __future__ import annotations

import json
import shutil

import adapted
import moe_models
import nf4_oracle
import nf4_runs
import nf4_slime_runs
import pytest
import reference
import torch
from harness import Layout
from rehearsals import TINY, Rehearsal
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slime_plugins.lora import BaseQuant, LoRAConfig, export_peft, import_peft
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.merge import merge_checkpoint
from slime_plugins.lora.checkpoint.reader import AdapterCheckpoint
from slime_plugins.lora.checkpoint.save import save_adapter
from slime_plugins.lora.cli import main
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import spellings
from slime_plugins.lora.peft.directory import open_tensors
from slime_plugins.lora.peft.verify import verify_adapter
from slime_plugins.lora.quant.codes import check_codes
from slime_plugins.lora.quant.hf_model import load_base
from slime_plugins.lora.rehearsal.preflight import prepare
from slime_plugins.lora.rehearsal.rollout import Rollout
from slime_plugins.lora.rehearsal.settings import Settings
from slime_plugins.lora.rehearsal.trainer import RankTrainer

TOKENS = reference.batch(128)
FORMS = {"nested": True, "plain": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """form -> (checkpoint in codes, what transformers has of it when it loads it)."""
    cache = {}

    def get(form):
        if form not in cache:
            dense = nf4_oracle.checkpoint(tmp_path_factory, dtype=torch.bfloat16)
            path = nf4_oracle.saved_in_codes(dense, tmp_path_factory.mktemp(form) / "base", double_quant=FORMS[form])
            cache[form] = path, nf4_oracle.dequantised(AutoModelForCausalLM.from_pretrained(path))
        return cache[form]

    return get


@pytest.mark.parametrize("form", FORMS)
def test_read_dense(saved, form):
    """Whole, and in parts that blocks do not fit."""
    path, expected = saved(form)
    base = BaseCheckpoint(path)
    assert base.linears >= set(expected) and len(base.coded) == len(expected) == 14
    for name, weight in expected.items():
        stored = base.weights[f"{name}.weight"]
        assert stored.shape == weight.shape and torch.equal(stored.read(), weight)
        for dim in (0, 1):
            third = base.read(f"{name}.weight", dim=dim, part=1, parts=4)
            assert torch.equal(third, weight.chunk(4, dim)[1])


@pytest.mark.parametrize("form, sizes", [("nested", {}), ("nested", dict(tp=2)), ("plain", dict(tp=2))], ids=str)
def test_codes_are_taken_as_they_are(pool1, pool2, saved, form, sizes):
    path, expected = saved(form)
    pool, quant = pool2 if sizes else pool1, BaseQuant(double_quant=FORMS[form])
    for dtype in (torch.bfloat16, torch.float32):
        for found in pool.run(nf4_runs.weights, path, quant, dtype, path, **sizes):
            assert found.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(found[name], expected[name].to(dtype))] == []


def test_new_codes_would_be_others(pool1, saved):
    """What taking the checkpoint's codes is for."""
    path, expected = saved("nested")
    (found,) = pool1.run(nf4_runs.weights, path, BaseQuant(), torch.bfloat16)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("quant", [None, BaseQuant()], ids=["dense", "nf4"])
@pytest.mark.parametrize("sizes", [{}, dict(tp=2, sp=True)], ids=str)
def test_logits_and_gradients(pool1, pool2, tmp_path_factory, quant, sizes):
    path = nf4_oracle.checkpoint(tmp_path_factory)
    path = nf4_oracle.saved_in_codes(path, tmp_path_factory.mktemp("fp32") / "base", torch.float32)
    model = reference.peft_model(path, rank=nf4_oracle.RANK, alpha=nf4_oracle.ALPHA).train()
    logits, _, grads = reference.logits_loss_grads(model, TOKENS)
    kwargs = dict(quant=quant, codes_of=path)
    for r in (pool2 if sizes else pool1).run(nf4_runs.parity, path, logits, grads, TOKENS, kwargs, **sizes):
        assert r["logits"] <= 1e-5
        assert r["A"] <= 1e-4 and r["B"] <= 1e-4


@pytest.mark.parametrize(
    "family, te, sizes",
    [
        ("qwen3_moe", False, dict(ep=2, etp=1)),
        pytest.param("qwen3_moe", True, dict(ep=2, etp=1), marks=pytest.mark.slow),
        ("deepseek_v3", True, dict(tp=2, sp=True, etp=2)),  # Megatron's local attention has no latent form over ranks
    ],
    ids=str,
)
def test_codes_of_experts(request, tmp_path, family, te, sizes):
    """Each expert gets its own codes, wherever it is; shared experts and latent attention theirs."""
    with moe_models.sizes(**nf4_oracle.MOE_SIZES):
        path = moe_models.make_checkpoint(tmp_path / "base", family)
        names = moe_models.linears(path)
    expected = nf4_oracle.through_codes(path, names)
    codes = nf4_oracle.in_codes(path, names, tmp_path / "codes")
    assert all(torch.equal(BaseCheckpoint(codes).weights[f"{name}.weight"].read(), expected[name]) for name in names)
    dense = nf4_oracle.dense_copy(path, expected, tmp_path / "dense")
    pool = request.getfixturevalue("te_pool2" if te else "pool2")
    seen = set()
    for found in pool.run(nf4_runs.moe_weights, dense, codes, te, **sizes):
        found = {next(one for one in spellings(name) if one in expected): found[name] for name in found}
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
        seen |= found.keys()
    assert seen == set(expected)


def ends(layout: Layout, codes, dense, source, out):
    """A model on codes, saved and exported onto its codes and their weights; what the checkpoint that they were made
    from is told; and the check of engines that hold each."""
    from slime_plugins.lora.slime.hooks.base_check import refuse_other_base, remember_base

    chunks, _ = nf4_runs.chunks_of(layout, codes, dtype=torch.bfloat16, codes_of=codes)
    adapted.randomize(chunks)
    remember_base(chunks, str(codes), None)
    save_adapter(chunks, out / "run")
    for kind, directory in {"codes": codes, "dense": dense}.items():
        export_peft(chunks, out / kind, hf_checkpoint=directory)
        import_peft(chunks, out / kind)
        refuse_other_base(chunks, str(directory))
    for end in (
        lambda: export_peft(chunks, out / "x", hf_checkpoint=source),
        lambda: refuse_other_base(chunks, source),
    ):
        with pytest.raises(ValueError, match="base weights differ in 2 of 2 layers"):
            end()


def test_ends(pool2, saved, tmp_path_factory, tmp_path, capsys):
    """Export, import, dequantise, merge, verify: the base is these codes or their weights, and no other."""
    codes, expected = saved("nested")
    source = nf4_oracle.checkpoint(tmp_path_factory, dtype=torch.bfloat16)
    dense, out = tmp_path / "dense", tmp_path / "out"
    assert main(["dequantize", "--hf-checkpoint", str(codes), "--out", str(dense)]) == 0
    written = load_file(dense / "model.safetensors")
    assert written.keys() == BaseCheckpoint(codes).weights.keys()
    assert all(torch.equal(written[f"{name}.weight"], weight) for name, weight in expected.items())
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(dense)
    pool2.run(ends, codes, dense, source, out, tp=2)
    assert open_tensors(out / "codes").base_quant == BaseQuant() and open_tensors(out / "dense").base_quant is None
    assert verify_adapter(out / "codes", codes, full=True).ok and verify_adapter(out / "dense", dense).ok
    export = ["export", "--checkpoint", str(out / "run"), "--merge", "--hf-checkpoint"]
    assert main([*export, str(codes), "--out", str(tmp_path / "merged-codes")]) == 0
    assert main([*export, str(dense), "--out", str(tmp_path / "merged-dense")]) == 0
    merged = [load_file(tmp_path / f"merged-{kind}" / "model.safetensors") for kind in ("codes", "dense")]
    assert merged[0].keys() == merged[1].keys() and any(not torch.equal(merged[0][k], written[k]) for k in written)
    assert all(torch.equal(merged[0][name], tensor) for name, tensor in merged[1].items())
    merge_checkpoint(
        list(AdapterCheckpoint(out / "run").projections()), dense, tmp_path / "expected"
    )  # not through codes
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert all(torch.equal(merged[0][name], tensor) for name, tensor in expected.items())
    assert main([*export, str(source), "--out", str(tmp_path / "merged-source")]) == 1
    assert "is not the base of" in capsys.readouterr().err


def test_in_several_files(saved, tmp_path):
    """Codes and scales of one matrix torn apart by an index; the dense copy has its matrices where the codes were."""
    codes, expected = saved("nested")
    shutil.copytree(codes, tmp_path / "torn")
    tensors = load_file(tmp_path / "torn" / "model.safetensors")
    (tmp_path / "torn" / "model.safetensors").unlink()
    halves = {f"model-0000{i}-of-00002.safetensors": dict(list(tensors.items())[i - 1 :: 2]) for i in (1, 2)}
    for name, half in halves.items():
        save_file(half, tmp_path / "torn" / name, {"format": "pt"})
    weight_map = {tensor: name for name, half in halves.items() for tensor in half}
    (tmp_path / "torn" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    base = BaseCheckpoint(tmp_path / "torn")
    assert any(len(weight.files) == 2 for weight in base.coded.values())
    assert all(torch.equal(base.weights[f"{name}.weight"].read(), weight) for name, weight in expected.items())
    assert main(["dequantize", "--hf-checkpoint", str(base.directory), "--out", str(tmp_path / "out")]) == 0
    dense = BaseCheckpoint(tmp_path / "out")
    assert not dense.coded and dense.weights.keys() == base.weights.keys()
    assert all(torch.equal(dense.weights[f"{name}.weight"].read(), weight) for name, weight in expected.items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def given(path, tmp_path, **more):
    (tmp_path / "prompts.jsonl").write_text('{"input": "t5 t6", "label": "t7"}\n')
    data = dict(prompt_data=str(tmp_path / "prompts.jsonl"), rollout_max_response_len=8, out=str(tmp_path / "out"))
    return dict(hf_checkpoint=str(path), tp=1) | data | more


def test_before_anything_starts(saved, tmp_path_factory, tmp_path):
    """The flags of a 4-bit base are those of the codes, or say that it trains dense."""
    said: list[str] = []
    codes, _ = saved("nested")
    assert prepare(given(codes, tmp_path), said.append).base_quant is None
    assert "trains on their dequantised weights; --lora-base-quant nf4 keeps it in 4 bits" in said[0]
    assert prepare(given(codes, tmp_path, lora_base_quant="nf4"), said.append).base_quant == BaseQuant()
    for form, flags, words in (
        ("nested", dict(lora_base_double_quant=False), "with nested scales: drop --no-lora-base-double-quant"),
        ("plain", {}, "with plain scales: add --no-lora-base-double-quant"),
    ):
        with pytest.raises(UsageError, match=words):
            prepare(given(saved(form)[0], tmp_path, lora_base_quant="nf4", **flags), said.append)
    dense = nf4_oracle.checkpoint(tmp_path_factory, dtype=torch.bfloat16)
    skipping = nf4_oracle.saved_in_codes(dense, tmp_path / "skipping", skip=("o_proj",))
    with pytest.raises(UsageError, match=r"holds model.layers.0.self_attn.o_proj dense.*-quant-exclude linear_proj"):
        check_codes(BaseQuant(), BaseCheckpoint(skipping))
    check_codes(BaseQuant(exclude=("linear_proj",)), BaseCheckpoint(skipping))
    check_codes(BaseQuant(exclude=("linear_fc1", "linear_proj")), BaseCheckpoint(skipping))  # its codes, dequantised
    assert main(["dequantize", "--hf-checkpoint", str(codes), "--out", str(tmp_path / "dense")]) == 0
    with pytest.raises(UsageError, match="weights that have been through 4-bit codes, and other codes would be made"):
        prepare(given(tmp_path / "dense", tmp_path, lora_base_quant="nf4"), said.append)


def test_other_codes_are_refused(tmp_path_factory, tmp_path, capsys):
    dense = nf4_oracle.checkpoint(tmp_path_factory, dtype=torch.bfloat16)
    fp4 = nf4_oracle.saved_in_codes(dense, tmp_path / "fp4", bnb_4bit_quant_type="fp4")
    verbs = (
        ["dequantize", "--hf-checkpoint", str(fp4), "--out", str(tmp_path / "out")],
        ["plan", "--hf-checkpoint", str(fp4)],
        [
            "rehearse",
            "--hf-checkpoint",
            str(fp4),
            "--out",
            str(tmp_path / "out"),
            "--prompt-data",
            str(fp4 / "config.json"),
        ],
    )
    for verb in verbs:
        capsys.readouterr()
        assert main(verb) == 1
        said = capsys.readouterr().err
        assert "fp4" in said and "nf4 alone is read" in said and said.count("\n") == 1
    eight = json.loads((dense / "config.json").read_text())
    eight["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    shutil.copytree(dense, tmp_path / "eight")
    (tmp_path / "eight" / "config.json").write_text(json.dumps(eight))
    assert main(["plan", "--hf-checkpoint", str(tmp_path / "eight")]) == 1
    assert "give the dense checkpoint, or one in bitsandbytes' nf4" in capsys.readouterr().err


STATE = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(shape=[256, 191]), "q_proj.weight holds 24576 values of U8, expected 24448 of bytes"),
        (dict(shape=[256]), r"its shape is \[256\]"),
        (dict(blocksize=128), "absmax holds 768 values of U8, expected 384 of U8"),
        (dict(blocksize=True), "its blocksize is True"),
        (dict(nested_blocksize=1 << 40), "its nested_blocksize is"),
        (dict(dtype="int8"), "its dtype is 'int8'"),
        (dict(nested_offset="0"), "its nested_offset is '0'"),
        ("absmax", "there is no 'model.layers.0.self_attn.q_proj.weight.absmax'"),
        ("nested_absmax", "there is no .*nested_absmax"),
        (b"[1]", "its state is no JSON object"),
        (b"{" * 5000, "its state is 5000 bytes"),
    ],
    ids=str,
)
def test_damage(saved, tmp_path, change, words):
    shutil.copytree(saved("nested")[0], tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    if isinstance(change, str):
        del tensors[STATE.replace("quant_state.bitsandbytes__nf4", change)]
    else:
        if isinstance(change, dict):
            change = json.dumps(json.loads(bytes(tensors[STATE].tolist())) | change).encode()
        tensors[STATE] = torch.tensor(list(change), dtype=torch.uint8)
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"q_proj.weight is not whole in NF4 codes: .*{words}"):
        BaseCheckpoint(tmp_path / "base")


def test_codes_of_another_checkpoint(pool1, saved, tmp_path):
    """A model is loaded from one and told to take the codes of another."""
    codes, _ = saved("nested")
    shutil.copytree(codes, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7] ^= 1
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    said = pool1.run(taking_other_codes, codes, tmp_path / "other")[0]
    assert "decoder.layers.1.mlp.linear_fc1: what was loaded is not what the codes in" in said


def taking_other_codes(layout: Layout, codes, other):
    try:
        nf4_runs.chunks_of(layout, codes, dtype=torch.bfloat16, codes_of=other)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("sizes", [{}, dict(tp=2)], ids=str)
def test_in_slimes_hooks(pool1, pool2, saved, tmp_path, sizes):
    """Its reader gives dense matrices while the base is loaded; the model has the codes."""
    codes, expected = saved("nested")
    for found, read in (pool2 if sizes else pool1).run(nf4_slime_runs.from_codes, codes, tmp_path, **sizes):
        assert len(found) == 8
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
        *coded, norm = nf4_slime_runs.CODED
        assert norm.startswith("model.norm") and read[norm] == "slime's model.norm.weight"
        assert all(torch.equal(read[name], expected[name]) for name in coded)


def logits_of_trainer(layout: Layout, settings, tokens, out):
    """Of a rehearsal's trainer, whose adapter is then in ``out``."""
    trainer = RankTrainer()
    trainer.build(settings)
    adapted.randomize(trainer.chunks)
    trainer.export(str(out))
    return trainer.logits(tokens)


@pytest.mark.parametrize("base, quant", [("dense", BaseQuant()), ("nested", BaseQuant()), ("nested", None)], ids=str)
def test_rollouts_and_training_have_one_base(pool2, saved, tmp_path_factory, tmp_path, base, quant):
    path = nf4_oracle.checkpoint(tmp_path_factory) if base == "dense" else saved(base)[0]
    settings = Settings(hf_checkpoint=str(path), tp=2, base_quant=quant, lora=LoRAConfig(rank=4))
    ours = pool2.run(logits_of_trainer, settings, TOKENS, tmp_path / "adapter", tp=2)
    rollout = Rollout()
    rollout.device, rollout.model = "cpu", None
    rollout.base = load_base(path, torch.float32, "cpu", quant).eval()
    rollout.load_adapter(tmp_path / "adapter")
    theirs = rollout.logits(TOKENS)
    assert all((logits - theirs).abs().max() <= 1e-5 * theirs.abs().max() for logits in ours)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--lora-base-quant", "nf4"), ()], ids=str)
def test_a_rehearsal_on_a_checkpoint_in_codes(saved, tmp_path, flags):
    own, base = given(saved("nested")[0], tmp_path), ("--dtype", "float32", "--objective", "sft", "--tp", "2")
    files = ("--hf-checkpoint", own["hf_checkpoint"], "--prompt-data", own["prompt_data"])
    with Rehearsal(tmp_path / "out", tmp_path / "cache", *TINY, *files, *base, *flags) as run:
        code, text = run.wait()
    assert code == 0, text
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["logits_max_abs_diff"] <= 1e-4
