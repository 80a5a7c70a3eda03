"""GRPO's arithmetic, prompt files, rewards, settings and output directories, without Megatron or Ray.

pytest tests/rehearsal/test_rehearsal_pure.py
"""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.objectives import OBJECTIVES, make_objective, objective_class, option_names
from slime_plugins.lora.objectives.batch import Batch, make_batch
from slime_plugins.lora.objectives.gkd import at_students_tokens, teacher_view
from slime_plugins.lora.objectives.grpo import GRPO, clipped_policy_loss, group_advantages, k3, sample_mean
from slime_plugins.lora.objectives.objective import ModelOutput
from slime_plugins.lora.objectives.sft import SFT
from slime_plugins.lora.objectives.teacher_prompt import TeacherPrompt
from slime_plugins.lora.rehearsal import outputs
from slime_plugins.lora.rehearsal.encode import Encoder
from slime_plugins.lora.rehearsal.rewards import exact, number
from slime_plugins.lora.rehearsal.settings import Settings
from slime_plugins.lora.rehearsal.task import Keys, Prompt, read_prompts, recall_prompts, shuffled


def test_group_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    advantages = group_advantages(rewards, 4)
    torch.testing.assert_close(advantages[:4], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5, rtol=0)
    assert torch.equal(advantages[4:], torch.zeros(4)), "equal rewards say nothing about which answer is better"


def test_clipping_only_takes_gain_away():
    """Outside the clip range the gradient is gone where the step would go on in that direction, and only there."""
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.1], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss = clipped_policy_loss(ratio, advantages, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-0.5, 0.8, -1.2, 1.5, -1.1]))
    loss.sum().backward()
    assert torch.equal(ratio.grad, torch.tensor([-1.0, 0.0, 0.0, 1.0, -1.0]))


def test_k3_estimates_the_kl():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    estimate = k3(policy.log(), reference.log())
    assert (estimate >= 0).all()
    # In expectation over the policy it is the KL itself.
    torch.testing.assert_close((policy * estimate).sum(), (policy * (policy / reference).log()).sum())
    assert torch.equal(k3(policy.log(), policy.log()), torch.zeros(3))


def test_sample_mean_counts_samples_not_tokens():
    values = torch.tensor([[9.0, 1.0, 3.0], [9.0, 10.0, 9.0]])
    assert sample_mean(values, torch.tensor([[0.0, 1, 1], [0, 1, 0]])) == (2 + 10) / 2


def test_make_batch():
    batch = make_batch([[5, 6, 7], [8]], [[1, 2], [3]], multiple=4, advantages=torch.tensor([1.0, -1.0]))
    assert batch.tokens.tolist() == [[5, 6, 7, 1, 2, 0, 0, 0], [8, 3, 0, 0, 0, 0, 0, 0]]
    assert batch.mask.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.lengths().tolist() == [5, 2]
    assert batch[1:].tokens.shape == (1, 8)
    more = batch.having(score=torch.arange(2))
    assert {name: value.tolist() for name, value in more[1:].fields.items()} == {"advantages": [-1.0], "score": [1]}
    assert "score" not in batch.fields


