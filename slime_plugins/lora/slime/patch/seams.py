"""Where slime meets the plugin: one entry per seam, the symbols as slime names them. Stdlib only.

Known to fit v0.2.4, v0.3.0, v0.3.1 and main of August 2026; ``slime-lora patch check`` says for any other checkout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slime_plugins.lora.slime.patch.edits import AroundAssignment, Decorate, DictEntry, Member, Rebind

_MEGATRON = "slime/backends/megatron_utils"
_ACTOR = f"{_MEGATRON}/actor.py"
_CLASS = "MegatronTrainRayActor"


@dataclass(frozen=True)
class Seam:
    """One thing that slime does and LoRA does differently."""

    name: str
    edits: tuple[tuple[str, Any], ...]
    """(file, edit); with ``either``, the first whose place is there is made, else all of them."""
    either: bool = False
    optional: bool = False
    """A file that a slime version lacks means a feature that it lacks; nothing to do then."""


SEAMS = (
    Seam(
        "flags",
        (
            ("slime/utils/arguments.py", Decorate("get_slime_extra_args_provider", "flags")),
            ("slime/utils/arguments.py", Decorate("slime_validate_args", "validation", ("args",))),
        ),
    ),
    Seam(
        "model",
        (
            (
                f"{_MEGATRON}/model_provider.py",
                Decorate("get_model_provider_func", "model_provider", ("args", "role")),
            ),
        ),
    ),
    Seam(
        "optimizer",
        ((f"{_MEGATRON}/model.py", Rebind("get_megatron_optimizer", "optimizing")),),
    ),
    Seam(
        "checkpoint",
        (
            (
                f"{_MEGATRON}/checkpoint.py",
                Decorate("load_checkpoint", "loading", ("ddp_model", "optimizer", "opt_param_scheduler")),
            ),
            (f"{_MEGATRON}/checkpoint.py", Rebind("save_checkpoint", "saving")),
        ),
    ),
    Seam(
        "Hugging Face save",
        (
            (
                f"{_MEGATRON}/hf_checkpoint_saver.py",
                Decorate("save_hf_model_to_path", "saving_hf", ("args", "output_dir", "model")),
            ),
            (f"{_MEGATRON}/model.py", Decorate("save_hf_model", "saving_hf", ("args", "rollout_id", "model"))),
        ),
        either=True,
    ),
    Seam(
        "policies",
        (
            (
                _ACTOR,
                AroundAssignment(
                    f"{_CLASS}.init",
                    "self.weights_backuper",
                    "self.weights_backuper = slime_lora.weights_backuper(self, self.weights_backuper)",
                    after=True,
                ),
            ),
            (_ACTOR, Decorate(f"{_CLASS}.load_other_checkpoint", "other_policy", ("model_tag", "path"))),
        ),
    ),
    Seam(
        "weight sync",
        (
            (
                _ACTOR,
                AroundAssignment(
                    f"{_CLASS}.init",
                    "self.weight_updater",
                    "update_weight_cls = slime_lora.weight_updater(self, update_weight_cls)",
                    after=False,
                ),
            ),
            (_ACTOR, Decorate(f"{_CLASS}.update_weights", "syncing")),
            (
                f"{_MEGATRON}/update_weight/common.py",
                Decorate("named_params_and_buffers", "base_parameters", ("args", "model")),
            ),
            (
                f"{_MEGATRON}/update_weight/common.py",
                Decorate("all_gather_param", "merging_one", ("name", "param")),
            ),
            (
                f"{_MEGATRON}/update_weight/hf_weight_iterator_direct.py",
                Decorate(
                    "_get_megatron_full_params",
                    "merging_bucket",
                    ("megatron_local_param_infos", "megatron_local_weights"),
                ),
            ),
        ),
    ),
    Seam(
        "requests",
        (
            ("slime/utils/http_utils.py", Decorate("post", "naming_adapter", ("url", "payload"))),
            ("slime/ray/rollout.py", Member("RolloutManager", "use_lora_adapter", "use_lora_adapter")),
        ),
    ),
    Seam(
        "engines of other models",
        (
            (
                "slime/backends/sglang_utils/sglang_config.py",
                Decorate("ModelConfig.resolve", "serving", ("args",)),
            ),
        ),
        optional=True,
    ),
    Seam(
        "requests of the streaming rollout",
        (
            (
                "slime/rollout/sglang_streaming_rollout.py",
                DictEntry("generate_streaming", ("sampling_params", "stream"), "request_fields(url)", ("url",)),
            ),
        ),
        optional=True,
    ),
    Seam(
        "requests of agents",
        (
            (
                "slime/agent/adapters/common.py",
                DictEntry(
                    "call_sglang_generate",
                    ("sampling_params", "return_logprob"),
                    'request_fields(f"{sglang_url}/generate")',
                    ("sglang_url",),
                ),
            ),
        ),
        optional=True,
    ),
    Seam(
        "a teacher's prompts",
        (
            (
                "slime/ray/rollout.py",
                Decorate("RolloutManager._convert_samples_to_train_data", "teacher_prompts", ("samples",)),
            ),
        ),
    ),
    Seam(
        "metrics",
        ((f"{_MEGATRON}/model.py", Decorate("train_one_step", "measuring", ("args", "model"))),),
    ),
)
