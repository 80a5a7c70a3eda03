"""PEFT adapters into Megatron models and out again: the same logits, the same tensors, or an error on every rank.

pytest tests/ends/test_import.py
"""

from __future__ import annotations

import json
import re

import adapted
import pytest
import reference
import torch
from harness import Layout, WorkerError
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig, export_peft, import_peft
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.peft.config import module_scaling, parse_key
from slime_plugins.lora.peft.directory import read_adapter

TOKENS = reference.batch(128)
LEAVES = list(reference.LEAVES)
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": LEAVES}


def made_by_peft(hf_dir, out, options: dict, *, shared=False, dtype=torch.float32, binary=False) -> torch.Tensor:
    """An adapter directory as PEFT writes it, and PEFT's logits with it. q, k, v have an A each, unless ``shared``."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(**options))
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                A, B = module.lora_A["default"], module.lora_B["default"]
                plain = name.removeprefix("base_model.model.")
                layout = "fused" if shared else "split"
                values = reference.adapter_values(plain, *A.weight.shape, B.weight.shape[0], layout)
                A.weight.data, B.weight.data = (value.to(dtype) for value in values)
        logits = model.to(torch.float32)(TOKENS[:, :-1]).logits
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(out)
    if binary:
        torch.save(load_file(out / "adapter_model.safetensors"), out / "adapter_model.bin")
        (out / "adapter_model.safetensors").unlink()
    return logits


def imported(layout: Layout, hf_dir, adapter, config=None, out=None):
    """Import into a fresh model; what the import says, and this rank's logits, whole on the last stage."""
    chunks = adapted.adapted_chunks(hf_dir, config or LoRAConfig.from_peft(adapter), sp=layout.sp, vpp=layout.vpp)
    model = adapted.wrap(chunks)  # importing reaches through DDP
    report = import_peft(model, adapter)
    microbatches = 2 if layout.pp > 1 else 1
    logits = adapted.run_schedule(chunks, TOKENS, microbatches=microbatches, forward_only=True, collect_logits=True)
    if out is not None:
        export_peft(model, out, hf_checkpoint=hf_dir)
    return report, adapted.gather_logits(logits, 128)


def check_logits(results, expected):
    logits = next(logits for _, logits in results if logits is not None)
    assert adapted.relative(logits - expected, expected) <= 1e-5
    assert all(report == results[0][0] for report, _ in results)
    return results[0][0]