def output_of(log_probs):
    """A model output whose tokens have these log-probs. Its logits are log-probs over two columns."""
    logits = torch.stack([log_probs, log_probs + 1], dim=-1)
    return ModelOutput(logits, 0, 2, token_log_probs=lambda: log_probs, head=torch.tensor([[0.7], [0.2]]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_do_not_share_memory_with_the_loss(name):
    """Megatron's schedule divides the loss in place; what is logged must not shrink with it."""
    zeros = torch.zeros(2, 3)
    batch = Batch(zeros.long(), torch.tensor([[0.0, 1, 1]] * 2), {"advantages": torch.tensor([1.0, 2.0])})
    objective = make_objective(name, Settings())
    computed = {name: zeros[..., None] + 1 if c.hidden else zeros for name, c in objective.computed.items()}
    batch = objective.prepare(batch).having(**computed)
    loss, metrics = objective.loss(output_of((zeros - 0.5).requires_grad_()), batch)
    before = metrics["loss"].item()
    assert before == loss.item() != 0
    with torch.no_grad():
        loss /= 4
    assert metrics["loss"].item() == before


def test_log_probs_are_computed_once_and_only_if_asked_for():
    asked = []
    output = ModelOutput(torch.zeros(1, 2, 4), 0, 4, token_log_probs=lambda: asked.append(1) or torch.zeros(1, 2))
    assert not asked, "an objective on logits must not pay for them"
    assert output.log_probs is output.log_probs
    assert len(asked) == 1


def test_objectives_take_the_options_that_they_name():
    assert option_names(GRPO) == ("eps_clip", "kl_loss_coef", "rollout_temperature")
    assert make_objective("grpo", Settings(eps_clip=0.3)).eps_clip == 0.3
    assert make_objective("grpo", Settings(rollout_temperature=0.7)).temperature == 0.7
    assert make_objective("sft", Settings(rollout_temperature=0.7)).temperature == 1.0
    rollouts = {name: objective_class(name).rollouts for name in OBJECTIVES}
    assert rollouts == {"grpo": True, "sft": False, "gkd": True}


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_sft_is_the_mean_over_all_tokens_however_samples_are_cut(cut):
    """A mean of the parts' means would weigh a token of a short response more."""
    log_probs = -torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1.0]])
    batch = SFT().prepare(Batch(torch.zeros(4, 6, dtype=torch.int64), mask))
    size = 4 // cut
    parts = [slice(start, start + size) for start in range(0, 4, size)]
    losses = [SFT().loss(output_of(log_probs[rows]), batch[rows])[0] for rows in parts]
    torch.testing.assert_close(sum(losses) / cut, -log_probs[mask > 0].mean())


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"input": "a", "label": "b"', "p.jsonl:3: not JSON"),
        ('["a", "b"]', "p.jsonl:3: expected a JSON object, found list"),
        ('{"prompt": "a", "label": "b"}', "p.jsonl:3: no key 'input' (--input-key), this line has: prompt, label"),
        ('{"input": "a", "answer": "b"}', "p.jsonl:3: no key 'label' (--label-key)"),
        ('{"input": "", "label": "b"}', "p.jsonl:3: 'input' is ''"),
        ('{"input": "a", "label": null}', "p.jsonl:3: 'label' is None"),
    ],
)
def test_broken_prompt_line(tmp_path, line, words):
    path = tmp_path / "p.jsonl"
    path.write_text('{"input": "a", "label": 1}\n\n' + line + "\n")
    with pytest.raises(ValueError) as info:
        read_prompts(path, Keys())
    assert words in str(info.value)


def test_prompt_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"q": "a", "a": 12}\n{"q": [{"role": "user", "content": "b"}], "a": "c"}\n')
    first, second = read_prompts(path, Keys(input="q", label="a"))
    assert (first.prompt, first.label) == ("a", "12")
    assert second.prompt[0]["content"] == "b"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(path, Keys(input="q", label="a"))


