"""The rehearsal: roll out with the exported adapter, reward, train on the Megatron ranks, export, again."""

from __future__ import annotations

import hashlib
import itertools
import time
from pathlib import Path

import torch

from slime_plugins.lora.objectives.grpo import Batch, group_advantages, make_batch
from slime_plugins.lora.peft.verify import verify_adapter
from slime_plugins.lora.rehearsal import outputs
from slime_plugins.lora.rehearsal.cluster import Cluster, ray_cluster, resolve_device
from slime_plugins.lora.rehearsal.display import Display
from slime_plugins.lora.rehearsal.outputs import Recorder
from slime_plugins.lora.rehearsal.settings import Settings
from slime_plugins.lora.rehearsal.task import REWARDS, Prompt, read_prompts, shuffled

LOGITS_TOLERANCE = 1e-4
"""Largest absolute difference between Megatron's and transformers' logits that a float32 run may end with."""
_COMPARED_TOKENS = 1024
"""Tokens, roughly, on which the two are compared at the end."""


def rehearse(settings: Settings, *, debug: bool = False) -> dict:
    """Train, export, compare. Returns the summary, which is on disk then, as are adapter, metrics and curve.

    Args:
        settings: as ``preflight.prepare`` returns them.
        debug: show the other processes' output.
    Raises:
        UsageError: no GPUs for ``--device cuda``.
        ValueError: a process died; or, at the end, the base has changed, logits differ, the adapter is not trained.
    """
    display = Display()
    out, adapter_dir = Path(settings.out), Path(settings.out) / outputs.ADAPTER
    device = resolve_device(settings)
    if outputs.claim(out):
        display.line(f"{out}: replacing the earlier rehearsal there")
    display.line(f"starting {settings.world_size} Megatron ranks and a rollout process on {device} ...")
    with outputs.Recorder(out, settings) as recorder, ray_cluster(settings, device, show_logs=debug) as cluster:
        built = cluster.ranks("describe")[0]
        display.line(built.pop("report"))
        start = time.monotonic()
        last_batch = train(cluster, settings, adapter_dir, recorder, display)
        seconds = time.monotonic() - start
        summary = {
            "reward_first": recorder.steps[0]["reward"],
            "reward_last": recorder.steps[-1]["reward"],
            "steps": settings.steps,
            "seconds_per_step": seconds / len(recorder.steps),
            **built,
            "logits_max_abs_diff": _logits_difference(cluster, settings, adapter_dir, last_batch),
            **_checksums(cluster),
            "settings": settings.to_dict(),
        }
    outputs.draw_curve(out, recorder.steps, f"{Path(settings.hf_checkpoint).name}, LoRA rank {settings.lora.rank}")
    summary["serve_command"] = outputs.serve_command(out, settings.dtype, device, settings.base_quant)
    outputs.write_summary(out, summary)
    verify(summary, settings, adapter_dir)
    display.end(out, summary)
    return summary


def train(cluster: Cluster, settings: Settings, adapter_dir: Path, recorder: Recorder, display: Display) -> Batch:
    """The loop. Returns the last step's samples."""
    first = cluster.ranks("load", settings.load)[0] if settings.load else 0
    prompts = read_prompts(settings.prompt_data, settings.input_key, settings.label_key)
    order = itertools.islice(shuffled(prompts, settings.seed), first * settings.rollout_batch_size, None)
    cluster.ranks("export", str(adapter_dir))
    with display.steps(settings.steps, first):
        for step in range(first, settings.steps):
            start = time.monotonic()
            shown = list(itertools.islice(order, settings.rollout_batch_size))
            batch, rolled_out = roll_out(cluster, settings, adapter_dir, shown, step)
            trained = train_on(cluster, batch)
            cluster.ranks("export", str(adapter_dir))
            seconds = time.monotonic() - start
            speed = {"tokens_per_s": batch.lengths().sum().item() / seconds, "seconds": seconds}
            metrics = {"step": step, **rolled_out, **trained, **speed}
            recorder.step(metrics)
            display.step(metrics)
            if _is_save_step(settings, step + 1):
                cluster.ranks("save", settings.save, step + 1)
    return batch


def _is_save_step(settings: Settings, done: int) -> bool:
    if settings.save is None:
        return False
    return done == settings.steps or (settings.save_interval is not None and done % settings.save_interval == 0)


def roll_out(
    cluster: Cluster, settings: Settings, adapter_dir: Path, prompts: list[Prompt], step: int
) -> tuple[Batch, dict[str, float]]:
    """Sample with the exported adapter, decode, reward."""
    start = time.monotonic()
    samples = cluster.rollout("sample", str(adapter_dir), [prompt.prompt for prompt in prompts], step)
    n, reward = settings.n_samples_per_prompt, REWARDS[settings.rm_type]
    rewards = torch.tensor([reward(sample.text, prompts[i // n].label) for i, sample in enumerate(samples)])
    batch = make_batch(
        [sample.prompt for sample in samples],
        [sample.response for sample in samples],
        group_advantages(rewards, n),
        multiple=settings.tp,
    )
    return batch, {
        "reward": rewards.mean().item(),
        "response_length": batch.mask.sum(1).mean().item(),
        "rollout_seconds": time.monotonic() - start,
    }


def train_on(cluster: Cluster, batch: Batch) -> dict[str, float]:
    """Train on one rollout. Metrics are means over the ranks that have a loss."""
    trained = [metrics for metrics in cluster.ranks("train", batch) if metrics is not None]
    old_log_probs, *_ = [metrics.pop("old_log_probs") for metrics in trained]
    metrics = {name: sum(m[name] for m in trained) / len(trained) for name in trained[0]}
    # Does Megatron's policy give the samples the probability that they were drawn with?
    head = batch[: len(old_log_probs)]
    difference = (cluster.rollout("log_probs", head.tokens) - old_log_probs).abs() * head.mask
    return {**metrics, "rollout_log_prob_abs_diff": (difference.sum() / head.mask.sum()).item()}


def _logits_difference(cluster: Cluster, settings: Settings, adapter_dir: Path, batch: Batch) -> float:
    """Largest difference between Megatron with its adapters and transformers with the exported ones, on samples."""
    multiple = settings.pp if settings.vpp else 1  # what the interleaved schedule can cut
    samples = min(len(batch), _COMPARED_TOKENS // batch.tokens.shape[1]) // multiple * multiple
    head = batch[: max(samples, multiple)]
    cluster.rollout("load_adapter", str(adapter_dir))
    expected = cluster.rollout("logits", head.tokens)
    logits = next(result for result in cluster.ranks("logits", head.tokens) if result is not None)
    real = head.lengths()[:, None] > torch.arange(head.tokens.shape[1])
    return (logits - expected)[real].abs().max().item()


def _checksums(cluster: Cluster) -> dict[str, str]:
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
        raise ValueError(f"{adapter_dir}: {report.problems[0]}")
