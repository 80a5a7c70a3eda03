"""slime's flags and requests with the plugin in it, on namespaces as slime's parser makes them. Pure.

pytest tests/slime/hooks/test_slime_launch.py
"""

import argparse
import asyncio
import concurrent.futures
import json
import sys
import types

import pytest
import ray_stand_in
from packaging.version import Version

from slime_plugins.lora import slime as hooks
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.slime.hooks import launch, paths, refusals, requests
from slime_plugins.lora.slime.hooks.refusal import Launch, adapted_linears


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
        sglang_max_loras_per_batch=8, sglang_enable_weights_cpu_backup=False, sglang_weight_version="default",
        sglang_disable_shared_experts_fusion=False, checked=0,
    )  # fmt: skip
    for name, value in (slime | settings).items():
        setattr(args, name, value)
    return args


@hooks.validation
def slime_validate_args(args):
    args.checked += 1
    return "slime's"


SHARED = dict(num_experts=8, moe_shared_expert_intermediate_size=64)
LATENT = dict(multi_latent_attention=True, q_lora_rank=16, colocate=True)


EVALUATED = dict(eval_interval=2, save="s", eval_datasets=[types.SimpleNamespace(name="a")])


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
        ("--optim paged_adamw_32bit", {}, "drop it: .*21 MiB a GPU.* nothing to page"),
        ("--lora-r 0", {}, "rank is 0"),
        ("--lora-plus-ratio 0.5", {}, "expected at least 1"),
        ("--lora-ref start", dict(use_kl_loss=True), "without --lora-adapter-path"),
        ("--lora-ref start --lora-adapter-path x", dict(use_kl_loss=False, kl_coef=0.0), "add --use-kl-loss"),
        ("--lora-ref start --lora-adapter-path x", dict(kl_coef=0.1, ref_update_interval=2), "moves it"),
        ("--lora-plus-ratio 4", dict(lr_warmup_init=1e-6), "drop --lr-warmup-init"),
        ("--lr-plateau-metric val_loss", {}, "needs --val-data and --val-interval"),
        ("--val-interval 3", {}, "go together"),
        ("--val-data x", {}, "go together"),
        ("--val-data x --val-interval 0", {}, "expected 1 or more"),
        ("--lr-plateau-metric eval/a", {}, "needs --eval-interval"),
        ("--lr-plateau-metric eval/a", dict(eval_interval=2, debug_train_only=True), "use val_loss"),
        ("--lr-plateau-metric eval/a", dict(EVALUATED, update_weights_interval=4, num_rollout=9), "multiple of it"),
        ("--lr-plateau-metric eval/a", dict(EVALUATED, update_weights_interval=2, num_rollout=None), "--num-rollout"),
        ("--lr-plateau-metric eval/a", dict(eval_interval=2, save=None), "needs? --save"),
        ("--lr-plateau-metric eval/a", dict(EVALUATED, release_train=True), "--release-train ends the trainer"),
        ("--lr-plateau-metric eval/a", dict(EVALUATED, debug_rollout_only=True), "does not train here"),
        ("--lr-plateau-metric eval/b", EVALUATED, "no such evaluation, .* name a"),
        ("--lr-plateau-metric loss", EVALUATED, "expected val_loss or eval/NAME"),
        ("--lr-plateau-metric eval/a --stop-min-lr 1", EVALUATED, "below --lr"),
        ("--lr-plateau-patience 3", {}, "without --lr-plateau-metric"),
        ("--val-data x --val-interval 1", dict(save="s", qkv_format="bshd"), "use --qkv-format thd"),
        ("--val-data x --val-interval 1", dict(save="s", multimodal_keys="{}"), "drop one of them"),
        ("--lora-sync adapter", {}, "--lora-sync-dir"),
        ("--lora-sync adapter", dict(update_weight_mode="delta"), "--lora-sync merged"),
        ("--lora-sync adapter", dict(release_train=True), "--lora-sync merged"),
        ("--lora-sync adapter", dict(colocate=True, update_weight_transport="disk"), "drop --update-weight-transport"),
        ("--lora-sync adapter --lora-r 16", dict(colocate=True, sglang_max_lora_rank=8), "has rank 16"),
        ("", dict(moe_router_enable_expert_bias=True, moe_router_bias_update_rate=1e-3), "rate 0"),
        ("--lora-adapter-path a", dict(update_weight_mode="delta"), "--update-weight-mode full"),
        ("", dict(use_transformer_engine_op_fuser=True), "never calls the adapters; drop it"),
        ("", dict(moe_shared_expert_overlap=True, **SHARED), "--lora-exclude-modules shared_experts.linear_fc1"),
        ("", dict(num_experts=8, tensor_model_parallel_size=2), "stops at the first step; add --sequence-parallel"),
        ("", dict(megatron_deepgemm_forward_layers="all"), "drop them"),
        ("", dict(megatron_deepgemm_moe_forward_layers="all"), "drop them"),
        ("", dict(overlap_moe_expert_parallel_comm=True, fp8="e4m3", num_experts=8), "--lora-exclude-modules experts"),
        ("", dict(delay_wgrad_compute=True), "Pop empty queue.*drop it"),
        ("", dict(enable_cuda_graph=True), "drop them"),
        ("", dict(cuda_graph_impl="transformer_engine"), "drop them"),
        ("--lora-sync adapter", dict(check_weight_update_equal=True), "use --lora-sync merged"),
        ("--lora-sync adapter", dict(sglang_dp_size=2), "--rollout-num-gpus-per-engine"),
        ("--lora-sync adapter", dict(sglang_enable_dp_attention=True), "--lora-sync merged"),
        ("--lora-sync adapter", dict(sglang_speculative_algorithm="EAGLE"), "NGRAM alone .*drop it"),
        ("--lora-sync adapter", dict(sglang_tokenizer_worker_num=4), "drop it"),
        ("--lora-sync adapter", dict(sglang_moe_runner_backend="deep_gemm", num_experts=8), "use triton"),
        ("--lora-sync adapter", dict(sglang_moe_a2a_backend="deepep", num_experts=8), "drop it"),
        ("--lora-sync adapter", dict(sglang_max_loaded_loras=1), "drop the flag"),
        ("--lora-sync adapter --lora-target-modules router linear_fc1", dict(num_experts=8), "leave it out"),
        ("--lora-sync adapter --lora-target-modules q_proj", {}, "target linear_qkv"),
        ("--lora-sync adapter --lora-target-modules k_proj v_proj", {}, "target linear_qkv"),
        ("--lora-sync adapter --lora-target-modules up_proj", {}, "target linear_fc1"),
        ("--lora-sync adapter --lora-target-modules q_a_proj", LATENT, "target both"),
        ("--lora-sync adapter", {**LATENT, "q_lora_rank": None}, "--lora-exclude-modules linear_q_proj"),
        ("--lora-sync adapter --trainable-token-indices 5", dict(colocate=True), "them; use --lora-sync merged"),
        ("--lora-sync adapter --lora-sync-lag 3", dict(colocate=True, sglang_max_loras_per_batch=3), "at least that"),
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
    assert args.sglang_max_loras_per_batch == 2, "the current version and the one before"
    assert args.sglang_weight_version == "slime-lora" and not args.sglang_disable_shared_experts_fusion
    assert args.sglang_enable_weights_cpu_backup
    assert args.update_weight_transport == "nccl", "slime's train group would wait for a checkpoint on disk"
    args = parse("--use-lora", "--lora-sync", "adapter", update_weight_disk_dir="shared", sglang_max_lora_rank=64)
    slime_validate_args(args)
    assert args.lora_sync_dir == "shared" and args.sglang_max_lora_rank == 64
    assert args.sglang_lora_target_modules == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert not args.sglang_enable_weights_cpu_backup