def test_shuffled_repeats_everything():
    order = shuffled(range(5), seed=3)
    epochs = [[next(order) for _ in range(5)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = shuffled(range(5), seed=3)
    assert [next(again) for _ in range(5)] == epochs[0]


def test_recall_labels_are_right():
    for row in recall_prompts(50, seed=1):
        *digits, ordinal = row["input"].split()
        assert len(set(digits)) == 5, "a digit shown twice would make guessing right more often"
        assert digits[["first", "second", "third", "fourth", "fifth"].index(ordinal)] == row["label"]


@pytest.mark.parametrize(
    "reward, response, label, expected",
    [
        (exact, " 7 ", "7", 1.0),
        (exact, "7 7", "7", 0.0),
        (exact, "", "7", 0.0),
        (number, "3 + 4 = 7, so the answer is 7.", "7", 1.0),
        (number, "it is 1,234.50", "#### 1234.5", 1.0),
        (number, "7 or 8", "7", 0.0),
        (number, "seven", "7", 0.0),
        (number, "seven", "seven", 0.0),
        (number, "-3", "3", 0.0),
    ],
)
def test_rewards(reward, response, label, expected):
    assert reward(response, label) == expected


GKD = {"objective": "gkd", "n_samples_per_prompt": 1, "gkd_teacher_prompt_template": "{label} {prompt}"}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": 0}, "--steps 0"),
        ({"tp": 0}, "--tp 0"),
        ({"n_samples_per_prompt": 1}, "--n-samples-per-prompt 1"),
        ({"objective": "sft"}, "--n-samples-per-prompt 16: --objective sft trains on the one response"),
        ({"steps": 10**20}, "--steps 100000000000000000000: expected a whole number from 1 to"),
        ({"tp": 10**9}, "processes on this machine, expected at most 64"),
        ({"seed": 10**20}, "--seed 100000000000000000000: expected a whole number from 0 to"),
        ({"seed": -1}, "--seed -1"),
        ({"lr": float("nan")}, "--lr nan: expected a number above 0"),
        ({"lr": float("inf")}, "--lr inf"),
        ({"rollout_temperature": float("nan")}, "--rollout-temperature nan"),
        ({"kl_loss_coef": float("nan")}, "--kl-loss-coef nan"),
        ({"clip_grad": float("inf")}, "--clip-grad inf"),
        ({"rollout_batch_size": 10**9}, "samples per step"),
        ({"wandb_project": "x"}, "--wandb-project without --use-wandb"),
        ({"load": "a", "lora_adapter_path": "b"}, "leave one of them out"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"rollout_temperature": -1.0}, "--rollout-temperature -1.0"),
        ({"kl_loss_coef": -0.1}, "--kl-loss-coef -0.1"),
        ({"tp": 1, "sp": True}, "--sp"),
        ({"vpp": 2}, "--vpp 2 --pp 1"),
        ({"prompt_data": "x"}, "go together"),
        ({"dp": 3}, "512 samples per step"),
        ({"micro_batch_size": 3}, "--micro-batch-size 3"),
        ({"pp": 3, "vpp": 2}, "multiple of --pp 3"),
        ({**GKD, "gkd_beta": 1.5}, "--gkd-beta 1.5: expected a number from 0 to 1"),
        ({**GKD, "gkd_beta": float("nan")}, "--gkd-beta nan"),
        ({**GKD, "gkd_lmbda": -0.1}, "--gkd-lmbda -0.1: expected a number from 0 to 1"),
        ({**GKD, "gkd_temperature": 0.0}, "--gkd-temperature 0.0: expected a number above 0"),
        ({**GKD, "sft_alpha": float("inf")}, "--sft-alpha inf"),
        ({**GKD, "gkd_teacher": "ema", "gkd_ema_decay": 1.0}, "--gkd-ema-decay 1.0"),
        (
            {**GKD, "gkd_teacher": "live", "gkd_teacher_prompt_template": None, "sft_alpha": 0.1},
            "--gkd-teacher live: the student is its own teacher at every step",
        ),
        ({**GKD, "gkd_ema_decay": 0.9}, "--gkd-ema-decay is not read with --gkd-teacher base; drop it"),
        ({**GKD, "gkd_chunk_size": 0}, "--gkd-chunk-size 0"),
        ({**GKD, "n_samples_per_prompt": 4}, "--n-samples-per-prompt 4 with --gkd-lmbda 0.5"),
        ({**GKD, "sft_alpha": 0.1, "gkd_lmbda": 1.0}, "--sft-alpha 0.1 with --gkd-lmbda 1"),
        ({**GKD, "gkd_teacher": "ema", "load": "x"}, "--load with --gkd-teacher ema: the average is in no checkpoint"),
    ],
)
def test_settings_are_checked(changes, words):
    with pytest.raises(UsageError) as info:
        dataclasses.replace(Settings(), **changes).check()
    assert words in str(info.value)


NOTHING = "divergence and gradient are exactly 0 and nothing can be learnt"


@pytest.mark.parametrize("template", [None, "{prompt}", " {prompt} ", "{prompt}\\n"])
def test_a_student_that_is_its_teacher_is_refused(template):
    """One checkpoint as teacher and student, as it is commonly set up: it runs, and nobody is told."""
    same = dataclasses.replace(Settings(), **{**GKD, "gkd_teacher_prompt_template": template})
    for changes, why in (
        ({}, "the adapters start as nothing (B = 0)"),
        ({"gkd_beta": 0.0, "gkd_lmbda": 1.0, "gkd_temperature": 2.0}, "the adapters start as nothing"),
        ({"gkd_teacher": "ema"}, "the average starts as the student"),
        ({"gkd_teacher": "ema", "lora_adapter_path": "a"}, "the average starts as the student"),
        ({"gkd_teacher": "a", "lora_adapter_path": "a"}, "the student starts from it"),
    ):
        with pytest.raises(UsageError) as info:
            dataclasses.replace(same, **changes).check()
        assert why in str(info.value)
        assert NOTHING in str(info.value)
        assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"gkd_teacher_prompt_template": "{metadata[hint]} {prompt}"},
        {"sft_alpha": 0.5},
        {"gkd_teacher": "another"},
        {"lora_adapter_path": "a"},
        {"load": "a"},
        {"gkd_teacher": "b", "lora_adapter_path": "a"},
    ],
    ids=str,
)
def test_what_there_is_to_learn_is_not_refused(changes):
    dataclasses.replace(Settings(), **{**GKD, "gkd_teacher_prompt_template": None, **changes}).check()


