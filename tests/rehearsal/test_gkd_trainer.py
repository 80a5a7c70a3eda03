"""Distillation on Megatron ranks equals the paper's formula on transformers + PEFT, at any layout, loss and gradients.

The oracle is one process: two forward passes of a PEFT model, with and without its adapter, whole logits, autograd.

    pytest tests/rehearsal/test_gkd_trainer.py
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from gradient_steps import GRADIENT_LR, VOCAB, gradient_trainer, samples, taken_gradient
from harness import Layout, WorkerError
from safetensors.torch import load_file

from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.objectives.batch import make_batch
from slime_plugins.lora.rehearsal.settings import Settings
from slime_plugins.lora.rehearsal.tiny import make_tiny

SETTINGS = Settings(
    objective="gkd",
    lr=GRADIENT_LR,
    clip_grad=0.0,
    n_samples_per_prompt=1,
    num_steps_per_rollout=1,
    gkd_chunk_size=5,
    lora=LoRAConfig(rank=4, layout="split"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "qwen3"
    return make_tiny(path, "qwen3", num_layers=4, hidden=40, head_dim=12, ffn=56, vocab_size=VOCAB, tokenizer=False)


def teacher_prompts():
    """Longer and shorter ones than the student's, none the same."""
    prompts, _ = samples()
    return [[9, 8, 7, *prompt][i % 2 * 4 :] for i, prompt in enumerate(prompts)]


def distillation_batch(multiple: int, privileged: bool):
    prompts, responses = samples()
    fields = {"is_given": torch.ones(len(prompts))}
    if privileged:
        teachers = make_batch(teacher_prompts(), responses, multiple=multiple)
        fields |= {"teacher_tokens": teachers.tokens, "teacher_mask": teachers.mask}
    return make_batch(prompts, responses, multiple=multiple, **fields)


def train(layout: Layout, settings, start_dir, end_dir, *, defect=None):
    trainer = gradient_trainer(settings)
    trainer.take_teacher(settings.gkd_teacher, settings.gkd_ema_decay)
    trainer.export(str(start_dir))
    if defect is not None:
        _break(trainer, defect)
    privileged = settings.gkd_teacher_prompt_template is not None
    metrics = trainer.train(distillation_batch(layout.tp, privileged))
    trainer.export(str(end_dir))
    return metrics


def _break(trainer, defect: str) -> None:
    import contextlib

    from slime_plugins.lora.objectives import gkd

    if defect == "adapters on in the teacher pass":
        trainer.teacher.active = contextlib.nullcontext
    else:
        computed = trainer.objective.computed["teacher_hidden"]
        roll = lambda hidden, view: gkd.at_students_tokens(hidden, view).roll(1, dims=1)  # noqa: E731
        flip = lambda hidden, view: gkd.at_students_tokens(hidden, view).flip(0)  # noqa: E731
        of = {"rows off by one": roll, "cache by order": flip}[defect]
        type(trainer.objective).computed = {"teacher_hidden": dataclasses.replace(computed, of=of)}


