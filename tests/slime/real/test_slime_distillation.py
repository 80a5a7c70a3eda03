"""slime's own train.py with ``--use-gkd`` against the paper's formula on transformers + PEFT in float32, one step.

    as test_slime_training.py; six runs of half a minute

slime trains in bf16: the loss agrees to 1e-3 and the gradient's norm to 1.5 %.
"""

from __future__ import annotations

import sys

import pytest
import torch
from test_slime_training import run  # noqa: F401 - a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

BETA, TEMPERATURE = 0.5, 2.0
PROMPT = "t5 t6 t7 {prompt}"


@pytest.fixture(scope="module")
def reference(harness_dir, tmp_path_factory):
    """The harness's model and samples, a random adapter for the student, and loss and gradient norm by prefix."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(harness_dir))
    import fixtures

    where = tmp_path_factory.mktemp("reference")
    fixtures.make_model(where / "hf", 0, tie=True, kind="qwen3")
    fixtures.make_rollouts(where / "rollouts", where / "hf", 1, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(where / "hf")
    torch.manual_seed(0)
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=leaves, init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(where / "hf", dtype=torch.float32), config)
    model.save_pretrained(where / "adapter")
    rows = torch.load(where / "rollouts" / "rollout_0.pt", weights_only=False)["samples"]

    def expected(prefix: str) -> tuple[float, float]:
        model.zero_grad()
        loss = 0.0
        for row in rows:
            count, tokens = row["response_length"], row["tokens"]
            shown = tokenizer(prefix + row["prompt"], add_special_tokens=False).input_ids + tokens[-count:]
            student = model(torch.tensor([tokens])).logits[0, -count - 1 : -1]
            with torch.no_grad(), model.disable_adapter():
                teacher = model(torch.tensor([shown])).logits[0, -count - 1 : -1]
            p, q = (student / TEMPERATURE).softmax(-1), (teacher / TEMPERATURE).softmax(-1)
            m = BETA * q + (1 - BETA) * p
            kl = lambda one, other: (one * (one / other).log()).sum(-1).mean()  # noqa: E731
            loss = loss + (BETA * kl(q, m) + (1 - BETA) * kl(p, m)) / len(rows)
        loss.backward()
        squares = [(p.grad**2).sum() for p in model.parameters() if p.grad is not None]
        return loss.item(), torch.stack(squares).sum().sqrt().item()

    return where / "adapter", {None: expected(""), PROMPT: expected("t5 t6 t7 ")}


@pytest.mark.parametrize(
    "words, prompt",
    [
        ((), None),
        (("--tp", "2"), None),
        (("--pp", "2"), None),
        (("--cp", "2"), None),
        ((), PROMPT),
        (("--tp", "2"), PROMPT),
    ],
    ids=["tp1", "tp2-sp", "pp2", "cp2", "tp1-privileged", "tp2-sp-privileged"],
)
def test_equals_transformers(run, reference, words, prompt):  # noqa: F811
    adapter, expected = reference
    flags = f"--use-lora --lora-r 4 --lora-alpha 8 --lora-layout split --lora-adapter-path {adapter} --use-gkd"
    flags += f" --gkd-lmbda 0 --gkd-beta {BETA} --gkd-temperature {TEMPERATURE}"
    if prompt is not None:
        flags += f" --gkd-teacher-prompt-template '{prompt}'"
    done = run("--steps", "1", *words, extra=flags)
    loss, norm = expected[prompt]
    assert done.of("loss") == done.of("gkd/divergence") == [pytest.approx(loss, rel=1e-3)]
    assert done.of("grad_norm") == [pytest.approx(norm, rel=1.5e-2)]


def flags_with(adapter, *more: str) -> str:
    flags = f"--use-lora --lora-r 4 --lora-alpha 8 --lora-layout split --lora-adapter-path {adapter} --use-gkd"
    return " ".join([flags, "--gkd-teacher ema --gkd-teacher-prompt-template 't5 {prompt}'", *more])


def test_lambda(run, reference):  # noqa: F811
    """slime's own rollout loop; steps on its samples and on the labels of the data."""
    more = ("--gkd-lmbda 0.5 --seed 3 --label-key label --n-samples-per-prompt 1 --rollout-batch-size 16",)
    done = run("--mode", "colocate", "--generate", "--steps", "3", extra=flags_with(reference[0], *more))
    assert set(done.of("gkd/on_policy")) == {0.0, 1.0}
    assert all(value > 0 for value in done.of("gkd/divergence"))


def test_beside_the_policy_loss(run, reference):  # noqa: F811
    done = run("--steps", "2", extra=flags_with(reference[0], "--gkd-lmbda 0 --gkd-coef 0.5"))
    for total, policy, divergence in zip(done.of("loss"), done.of("policy_loss"), done.of("gkd/divergence")):
        assert total == pytest.approx(policy + 0.5 * divergence, abs=1e-6)
        assert divergence > 0
    assert all(value > 0 for value in done.of("kl_loss")), "advantages and reference are there"