def test_lambda_is_the_share_of_steps_on_samples():
    objective = make_objective("gkd", Settings(gkd_lmbda=0.3))
    decided = [objective.on_policy(step, seed=5) for step in range(4000)]
    assert sum(decided) / 4000 == pytest.approx(0.3, abs=0.03)
    assert decided == [objective.on_policy(step, seed=5) for step in range(4000)], "a resumed run decides alike"
    for lmbda in (0.0, 1.0):
        objective = make_objective("gkd", Settings(gkd_lmbda=lmbda))
        assert {objective.on_policy(step, seed=5) for step in range(100)} == {bool(lmbda)}


def test_teacher_prompt():
    template = TeacherPrompt("{{A}} {label} {metadata[hint]} {prompt}")
    assert template.of("what?", "7", {"hint": 3}) == "{A} 7 3 what?"
    assert template.of("a {label} in a prompt", "7", {"hint": 3}) == "{A} 7 3 a {label} in a prompt"
    lines = TeacherPrompt(r"system\n{label}\n{prompt}")
    assert lines.of(r"a \nu", r"\nabla", {}) == "system\n\\nabla\na \\nu", "in the template alone"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "what?"}]
    assert template.of(messages, "7", {"hint": 3}) == [messages[0], {"role": "user", "content": "{A} 7 3 what?"}]
    with pytest.raises(ValueError, match=r"there is no metadata\[hint\] for the prompt 'what\?'"):
        template.of("what?", "7", {})
    with pytest.raises(ValueError, match="there is no label"):
        template.of("what?", None, {"hint": 3})
    with pytest.raises(ValueError, match="expected one with text as content"):
        template.of([{"role": "user", "content": [{"type": "image"}]}], "7", {"hint": 3})


@pytest.mark.parametrize(
    "template", ["{answer}", "{prompt.__class__}", "{}", "{prompt", "}", "{metadata}", "{prompt!r}"]
)
def test_a_wrong_teacher_prompt_is_named(template):
    with pytest.raises(UsageError, match=r"expected \{prompt\}, \{label\} or"):
        TeacherPrompt(template)


def test_the_teachers_states_go_where_the_student_has_its_tokens():
    """Of prompts of 2 and 1 tokens before responses of 2 and 3, shown to the teacher as prompts of 1 and 3."""
    student = make_batch([[5, 6], [7]], [[1, 2], [1, 2, 3]], multiple=1)
    shown = make_batch([[4], [4, 4, 4]], [[1, 2], [1, 2, 3]], multiple=2)
    view = teacher_view(student.having(teacher_tokens=shown.tokens, teacher_mask=shown.mask))
    assert torch.equal(view.tokens, shown.tokens)
    states = torch.arange(12.0).view(2, 6, 1) + 1
    aligned = at_students_tokens(states, view)[..., 0]
    assert aligned.tolist() == [[0, 1, 2, 0], [9, 10, 11, 0]]
    assert torch.equal(teacher_view(student).tokens, student.tokens), "without a prompt of its own, the student's"


def test_microbatches():
    def count(samples, seq_length, **changes):
        return dataclasses.replace(Settings(), **changes).num_microbatches(samples, seq_length)

    assert count(256, 8) == 1
    assert count(256, 64) == 4, "16,384 tokens in pieces of 4,096"
    assert count(256, 8, pp=2) == 2, "fewer would leave a stage idle"
    assert count(12, 10_000, pp=2, vpp=2) == 12, "as small as they get, where nothing fits"
    assert count(6, 8, pp=4) == 6
    assert count(256, 8, micro_batch_size=64) == 4


