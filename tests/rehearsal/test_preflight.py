"""What is known before any process starts: defaults, the start's LoRA flags, prompts that do not fit, ``--config``.

pytest tests/rehearsal/test_preflight.py
"""

import argparse
import json
import shutil

import pytest

from slime_plugins.lora.cli import main
from slime_plugins.lora.cli import rehearse as verb
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.rehearsal import devices
from slime_plugins.lora.rehearsal.preflight import prepare
from slime_plugins.lora.rehearsal.settings import Settings, refuse_unread, resolve
from slime_plugins.lora.rehearsal.tiny import make_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("preflight") / "base", "qwen3", num_layers=1)


@pytest.fixture
def own(base, tmp_path):
    """Flags of a run on data of one's own, by destination."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input": "t5 t6", "label": "t7"}\n')
    return {
        "hf_checkpoint": str(base),
        "prompt_data": str(prompts),
        "rollout_max_response_len": 8,
        "out": str(tmp_path / "out"),
        "tp": 1,
    }


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """A PEFT adapter of rank 4 on q and v, and the checkpoint that ``slime-lora import`` makes of it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    where = tmp_path_factory.mktemp("adapters")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(where / "peft")
    command = ["import", "--adapter", where / "peft", "--hf-checkpoint", base, "--out", where / "imported"]
    assert main([str(word) for word in command]) == 0
    return where


def refused(given, words):
    lines = []
    with pytest.raises(ValueError) as info:
        prepare(given, lines.append)
    assert words in str(info.value)
    assert "\n" not in str(info.value)
    return info.value


def test_defaults_depend_on_objective_and_data():
    lora = LoRAConfig()
    assert resolve({}, lora) == Settings()
    own = resolve({"hf_checkpoint": "x", "prompt_data": "y", "lr": 1.0}, lora)
    assert (own.steps, own.n_samples_per_prompt, own.num_steps_per_rollout, own.lr) == (20, 8, 2, 1.0)
    sft = resolve({"objective": "sft"}, lora)
    assert (sft.n_samples_per_prompt, sft.num_steps_per_rollout) == (1, 1)
    sft.check()


@pytest.mark.parametrize(
    "objective, given, words",
    [
        ("sft", {"eps_clip": 0.2}, "--eps-clip is read by --objective grpo, not by sft; drop it"),
        ("sft", {"rollout_temperature": 1.0}, "--rollout-temperature is read by --objective grpo"),
        ("sft", {"show_samples": 1}, "--show-samples is not read by --objective sft: its responses are given"),
        ("grpo", {"gkd_beta": 0.5}, "--gkd-beta is read by --objective gkd, not by grpo; drop it"),
        ("gkd", {"eps_clip": 0.2}, "--eps-clip is read by --objective grpo, not by gkd; drop it"),
        ("grpo", {"response_key": "x"}, "--response-key is not read by --objective grpo"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(objective, given, words):
    with pytest.raises(UsageError, match=words):
        refuse_unread(objective, given)


def test_the_starts_lora_flags_are_taken(own, adapters):
    lines = []
    for start in ({"lora_adapter_path": str(adapters / "peft")}, {"load": str(adapters / "imported")}):
        settings = prepare({**own, **start, "seed": 7}, lines.append)
        lora = settings.lora
        assert (lora.rank, lora.alpha, lora.layout, lora.seed) == (4, 12.0, "split", 7)
        # And said, as flags that give the same again.
        said = next(line.split() for line in lines if "--lora-r 4 --lora-alpha 12 --lora-target-modules" in line)
        assert {"q_proj", "v_proj", "--lora-layout", "split"} <= set(said)
        given = {"lora_r": 4, "lora_alpha": 12.0, "lora_layout": "split"}
        given["lora_target_modules"] = list(lora.target_modules)
        assert prepare({**own, **start, **given, "seed": 7}, lines.append).lora == lora
        # What says nothing of its values may be another.
        assert prepare({**own, **start, "lora_dropout": 0.1}, lines.append).lora.dropout == 0.1
    assert "it has no optimizer state, the optimizer starts anew" in "\n".join(lines)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"lora_r": 8}, "q_proj has rank 4 and scaling 3 there, rank 8 and scaling 1.5 by the flags"),
        ({"lora_alpha": 4.0}, "q_proj has rank 4 and scaling 3 there, rank 4 and scaling 1 by the flags"),
        ({"lora_target_modules": ["q_proj"]}, "v_proj is adapted there, and not by the flags"),
        ({"lora_target_modules": ["all-linear"]}, "is adapted by the flags, and not there"),
        ({"lora_layout": "fused"}, "layout split there, fused by the flags"),
    ],
    ids=str,
)
def test_flags_that_the_start_does_not_fit(own, adapters, flags, words):
    error = refused({**own, "load": str(adapters / "imported"), **flags}, words)
    assert "or give: --lora-r 4 --lora-alpha 12 " in str(error)


