"""Which base an adapter belongs to: a model at any parallelism, of any kind of linear, has the digits of its files.

pytest tests/checkpoint/test_fingerprint.py
"""

from __future__ import annotations

import contextlib
import shutil

import adapted
import moe_models
import moe_runs
import pytest
import torch
from harness import Layout, WorkerError
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig, save_adapter
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.fingerprint import fingerprint_of_hf
from slime_plugins.lora.checkpoint.model import fingerprint_of_model

CONFIG = LoRAConfig(rank=2)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = moe_models.make_checkpoint(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


def fingerprint(layout: Layout, hf_dir, te, single):
    with moe_runs.single_grouped_weights() if single else contextlib.nullcontext():
        chunks = moe_runs.chunks_of(layout, hf_dir, te, CONFIG)
    return fingerprint_of_model(chunks)


@pytest.mark.parametrize(
    "family, te, single, split",
    [
        ("qwen3_moe", True, False, "tp2-ep2-etp2"),
        ("qwen3_moe", True, True, "tp2-ep2-etp2"),  # one 3-D weight for all experts of a rank
        ("qwen3_moe", False, False, "tp2-ep2-etp2"),
        ("qwen2_moe", True, False, "tp2-ep2-etp1"),  # shared experts
        ("deepseek_v3", True, False, "tp2-ep2-etp2"),  # weights that every tensor-parallel rank has whole
    ],
)
def test_the_models_is_its_files(te_pool4, checkpoint_of, family, te, single, split):
    path = checkpoint_of(family)
    base = BaseCheckpoint(path)
    expected = fingerprint_of_hf(base, "float32", range(base.config["num_hidden_layers"]))
    assert {"embedding", "head", "norm", "layers.0", "layers.1"} <= expected["rest"].keys()
    for seen in te_pool4.run(fingerprint, path, te, single, **moe_runs.SPLITS[split]):
        assert seen["layers"] == expected["layers"] and seen["rest"] == expected["rest"]


def dense(layout: Layout, hf_dir):
    return fingerprint_of_model(adapted.adapted_chunks(hf_dir, CONFIG, sp=layout.sp, vpp=layout.vpp))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])  # biases, tied and untied, norms on heads
@pytest.mark.parametrize("sizes", [dict(tp=2, sp=True), dict(pp=2), dict(pp=2, vpp=2)], ids=["tp2", "pp2", "vpp2"])
def test_a_dense_models_is_its_files(pool2, tmp_path_factory, family, sizes):
    base = BaseCheckpoint(tiny(tmp_path_factory, family))
    expected = fingerprint_of_hf(base, "float32", range(4))
    for seen in pool2.run(dense, base.directory, **sizes):
        assert seen == expected


def engines_base(layout: Layout, hf_dir, other):
    from slime_plugins.lora.slime.hooks.base_check import refuse_other_base, remember_base

    chunks = moe_runs.chunks_of(layout, hf_dir, True, CONFIG)
    remember_base(chunks, str(hf_dir), None)
    refuse_other_base(chunks, str(other))
    return True


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_the_engines_base_is_compared_whole(te_pool4, checkpoint_of, tmp_path, family):
    """A copy elsewhere is the same base, with shared experts (spelled otherwise) and duplicated weights too."""
    path = checkpoint_of(family)
    shutil.copytree(path, tmp_path / "copy")
    assert all(te_pool4.run(engines_base, path, tmp_path / "copy", **moe_runs.SPLITS["tp2-ep2-etp2"]))
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    (name,) = [key for key in tensors if key.endswith("layers.1.self_attn.o_proj.weight")]
    tensors[name][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(WorkerError) as caught:
        te_pool4.run(engines_base, path, tmp_path / "copy", **moe_runs.SPLITS["tp2-ep2-etp2"])
    assert len(caught.value.errors) == 4
    for kind, message in caught.value.errors.values():
        assert kind == "ValueError" and "not the base that trains (base weights differ in 1 of" in message


def saves(layout: Layout, hf_dir, out):
    """How often weights are summed up: two saves, then one after a base weight has been written to."""
    from slime_plugins.lora.base import fingerprint as room

    real, calls = room.checksum, []
    room.checksum = lambda tensor: calls.append(1) or real(tensor)
    try:
        chunks = adapted.adapted_chunks(hf_dir, CONFIG)
        counts = []
        for step in (1, 2, 3):
            if step == 3 and layout.tp == 2 and torch.distributed.get_rank() == 1:
                with torch.no_grad():
                    chunks[0].decoder.layers[0].mlp.linear_fc2.weight[0, 0] += 1
            save_adapter(chunks, out, step=step)
            counts.append(len(calls))
        return counts, fingerprint_of_model(chunks)["layers"]["0"]
    finally:
        room.checksum = real


def test_it_is_computed_once(pool2, tmp_path_factory, tmp_path):
    path = tiny(tmp_path_factory)
    original = fingerprint_of_hf(BaseCheckpoint(path), "float32", [0])["layers"]["0"]
    for (first, second, third), digits in pool2.run(saves, path, tmp_path, tp=2):
        assert first > 0 and second == first and third == 2 * first
        assert digits != original


def exports(layout: Layout, hf_dir, part, out):
    """Export a model whose base is not, in one element, that of the directory."""
    from slime_plugins.lora import export_peft

    chunks = adapted.adapted_chunks(hf_dir, CONFIG)
    adapted.randomize(chunks)
    parameters = dict(chunks[0].named_parameters())
    (name,) = [name for name in parameters if name.endswith(part)]
    with torch.no_grad():
        parameters[name].view(-1)[3] += 1e-3
    export_peft(chunks, out, hf_checkpoint=hf_dir)


@pytest.mark.parametrize(
    "part, named",
    [
        ("embedding.word_embeddings.weight", "the embedding of the base differs"),
        ("final_layernorm.weight", "the last norm of the base differs"),
        ("layers.2.input_layernorm.weight", "norms or biases of the base differ in 1 layers, from layer 2"),
        ("layers.3.mlp.linear_fc2.weight", "base weights differ in 1 of 4 layers compared, from layer 3"),
    ],
)
def test_an_export_names_no_other_base(pool2, tmp_path_factory, tmp_path, part, named):
    with pytest.raises(WorkerError) as caught:
        pool2.run(exports, tiny(tmp_path_factory), part, tmp_path / "out", tp=2)
    assert len(caught.value.errors) == 2
    for kind, message in caught.value.errors.values():
        assert kind == "ValueError" and "is not the base of this model" in message and named in message
    assert not (tmp_path / "out").exists()
