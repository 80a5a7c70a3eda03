"""The rehearsal: samples, training on the Megatron ranks, export, again."""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from slime_plugins.lora.checkpoint import directory
from slime_plugins.lora.objectives import make_objective
from slime_plugins.lora.objectives.batch import Batch
from slime_plugins.lora.objectives.objective import Objective
from slime_plugins.lora.rehearsal import final, outputs
from slime_plugins.lora.rehearsal.adapter_start import REFERENCE, carry_extra, kept_reference
from slime_plugins.lora.rehearsal.cluster import Cluster, ray_cluster
from slime_plugins.lora.rehearsal.control import control_of, stopped
from slime_plugins.lora.rehearsal.devices import resolve_device
from slime_plugins.lora.rehearsal.display import Display
from slime_plugins.lora.rehearsal.preflight import eval_prompts, train_prompts, validation_prompts
from slime_plugins.lora.rehearsal.rewards import Rewarder
from slime_plugins.lora.rehearsal.samples import Source
from slime_plugins.lora.rehearsal.settings import Settings
from slime_plugins.lora.rehearsal.task import Prompt, shuffled


def rehearse(settings: Settings, *, debug: bool = False) -> dict:
    """Train, export, compare. Returns the summary, which is on disk then, as are adapter, metrics and curve.

    Args:
        settings: as ``preflight.prepare`` returns them.
        debug: show the other processes' output.
    Raises:
        UsageError: no GPUs for ``--device cuda``.
        ValueError: a process died; or, at the end, the base has changed, logits differ, the adapter is not trained.
        KeyboardInterrupt: with the command that goes on with the run, if it has saved something.
    """
    display = Display()
    if why := stopped(settings):
        display.line(why)
        return {}
    out, adapter_dir = Path(settings.out), Path(settings.out) / outputs.ADAPTER
    device, objective = resolve_device(settings), make_objective(settings.objective, settings)
    if outputs.claim(out):
        display.line(f"{out}: replacing the earlier rehearsal there")
    ranks = f"{settings.world_size} Megatron rank{'s' * (settings.world_size > 1)}"
    display.line(f"starting {ranks} and a rollout process on {device} ...")
    try:
        with (
            Rewarder(settings) as rewarder,
            outputs.Recorder(out, settings) as recorder,
            ray_cluster(settings, device, show_logs=debug) as cluster,
        ):
            built = cluster.ranks("describe")[0]
            display.line(built.pop("report"))
            source = Source(settings, objective, cluster, adapter_dir, rewarder, recorder, display)
            start = time.monotonic()
            trained, last_batch = train(source)
            seconds = time.monotonic() - start
            summary = {
                **trained,
                "seconds_per_step": seconds / len(recorder.steps),
                **built,
                "logits_max_abs_diff": final.logits_difference(cluster, settings, adapter_dir, last_batch),
                **final.checksums(cluster),
                "settings": settings.to_dict(),
            }
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(_how_to_go_on(settings)) from None
    title = f"{Path(settings.hf_checkpoint).name}, LoRA rank {settings.lora.rank}"
    curve = outputs.draw_curve(out, recorder.steps, title, objective.curve)
    summary["serve_command"] = outputs.serve_command(out, settings.dtype, device, settings.base_quant)
    outputs.write_summary(out, summary)
    final.verify(summary, settings, adapter_dir)
    display.end(out, curve.name, summary)
    return summary


def train(source: Source) -> tuple[dict, Batch]:
    """The loop. Returns its part of the summary, and the last step's samples."""
    settings, cluster, recorder = source.settings, source.cluster, source.recorder
    first = _start(cluster, settings)
    held_out, batches = eval_prompts(settings), _prompts_by_step(settings, first)
    cluster.ranks("export", str(source.adapter_dir))
    if carried := carry_extra(settings, source.adapter_dir):
        source.display.line(f"trained beside the adapter, carried along as they are: {', '.join(carried)}")
    if _has_teacher(source.objective):
        cluster.ranks("take_teacher", settings.gkd_teacher, settings.gkd_ema_decay)
    before = _evaluate_first(source, held_out, first)
    validations, control = validation_prompts(settings), control_of(source, first)
    if control:
        control.begin()
    with source.display.steps(settings.steps, first):
        for step in range(first, settings.steps):
            start = time.monotonic()
            batch, sampled = source.batch(next(batches), step)
            trained = train_on(cluster, batch, source.objective)
            cluster.ranks("export", str(source.adapter_dir))
            seconds = time.monotonic() - start
            speed = {"tokens_per_s": batch.lengths().sum().item() / seconds, "seconds": seconds}
            metrics = {"step": step + 1, **sampled, **trained, **speed}
            if held_out and _is_due(settings, step + 1, settings.eval_interval):
                metrics["eval_reward"] = source.held_out_reward(held_out, step + 1)
            if validations and _is_due(settings, step + 1, settings.val_interval):
                metrics["val_loss"] = source.validation_loss(validations)
            if control:
                metrics["lr"] = control.history.state.lr
            recorder.step(metrics)
            source.display.step(metrics, recorder)
            if control:
                control.after(step + 1, metrics)
            stop = control is not None and control.history.state.stopped is not None
            if settings.save is not None and (stop or _is_due(settings, step + 1, settings.save_interval)):
                cluster.ranks("save", settings.save, step + 1)
            if stop:
                break
    results = {**_results(source, first, before), **(control.end() if control else {})}
    if held_out and _has_teacher(source.objective):
        results |= _against_teacher(source, held_out)
    return results, batch