def test_the_wrong_kind_of_start(own, adapters, tmp_path):
    refused({**own, "load": str(adapters / "peft")}, "is a PEFT adapter; start from it with --lora-adapter-path")
    refused({**own, "lora_adapter_path": str(tmp_path / "none")}, "none is no adapter checkpoint")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"apply_chat_template": True}, "--apply-chat-template: the tokenizer of"),
        ({"rollout_max_response_len": 511}, "a prompt of 2 tokens and --rollout-max-response-len 511 exceed"),
        ({"eval_data": "/nowhere"}, "--eval-data /nowhere: no such file"),
        ({"eval_interval": 2}, "--eval-interval without --eval-data"),
        ({"use_wandb": True}, "--use-wandb: the package wandb is not installed: pip install wandb"),
        ({"custom_rm_path": "nothing.here"}, "--custom-rm-path nothing.here: no module nothing"),
        ({"lora_r": 65}, "LoRA rank 65 is larger than decoder.layers.0.self_attention.linear_qkv, a 128 x 64 matrix"),
        ({"lora_r": 33, "lora_layout": "split"}, "LoRA rank 33 is larger than model.layers.0.self_attn.k_proj, a 32"),
        ({"lora_r": 10**20}, "LoRA rank 100000000000000000000 is larger than"),
        ({"lora_rank_pattern": {"q_proj": 2}}, "in layout fused they share one A"),
        ({"out": ""}, "--out '': expected a name, not an empty one"),
        ({"save": "a\0b"}, "--save 'a\\x00b': expected a name"),
    ],
    ids=str,
)
def test_refused_before(own, base, tmp_path, changes, words):
    if "apply_chat_template" in changes:
        plain = tmp_path / "no_template"
        shutil.copytree(base, plain)
        for name in ("chat_template.jinja",):
            (plain / name).unlink()
        own["hf_checkpoint"] = str(plain)
    refused({**own, **changes}, words)


def test_out_spares_what_is_read(own, base, adapters, tmp_path):
    inside = "lies in --hf-checkpoint"
    refused({**own, "out": str(base)}, "holds other files")
    refused({**own, "out": str(base / "run")}, inside)
    refused(
        {**own, "lora_adapter_path": str(adapters / "peft"), "out": str(adapters / "peft" / "x")}, "lies in --lora-"
    )
    earlier = tmp_path / "earlier"
    shutil.copytree(adapters / "peft", earlier / "adapter")
    (earlier / "settings.json").write_text("{}")
    start = {"lora_adapter_path": str(earlier / "adapter"), "out": str(earlier)}
    refused({**own, **start}, "would be replaced by this run")
    shutil.copy(own["prompt_data"], earlier / "samples.jsonl")
    refused({**own, "eval_data": str(earlier / "samples.jsonl"), "out": str(earlier)}, "would be replaced by this run")
    assert (earlier / "adapter" / "adapter_config.json").is_file()


def test_a_chat_template_that_is_not_applied_is_noted(own):
    lines = []
    prepare(own, lines.append)
    assert "chat models want --apply-chat-template" in "\n".join(lines)
    lines.clear()
    prepare({**own, "apply_chat_template": True}, lines.append)
    assert not lines


def test_responses_are_looked_at_too(own, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"input": "t5", "label": "t6 " * 512}) + "\n")
    prepare(own, lambda line: None)
    refused(
        {**own, "objective": "sft"}, "a prompt of 1 tokens and a response of 513 exceed this model's 512 positions"
    )


def test_a_teachers_prompts_are_looked_at(own, tmp_path):
    own |= {"objective": "gkd", "gkd_teacher_prompt_template": "{label} {prompt}"}
    prepare(own, lambda line: None)
    refused({**own, "gkd_teacher": str(tmp_path / "none")}, "there is no such directory")
    refused({**own, "gkd_teacher": own["hf_checkpoint"]}, "is no adapter checkpoint")
    refused({**own, "gkd_teacher_prompt_template": "{prompt}"}, "divergence and gradient are exactly 0")
    refused({**own, "gkd_teacher_prompt_template": "{metadata[hint]} {prompt}"}, "there is no metadata[hint]")
    refused({**own, "gkd_teacher_prompt_template": "t4 " * 510 + "{prompt}"}, "a prompt of 512 tokens and")
    refused({**own, "gkd_teacher_prompt_template": ""}, "--gkd-teacher-prompt-template '': expected a name")
    earlier = tmp_path / "out" / "adapter"
    earlier.mkdir(parents=True)
    (tmp_path / "out" / "settings.json").write_text("{}")
    refused({**own, "gkd_teacher": str(earlier)}, "would be replaced")


