"""Training control at launch: flags, whether they can work, and whether the run has stopped already. No torch."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from slime_plugins.lora.control import history
from slime_plugins.lora.control.arguments import add_plateau_arguments, plateau_of
from slime_plugins.lora.control.history import History
from slime_plugins.lora.control.plateau import EVAL, Plateau
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.slime.hooks.paths import resumed_step


def add_flags(parser: ArgumentParser) -> None:
    """The flags of validations, of a plateau rule and of stopping."""
    group = parser.add_argument_group("training control (with --use-lora)", "learning rate on a plateau, stopping")
    group.add_argument(
        "--val-data", default=None, metavar="FILE", help="as --prompt-data: val_loss is computed of its responses"
    )
    group.add_argument(
        "--val-interval", type=int, default=None, metavar="N", help="rollouts between validations; one after the last"
    )
    add_plateau_arguments(group)


def wanted(args: Namespace) -> bool:
    """Is anything validated or decided in this run?"""
    if not getattr(args, "use_lora", False):
        return False
    return args.lr_plateau_metric is not None or args.val_interval is not None


def rule_of(args: Namespace) -> Plateau | None:
    """The rule of this run; None where nothing is decided. Raises UsageError."""
    return plateau_of(args)


def refuse_unread(args: Namespace) -> None:
    """Raise UsageError for flags of training control without ``--use-lora``."""
    parser = ArgumentParser(add_help=False)
    add_flags(parser)
    given = [name for name, default in vars(parser.parse_args([])).items() if getattr(args, name, default) != default]
    if given:
        shown = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(f"{shown} given without --use-lora; add --use-lora, or drop them")


def check_rule(args: Namespace) -> None:
    """Raise UsageError for flags that make no rule; of a doctor's arguments too, which may lack slime's defaults."""
    if getattr(args, "lr", None) is not None or args.lr_plateau_metric is None:
        rule_of(args)


def set_up(args: Namespace) -> None:
    """Check validation data and evaluations; end the process, with exit code 0, where the run to go on has stopped.

    Raises:
        UsageError: with the reason and the way out.
    """
    if not wanted(args):
        return
    rule = rule_of(args)
    if args.val_data is not None:
        from slime_plugins.lora.slime.hooks.control.data import read

        read(args)
    if rule is not None and rule.metric.startswith(EVAL):
        _refuse_unknown_evaluation(args, rule.metric.removeprefix(EVAL))
    past = past_of(args, rule, _next_rollout(args))
    message = None if past is None else past.stop_message(args.load)
    if message:
        print(f"LoRA: {message}", flush=True)
        raise SystemExit(0)


def past_of(args: Namespace, rule: Plateau | None, until: int) -> History | None:
    """The history of the run that goes on after ``until`` rollouts; None where one starts, or none is kept."""
    found = _resumed(args)
    return None if found is None else history.read(found.parent, rule, args.lr, until=until)


def resumes(args: Namespace) -> bool:
    """Does the run go on with another one's steps?"""
    return _resumed(args) is not None


def _resumed(args: Namespace) -> Path | None:
    return None if args.finetune else resumed_step(args)


def _next_rollout(args: Namespace) -> int:
    """The number of rollouts that a resumed run has trained on."""
    from slime_plugins.lora.checkpoint.manifest import Manifest

    found = _resumed(args)
    if args.start_rollout_id is not None or found is None:
        return args.start_rollout_id or 0
    step = Manifest.read(found).step
    return 0 if step is None else step + 1  # slime names a checkpoint by its last rollout, from 0


def _refuse_unknown_evaluation(args: Namespace, name: str) -> None:
    names = [dataset.name for dataset in getattr(args, "eval_datasets", None) or ()]
    own_function = getattr(args, "eval_function_path", None) not in (
        None,
        getattr(args, "rollout_function_path", None),
    )
    if name not in names and not own_function:  # whose names are its own affair
        raise UsageError(
            f"--lr-plateau-metric {EVAL}{name}: no such evaluation, --eval-prompt-data and --eval-config name "
            f"{', '.join(names) or 'nothing'}"
        )


def validates(args: Namespace, rollout_id: int) -> bool:
    """Is ``val_loss`` computed after this rollout?"""
    if args.val_interval is None or not _actor_trains(args, rollout_id):
        return False
    return (rollout_id + 1) % args.val_interval == 0 or rollout_id == args.num_rollout - 1


def evaluates(args: Namespace, rollout_id: int, num_rollout_per_epoch: int | None) -> bool:
    """Does slime evaluate rewards after this rollout, of weights that it has trained?"""
    from slime.utils.misc import should_run_periodic_action

    return _actor_trains(args, rollout_id) and should_run_periodic_action(
        rollout_id, args.eval_interval, num_rollout_per_epoch
    )


def decides(args: Namespace, rollout_id: int, num_rollout_per_epoch: int | None) -> bool:
    """Is the metric of the rule measured after this rollout?"""
    metric: Any = args.lr_plateau_metric
    if metric is None:
        return False
    if metric.startswith(EVAL):
        return evaluates(args, rollout_id, num_rollout_per_epoch)
    return validates(args, rollout_id)


def _actor_trains(args: Namespace, rollout_id: int) -> bool:
    return not args.use_critic or rollout_id >= args.num_critic_only_steps
