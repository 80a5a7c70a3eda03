"""What adapter sync asks of SGLang's engines, as their arguments. Light: imported in every process."""

from __future__ import annotations

import functools
from argparse import Namespace

from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import hf_names
from slime_plugins.lora.server.names import MARK, served_leaf
from slime_plugins.lora.slime.hooks.refusal import Launch, adapted_linears
from slime_plugins.lora.slime.hooks.refusals import versions_kept

SGLANG_LORAS_PER_BATCH = 8
"""SGLang's default for --max-loras-per-batch: GPU memory for that many adapters."""
SERVING = {
    "enable_lora": None,
    "max_lora_rank": None,
    "lora_target_modules": None,
    "max_loras_per_batch": SGLANG_LORAS_PER_BATCH,
    "weight_version": "default",
    "enable_weights_cpu_backup": False,
    "disable_shared_experts_fusion": False,
}
"""SGLang's arguments that adapter sync sets, for the engines of the trained model alone, with SGLang's defaults."""


def serve_adapters(args: Namespace) -> None:
    """Set SGLang's LoRA arguments from the LoRA flags; ``args.lora_serving`` is what they were before.

    Raises:
        UsageError: an SGLang, or settings of it, that cannot serve this adapter.
    """
    before = {name: getattr(args, f"sglang_{name}") for name in SERVING if hasattr(args, f"sglang_{name}")}
    _set_sizes(args)
    args.sglang_weight_version = MARK  # by which the server's plugin knows the engines of a run
    _set_shared_experts(args)
    _set_offload(args)
    _set_way(args)
    args.lora_serving = before


def _set_sizes(args: Namespace) -> None:
    if not hasattr(args, "sglang_enable_lora"):
        raise UsageError("--lora-sync adapter: this SGLang has no --enable-lora; use --lora-sync merged")
    config = LoRAConfig.from_args(args)
    rank = max([config.rank, *config.rank_pattern.values()])
    if args.sglang_max_lora_rank is not None and args.sglang_max_lora_rank < rank:
        raise UsageError(f"--sglang-max-lora-rank is {args.sglang_max_lora_rank}, but the adapter has rank {rank}")
    args.sglang_enable_lora = True
    args.sglang_max_lora_rank = args.sglang_max_lora_rank or rank
    needed = projections(args)
    targets = args.sglang_lora_target_modules or needed
    missing = [] if "all" in targets else [leaf for leaf in needed if leaf not in targets]
    if missing:
        raise UsageError(
            f"--sglang-lora-target-modules has no {' '.join(missing)}, which the adapter needs; add them, or drop the "
            "flag"
        )
    args.sglang_lora_target_modules = targets
    kept, slots = versions_kept(args), getattr(args, "sglang_max_loras_per_batch", None)
    if slots == SGLANG_LORAS_PER_BATCH:
        args.sglang_max_loras_per_batch = kept  # each takes GPU memory, also while the trainer has the GPU
    elif slots is not None and slots < kept:
        raise UsageError(
            f"--sglang-max-loras-per-batch is {slots}, but {kept} versions of the adapter are in use at a time "
            "(--lora-sync-lag); give at least that"
        )


def _set_shared_experts(args: Namespace) -> None:
    launch = Launch(args)
    if launch.moe or launch.shared:
        # Else CUDA engines compute the shared experts as routed ones, where no adapter of theirs is looked for.
        if hasattr(args, "sglang_disable_shared_experts_fusion"):
            args.sglang_disable_shared_experts_fusion = True
        elif launch.shared:
            raise UsageError(
                "--lora-sync adapter with adapted shared experts needs an SGLang with "
                "--disable-shared-experts-fusion; exclude them (--lora-exclude-modules shared_experts.linear_fc1 "
                "shared_experts.linear_fc2), or use --lora-sync merged"
            )


def _set_offload(args: Namespace) -> None:
    if args.offload_rollout:
        # The engines forget their weights while they are offloaded, and this sync does not bring the base again.
        if not hasattr(args, "sglang_enable_weights_cpu_backup"):
            raise UsageError(
                "--lora-sync adapter with --offload-rollout needs an SGLang with --enable-weights-cpu-backup, or the "
                "engines lose their base; use --no-offload-rollout or --lora-sync merged"
            )
        args.sglang_enable_weights_cpu_backup = True


def _set_way(args: Namespace) -> None:
    if not args.colocate:
        args.lora_sync_dir = args.lora_sync_dir or getattr(args, "update_weight_disk_dir", None)
        if not args.lora_sync_dir:
            raise UsageError(
                "--lora-sync adapter without --colocate passes the adapter through files: give --lora-sync-dir, a "
                "directory that trainer and engines share"
            )
    if getattr(args, "update_weight_transport", None) == "disk":
        args.update_weight_transport = "nccl"  # or slime's train group would wait for a whole checkpoint on disk


def transport(args: Namespace) -> str:
    """How ``adapter_sync`` will pass the adapter to the engines, after ``serve_adapters``."""
    if args.lora_sync_dir:
        return f"files in --lora-sync-dir {args.lora_sync_dir}, which trainer and engines share"
    return (
        "files in memory (/dev/shm) where the job is on one machine and they fit twice, else copies in the requests; "
        "no handles to GPU memory (CUDA IPC)"
    )


def projections(args: Namespace) -> list[str]:
    """Hugging Face leaves that an adapter touches, in the table's order: what SGLang must make room for."""
    found = {}
    for layer, path, leaves in adapted_linears(args):
        if path.startswith("mlp.experts."):
            # SGLang wraps experts for gate, up and down together or not at all.
            found.update(dict.fromkeys(("gate_proj", "up_proj", "down_proj")))
        ordered = (name.rsplit(".", 1)[-1] for name in hf_names(f"decoder.layers.{layer}.{path}"))
        found.update(dict.fromkeys(leaf for leaf in ordered if leaf in leaves))
    return list(dict.fromkeys(map(served_leaf, found)))


def serving(resolve):
    """Hook: ``ModelConfig.resolve``. Models of ``--sglang-config`` that get no weights keep the user's settings.

    slime resolves them in their order. Raises UsageError where the first one, which its rollouts ask, gets no weights.
    """

    @functools.wraps(resolve)
    def hooked(self, args: Namespace):
        result = resolve(self, args)
        if getattr(args, "use_lora", False):
            _refuse_frozen_first(self, args)
        for name, value in (getattr(args, "lora_serving", None) or {}).items():
            if not self.update_weights:
                for group in self.server_groups:
                    given = {key.replace("-", "_") for key in group.overrides}
                    if name not in given:
                        group.overrides[name] = value
        return result

    return hooked


def _refuse_frozen_first(model, args: Namespace) -> None:
    first = getattr(args, "lora_first_model", None) or model.name
    args.lora_first_model = first
    if first == model.name and not model.update_weights and not args.debug_train_only:
        raise UsageError(
            f"--sglang-config: its first model {first!r} gets no weights, but slime's rollouts ask the first one: "
            "training would learn from answers of weights that no sync reaches; list the trained model first"
        )
