"""Training on Megatron ranks equals GRPO and SFT written down plainly on transformers + PEFT, at any layout.

GRPO: two optimizer steps on one rollout: the second is off-policy, so ratio, clipping and KL all count. SFT: loss and
gradients of one step. The oracles share no code with the trainer: their own masks, their own loss, one process.

    pytest tests/rehearsal/test_rehearsal_trainer.py
"""

import dataclasses

import pytest
import torch
from gradient_steps import GRADIENT_LR, VOCAB, gradient_trainer, samples, taken_gradient
from harness import Layout
from safetensors.torch import load_file

from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.objectives.batch import make_batch
from slime_plugins.lora.rehearsal.settings import Settings
from slime_plugins.lora.rehearsal.tiny import make_tiny

TEMPERATURE = 0.7
# Split: with one A for q, k and v, as fused has it, PEFT would train three.
LORA = LoRAConfig(rank=4, layout="split")
SETTINGS = Settings(
    lr=2e-2, eps_clip=0.05, kl_loss_coef=0.3, clip_grad=0.5, rollout_temperature=TEMPERATURE, lora=LORA
)
ADVANTAGES = torch.tensor([1.0, -0.5, 0.25, -2.0, 0.75, 1.5, -1.0, 0.5])


def train(layout: Layout, settings, start_dir, end_dir):
    from adapted import randomize

    from slime_plugins.lora.rehearsal.trainer import RankTrainer

    trainer = RankTrainer()
    trainer.build(settings)
    randomize(trainer.chunks)  # with B zero, a reference that has the adapters on would be the right one
    trainer.optimizer.reload_model_params()
    trainer.export(str(start_dir))
    prompts, responses = samples()
    metrics = trainer.train(make_batch(prompts, responses, multiple=layout.tp, advantages=ADVANTAGES))
    trainer.export(str(end_dir))
    before, after = trainer.base_checksums()
    assert before == after
    return metrics