def base_dir(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_what_the_base_says_is_looked_at(tmp_path):
    gated = base_dir(tmp_path, model_type="qwen3_next", layer_types=["linear_attention", "full_attention"])
    refused("--context-parallel-size 1", "--use-lora", hf_checkpoint=gated, context_parallel_size=2)
    slime_validate_args(parse("--use-lora", hf_checkpoint=gated, context_parallel_size=1))
    adapter = ("--use-lora", "--lora-sync", "adapter")
    refused("room for the gate", *adapter, "--lora-target-modules", "linear_qkv", hf_checkpoint=gated, colocate=True)
    codes = base_dir(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused("`slime-lora dequantize`.*the codes as --ref-load", "--use-lora", hf_checkpoint=codes, colocate=True)
    slime_validate_args(parse("--use-lora", hf_checkpoint=codes, debug_train_only=True))  # no engine starts from it
    nested = base_dir(tmp_path, text_config={"model_type": "qwen2_moe"})
    launch_of = [*adapter, "--lora-target-modules", "experts.linear_fc1"]
    refused("SGLang 0.5.23 or newer", *launch_of, hf_checkpoint=nested, num_experts=8, colocate=True)
    rows = refusals.refused(Launch(parse(*launch_of, hf_checkpoint=nested, num_experts=8), Version("0.5.23")))
    assert rows == []


def test_linear_attention_is_served_under_sglangs_names(tmp_path):
    """Every layer has one kind of attention; what the engines make room for is what these layers have."""
    kinds = {"linear_num_key_heads": 2, "layer_types": ["linear_attention", "linear_attention", "full_attention"]}
    text = base_dir(tmp_path, model_type="qwen3_5", text_config=kinds | {"model_type": "qwen3_5_text"})
    adapter = ("--use-lora", "--lora-sync", "adapter")
    args = parse(*adapter, hf_checkpoint=text, colocate=True, num_layers=3)
    slime_validate_args(args)
    assert set(args.sglang_lora_target_modules) == {
        "in_proj_qkvz", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    found = {(layer, path) for layer, path, _ in adapted_linears(args) if path.startswith("self_attention")}
    linear = {f"self_attention.linear_attn.{leaf}" for leaf in ("in_proj_qkv", "in_proj_z", "out_proj")}
    attention = {"self_attention.linear_qkv", "self_attention.linear_proj"}
    assert found == {(n, path) for n in (0, 1) for path in linear} | {(2, path) for path in attention}
    gates = [*adapter, "--lora-target-modules", "in_proj_a", "in_proj_b"]
    refused("SGLang serves no adapter of in_proj_a", *gates, hf_checkpoint=text, colocate=True, num_layers=3)
    interval = base_dir(tmp_path, model_type="qwen3_next", linear_num_key_heads=2, full_attention_interval=2)
    words = [*adapter, "--lora-target-modules", "in_proj_qkvz"]
    refused("in Qwen3.5 alone", *words, hf_checkpoint=interval, colocate=True, num_layers=4)


def test_merged_weights_into_a_quantised_engine_are_warned_of(tmp_path):
    unknown = base_dir(tmp_path, model_type="qwen3", quantization_config={"quant_method": "mxfp4"})
    with pytest.warns(UserWarning, match="sync_lost.*does not see it; --lora-sync adapter"):
        slime_validate_args(parse("--use-lora", hf_checkpoint=unknown))
    quantised = base_dir(tmp_path, model_type="qwen3", quantization_config={"quant_method": "fp8"})
    with pytest.warns(UserWarning, match=r"measured after .*\(FP8, one scale per tensor\).*--lora-sync adapter"):
        slime_validate_args(parse("--use-lora", hf_checkpoint=quantised))
    slime_validate_args(parse("--use-lora", "--lora-sync", "adapter", hf_checkpoint=quantised, colocate=True))


def test_experts_and_shared_experts_are_served_apart():
    """SGLang would fuse them, and wraps experts for gate, up and down together or not at all."""
    args = parse("--use-lora", "--lora-sync", "adapter", "--lora-target-modules", "experts.linear_fc2",
                 colocate=True, **SHARED)  # fmt: skip
    slime_validate_args(args)
    assert args.sglang_lora_target_modules == ["gate_proj", "up_proj", "down_proj"]
    assert args.sglang_disable_shared_experts_fusion


def test_targets_that_sglang_was_given_have_all_that_is_sent():
    """It leaves out experts in silence where it was told gate, up or down alone, and refuses the adapter elsewhere."""
    words = ("--use-lora", "--lora-sync", "adapter", "--lora-target-modules", "experts.linear_fc2")
    own = dict(colocate=True, **SHARED)
    refused(
        "--sglang-lora-target-modules has no gate_proj up_proj, which the adapter needs; add them, or drop the flag",
        *words, sglang_lora_target_modules=["down_proj", "q_proj"], **own,
    )  # fmt: skip
    for enough in (["all"], ["down_proj", "q_proj", "up_proj", "gate_proj"]):
        args = parse(*words, sglang_lora_target_modules=enough, **own)
        slime_validate_args(args)
        assert args.sglang_lora_target_modules == enough


def test_how_many_versions_stay_loaded():
    for words, settings, kept in (
        ("", {}, 2),
        ("", dict(partial_rollout=True, update_weights_interval=4), 2),
        ("", dict(max_policy_version_lag=3), 4),
        ("--lora-sync-lag 2", dict(max_policy_version_lag=3), 3),
        ("--lora-sync-lag 0", {}, 2),  # the new one is loaded before the old one goes
    ):
        args = parse("--use-lora", "--lora-sync", "adapter", *words.split(), colocate=True, **settings)
        slime_validate_args(args)
        assert refusals.versions_kept(args) == args.sglang_max_loras_per_batch == kept


def test_models_that_get_no_weights_keep_the_users_settings():
    """--sglang-config with a frozen reward model beside the trained one."""

    @hooks.serving
    def resolve(self, args):
        return "slime's"

    args = parse("--use-lora", "--lora-sync", "adapter", colocate=True, offload_rollout=True)
    slime_validate_args(args)
    assert args.sglang_enable_lora and args.sglang_enable_weights_cpu_backup

    def model(name, update_weights, **overrides):
        group = types.SimpleNamespace(overrides={"model_path": "m", **overrides})
        return types.SimpleNamespace(name=name, update_weights=update_weights, server_groups=[group])

    trained, frozen = model("policy", True), model("judge", False)
    own = model("own", False, **{"max-lora-rank": 8, "enable_lora": True})
    for each in (trained, frozen, own):
        assert resolve(each, args) == "slime's"
    assert trained.server_groups[0].overrides == {"model_path": "m"}
    assert frozen.server_groups[0].overrides == {
        "model_path": "m", "enable_lora": False, "max_lora_rank": None, "lora_target_modules": None,
        "max_loras_per_batch": 8, "weight_version": "default", "enable_weights_cpu_backup": False,
        "disable_shared_experts_fusion": False,
    }  # fmt: skip
    assert own.server_groups[0].overrides["enable_lora"] is True
    assert own.server_groups[0].overrides["max-lora-rank"] == 8
    resolve(model("judge", False), parse())


def test_the_first_model_is_the_one_that_slimes_rollouts_ask():
    @hooks.serving
    def resolve(self, args):
        return None

    def model(name, update_weights):
        return types.SimpleNamespace(name=name, update_weights=update_weights, server_groups=[])

    for words in ("--use-lora", "--use-lora --lora-sync adapter"):
        args = parse(*words.split(), colocate=True)
        with pytest.raises(UsageError, match=r"its first model 'judge' gets no weights.*list the trained model first"):
            resolve(model("judge", False), args)
        args = parse(*words.split(), colocate=True)
        for each in (model("policy", True), model("judge", False)):
            resolve(each, args)
    resolve(model("judge", False), parse())  # slime's own business


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
    monkeypatch.setattr(requests, "_unproven", None)


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
    manager = types.SimpleNamespace(_get_updatable_server=lambda: server, args=types.SimpleNamespace())
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


def test_offloaded_engines_are_proven_before_the_first_request(nothing_announced, monkeypatch):
    """While the trainer syncs they have no memory to compute in. A proof that fails fails every request."""
    monkeypatch.setitem(sys.modules, "ray", ray_stand_in.module())
    asked = []

    def answer(endpoint, payload):
        asked.append((endpoint, payload["lora_path"], payload["sampling_params"]["max_new_tokens"]))
        return {"text": "t"}

    engine = types.SimpleNamespace(_make_request=types.SimpleNamespace(remote=answer))
    server = types.SimpleNamespace(router_ip="127.0.0.1", router_port=9, engines=[engine, None])
    args = types.SimpleNamespace(offload_rollout=True, lora_sync_timeout=5.0)
    manager = types.SimpleNamespace(_get_updatable_server=lambda: server, args=args)
    hooks.use_lora_adapter(manager, "v1")
    assert asked == []
    for _ in range(2):
        assert hooks.request_fields("http://127.0.0.1:9/generate") == {"lora_path": "v1"}
    assert asked == [("generate", "v1", 1), ("generate", "slime-lora-base", 1)]

    def broken(endpoint, payload):
        future = concurrent.futures.Future()
        future.set_exception(ValueError("400 Client Error"))
        return future

    engine._make_request.remote = broken
    hooks.use_lora_adapter(manager, "v2")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="engine 0 of 1, generate with lora_path v2: 400 Client Error"):
            hooks.request_fields("http://127.0.0.1:9/generate")


def test_a_start_with_a_head_beside_it_is_refused_in_either_form(tmp_path):
    """What it trains and writes has no head: one that goes missing on the way would be missed much later."""
    import torch

    from slime_plugins.lora.peft.extra import put_extra
    from slime_plugins.lora.slime.hooks import checkpoints

    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "adapter.json").write_text("{}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    put_extra(tmp_path, {"score.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"whole modules were trained \(score\.weight\), which would be lost"):
        checkpoints._start_from([], str(tmp_path))