def oracle(hf_dir, start_dir, settings, teacher_dir=None):
    """Loss, gradients by name, and the mean of KL(teacher || student)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, start_dir, is_trainable=True)
    if teacher_dir is not None:
        model.load_adapter(teacher_dir, "teacher", is_trainable=False)
    rows, targets, beta, temperature = [], [], settings.gkd_beta, settings.gkd_temperature
    privileged = settings.gkd_teacher_prompt_template is not None
    prompts, responses = samples()

    def logits(prompt, response):
        return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]

    for prompt, response, shown in zip(prompts, responses, teacher_prompts() if privileged else prompts):
        with torch.no_grad():
            if teacher_dir is None:
                with model.disable_adapter():
                    teacher = logits(shown, response)
            else:
                model.set_adapter("teacher")
                teacher = logits(shown, response)
                model.set_adapter("default")
        rows.append((logits(prompt, response), teacher))
        targets += response
    student, teacher = (torch.cat(column) for column in zip(*rows))
    p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    kl = lambda one, other: (one * (one / other).log()).sum(-1).mean()  # noqa: E731
    m = beta * q + (1 - beta) * p
    loss = kl(p, q) if beta == 1 else kl(q, p) if beta == 0 else beta * kl(q, m) + (1 - beta) * kl(p, m)
    if settings.sft_alpha:
        loss = loss + settings.sft_alpha * torch.nn.functional.cross_entropy(student, torch.tensor(targets))
    loss.backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), gradients, kl(q, p).item()


def compare(results, start_dir, end_dir, expected):
    loss, gradients, kl = expected
    mean = {name: sum(metrics[name] for metrics in results) / len(results) for name in results[0]}
    assert mean["loss"] == pytest.approx(loss, rel=1e-5)
    assert mean["kl_to_student"] == pytest.approx(kl, rel=1e-4)
    start, end = (load_file(path / "adapter_model.safetensors") for path in (start_dir, end_dir))
    assert start.keys() == gradients.keys()
    for name, gradient in gradients.items():
        found = taken_gradient(start[name], end[name])
        assert (found - gradient).norm() <= 1e-4 * gradient.norm(), name
    return mean


LAYOUTS = [
    ("pool1", {}, {}),
    ("pool2", {"tp": 2}, {"micro_batch_size": 2}),
    ("pool2", {"tp": 2, "sp": True}, {"recompute_granularity": "full"}),
    ("pool2", {"pp": 2}, {"micro_batch_size": 2}),
    ("pool2", {"pp": 2, "vpp": 2}, {"micro_batch_size": 2}),
    ("pool2", {}, {"dp": 2, "micro_batch_size": 1}),
]
PRIVILEGED = {"gkd_teacher_prompt_template": "{label} {prompt}"}


@pytest.mark.parametrize("pool, layout, flags", LAYOUTS, ids=["tp1", "tp2", "tp2-sp", "pp2", "pp2-vpp2", "dp2"])
@pytest.mark.parametrize(
    "objective",
    [{"gkd_beta": 0.5}, {"gkd_beta": 0.1, "gkd_temperature": 2.0, "sft_alpha": 0.3, **PRIVILEGED}],
    ids=["plain", "privileged"],
)
def test_equals_oracle(request, base, tmp_path, pool, layout, flags, objective):
    settings = dataclasses.replace(SETTINGS, hf_checkpoint=str(base), **{"tp": 1, **layout, **flags}, **objective)
    dirs = tmp_path / "a", tmp_path / "b"
    results = [m for m in request.getfixturevalue(pool).run(train, settings, *dirs, **layout) if m is not None]
    mean = compare(results, *dirs, oracle(base, dirs[0], settings))
    assert 0 < mean["top_agreement"] < 1
    assert mean["divergence"] > 1e-3, "student and teacher must differ enough to mean something"


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_limits_equal_oracle(pool2, base, tmp_path, beta):
    settings = dataclasses.replace(SETTINGS, hf_checkpoint=str(base), tp=2, gkd_beta=beta, gkd_temperature=0.7)
    dirs = tmp_path / "a", tmp_path / "b"
    compare(pool2.run(train, settings, *dirs, tp=2), *dirs, oracle(base, dirs[0], settings))


@pytest.mark.parametrize("defect", ["adapters on in the teacher pass", "rows off by one", "cache by order"])
def test_a_defect_is_seen(pool1, base, tmp_path, defect):
    settings = dataclasses.replace(SETTINGS, hf_checkpoint=str(base), tp=1)
    dirs = tmp_path / "a", tmp_path / "b"
    try:
        results = pool1.run(functools.partial(train, defect=defect), settings, *dirs)
    finally:
        pool1.stop()  # with the class that was broken in it
    with pytest.raises(AssertionError):
        compare(results, *dirs, oracle(base, dirs[0], settings))


def steps_of_an_average(layout: Layout, settings, dirs):
    """Two steps; the student's adapters after each, the teacher's at the end, and the student's again."""
    trainer = gradient_trainer(settings)
    trainer.take_teacher("ema", 0.75)
    trainer.export(str(dirs[0]))
    first = trainer.train(distillation_batch(layout.tp, True))
    trainer.export(str(dirs[1]))
    trainer.train(distillation_batch(layout.tp, True))
    trainer.export(str(dirs[2]))
    trainer.export_teacher(str(dirs[3]))
    trainer.export(str(dirs[4]))
    return first