def oracle(hf_dir, start_dir):
    """Metrics and final adapter tensors."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, start_dir, is_trainable=True)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=SETTINGS.lr, betas=(0.9, 0.999), eps=1e-8)
    rows = list(zip(*samples(), ADVANTAGES.tolist()))

    def log_probs(prompt, response):
        logits = model(torch.tensor([prompt + response])).logits[0] / TEMPERATURE
        return logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(response)), response]

    with torch.no_grad():
        old = [log_probs(p, r) for p, r, _ in rows]
        with model.disable_adapter():
            ref = [log_probs(p, r) for p, r, _ in rows]
    seen = []
    for half in (range(4), range(4, 8)):
        policy, kl, clipped = 0.0, 0.0, 0.0
        for i in half:
            prompt, response, advantage = rows[i]
            new = log_probs(prompt, response)
            ratio = (new - old[i]).exp()
            clamped = ratio.clamp(0.95, 1.05)
            policy = (
                policy + torch.stack([-min(a, b) for a, b in zip(ratio * advantage, clamped * advantage)]).mean() / 4
            )
            kl = kl + ((ref[i] - new).exp() - (ref[i] - new) - 1).mean() / 4
            clipped = clipped + (clamped != ratio).float().mean() / 4
        loss = policy + 0.3 * kl
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        seen.append([x.item() for x in (loss, policy, kl, clipped, grad_norm)])
    mean = [sum(column) / 2 for column in zip(*seen)]
    names = ("loss", "policy_loss", "kl", "clip_fraction", "grad_norm")
    return {**dict(zip(names, mean)), "kl": seen[0][2]}, seen, get_peft_model_state_dict(model)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "qwen3"
    return make_tiny(path, "qwen3", num_layers=4, hidden=40, head_dim=12, ffn=56, vocab_size=VOCAB, tokenizer=False)


@pytest.mark.parametrize(
    "layout, flags",
    [
        ({"tp": 2}, {}),
        ({"tp": 2, "sp": True}, {"micro_batch_size": 2, "recompute_granularity": "full"}),
        ({"pp": 2}, {"micro_batch_size": 1}),
        ({"pp": 2, "vpp": 2}, {"micro_batch_size": 1}),
        ({}, {"dp": 2}),
    ],
    ids=["tp2", "tp2-sp-recompute", "pp2", "pp2-vpp2", "dp2"],
)
def test_train_equals_oracle(pool2, base, tmp_path, layout, flags):
    sizes = {"tp": 1, **layout}
    settings = dataclasses.replace(SETTINGS, hf_checkpoint=str(base), **sizes, **flags)
    results = [m for m in pool2.run(train, settings, tmp_path / "a", tmp_path / "b", **layout) if m is not None]
    expected, steps, tensors = oracle(base, tmp_path / "a")
    assert min(steps[0][2], steps[1][2]) > 0.001, "policy and reference must differ enough to mean something"
    assert steps[0][3] == 0, "the first step is on-policy"
    assert steps[1][3] > 0.1, "the second is clipped in places"
    # Data-parallel ranks report their own samples; the driver averages.
    metrics = {name: sum(m[name] for m in results) / len(results) for name in expected}
    for name in expected:
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    trained = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert trained.keys() == tensors.keys()
    for name, tensor in trained.items():
        # Adam divides by the gradient's own size: rounding shows where a gradient is near zero.
        error = (tensor - tensors[name]).abs().max().item()
        assert error <= 1e-3 * SETTINGS.lr, f"{name}: {error:.2e}"


def train_sft(layout: Layout, settings, start_dir, end_dir):
    trainer = gradient_trainer(settings)
    trainer.export(str(start_dir))
    metrics = trainer.train(make_batch(*samples(), multiple=layout.tp))
    trainer.export(str(end_dir))
    return metrics


def sft_oracle(hf_dir, start_dir):
    """Loss and gradients by name; cross-entropy over one long row of logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, start_dir, is_trainable=True)
    logits, targets = [], []
    for prompt, response in zip(*samples()):
        logits.append(model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1])
        targets += response
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(targets))
    loss.backward()
    return loss.item(), {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "pool, layout, flags",
    [
        ("pool1", {}, {}),
        ("pool2", {"tp": 2}, {"micro_batch_size": 2}),
        ("pool2", {"tp": 2, "sp": True}, {}),
        ("pool2", {"pp": 2}, {"micro_batch_size": 2}),
        ("pool2", {}, {"dp": 2, "micro_batch_size": 1}),
    ],
    ids=["tp1", "tp2", "tp2-sp", "pp2", "dp2"],
)
def test_sft_equals_oracle(request, base, tmp_path, pool, layout, flags):
    """Responses are of 1 to 5 tokens: a mean of means, over ranks or microbatches, would be another loss."""
    settings = dataclasses.replace(
        SETTINGS,
        objective="sft",
        hf_checkpoint=str(base),
        n_samples_per_prompt=1,
        num_steps_per_rollout=1,
        lr=GRADIENT_LR,
        clip_grad=0.0,
        **{"tp": 1, **layout, **flags},
    )
    ranks = request.getfixturevalue(pool)
    results = [m for m in ranks.run(train_sft, settings, tmp_path / "a", tmp_path / "b", **layout) if m is not None]
    loss, gradients = sft_oracle(base, tmp_path / "a")
    assert sum(metrics["loss"] for metrics in results) / len(results) == pytest.approx(loss, rel=1e-5)
    start, end = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b"))
    assert start.keys() == gradients.keys()
    for name, gradient in gradients.items():
        found = taken_gradient(start[name], end[name])
        assert (found - gradient).norm() <= 1e-4 * gradient.norm(), name


def start(layout: Layout, settings, how, source, end_dirs):
    """Adapters read from ``source``, written again, trained for a step, written again. Returns what the read gave."""
    from slime_plugins.lora.rehearsal.trainer import RankTrainer

    trainer = RankTrainer()
    trainer.build(settings)
    result = getattr(trainer, how)(str(source))
    trainer.export(str(end_dirs[0]))
    trainer.train(make_batch(*samples(), multiple=layout.tp))
    trainer.export(str(end_dirs[1]))
    return result


@pytest.mark.parametrize("how", ["start_from_peft", "start_from_checkpoint", "load"])
def test_starts_from_an_adapter(pool2, base, tmp_path, how):
    """A PEFT directory, a checkpoint, and ``--load`` of what ``slime-lora import`` wrote, which is at no step."""
    from slime_plugins.lora.checkpoint.from_peft import import_checkpoint

    settings = dataclasses.replace(
        SETTINGS, objective="sft", hf_checkpoint=str(base), n_samples_per_prompt=1, num_steps_per_rollout=1, lr=1e-3
    )
    pool2.run(train_sft, settings, tmp_path / "peft", tmp_path / "unused", tp=2)
    import_checkpoint(tmp_path / "peft", base, tmp_path / "imported")
    source = tmp_path / ("peft" if how == "start_from_peft" else "imported")
    ends = (tmp_path / "read", tmp_path / "trained")
    results = pool2.run(start, settings, "load" if how == "load" else "start_from", source, ends, tp=2)
    assert set(results) == {0 if how == "load" else None}
    was, read, trained = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "peft", *ends))
    for name, tensor in was.items():
        assert torch.equal(read[name], tensor), name
        # Adam's first step is of the learning rate. From other values, as of masters that were not read, it is not.
        assert 0 < (trained[name] - tensor).abs().max() <= 1.01 * settings.lr, name
