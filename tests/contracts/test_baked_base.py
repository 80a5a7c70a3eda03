"""``export --bake-tokens`` through the servers' own code: the base with the rows in it, and the plain adapter on it.

make contracts        # vLLM's part: make contracts FETCH_ARGS=--vllm
"""

from __future__ import annotations

import json
import types
from pathlib import Path

import adapted
import pytest
import reference
import torch
from harness import Layout
from safetensors.torch import load_file
from server_weights import LIBRARIES, Server, Vocabulary, sglang_loads
from sglang_worker import Worker
from wheels import SGLANG, VLLM, Wheel, vllm

from slime_plugins.lora import LoRAConfig, save_adapter
from slime_plugins.lora.adapters import iter_token_rows
from slime_plugins.lora.cli import main
from slime_plugins.lora.rehearsal.tiny import make_tiny, write_tokenizer

pytestmark = pytest.mark.contracts
SERVERS = [*(("sglang", version) for version in SGLANG), ("vllm", VLLM)]
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"t{i}" for i in range(4, 100))]
IDS = (7, 100, 101, 102)
"""An old token, and three that are new: 103 rows are no multiple of what servers pad to."""
MATRICES = {"model.embed_tokens.weight": "embedding.word_embeddings", "lm_head.weight": "output_layer"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(layout: Layout, base: Path, out: Path) -> None:
    """A checkpoint of adapters and rows, none of them zero."""
    chunks = adapted.adapted_chunks(base, LoRAConfig(rank=4, alpha=8, layout="split", trainable_token_indices=IDS))
    adapted.set_adapters(chunks, "split", 4)
    with torch.no_grad():
        for rows in iter_token_rows(chunks):
            if rows.lora_table:
                rows.lora_rows.copy_(reference.draw(rows.lora_name, *rows.lora_rows.shape))
    save_adapter(chunks, out, step=1)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def exported(request, pool1, tmp_path_factory):
    """A directory with small, base (of small, with new tokens), adapter (rows in it), baked and plain (on baked)."""
    root = tmp_path_factory.mktemp("baked")
    make_tiny(root / "small", "qwen3", vocab_size=100, tied=request.param, tokenizer=False, max_shard_size="40KB")
    write_tokenizer(root / "small", WORDS, added=False)
    (root / "items.txt").write_text("<item_1>\n<item_2>\n<item_3>\n")

    def run(*words):
        assert main([str(word) for word in words]) == 0

    run("add-tokens", "--hf-checkpoint", root / "small", "--tokens", root / "items.txt", "--out", root / "base")
    pool1.run(trained, root / "base", root / "saved")
    export = ("export", "--checkpoint", root / "saved", "--hf-checkpoint", root / "base", "--out")
    run(*export, root / "adapter")
    run(*export, root / "plain", "--bake-tokens", root / "baked")
    return root


@pytest.fixture(params=SERVERS, ids=lambda server: "-".join(server))
def server(request) -> Server:
    return Server(*request.param)


def config_of(hf_dir: Path):
    """As transformers reads it for the servers."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(hf_dir)


def expected(root: Path) -> dict[str, torch.Tensor]:
    """Matrices over the vocabulary: the base's, and in the trained rows the change on top."""
    found = {}
    for file in (root / "base").glob("*.safetensors"):
        found |= {name: tensor for name, tensor in load_file(file).items() if name in MATRICES}
    for name, weight in found.items():
        weight[list(IDS)] += reference.draw(MATRICES[name], len(IDS), weight.shape[1])
    return found


def test_every_file_is_read(server, exported):
    """The links too, by the index that the copy has."""
    tensors = server.tensors(exported / "baked")
    index = json.loads((exported / "baked" / "model.safetensors.index.json").read_text())["weight_map"]
    assert tensors.keys() == index.keys() and len(set(index.values())) > 3
    for name, weight in server.tensors(exported / "base").items():
        assert torch.equal(tensors[name], weight) is (name not in MATRICES), name


@pytest.mark.parametrize("tp", [1, 2])
def test_embedding_and_head_have_the_rows(server, exported, tp):
    config, tensors, matrices = config_of(exported / "baked"), server.tensors(exported / "baked"), expected(exported)
    head = matrices.get("lm_head.weight", matrices["model.embed_tokens.weight"])
    ranks = [Vocabulary(server, config, tp, rank) for rank in range(tp)]
    for rank in ranks:
        for name in MATRICES.keys() & tensors.keys():
            rank.load(name, tensors[name])
    ids = torch.tensor([*IDS, 5, 99])
    with torch.no_grad():
        embedded = sum(rank.embed_tokens(ids) for rank in ranks)
        columns = torch.cat([rank.lm_head.weight for rank in ranks])[: config.vocab_size]
    assert torch.equal(embedded, matrices["model.embed_tokens.weight"][ids])
    assert torch.equal(columns, head)


def test_a_vocabulary_of_another_size_is_refused(server, exported):
    """What ``vocab_size`` left as it was before the new tokens would be: add-tokens has to change it."""
    config, tensors = config_of(exported / "small"), server.tensors(exported / "baked")
    with pytest.raises((AssertionError, RuntimeError)):
        Vocabulary(server, config, 1, 0).load("model.embed_tokens.weight", tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("version", SGLANG)
def test_sglang_loads_all_of_it(version, exported):
    server, config = Server("sglang", version), config_of(exported / "baked")
    vocabulary, tensors = Vocabulary(server, config, 1, 0), server.tensors(exported / "baked")
    taken = sglang_loads(server, config, vocabulary, tensors)
    assert len(taken) == len(tensors) - len(MATRICES.keys() & tensors.keys())
    for name, weight in expected(exported).items():
        module = vocabulary.lm_head if name.startswith("lm_head") else vocabulary.embed_tokens
        assert torch.equal(module.weight[: len(weight)], weight), name


@pytest.mark.parametrize("version", SGLANG)
def test_sglang_serves_the_plain_adapter(version, exported):
    adapter = exported / "plain"
    worker = Worker(version, exported / "baked", TARGETS, 4)
    read = worker.wheel.module("sglang.srt.lora.lora_config").LoRAConfig(str(adapter))
    assert read.lora_added_tokens_size == 0
    tensors = load_file(adapter / "adapter_model.safetensors")
    worker.load("plain", read.hf_config, tensors)
    worker.generate("plain")
    served = worker.served("plain")
    assert len(served) == len(tensors) // 2
    for name, update in served.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        assert (update - 2 * B @ A).abs().max() <= 0.02 * (B @ A).abs().max(), name


def vllm_reads(adapter: Path) -> dict[str, torch.Tensor]:
    """vLLM's own checks of an adapter's config and names; the tensors that it would serve."""
    wheel = Wheel(vllm(), "vllm")
    names = wheel.take("vllm.lora.utils", "parse_fine_tuned_lora_name", "is_base_embedding_weights")
    wheel.give("vllm.logger", init_logger=lambda name: types.SimpleNamespace(info_once=lambda *args: None))
    wheel.give("regex", **vars(__import__("re")))
    helper = wheel.module("vllm.lora.peft_helper").PEFTHelper.from_local_dir(str(adapter), None)
    helper.validate_legal(types.SimpleNamespace(max_lora_rank=4))
    own = wheel.take(
        "vllm.lora.lora_model", "LoRAModel.from_local_checkpoint", **LIBRARIES,
        get_lora_id=lambda: 1, **vars(names),
    )  # fmt: skip
    model = types.SimpleNamespace(from_lora_tensors=lambda **given: given["tensors"])
    return own.from_local_checkpoint.__func__(model, str(adapter), set(TARGETS), helper)


def test_vllm_serves_the_plain_adapter(exported):
    tensors = vllm_reads(exported / "plain")
    assert tensors.keys() == load_file(exported / "plain" / "adapter_model.safetensors").keys()


def test_vllm_refuses_rows_in_an_adapter(exported):
    """Why they are baked in."""
    with pytest.raises(ValueError, match="trainable_tokens_delta is unsupported LoRA weight"):
        vllm_reads(exported / "adapter")


@pytest.mark.parametrize("version", SGLANG)
def test_sglang_passes_over_rows_in_an_adapter(version, exported):
    """Why they are baked in, and why the export says so: no error, no warning, and the initial rows are served."""
    worker = Worker(version, exported / "base", TARGETS, 4)
    config = json.loads((exported / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(exported / "adapter" / "adapter_model.safetensors")
    worker.load("rows", config, tensors)
    worker.generate("rows")
    assert len(worker.served("rows")) == sum("lora_A" in name for name in tensors)
