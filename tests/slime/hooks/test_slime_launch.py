"""slime's flags and requests with the plugin in it, on namespaces as slime's parser makes them. Pure.

pytest tests/slime/hooks/test_slime_launch.py
"""

import argparse
import asyncio
import types

import pytest

from slime_plugins.lora import slime as hooks
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.slime.hooks import launch, paths, requests


def parse(*words, **settings):
    """A namespace with slime's own arguments where the checks look, and the LoRA flags parsed from ``words``."""

    @hooks.flags
    def get_slime_extra_args_provider(add_custom_arguments=None):
        def add_slime_arguments(parser):
            parser.add_argument("--lr", type=float, default=1e-4)
            return parser

        return add_slime_arguments

    parser = get_slime_extra_args_provider()(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args(words)
    slime = dict(
        load=None, ckpt_step=None, finetune=False, no_load_optim=False, no_load_rng=False, start_rollout_id=None,
        debug_train_only=False, use_critic=False, colocate=False, save_hf=None, no_save_optim=False, num_layers=3,
        offload_rollout=False, update_weight_transport="nccl", update_weight_mode="full", update_weight_disk_dir=None,
        sglang_enable_lora=False, sglang_max_lora_rank=None, sglang_lora_target_modules=None,
        sglang_max_loras_per_batch=8, sglang_enable_weights_cpu_backup=False, checked=0,
    )  # fmt: skip
    for name, value in (slime | settings).items():
        setattr(args, name, value)
    return args


@hooks.validation
def slime_validate_args(args):
    args.checked += 1
    return "slime's"


def refused(reason, *words, **settings):
    with pytest.raises(UsageError, match=reason):
        slime_validate_args(parse(*words, **settings))


def test_without_use_lora_nothing_changes():
    args = parse()
    before = dict(vars(args), checked=1)
    assert slime_validate_args(args) == "slime's"
    assert vars(args) == before
    assert slime_validate_args(argparse.Namespace(checked=0)) == "slime's"  # a tool with a parser of its own


@pytest.mark.parametrize("flag", ["--lora-sync adapter", "--lora-critic", "--lora-adapter-path x", "--lora-r 4"])
def test_flags_without_use_lora_are_refused(flag):
    refused("without --use-lora", *flag.split())


@pytest.mark.parametrize(
    "words, settings, reason",
    [
        ("--no-lora-only-trainable", {}, "reference policy"),
        ("", dict(only_train_params_name_list=["x"]), "--lora-target-modules"),
        ("", dict(freeze_params_name_list=["x"]), "--lora-target-modules"),
        ("", dict(enable_mtp_training=True), "MTP"),
        ("", dict(fp8_param_gather=True), "FP8"),
        ("", dict(megatron_to_hf_mode="bridge"), "--megatron-to-hf-mode raw"),
        ("", dict(init_model_with_meta_device=True), "drop it"),
        ("", dict(optimizer_cpu_offload=True), "--no-save-optim"),
        ("", dict(use_precision_aware_optimizer=True), "--no-save-optim"),
        ("--lora-critic", {}, "without a critic"),
        ("", dict(use_critic=True, save="d", megatron_config_path=None), "one of its own"),
        ("", dict(use_critic=True, save="d", critic_save=None), "one of its own"),
        ("--lora-save-merged", {}, "give --save-hf too"),
        ("--lora-r 0", {}, "rank is 0"),
        ("--lora-plus-ratio 0.5", {}, "expected at least 1"),
        ("--lora-ref start", dict(use_kl_loss=True), "without --lora-adapter-path"),
        ("--lora-ref start --lora-adapter-path x", dict(use_kl_loss=False, kl_coef=0.0), "add --use-kl-loss"),
        ("--lora-ref start --lora-adapter-path x", dict(kl_coef=0.1, ref_update_interval=2), "moves it"),
        ("--lora-plus-ratio 4", dict(lr_warmup_init=1e-6), "drop --lr-warmup-init"),
        ("--lora-sync adapter", {}, "--lora-sync-dir"),
        ("--lora-sync adapter", dict(update_weight_mode="delta"), "--lora-sync merged"),
        ("--lora-sync adapter", dict(release_train=True), "--lora-sync merged"),
        ("--lora-sync adapter", dict(colocate=True, update_weight_transport="disk"), "drop --update-weight-transport"),
        ("--lora-sync adapter --lora-r 16", dict(colocate=True, sglang_max_lora_rank=8), "has rank 16"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(words, settings, reason):
    refused(reason, "--use-lora", *words.split(), **settings)


def test_an_sglang_without_lora_is_refused():
    args = parse("--use-lora", "--lora-sync", "adapter", colocate=True)
    del args.sglang_enable_lora
    with pytest.raises(UsageError, match="no --enable-lora"):
        slime_validate_args(args)
    args = parse("--use-lora", "--lora-sync", "adapter", colocate=True, offload_rollout=True)
    del args.sglang_enable_weights_cpu_backup
    with pytest.raises(UsageError, match="lose their base"):
        slime_validate_args(args)


def test_sglang_is_told_what_it_will_serve():
    args = parse(
        "--use-lora", "--lora-sync", "adapter", "--lora-r", "4", "--lora-rank-pattern", '{"linear_fc2": 12}',
        "--lora-target-modules", "q_proj,v_proj", "*.layers.2.*.linear_fc2", "--lora-sync-dir", "d",
        update_weight_transport="disk", offload_rollout=True,
    )  # fmt: skip
    slime_validate_args(args)
    assert args.sglang_enable_lora and args.sglang_max_lora_rank == 12
    assert args.sglang_lora_target_modules == ["q_proj", "v_proj", "down_proj"]
    assert args.sglang_max_loras_per_batch == 3
    assert args.sglang_enable_weights_cpu_backup
    assert args.update_weight_transport == "nccl", "slime's train group would wait for a checkpoint on disk"
    args = parse("--use-lora", "--lora-sync", "adapter", update_weight_disk_dir="shared", sglang_max_lora_rank=64)
    slime_validate_args(args)
    assert args.lora_sync_dir == "shared" and args.sglang_max_lora_rank == 64
    assert args.sglang_lora_target_modules == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert not args.sglang_enable_weights_cpu_backup


def checkpoint(root, step, adapter=True):
    directory = root / f"iter_{step:07d}"
    directory.mkdir(parents=True)
    (root / paths.TRACKER).write_text(str(step))
    if adapter:
        (directory / paths.ADAPTER_FILE).write_text("{}")
    return str(root)


def test_load_is_a_base_or_a_run_to_resume(tmp_path):
    resumed = parse("--use-lora", load=checkpoint(tmp_path / "run", 7))
    slime_validate_args(resumed)
    assert (resumed.finetune, resumed.no_load_optim, resumed.start_rollout_id) == (False, False, None)
    base = parse("--use-lora", load=checkpoint(tmp_path / "base", 500, adapter=False))
    slime_validate_args(base)
    assert (base.finetune, base.no_load_optim, base.no_load_rng, base.start_rollout_id) == (True, True, True, 0)
    with pytest.raises(UsageError, match="no checkpoint of step 6"):
        slime_validate_args(parse("--use-lora", load=str(tmp_path / "run"), ckpt_step=6))


def test_paths(tmp_path):
    run = checkpoint(tmp_path / "run", 3)
    checkpoint(tmp_path / "run", 9)
    assert paths.step_dir(run).name == "iter_0000009" and paths.step_dir(run, 3).name == "iter_0000003"
    assert paths.step_dir(run, 4) is None and paths.step_dir(tmp_path) is None
    assert paths.adapter_step_dir(f"{run}/iter_0000003").name == "iter_0000003"
    (tmp_path / "release").mkdir()
    (tmp_path / paths.TRACKER).write_text("release\n")
    assert paths.step_dir(tmp_path).name == "release" and paths.adapter_step_dir(tmp_path) is None


def test_a_critic_gets_adapters_only_when_asked():
    args = parse("--use-lora")
    assert launch.wants_adapters(args, "actor") and not launch.wants_adapters(args, "critic")
    assert launch.wants_adapters(parse("--use-lora", "--lora-critic"), "critic")
    assert not launch.wants_adapters(parse(), "actor")

    def provider():
        return None

    assert launch.model_provider(lambda args, role="actor": provider)(parse()) is provider


@pytest.fixture
def nothing_announced(monkeypatch):
    monkeypatch.setattr(requests, "_announced", None)


def test_requests_name_the_adapter_once_it_is_there(nothing_announced):
    sent = []

    @hooks.naming_adapter
    async def post(url, payload, max_retries=60, headers=None):
        sent.append((url, payload, headers))
        return "answer"

    payload = {"input_ids": [1]}
    generate = "http://10.0.0.1:3000/generate"
    assert asyncio.run(post(generate, payload, headers={"a": "b"})) == "answer"
    assert sent.pop() == (generate, payload, {"a": "b"})

    server = types.SimpleNamespace(router_ip="10.0.0.1", router_port=3000)
    manager = types.SimpleNamespace(_get_updatable_server=lambda: server)
    assert hooks.use_lora_adapter(manager, "run-v000001") == "run-v000001"
    asyncio.run(post(generate, payload))
    assert sent.pop()[1] == {"input_ids": [1], "lora_path": "run-v000001"}
    assert payload == {"input_ids": [1]}, "the caller's payload may be sent again, under a newer adapter"
    asyncio.run(post("http://10.0.0.1:3000/v1/chat/completions", payload))
    assert sent.pop()[1]["lora_path"] == "run-v000001"
    for other in (
        "http://10.0.0.1:3000/abort_request",
        "http://10.0.0.1:3001/generate",  # another model's router: a reference, a reward model
        "http://10.0.0.2:3000/generate",
    ):
        asyncio.run(post(other, payload))
        assert sent.pop()[1] == payload
    asyncio.run(post(generate, {"lora_path": "mine"}))
    assert sent.pop()[1] == {"lora_path": "mine"}
    assert hooks.request_fields(generate) == {"lora_path": "run-v000001"}


def test_the_router_of_args_serves_where_the_server_has_none(nothing_announced):
    args = types.SimpleNamespace(sglang_router_ip="127.0.0.1", sglang_router_port=9)
    hooks.use_lora_adapter(types.SimpleNamespace(_get_updatable_server=lambda: None, args=args), "v1")
    assert hooks.request_fields("http://127.0.0.1:9/generate") == {"lora_path": "v1"}
