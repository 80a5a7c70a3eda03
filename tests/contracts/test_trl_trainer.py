"""A distillation step on Megatron ranks against TRL's own loss on transformers + PEFT in one process, fp32.

    make contracts                                                   # two layouts
    pytest -m "contracts and slow" tests/contracts/test_trl_trainer.py   # the others, minutes

The teacher is the base with prompts of its own. Every case is a trainer of its own, whose one step subtracts a known
multiple of the gradient.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from gradient_steps import GRADIENT_LR, VOCAB, gradient_trainer, samples, taken_gradient
from harness import Layout
from safetensors.torch import load_file
from wheels import TRL, Wheel, unpacked

from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.objectives.batch import make_batch
from slime_plugins.lora.rehearsal.settings import Settings
from slime_plugins.lora.rehearsal.tiny import make_tiny

pytestmark = pytest.mark.contracts
CASES = list(itertools.product((0.0, 0.1, 0.5, 1.0), (0.7, 1.0, 2.0)))
SETTINGS = Settings(
    objective="gkd",
    lr=GRADIENT_LR,
    clip_grad=0.0,
    n_samples_per_prompt=1,
    num_steps_per_rollout=1,
    gkd_chunk_size=5,
    gkd_teacher_prompt_template="{label} {prompt}",
    lora=LoRAConfig(rank=4, layout="split"),
)
LAYOUTS = {
    "tp1": ("pool1", {}, {}),
    "tp2": ("pool2", {"tp": 2}, {}),
    "tp2-sp": ("pool2", {"tp": 2, "sp": True}, {"micro_batch_size": 2}),
    "tp4": ("pool4", {"tp": 4}, {}),
    "pp2": ("pool2", {"pp": 2}, {"micro_batch_size": 2}),
    "dp2": ("pool2", {}, {"dp": 2, "micro_batch_size": 1}),
}
HEAVY = ("tp2", "tp4", "pp2", "dp2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "qwen3"
    sizes = dict(num_layers=2, hidden=48, num_kv_heads=4, head_dim=12, ffn=56, vocab_size=VOCAB)
    return make_tiny(path, "qwen3", **sizes, tokenizer=False)


def teacher_prompts():
    prompts, _ = samples()
    return [[9, 8, 7, *prompt][i % 2 * 4 :] for i, prompt in enumerate(prompts)]


def train(layout: Layout, settings, out):
    """One step for each case, from the same start. Returns each case's loss."""
    prompts, responses = samples()
    teachers = make_batch(teacher_prompts(), responses, multiple=layout.tp)
    fields = {"teacher_tokens": teachers.tokens, "teacher_mask": teachers.mask, "is_given": torch.ones(len(prompts))}
    batch = make_batch(prompts, responses, multiple=layout.tp, **fields)
    losses = []
    for number, (beta, temperature) in enumerate(CASES):
        trainer = gradient_trainer(dataclasses.replace(settings, gkd_beta=beta, gkd_temperature=temperature))
        trainer.take_teacher("base", None)
        if number == 0:
            trainer.export(str(out / "start"))
        metrics = trainer.train(batch)
        trainer.export(str(out / str(number)))
        losses.append(None if metrics is None else metrics["loss"])
    return losses


def judged(hf_dir, start_dir):
    """Loss and gradients by name, of every case, by TRL on PEFT's logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    wheel = Wheel(unpacked("trl", TRL[-1]), "trl")
    module = "trl.experimental.gkd.gkd_trainer"
    given = {"F": torch.nn.functional, "torch": torch}
    jsd = wheel.take(module, "GKDTrainer.generalized_jsd_loss", **given).generalized_jsd_loss
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, start_dir, is_trainable=True)
    names = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    student, teacher = [], []
    for prompt, shown, response in zip(samples()[0], teacher_prompts(), samples()[1]):
        student.append(model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1])
        with torch.no_grad(), model.disable_adapter():
            teacher.append(model(torch.tensor([shown + response])).logits[0, len(shown) - 1 : -1])
    # The loss itself in double: TRL's own rounding is as large as what is to be seen.
    student, teacher = torch.cat(student)[None].double(), torch.cat(teacher)[None].double()
    for beta, temperature in CASES:
        loss = jsd(student, teacher, torch.ones(student.shape[:2], dtype=torch.int64), beta, temperature)
        gradients = torch.autograd.grad(loss, list(names.values()), retain_graph=True)
        yield loss.item(), dict(zip(names, gradients))


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in LAYOUTS]
)
def test_a_step_equals_trl(request, base, tmp_path, layout):
    pool, sizes, flags = LAYOUTS[layout]
    settings = dataclasses.replace(SETTINGS, hf_checkpoint=str(base), **{"tp": 1, **sizes, **flags})
    per_rank = request.getfixturevalue(pool).run(train, settings, tmp_path, timeout=280, **sizes)
    per_rank = [losses for losses in per_rank if losses[0] is not None]
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    worst = [0.0, 0.0]
    for number, (loss, gradients) in enumerate(judged(base, tmp_path / "start")):
        found = sum(losses[number] for losses in per_rank) / len(per_rank)
        end = load_file(tmp_path / str(number) / "adapter_model.safetensors")
        assert start.keys() == end.keys() == gradients.keys()
        error = sum((taken_gradient(start[n], end[n]) - g).norm() ** 2 for n, g in gradients.items()) ** 0.5
        norm = sum(g.norm() ** 2 for g in gradients.values()) ** 0.5
        worst = [max(worst[0], abs(found / loss - 1)), max(worst[1], (error / norm).item())]
        assert found == pytest.approx(loss, rel=1e-6), CASES[number]
        assert error <= 1e-5 * norm, CASES[number]
    print(f"{layout}: loss {worst[0]:.1e}, gradient {worst[1]:.1e}, relative, at most")
