"""slime's hooks on Megatron-Core from the registry, without slime: policies, weight sync, loading, saving, metrics.

pytest tests/slime/hooks/test_slime_hooks.py        # the same hooks inside real slime: tests/slime
"""

from __future__ import annotations

import pytest
import slime_hooks_on_ranks as on_ranks
import torch
from harness import WorkerError
from tiny_checkpoints import tiny


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.mark.parametrize("sizes", [dict(tp=2, sp=True), dict(pp=2)], ids=["tp2-sp", "pp2"])
def test_policies(pool2, hf_dir, sizes):
    for seen in pool2.run(on_ranks.policies, hf_dir, **sizes):
        same = [
            ("ref", "base"),  # bit for bit: the reference is the base
            ("ref after a step", "base"),
            ("actor again", "actor"),
            ("old_actor", "actor"),
            ("stepped again", "stepped"),
            ("ref updated", "stepped"),
            ("teacher", "expected teacher"),
            ("live after loading others", "last"),
        ]
        for one, other in same:
            assert torch.equal(seen[one], seen[other]), (one, other)
        if seen["actor"].numel():  # the last pipeline stage
            for one, other in [("actor", "base"), ("stepped", "actor"), ("last", "stepped"), ("teacher", "base")]:
                assert not torch.allclose(seen[one], seen[other], atol=1e-3), (one, other)
        model_bytes, adapter_bytes = seen["sizes"]
        assert seen["tags"] == ["actor", "ref"]
        assert seen["unknown"] == "there is no policy 'refs'; known are actor, ref"
        assert seen["bytes"] == {"actor": adapter_bytes}, "the reference has a copy in host memory"
        assert seen["same weights"] == ["actor", "old_actor", "ref", "rollout_actor"]
        assert seen["base untouched"] and seen["active"] == "actor"
        assert seen["full"]["teacher (full)"] == seen["full"]["base (full)"] == model_bytes - adapter_bytes


@pytest.mark.parametrize(
    "sizes, dtype, offload",
    [
        (dict(tp=2, sp=True), torch.bfloat16, False),
        (dict(tp=2), torch.bfloat16, True),
        (dict(pp=2), torch.float32, False),
    ],
    ids=["tp2-bf16", "tp2-bf16-offload", "pp2-fp32"],
)
def test_merged_weights_while_slime_streams(pool2, hf_dir, sizes, dtype, offload):
    results = pool2.run(on_ranks.merged_sync, hf_dir, dtype, offload, **sizes)
    for seen in results:
        for way, equal in seen["equal"].items():
            assert all(equal.values()), (way, [name for name, same in equal.items() if not same])
        assert seen["changed"], "the merge changes what carries an adapter, and nothing else"
        assert seen["untouched"] and seen["lazy"] and seen["freed"]
        assert seen["adapters seen"] == []
        assert seen["merged"][0] == seen["merged"][1]
        lost, update = seen["lost"]
        assert update > 0 and (0 < lost < update if dtype == torch.bfloat16 else lost < 1e-3 * update)
    stages = sizes.get("pp", 1)
    for way in (0, 1):  # one engine's bytes, as the sum over pipeline stages
        total = sum(seen["bytes"][way] for seen in results[:stages])
        expected = sum(seen["bytes"][2] for seen in results[:stages])
        assert total == (expected if way == 0 else expected / stages)


def test_base_then_adapters_then_masters(pool2, hf_dir, tmp_path):
    for seen in pool2.run(on_ranks.loading, hf_dir, tmp_path, None, tp=2, sp=True):
        assert seen["returned"] == [(0, 0), (5, 0), (7, 0)]
        # the base is always read without an optimizer and as if from scratch, from --ref-load when resuming
        assert seen["asked"] == [(str(hf_dir), True, True, True)] * 7
        assert seen["resumed from"] == (str(tmp_path / "ckpt"), False), "arguments are put back"
        assert seen["eval only"] == [True, True], "--num-rollout 0 measures the base, not the adapter"
        assert seen["same step"], "the step after a resume is not the step of the run that went on"
        assert seen["peft equals checkpoint"] and seen["non-zero"]
        assert seen["step at lr 0"], "fp32 masters undo the load"


def test_a_base_without_one_of_its_weights_is_refused(pool2, hf_dir, tmp_path):
    with pytest.raises(WorkerError) as caught:
        pool2.run(on_ranks.loading, hf_dir, tmp_path, "layers.1.mlp.linear_fc2.weight", tp=2)
    for kind, message in caught.value.errors.values():
        assert kind == "ValueError" and "layers.1.mlp.linear_fc2.weight" in message


