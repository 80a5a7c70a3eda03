"""What slime's loop asks before it and at the end of every rollout: validations in, learning rate and stop out.

The loop runs in the driver, without a model. It holds the history, decides by it, and tells the trainer's actors what
to do (``trainer``). A step of the history is a rollout: entry 3 is of the weights after rollouts 0, 1 and 2.
"""

from __future__ import annotations

import functools
import logging
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_plugins.lora.control.history import BEST, FILE, FINAL, History
from slime_plugins.lora.control.keep import resume_best
from slime_plugins.lora.control.plateau import EVAL, VAL_LOSS
from slime_plugins.lora.slime.hooks.control import flags

logger = logging.getLogger(__name__)

_current: _Run | None = None


def start_of_run(args: Namespace, *others: Any) -> int:
    """In front of slime's loop, with what ``_Run`` holds: the number of rollouts that the loop shall end at."""
    global _current
    _current = None
    if not flags.wanted(args):
        return args.num_rollout
    _current = _Run.begun(args, *others)
    return args.start_rollout_id if _current.catch_up() else args.num_rollout


def end_of_rollout(rollout_id: int) -> bool:
    """At the bottom of slime's loop, after its evaluation: shall the run end here?"""
    return _current is not None and _current.after(rollout_id)


def evaluating(evaluate):
    """Hook: slime's evaluation in its RolloutManager, keeping the mean rewards for the loop."""

    @functools.wraps(evaluate)
    def hooked(self, rollout_id, *more, **kwargs):
        if not flags.wanted(self.args):
            return evaluate(self, rollout_id, *more, **kwargs)
        own = self.eval_generate_rollout

        @functools.wraps(own)
        def kept(*words, **options):
            output = own(*words, **options)
            found = getattr(output, "data", output)
            self.lora_rewards = (
                rollout_id,
                {f"{EVAL}{name}": float(sum(of["rewards"]) / len(of["rewards"])) for name, of in found.items()},
            )
            return output

        self.eval_generate_rollout = kept
        try:
            return evaluate(self, rollout_id, *more, **kwargs)
        finally:
            self.eval_generate_rollout = own

    return hooked


def lora_evaluation(self, rollout_id: int) -> dict[str, float]:
    """Member of slime's RolloutManager: rewards of its evaluation after this rollout; {} if there was none."""
    of, rewards = getattr(self, "lora_rewards", (None, {}))
    return rewards if of == rollout_id else {}