@pytest.mark.parametrize(
    "gpus, given, tp", [(0, {}, 2), (1, {}, 1), (2, {}, 2), (1, {"pp": 2}, 2), (1, {"device": "cpu"}, 2)], ids=str
)
def test_one_gpu_takes_one_process(own, monkeypatch, gpus, given, tp):
    monkeypatch.setattr(devices, "gpu_count", lambda: gpus)
    del own["tp"]
    if "pp" in given:
        with pytest.raises(UsageError, match="1 layers"):
            prepare({**own, **given}, lambda line: None)
        return
    lines = []
    assert prepare({**own, **given}, lines.append).tp == tp
    assert ("one GPU on this machine: --tp 1" in lines) == (tp == 1)


def test_a_fallback_to_the_cpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(devices, "gpu_count", lambda: 1)
    assert devices.resolve_device(Settings(tp=2)) == "cpu"
    warning = capsys.readouterr().err
    assert "warning: --tp 2 --pp 1 --dp 1 need 2 GPUs, found 1: running on the CPU" in warning
    assert devices.resolve_device(Settings(tp=2, device="cpu")) == "cpu"
    assert devices.resolve_device(Settings(tp=1)) == "cuda"
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match="--device cuda: --tp 2"):
        devices.resolve_device(Settings(tp=2, device="cuda"))


def test_config_reads_back_what_a_run_wrote(own, tmp_path):
    flags = {"lora_r": 3, "lora_alpha": 1.7, "lora_target_modules": ["q_proj", "o_proj"], "lora_layout": "split"}
    flags |= {"lora_exclude_modules": ["*.layers.0.mlp.*"], "lora_alpha_pattern": {"q_proj": 0.3}, "sp": False}
    flags |= {"lora_target_modules": ["q_proj", "o_proj", "up_proj", "linear_fc2"], "micro_batch_size": 4}
    settings = prepare({**own, **flags, "kl_loss_coef": 1e-7, "use_wandb": False}, lambda line: None)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings.to_dict()))
    assert prepare(verb._read_config(str(file)), lambda line: None) == settings


def test_config_of_the_builtin_task_is_the_builtin_task(tmp_path):
    file = tmp_path / "settings.json"
    made = {
        "hf_checkpoint": "/gone/recall-qwen3-0123456789ab",
        "prompt_data": "/gone/recall-qwen3-0123456789ab/prompts.jsonl",
    }
    file.write_text(json.dumps({**Settings(steps=3).to_dict(), **made}))
    given = verb._read_config(str(file))
    assert "hf_checkpoint" not in given
    assert given["steps"] == 3


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected a JSON object of settings, found list"),
        ('{"stepps": 3}', "'stepps' is no setting of a rehearsal"),
        ('{"steps": "many"}', "invalid int value: 'many'"),
        ('{"steps": [3]}', "steps is [3], expected text or a number"),
        ('{"tp": 1.5}', "invalid int value: '1.5'"),
        ('{"sp": "yes"}', "ignored explicit argument 'yes'"),
        ('{"objective": "dpo"}', "invalid choice: 'dpo'"),
        ('{"lora": {"rang": 3}}', "unexpected keyword argument 'rang'"),
        ('{"lora": {"rank": -3}}', "LoRA rank is -3"),
        ('{"lora": 3}', "argument after ** must be a mapping"),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path, capsys, text, words):
    file = tmp_path / "settings.json"
    file.write_text(text)
    assert main(["rehearse", "--config", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"slime-lora: error: --config {file}: ")
    assert words in error
    assert error.count("\n") == 1


def numeric_flags():
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return [action.option_strings[0] for action in parser._actions if action.type in (int, float)]


@pytest.mark.parametrize("name", numeric_flags())
def test_no_flag_takes_a_number_that_is_none(name, tmp_path, capsys, monkeypatch):
    """One line and exit code 2, before any process is started, whatever the flag."""
    from slime_plugins.lora.rehearsal import run

    monkeypatch.setattr(run, "rehearse", lambda *args, **options: pytest.fail("it would have started"))
    needed = {"--save-interval": ["--save", str(tmp_path / "saved")], "--lora-r": ["--tp", "1"]}.get(name, [])
    for value in ("nan", "inf", "-inf", "9" * 20, "-1", "1_000_000_000_000", "", "1e999", "0x10"):
        command = ["rehearse", "--out", str(tmp_path / "out"), *needed, f"{name}={value}"]
        assert main(command) == 2, value
        error = capsys.readouterr().err
        assert error.startswith("slime-lora: error: ")
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_help_leaves_out_what_says_nothing_here(capsys):
    assert main(["rehearse", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "instead of the whole model" not in text
    assert "lora-only-trainable" not in text
    assert "(default: 32; 8)" not in text
    assert "grpo 32 built-in, 8 own data; sft" in text
    assert "SUPPRESS" not in text