@pytest.mark.parametrize("vpp", [None, 2])
def test_adapters_go_in_once_all_chunks_are_there(pool2, hf_dir, vpp):
    """Under a virtual pipeline size a target may match in one chunk of one stage alone."""
    target = ["*.layers.2.*.linear_qkv"]
    results = pool2.run(on_ranks.provider, hf_dir, target, "actor", False, pp=2, vpp=vpp)
    adapted = [name for seen in results for name in seen["adapted"]]
    assert adapted == ["decoder.layers.2.self_attention.linear_qkv"]
    assert sum(len(seen["trainable"]) for seen in results) == 2


def test_a_critic_trains_whole_unless_asked(pool1, hf_dir):
    (whole,) = pool1.run(on_ranks.provider, hf_dir, ["all-linear"], "critic", False)
    assert whole["adapted"] == [] and len(whole["trainable"]) == whole["total"]
    (seen,) = pool1.run(on_ranks.provider, hf_dir, ["all-linear"], "critic", True)
    assert len(seen["adapted"]) == 16
    rest = [name for name in seen["trainable"] if "lora_" not in name]
    assert rest == ["output_layer.bias", "output_layer.weight"]


@pytest.mark.parametrize("sizes", [dict(), dict(tp=2, sp=True), dict(pp=2)], ids=["dp2", "tp2-sp", "pp2"])
def test_metrics(pool2, hf_dir, sizes):
    results = pool2.run(on_ranks.metrics, hf_dir, **sizes)
    expected = results[0]["expected"]
    for seen in results:
        assert seen["measured"]["update_norm"] == pytest.approx(expected, rel=1e-5)
        assert 0 < seen["measured"]["update_ratio"] < 1
        assert seen["measured"]["dead"] == 0 and seen["dead"] == 1
        assert "sync_bytes" not in seen["measured"]
        assert seen["grad_norm"] == 0.5
    (losses,) = {tuple(sorted(seen["losses"])) for seen in results if seen["losses"]}
    assert "loss" in losses and "lora/update_norm" in losses
    last = next(seen["losses"] for seen in reversed(results) if seen["losses"])
    assert last["lora/sync_bytes"] == 10 * sizes.get("pp", 1)
    assert last["lora/sync_seconds"] == 2 and last["lora/sync_lost"] == pytest.approx(0.25)


@pytest.mark.parametrize("colocate", [True, False], ids=["tensors", "disk"])
def test_adapter_sync(pool2, hf_dir, tmp_path, colocate):
    results = pool2.run(on_ranks.adapter_sync, hf_dir, tmp_path, colocate, None, tp=2)
    seen, other = results
    names = seen["names"]
    assert len(set(names)) == 4 and all(name.endswith(f"v00000{i + 1}") for i, name in enumerate(names))
    load = "load_lora_adapter_from_tensors" if colocate else "load_lora_adapter"
    version = ("update_weight_version", None)
    first, second = seen["asked"]
    assert first == [
        (load, names[0]), version,
        (load, names[1]), version,
        ("unload_lora_adapter", names[0]), (load, names[2]), version,
        ("unload_lora_adapter", names[1]), (load, names[3]), version,
    ]  # fmt: skip
    # An engine that has come back since gets the adapter, and is not asked for what it never had.
    assert second == [(load, names[3]), version]
    assert seen["proofs"] == [proof for name in names for proof in (name, "slime-lora-base")]
    assert all(seen["equal"]) and len(seen["equal"]) == (4 if colocate else 0)
    assert seen["left"] == [] and len(set(seen["sent"])) == 1 and seen["sent"][0] > 0
    assert other["names"] == [] and set(other["sent"]) == {0}


def test_an_adapter_sync_holds_one_linear_and_reads_the_base_once(pool2, hf_dir, tmp_path):
    """Of a base whose files have changed since, the headers are read again."""
    first, other = pool2.run(on_ranks.adapter_sync_costs, hf_dir, tmp_path, tp=2)
    for seen in (first, other):
        assert seen["most"] == 2, "more on the device at once than A and B of one linear"
        assert seen["left"] == 0
    files = len(list(hf_dir.glob("*.safetensors")))
    assert first["headers"] == [files, files, 2 * files] and other["headers"] == [0, 0, 0]


@pytest.mark.parametrize(
    "answer, reason",
    [
        ({"success": False, "error_message": "rank too large"}, "rank too large"),
        ({}, "expected success"),
        ({"success": True, "loaded_adapters": {"another": "x"}}, "is not among the loaded adapters"),
    ],
)
def test_an_engine_that_does_not_take_the_adapter_ends_the_run(pool2, hf_dir, tmp_path, answer, reason):
    with pytest.raises(WorkerError) as caught:
        pool2.run(on_ranks.adapter_sync, hf_dir, tmp_path, True, answer, tp=2)
    assert sorted(caught.value.errors) == [0, 1], "every rank stops"
    for kind, message in caught.value.errors.values():
        assert kind == "RuntimeError" and "engine 0 of 1" in message and reason in message