def test_the_average_follows_the_student(pool2, base, tmp_path):
    settings = dataclasses.replace(
        SETTINGS, hf_checkpoint=str(base), tp=2, gkd_teacher="ema", lr=GRADIENT_LR / 10, **PRIVILEGED
    )
    dirs = [tmp_path / str(i) for i in range(5)]
    results = pool2.run(steps_of_an_average, settings, dirs, tp=2)
    start, one, two, average, again = (load_file(path / "adapter_model.safetensors") for path in dirs)
    for name in start:
        assert (two[name] - one[name]).any()
        expected = 0.75 * (0.75 * start[name] + 0.25 * one[name]) + 0.25 * two[name]
        torch.testing.assert_close(average[name], expected, atol=1e-7, rtol=1e-5)
        assert torch.equal(two[name], again[name]), "the student is itself again, bit for bit"
    # At first the average is the student: with another prompt it still has something to teach.
    loss, _, _ = oracle(base, dirs[0], settings, teacher_dir=dirs[0])
    assert results[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_student_teaches_itself(pool2, base, tmp_path):
    settings = dataclasses.replace(SETTINGS, hf_checkpoint=str(base), tp=2, sp=True, gkd_teacher="live", **PRIVILEGED)
    dirs = tmp_path / "a", tmp_path / "b"
    results = pool2.run(train, settings, *dirs, tp=2, sp=True)
    compare(results, *dirs, oracle(base, dirs[0], settings, teacher_dir=dirs[0]))


def export_other(layout: Layout, settings, out, saved):
    from adapted import randomize

    from slime_plugins.lora.rehearsal.trainer import RankTrainer

    trainer = RankTrainer()
    trainer.build(settings)
    randomize(trainer.chunks, scale=0.2)
    trainer.export(str(out))
    trainer.save(str(saved), 1)


OTHERS = {
    "a-smaller-rank": LoRAConfig(rank=2, alpha=9, layout="split"),
    "a-larger-rank": LoRAConfig(rank=9, alpha=3, layout="split"),
    "fewer-targets": LoRAConfig(rank=4, alpha=20, target_modules=("v_proj", "o_proj", "up_proj"), layout="split"),
    "fused": LoRAConfig(rank=5),
}


@pytest.mark.parametrize("of, sp", [("peft", False), ("saved", True)], ids=["peft-tp2", "saved-tp2-sp"])
@pytest.mark.parametrize("lora", OTHERS.values(), ids=OTHERS)
def test_an_adapter_teaches(pool2, base, tmp_path, lora, of, sp):
    """Of other values, ranks, scaling, targets and layout than the student's, from either kind of directory."""
    settings = dataclasses.replace(SETTINGS, hf_checkpoint=str(base), tp=2, sp=sp)
    pool2.run(export_other, dataclasses.replace(settings, lora=lora), tmp_path / "peft", tmp_path / "saved", tp=2)
    dirs = tmp_path / "a", tmp_path / "b"
    results = pool2.run(train, dataclasses.replace(settings, gkd_teacher=str(tmp_path / of)), *dirs, tp=2)
    compare(results, *dirs, oracle(base, dirs[0], settings, teacher_dir=tmp_path / "peft"))


def test_an_adapter_of_more_than_the_student_has_is_refused(pool2, base, tmp_path):
    settings = dataclasses.replace(SETTINGS, hf_checkpoint=str(base), tp=2)
    pool2.run(export_other, settings, tmp_path / "peft", tmp_path / "saved", tp=2)
    student = dataclasses.replace(settings, lora=LoRAConfig(rank=4, target_modules=("q_proj",), layout="split"))
    for path in ("peft", "saved"):
        with pytest.raises(WorkerError) as info:
            pool2.run(train, dataclasses.replace(student, gkd_teacher=str(tmp_path / path)), tmp_path, tmp_path, tp=2)
        assert {kind for kind, _ in info.value.errors.values()} == {"ValueError"}
        assert all("down_proj" in words or "linear_fc" in words for _, words in info.value.errors.values()), info.value