def check_bits(directory, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(directory / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype  # torch.equal converts
        assert torch.equal(found[key], tensor), key


def products(directory) -> dict[str, torch.Tensor]:
    """Scaled B A of every module, in float64."""
    config, tensors = read_adapter(directory)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key in tensors:
        module, half = parse_key(key)
        pairs.setdefault(module, {})[half] = tensors[key].double()
    return {name: module_scaling(config, name) * pair["B"] @ pair["A"] for name, pair in pairs.items()}


def check_products(found, expected):
    found, expected = products(found), products(expected)
    assert found.keys() == expected.keys()
    for name, product in expected.items():
        assert adapted.relative(found[name] - product, product) <= 1e-6, name


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_split_round_trip_is_bit_equal(pool2, tmp_path, tmp_path_factory, family):
    """PEFT -> import -> export -> PEFT, with a different A for q, k, v and for gate, up."""
    hf_dir = tiny(tmp_path_factory, family)
    expected = made_by_peft(hf_dir, tmp_path / "in", PLAIN)
    report = check_logits(
        pool2.run(imported, hf_dir, tmp_path / "in", None, tmp_path / "out", tp=2, sp=True), expected
    )
    assert (report.projections, report.rescaled, report.stacked) == (28, (), ())
    check_bits(tmp_path / "out", load_file(tmp_path / "in" / "adapter_model.safetensors"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}], ids=str)
def test_stacked_in_a_fused_layout(pool2, tmp_path, tmp_path_factory, sizes):
    """Different As side by side in one A of rank 3r (q, k, v) and 2r (gate, up); B is block by block."""
    hf_dir = tiny(tmp_path_factory)
    expected = made_by_peft(hf_dir, tmp_path / "in", {**PLAIN, "use_rslora": True, "alpha_pattern": {"v_proj": 9}})
    config = LoRAConfig.from_peft(tmp_path / "in", "fused")
    assert (config.rank, config.rank_pattern) == (4, {"linear_qkv": 12, "linear_fc1": 8})
    report = check_logits(pool2.run(imported, hf_dir, tmp_path / "in", config, tmp_path / "out", **sizes), expected)
    assert report.rescaled == ()
    assert len(report.stacked) == 8
    check_products(tmp_path / "out", tmp_path / "in")


def test_shared_A_stays_fused(pool2, tmp_path, tmp_path_factory):
    """What a fused export looks like: no stacking, no split, the same bits."""
    hf_dir = tiny(tmp_path_factory)
    expected = made_by_peft(hf_dir, tmp_path / "in", PLAIN, shared=True)
    assert LoRAConfig.from_peft(tmp_path / "in").layout == "fused"
    report = check_logits(pool2.run(imported, hf_dir, tmp_path / "in", None, tmp_path / "out", tp=2), expected)
    assert report.stacked == ()
    check_bits(tmp_path / "out", load_file(tmp_path / "in" / "adapter_model.safetensors"))


FORMS = {
    "rslora": {**PLAIN, "use_rslora": True},
    "patterns": {
        **PLAIN,
        "rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 2, "down_proj": 7},
        "alpha_pattern": {"model.layers.2.mlp.up_proj": 11, "^model.layers.3.*": 3},
    },
    "q-v": {**PLAIN, "target_modules": ["q_proj", "v_proj"]},
    "regex": {**PLAIN, "target_modules": r".*\.[02]\.(self_attn\.o_proj|mlp\.gate_proj)"},
    "all-linear": {**PLAIN, "target_modules": "all-linear"},
    "some layers": {**PLAIN, "target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1, 3]},
    "excluded": {**PLAIN, "exclude_modules": ["layers.1.mlp.up_proj", "lm_head"]},
    "idle names": {**PLAIN, "target_modules": ["q_proj", "c_attn"], "exclude_modules": ["lm_head"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_peft_has(pool2, tmp_path, tmp_path_factory, form):
    hf_dir = tiny(tmp_path_factory)
    expected = made_by_peft(hf_dir, tmp_path / "in", FORMS[form])
    sizes = {"pp": 2} if form == "patterns" else {"tp": 2}
    report = check_logits(pool2.run(imported, hf_dir, tmp_path / "in", None, tmp_path / "out", **sizes), expected)
    assert report.rescaled == ()
    check_products(tmp_path / "out", tmp_path / "in")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bin_and_half_precision(pool2, tmp_path, tmp_path_factory, dtype):
    hf_dir = tiny(tmp_path_factory)
    expected = made_by_peft(hf_dir, tmp_path / "in", PLAIN, dtype=dtype, binary=True)
    before = torch.load(tmp_path / "in" / "adapter_model.bin")
    check_logits(pool2.run(imported, hf_dir, tmp_path / "in", None, tmp_path / "out", tp=2), expected)
    check_bits(tmp_path / "out", before)


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=3, alpha=7, use_rslora=True),
        LoRAConfig(rank=3, alpha=7, alpha_pattern={"linear_fc2": 20, "v_proj": 1}),
        LoRAConfig(rank=3, alpha=7, layout="split", rank_pattern={"q_proj": 2, "up_proj": 5}, use_rslora=True),
        LoRAConfig(rank=3, target_modules=("*.layers.[02].*.linear_qkv", "down_proj"), exclude_modules=("k_proj",)),
    ],
    ids=["rslora", "alphas", "ranks", "some-layers"],
)
def test_our_own_export_comes_back(pool2, tmp_path, tmp_path_factory, config):
    """The export is flat: scalings folded into B, ranks padded. Import takes both back, into the config it was of."""
    hf_dir = tiny(tmp_path_factory)
    pool2.run(exported, hf_dir, tmp_path / "in", config, tp=2)
    pool2.run(imported, hf_dir, tmp_path / "in", config, tmp_path / "out", tp=2)
    check_products(tmp_path / "out", tmp_path / "in")


def exported(layout: Layout, hf_dir, out, config):
    chunks = adapted.adapted_chunks(hf_dir, config)
    adapted.randomize(chunks, scale=0.3)
    export_peft(chunks, out, hf_checkpoint=hf_dir)


def test_another_alpha_changes_B_and_not_the_adapter(pool2, tmp_path, tmp_path_factory):
    hf_dir = tiny(tmp_path_factory)
    expected = made_by_peft(hf_dir, tmp_path / "in", PLAIN)
    config = LoRAConfig(rank=4, alpha=10, layout="split", alpha_pattern={"k_proj": 6})
    report = check_logits(pool2.run(imported, hf_dir, tmp_path / "in", config, tp=2), expected)
    assert len(report.rescaled) == 24
    assert not [name for name in report.rescaled if "k_proj" in name]


def masters_after_a_step(layout: Layout, hf_dir, adapter, tell_optimizer: bool):
    """The largest change of an adapter value by an optimizer step at learning rate 0. bf16, fp32 masters."""
    config = LoRAConfig.from_peft(adapter)
    chunks = adapted.adapted_chunks(hf_dir, config, dtype=torch.bfloat16)
    model = adapted.wrap(chunks)
    optimizer = adapted.optimizer_for(model, lr=0.0, bf16=True)
    import_peft(model, adapter, optimizer=optimizer if tell_optimizer else None)
    before = [p.detach().clone() for linear in iter_adapters(model) for p in (linear.lora_A, linear.lora_B)]
    adapted.train_step(model, optimizer, TOKENS)
    after = [p.detach() for linear in iter_adapters(model) for p in (linear.lora_A, linear.lora_B)]
    return max((a - b).abs().max().item() for a, b in zip(after, before))


def test_optimizer_masters_do_not_undo_the_import(pool2, tmp_path, tmp_path_factory):
    hf_dir = tiny(tmp_path_factory)
    made_by_peft(hf_dir, tmp_path / "in", PLAIN, dtype=torch.bfloat16)
    assert pool2.run(masters_after_a_step, hf_dir, tmp_path / "in", True, tp=2) == [0.0, 0.0]
    assert min(pool2.run(masters_after_a_step, hf_dir, tmp_path / "in", False, tp=2)) > 0.01


def refused(layout: Layout, hf_dir, adapter, config):
    """The error of an import, after which the adapters have to be what they were."""
    chunks = adapted.adapted_chunks(hf_dir, config)
    adapted.randomize(chunks, scale=0.3)
    before = [p.detach().clone() for linear in iter_adapters(chunks) for p in (linear.lora_A, linear.lora_B)]
    try:
        import_peft(chunks, adapter)
    except (ValueError, OSError) as error:
        after = [p.detach() for linear in iter_adapters(chunks) for p in (linear.lora_A, linear.lora_B)]
        assert all(torch.equal(a, b) for a, b in zip(after, before)), "something was copied"
        return f"{type(error).__name__}: {error}"
    return None


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A good adapter that the tests below spoil copies of: config and tensors."""
    out = tmp_path_factory.mktemp("adapter")
    made_by_peft(tiny(tmp_path_factory), out, PLAIN)
    return json.loads((out / "adapter_config.json").read_text()), load_file(out / "adapter_model.safetensors")


K1_A = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
K1_B = K1_A.replace("lora_A", "lora_B")
O3_A = "base_model.model.model.layers.3.self_attn.o_proj.lora_A.weight"
SPLIT = LoRAConfig(rank=4, alpha=6, layout="split")


def lost(keys):
    return lambda config, tensors: [tensors.pop(key) for key in keys]


def changed(**fields):
    return lambda config, tensors: config.update(fields)


def with_value(key, value):
    return lambda config, tensors: tensors.update({key: value(tensors[key])})


def at(tensor, value):
    tensor = tensor.clone()
    tensor[1, 1] = value
    return tensor


BAD = {
    "dora": (changed(use_dora=True), "use_dora is True"),
    "bias": (changed(bias="all"), "bias is 'all'"),
    "head": (
        changed(modules_to_save=["lm_head"]),
        "names lm_head, but the adapter holds no tensor of it",
    ),
    "pissa": (changed(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "type": (changed(peft_type="LOHA"), "peft_type is 'LOHA'"),
    "no alpha": (changed(lora_alpha=None), "lora_alpha is None"),
    "no such linear": (
        lambda config, tensors: tensors.update(
            {K1_A.replace("layers.1.self_attn.k_proj", "norm"): tensors[K1_A].clone()}
        ),
        "norm.lora_A.weight: it cannot be imported, no linear that can be adapted has that name",
    ),
    "half": (lost([K1_B]), f"{K1_A} has no lora_B"),
    "projection": (lost([K1_A, K1_B]), "no adapter for model.layers.1.self_attn.k_proj, which this model adapts"),
    "not finite": (with_value(K1_B, lambda B: at(B, float("nan"))), f"{K1_B} has 1 of"),
    "empty": (with_value(K1_A, lambda A: torch.empty(0)), f"{K1_A} has shape .0., it holds nothing"),
    "inputs": (
        with_value(K1_A, lambda A: A[:, :-2].clone()),
        f"{K1_A} has 62 inputs where this model has 64: another",
    ),
    "row inputs": (with_value(O3_A, lambda A: A[:, :-2].clone()), f"{O3_A} has 94 inputs where this model has 96"),
    "outputs": (with_value(K1_B, lambda B: B[:-2].clone()), f"{K1_B} has 22 outputs where this model has 24"),
    "rank in config": (changed(r=8), "rank 4, where adapter_config.json says rank 8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_adapters_are_refused_on_every_rank_and_nothing_is_copied(
    pool2, tmp_path, tmp_path_factory, adapter, name
):
    spoil, message = BAD[name]
    config, tensors = json.loads(json.dumps(adapter[0])), dict(adapter[1])
    spoil(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    check_refused(pool2.run(refused, tiny(tmp_path_factory), tmp_path, SPLIT, tp=2), message)


def check_refused(errors, message):
    assert len(set(errors)) == 1
    assert errors[0] is not None
    assert re.search(message, errors[0]), errors[0]
    assert "\n" not in errors[0]


OTHER_MODELS = {
    "rank": (LoRAConfig(rank=8, layout="split"), "has rank 4, but this model's adapter has rank 8: use --lora-r 4"),
    "fused": (LoRAConfig(rank=4), r"have different lora_A, which a fused linear of rank 4 cannot hold: .* or rank 12"),
    "fewer targets": (
        LoRAConfig(rank=4, layout="split", exclude_modules=("up_proj",)),
        "an adapter for model.layers.0.mlp.up_proj and 3 more, which this model does not adapt",
    ),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=str)
def test_models_that_cannot_hold_it(pool2, tmp_path, tmp_path_factory, adapter, name, sizes):
    config, message = OTHER_MODELS[name]
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter[0]))
    save_file(adapter[1], tmp_path / "adapter_model.safetensors")
    errors = pool2.run(refused, tiny(tmp_path_factory), tmp_path, config, **sizes)
    check_refused(errors, message)


def test_damaged_and_missing_files(pool2, tmp_path, tmp_path_factory):
    """The fault table of an adapter that this project wrote."""
    hf_dir, out = tiny(tmp_path_factory), tmp_path / "in"
    pool2.run(exported, hf_dir, out, SPLIT, tp=2)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    for name, content in whole.items():
        flipped = bytearray(content)
        flipped[-40] ^= 1
        for damaged in (content[: len(content) // 2], content[:5], b"", bytes(flipped), None):
            (out / name).write_bytes(damaged) if damaged is not None else (out / name).unlink()
            errors = pool2.run(refused, hf_dir, out, SPLIT, tp=2)
            if damaged != bytes(flipped) or name == "adapter_model.safetensors":
                check_refused(errors, name)
            (out / name).write_bytes(content)
    assert pool2.run(refused, hf_dir, out, SPLIT, tp=2) == [None, None]


def without_adapters(layout: Layout, hf_dir, adapter):
    from slime_plugins.lora.rehearsal.model import build_chunks

    import_peft(build_chunks(hf_dir), adapter)


def test_a_model_without_adapters(pool1, tmp_path, tmp_path_factory):
    with pytest.raises(WorkerError, match="this model has no adapters; call apply_lora on it first"):
        pool1.run(without_adapters, tiny(tmp_path_factory), tmp_path)
