"""slime's own train.py with trained vocabulary rows: what trains, is sent to engines, exported and resumed."""

from __future__ import annotations

import subprocess

import pytest
from peft_merged import merge_and_unload
from runs import LORA, Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

IDS = [5, 17, 63, 64, 65]
ROWS = "--trainable-token-indices 5 17 63-65"


@pytest.mark.parametrize("alone", [False, True], ids=["beside-lora", "alone"])
def test_rows_train_are_sent_exported_and_resumed(run, alone):
    import torch
    from safetensors.torch import load_file

    extra = f"{LORA} {ROWS}" + (" --freeze-llm" if alone else "")
    words = ("--steps", "4", "--save-interval", "2")
    trained = run(*words, "--mode", "colocate", "--tp", "2", extra=f"{extra} --save-hf hf_{{rollout_id}}")
    kl, norms = trained.of("kl_loss"), trained.of("lora/rows_norm")
    assert kl[0] == 0.0 and all(value > 0 for value in kl[1:])
    assert norms == sorted(norms) and norms[0] > 0, norms
    base = load_file(trained.work / "hf" / "model.safetensors")
    first, *_, last = (load_file(file) for file in trained.received("weights_*.safetensors"))
    assert all(torch.equal(first[name], tensor) for name, tensor in base.items())
    expected = merge_and_unload(trained.work / "hf", trained.work / "hf_3")
    wrong = [name for name, tensor in last.items() if not torch.equal(tensor, expected[name])]
    assert wrong == []
    embedding = "model.embed_tokens.weight"
    changed = (last[embedding] != base[embedding]).any(1).nonzero().flatten().tolist()
    assert changed == IDS
    others = [name for name in base if name != embedding and not torch.equal(last[name], base[name])]
    assert bool(others) is not alone
    # Tied over two stages now.
    resumed = run(*words, "--pp", "2", "--resume", extra=f"{extra} --ckpt-step 1", of=trained)
    # bf16 sums in another order; the rows alone move the policy by a KL that is no larger than that noise.
    assert resumed.of("kl_loss") == pytest.approx(kl[2:], rel=0.03, abs=1e-6)
    assert resumed.of("grad_norm") == pytest.approx(trained.of("grad_norm")[2:], rel=0.005)
    assert resumed.of("lora/rows_norm") == pytest.approx(norms[2:], rel=5e-3)


NEW = [f"<item_{i}>" for i in range(256)]
"""As many as keep Megatron from padding the vocabulary at TP 2; the samples hold the first twelve."""
SFT = "--loss-type sft_loss --calculate-per-token-loss --disable-compute-advantages-and-returns"


@pytest.fixture(scope="module")
def grown(harness_dir, slime_python, tmp_path_factory) -> Run:
    """The harness's model with new tokens, and samples that hold them, for runs to start ``of``."""
    import torch

    from slime_plugins.lora.cli import main

    work = tmp_path_factory.mktemp("grown")
    files = f"import sys; sys.path.insert(0, {str(harness_dir)!r}); import fixtures\n"
    files += f"fixtures.make_model({str(work / 'small')!r}, 0)\n"
    files += f"fixtures.make_rollouts({str(work / 'samples')!r}, {str(work / 'small')!r}, 4, seed=0)\n"
    subprocess.run([slime_python, "-c", files], check=True, capture_output=True)
    (work / "items.txt").write_text("".join(f"{token}\tt{i + 9} t{i + 77}\n" for i, token in enumerate(NEW)))
    words = ["--hf-checkpoint", work / "small", "--tokens", work / "items.txt", "--out", work / "hf"]
    assert main(["add-tokens", *map(str, words)]) == 0
    for file in (work / "samples").glob("rollout_*.pt"):
        rollout = torch.load(file, weights_only=False)
        for sample in rollout["samples"]:
            sample["tokens"] = [512 + t % 12 if t % 3 == 0 else t for t in sample["tokens"]]
        torch.save(rollout, file)
    return Run(work, "", [])


def loss_of(run: Run, adapter: str, rollout: int) -> float:
    """By transformers + PEFT, in float32: the mean over all tokens of the responses."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(run.work / "hf", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run.work / adapter)
    total, count = 0.0, 0
    for row in torch.load(run.work / "samples" / f"rollout_{rollout}.pt", weights_only=False)["samples"]:
        tokens, length = torch.tensor(row["tokens"]), row["response_length"]
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, -length - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, tokens[-length:], reduction="sum").item()
        count += length
    return total / count


@pytest.mark.parametrize("alone", [False, True], ids=["beside-lora", "alone"])
def test_sft_of_new_tokens(run, grown, alone):
    """In float32, TP 2 with SP, resumed at PP 2 (tied over the stages): what PEFT reads has slime's own loss."""
    import torch
    from safetensors.torch import load_file

    samples = f"--load-debug-rollout-data {grown.work}/samples/rollout_{{rollout_id}}.pt --vocab-size 768"
    rows = f"--new-tokens {grown.work}/items.txt" + (" --freeze-llm" if alone else "")
    extra = f"{LORA} {rows} {SFT} {samples} --save-hf hf_{{rollout_id}}"
    words = ("--keep", "--plugin", "exact", "--steps", "4", "--save-interval", "2")
    trained = run(*words, "--tp", "2", extra=extra, of=grown)
    assert "--sequence-parallel" in (trained.work / "command.txt").read_text()
    assert ("trainable params: 16,384 ||" in trained.log) is alone
    for rank in (0, 1):
        assert len({probe["base"] for probe in trained.probes if probe["rank"] == rank}) == 1, "the base has changed"
    resumed = run(*words, "--pp", "2", "--resume", extra=f"{extra} --ckpt-step 1", of=trained)
    for name in ("loss", "grad_norm", "lora/rows_norm"):
        assert resumed.of(name) == pytest.approx(trained.of(name)[2:], rel=1e-5), name
    assert trained.of("loss")[2] == pytest.approx(loss_of(trained, "hf_1", 2), rel=1e-6)
    assert trained.of("loss")[2] != pytest.approx(loss_of(trained, "hf_3", 2), rel=1e-3)
    first, last, base = (load_file(file) for file in (
        trained.work / "hf_3" / "adapter_model.safetensors",
        resumed.work / "hf_3" / "adapter_model.safetensors",
        grown.work / "hf" / "model.safetensors",
    ))  # fmt: skip
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(last[name], tensor, rtol=1e-4, atol=1e-6)
    key = "embed_tokens.trainable_tokens_delta" if alone else "embed_tokens.token_adapter.trainable_tokens_delta"
    change = first[f"base_model.model.model.{key}"].float() - base["model.embed_tokens.weight"][512:].float()
    # Every row is in the softmax of the tied head, and so each has a gradient.
    assert change.shape == (256, 64) and (change != 0).any(1).all()