def test_out_is_claimed_or_refused(tmp_path):
    out = tmp_path / "out"
    assert outputs.claim(out) is False
    (out / outputs.SETTINGS).write_text("{}")
    (out / outputs.ADAPTER).mkdir()
    (out / outputs.METRICS).write_text(json.dumps({"step": 1}))
    (out / outputs.SAMPLES).touch()
    (out / "notes.txt").write_text("mine")
    assert outputs.claim(out) is True
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", outputs.SETTINGS]
    (out / outputs.SETTINGS).unlink()
    with pytest.raises(UsageError, match="holds other files"):
        outputs.claim(out)
    with pytest.raises(UsageError, match="is a file"):
        outputs.claim(out / "notes.txt")


@pytest.mark.parametrize("names", [("reward", "kl"), ("loss", "eval_reward")])
def test_curve_is_drawn(tmp_path, names):
    steps = [{"step": i, "reward": i / 9, "kl": 0.1 * i, "loss": -0.1 * i} for i in range(1, 10)]
    path = outputs.draw_curve(tmp_path, steps, "a title", names)
    assert path.name in outputs.CURVES
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_prompts_become_tokens(tmp_path, family):
    """As AutoTokenizer reads them for the family; a prompt of no token, which nothing can follow, is named."""
    from slime_plugins.lora.rehearsal.tiny import make_tiny

    encoder = Encoder.read(make_tiny(tmp_path / "base", family), apply_chat_template=False, max_positions=5)
    assert encoder.template_unused
    assert encoder.prompts(["t10 t9", "t4"], room=2) == [[10, 9], [4]]
    assert encoder.pairs(["t10 t9"], ["t5 t6"], end=2) == ([[10, 9]], [[5, 6, 2]])
    with pytest.raises(ValueError, match="makes no token of the prompt ''"):
        encoder.prompts(["t4", ""], room=2)
    with pytest.raises(ValueError, match="a prompt of 4 tokens and --rollout-max-response-len 2 exceed"):
        encoder.prompts(["t4 t4 t4 t4"], room=2)
    with pytest.raises(ValueError, match="a prompt of 3 tokens and a response of 3 exceed this model's 5 positions"):
        encoder.pairs(["t4 t4 t4"], ["t5 t6"], end=2)
    encoder.tokenizer.chat_template = None
    with pytest.raises(
        UsageError, match=r"prompts that are lists of messages: the tokenizer of .* has no chat template"
    ):
        encoder.prompts([[{"role": "user", "content": "t4"}]], room=2)


def test_prompt_lines_carry_response_and_metadata(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"input": "a", "answer": "b", "metadata": {"k": 1}}\n')
    keys = Keys(label_required=False, response="answer")
    assert read_prompts(path, keys) == [Prompt("a", None, "b", {"k": 1})]
    path.write_text('{"input": "a", "answer": "b", "metadata": [1]}\n')
    with pytest.raises(ValueError, match=r"p.jsonl:1: 'metadata' .--metadata-key. is .1., expected a JSON object"):
        read_prompts(path, keys)
    path.write_bytes(b'{"input": "\xff"}\n')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(path, keys)


def test_wandb_is_told_what_tensorboard_is(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda exit_code: calls.append(exit_code)
    )
    fake = types.SimpleNamespace(
        login=lambda **options: calls.append(options), init=lambda **options: calls.append(options) or run
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = Settings(use_wandb=True, wandb_key="secret", wandb_project="p", wandb_team="t")
    with outputs.Recorder(tmp_path, settings) as recorder:
        recorder.step({"step": 1, "reward": 0.5})
    login, init, *rest = calls
    assert login == {"key": "secret", "host": None}
    assert (init["project"], init["entity"], init["config"]["lr"]) == ("p", "t", 5e-3)
    assert rest == [(1, {"reward": 0.5}), 0]
    assert "secret" not in (tmp_path / outputs.SETTINGS).read_text() + json.dumps(init["config"])


def test_the_trainer_is_there_before_megatron_is():
    """Ranks unpickle it, and only then make torch fit for a CPU: what Megatron compiles on import stays compiled."""
    code = "import sys, slime_plugins.lora.rehearsal.trainer; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