def _start(cluster: Cluster, settings: Settings) -> int:
    """Read what the run starts from. Returns the number of steps that are done."""
    if settings.lora_adapter_path is not None:
        cluster.ranks("start_from", settings.lora_adapter_path)
    first = cluster.ranks("load", settings.load)[0] if settings.load else 0
    if settings.lora_ref == "start":
        kept, place = kept_reference(settings), settings.save and Path(settings.save) / REFERENCE
        keep = place and (kept is None or kept.resolve() != place.resolve())
        cluster.ranks("take_reference", kept and str(kept), str(place) if keep else None)
    return first


def _prompts_by_step(settings: Settings, first: int) -> Iterator[list[Prompt]]:
    """From step ``first`` on, what a run that started at 0 would have."""
    size = settings.rollout_batch_size
    order = itertools.islice(shuffled(train_prompts(settings), settings.seed), first * size, None)
    while True:
        yield list(itertools.islice(order, size))


def _evaluate_first(source: Source, held_out: list[Prompt], first: int) -> dict[str, float]:
    if not held_out:
        return {}
    reward = source.held_out_reward(held_out, first)
    source.recorder.scalars(first, {"eval_reward": reward})
    source.display.line(f"held-out reward before: {reward:.3f} ({len(held_out)} prompts, likeliest answers)")
    return {"eval_reward_first": reward}


def _has_teacher(objective: Objective) -> bool:
    return any(computed.model == "teacher" for computed in objective.computed.values())


def _against_teacher(source: Source, held_out: list[Prompt]) -> dict[str, float]:
    """Expected rewards on held-out prompts: of the teacher, shown what it is shown, of student and base."""
    teacher_dir = None
    if source.settings.gkd_teacher != "base":
        teacher_dir = Path(source.settings.out) / outputs.TEACHER
        source.cluster.ranks("export_teacher", str(teacher_dir))
    return {
        "teacher_reward": source.expected_reward(held_out, teacher_dir, as_teacher=True),
        "student_reward": source.expected_reward(held_out, source.adapter_dir),
        "base_reward": source.expected_reward(held_out, None),
    }


def _is_due(settings: Settings, done: int, interval: int | None) -> bool:
    """After the last step, and every ``interval`` before."""
    return done == settings.steps or (interval is not None and done % interval == 0)


def train_on(cluster: Cluster, batch: Batch, objective: Objective) -> dict[str, float]:
    """Train on one batch. Metrics are means over the ranks that have a loss."""
    trained = [metrics for metrics in cluster.ranks("train", batch) if metrics is not None]
    if objective.sampled_log_probs is None:
        return {name: sum(m[name] for m in trained) / len(trained) for name in trained[0]}
    sampled, *_ = [metrics.pop("sampled_log_probs") for metrics in trained]
    metrics = {name: sum(m[name] for m in trained) / len(trained) for name in trained[0]}
    # Does Megatron's policy give the samples the probability that they were drawn with?
    head = batch[: len(sampled)]
    difference = (cluster.rollout("log_probs", head.tokens) - sampled).abs() * head.mask
    return {**metrics, "rollout_log_prob_abs_diff": (difference.sum() / head.mask.sum()).item()}


def _results(source: Source, first: int, before: dict[str, float]) -> dict:
    """Metrics of this run's own steps, a resumed one's too."""
    recorder, results = source.recorder, dict[str, float]()
    for name in ("reward", "loss"):
        values = [step[name] for step in recorder.steps if name in step]
        if values:
            results |= {f"{name}_first": values[0], f"{name}_last": values[-1], f"{name}_window": recorder.mean(name)}
    if "on_policy" in recorder.steps[0]:
        results["on_policy_share"] = sum(step["on_policy"] for step in recorder.steps) / len(recorder.steps)
    if "eval_reward" in recorder.steps[-1]:
        results |= {**before, "eval_reward_last": recorder.steps[-1]["eval_reward"]}
    if source.objective.rewarded:
        results["steps_without_signal"] = source.flat_steps
    return {**results, "steps": len(recorder.steps), "first_step": first + 1, "last_step": recorder.steps[-1]["step"]}


def _how_to_go_on(settings: Settings) -> str:
    """The command that resumes an interrupted run; empty where nothing can be resumed."""
    if settings.save is None:
        return ""
    try:
        checkpoint = directory.find(settings.save)
    except (ValueError, OSError):
        return f"nothing is saved in {settings.save} yet"
    config = Path(settings.out) / outputs.SETTINGS
    out = f"{settings.out}-after-{checkpoint.name}"
    command = ["slime-lora", "rehearse", "--config", str(config), "--load", settings.save, "--out", out]
    return f"go on with: {shlex.join(command)}"
