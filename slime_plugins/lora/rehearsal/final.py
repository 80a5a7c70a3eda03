"""What is asked of a run before it may be believed: the base as it was, Megatron and transformers agreed, trained."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from slime_plugins.lora.objectives.batch import Batch
from slime_plugins.lora.peft.verify import verify_adapter
from slime_plugins.lora.rehearsal.cluster import Cluster
from slime_plugins.lora.rehearsal.settings import Settings

LOGITS_TOLERANCE = 1e-4
"""Largest absolute difference between Megatron's and transformers' logits that a float32 run may end with."""
_COMPARED_TOKENS = 1024
"""Tokens, roughly, on which the two are compared at the end."""


def logits_difference(cluster: Cluster, settings: Settings, adapter_dir: Path, batch: Batch) -> float:
    """Largest difference between Megatron with its adapters and transformers with the exported ones, on samples."""
    multiple = settings.pp if settings.vpp else 1  # what the interleaved schedule can cut
    samples = min(len(batch), _COMPARED_TOKENS // batch.tokens.shape[1]) // multiple * multiple
    head = batch[: max(samples, multiple)]
    cluster.rollout("load_adapter", str(adapter_dir))
    expected = cluster.rollout("logits", head.tokens)
    logits = next(result for result in cluster.ranks("logits", head.tokens) if result is not None)
    real = head.lengths()[:, None] > torch.arange(head.tokens.shape[1])
    return (logits - expected)[real].abs().max().item()


def checksums(cluster: Cluster) -> dict[str, str]:
    """One SHA-256 over those of all ranks, of the base as loaded and as it is now."""
    before, after = zip(*cluster.ranks("base_checksums"), strict=True)
    return {
        "base_checksum_before": hashlib.sha256("".join(before).encode()).hexdigest(),
        "base_checksum_after": hashlib.sha256("".join(after).encode()).hexdigest(),
    }


def verify(summary: dict, settings: Settings, adapter_dir: Path) -> None:
    """Raise ValueError for a run that must not be believed."""
    if summary["base_checksum_before"] != summary["base_checksum_after"]:
        raise ValueError("the base changed while training: its checksum is not the one it was loaded with")
    difference = summary["logits_max_abs_diff"]
    if settings.dtype == "float32" and not difference <= LOGITS_TOLERANCE:
        raise ValueError(
            f"Megatron's logits differ from those of transformers + PEFT by {difference:.1e}, "
            f"expected at most {LOGITS_TOLERANCE:.0e}"
        )
    report = verify_adapter(adapter_dir, settings.hf_checkpoint)
    if not report.ok:
        flat = summary.get("steps_without_signal", 0)
        why = f" (in {flat} of {summary['steps']} steps no reward differed within a prompt's answers)" if flat else ""
        raise ValueError(f"{adapter_dir}: {report.problems[0]}{why}")