@dataclass
class _Run:
    """One run of slime's loop."""

    args: Namespace
    num_rollout_per_epoch: int | None
    actor_model: Any
    critic_model: Any
    rollout_manager: Any
    history: History
    goes_on: bool
    """With the validations of an earlier one."""

    @classmethod
    def begun(cls, args: Namespace, num_rollout_per_epoch, actor_model, critic_model, rollout_manager) -> _Run:
        """Read what is there, and let the trainer train with the rate that the run had."""
        rule = flags.rule_of(args)
        past = flags.past_of(args, rule, args.start_rollout_id)
        if past is None and flags.resumes(args):
            logger.warning("LoRA: %s has no %s: validations count from here", args.load, FILE)
        elif past is not None and args.lora_export_dir:
            said = resume_best(args.lora_export_dir, args.lora_export_dir, past)
            if said:
                logger.warning("LoRA: %s", said)
        elif args.lora_export_dir and (Path(args.lora_export_dir) / BEST).is_dir():
            logger.warning("LoRA: %s/%s is of another run until this one validates", args.lora_export_dir, BEST)
        if rule is not None and not args.lora_export_dir:
            logger.warning("LoRA: without --lora-export-dir no best adapter is kept")
        found = past or History(rule, args.lr)
        found.write(args.save)
        run = cls(args, num_rollout_per_epoch, actor_model, critic_model, rollout_manager, found, past is not None)
        run._trainer("begin", found.factor, num_rollout_per_epoch)
        return run

    def catch_up(self) -> bool:
        """A run that was cut off between its checkpoint and its validation validates now. Returns: is it over?"""
        next_one = self.args.start_rollout_id
        missing = self.goes_on and all(entry.step != next_one for entry in self.history.entries)
        if missing and next_one > 0 and self._is_due(next_one - 1) and self.history.state.stopped is None:
            logger.info("LoRA: rollout %d was saved and not validated; validating now", next_one - 1)
            self._measure_now(next_one - 1)
            self._decide(next_one - 1)
        if self.history.state.stopped is not None or next_one == self.args.num_rollout:
            return self._end(next_one - 1)
        return False

    def after(self, rollout_id: int) -> bool:
        """After a rollout's training, sync and evaluation."""
        if self._is_due(rollout_id):
            self._decide(rollout_id)
        stopped = self.history.state.stopped is not None
        if stopped or rollout_id == self.args.num_rollout - 1:
            return self._end(rollout_id)
        return False

    def _is_due(self, rollout_id: int) -> bool:
        return flags.validates(self.args, rollout_id) or self._evaluates(rollout_id)

    def _evaluates(self, rollout_id: int) -> bool:
        if self.args.debug_train_only:
            return False
        return flags.evaluates(self.args, rollout_id, self.num_rollout_per_epoch)

    def _decide(self, rollout_id: int) -> None:
        found: dict[str, float] = {}
        if flags.validates(self.args, rollout_id):
            found[VAL_LOSS] = self._trainer("measured", rollout_id)[0]
        if self._evaluates(rollout_id):
            found |= _get(self.rollout_manager.lora_evaluation.remote(rollout_id))
        rule, rate, step = self.history.rule, self.history.state.lr, rollout_id + 1
        if flags.decides(self.args, rollout_id, self.num_rollout_per_epoch) and rule and rule.metric not in found:
            raise ValueError(
                f"--lr-plateau-metric {rule.metric}: the evaluation after rollout {rollout_id} has no such reward, "
                f"it has {', '.join(name for name in found if name.startswith(EVAL)) or 'none'}"
            )
        entry = self.history.add(step, found)
        if self.history.is_best(step) and self.args.lora_export_dir:
            self._trainer("keep", BEST, self.history)
        self.history.write(self.args.save)  # last: what it says of the best adapter is so
        shown = ", ".join(f"{name} {value:.6g}" for name, value in found.items())
        logger.info("LoRA: validation after rollout %d: %s%s", rollout_id, shown, f"; {entry.decision}" * bool(rule))
        _log(self.args, rollout_id, {**found, "lr": self.history.state.lr})
        if self.history.state.lr != rate:
            self._trainer("set_rate", self.history.factor)

    def _measure_now(self, rollout_id: int) -> None:
        """Validate and evaluate the weights that are there, at a time when the engines may hold the devices."""
        args, manager = self.args, self.rollout_manager
        if self._evaluates(rollout_id):
            _get(manager.eval.remote(rollout_id))
        if args.offload_rollout:
            _get(manager.offload.remote())
        self._trainer("measure_awake", rollout_id)
        if args.offload_rollout:
            _get(manager.onload_weights.remote())
            self.actor_model.update_weights()
            _get(manager.onload_kv.remote())

    def _end(self, rollout_id: int) -> bool:
        """Leave the final adapter; of a stopped run, the checkpoint too. Returns whether it was stopped."""
        stopped = self.history.state.stopped
        if stopped:
            logger.info("LoRA: the run ends after rollout %d: %s", rollout_id, stopped)
            self._save(rollout_id)
        if self.args.lora_export_dir:
            self._trainer("keep", FINAL, self.history)
        return stopped is not None

    def _save(self, rollout_id: int) -> None:
        """As slime's loop does at a rollout that is due, unless this one was, or is what the run went on from."""
        from slime.utils.misc import should_run_periodic_action

        args = self.args
        due = should_run_periodic_action(rollout_id, args.save_interval, self.num_rollout_per_epoch, args.num_rollout)
        if due or rollout_id < args.start_rollout_id:
            return
        if args.offload_rollout:
            _get(self.rollout_manager.offload.remote())
        self._trainer("save", rollout_id)
        if self.critic_model is not None:
            _ask(self.critic_model, "save", rollout_id)
        if args.rollout_global_dataset:
            _get(self.rollout_manager.save.remote(rollout_id))

    def _trainer(self, what: str, *words: Any) -> list[Any]:
        return _ask(self.actor_model, what, *words)


def _ask(group: Any, what: str, *words: Any) -> list[Any]:
    """The answer of every rank of slime's group of actors."""
    return _get([actor.lora_control.remote(what, *words) for actor in group._actor_handlers])


def _get(answers: Any) -> Any:
    import ray

    return ray.get(answers)


def _log(args: Namespace, rollout_id: int, metrics: Mapping[str, float]) -> None:
    """Into slime's own tracking, where ``eval/`` is already."""
    try:
        from slime.utils import logging_utils
        from slime.utils.metric_utils import compute_rollout_step
    except ImportError:  # since August 2026
        from slime.observability import logging_utils
        from slime.observability.metric_utils import compute_rollout_step

    ours = {f"lora/{name}": value for name, value in metrics.items() if not name.startswith(EVAL)}
    logging_utils.log(args, {**ours, "rollout/step": compute_rollout_step(args, rollout_id)}, step_key="rollout/step")
