"""Distillation at launch and in the rollout: flags, what follows from them, whose responses, the teacher's prompts.

Light: imported in every process. What runs beside the model is in ``gkd``.
"""

from __future__ import annotations

import functools
import inspect
import logging
from argparse import ArgumentParser, Namespace
from typing import Any

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.objectives.teacher_prompt import TeacherPrompt
from slime_plugins.lora.slime.hooks.paths import resumed_step
from slime_plugins.lora.slime.hooks.teachers import check_teacher

logger = logging.getLogger(__name__)
_HERE = "slime_plugins.lora.slime.hooks"
_SLIMES = {
    "rollout_temperature": 1.0,
    "n_samples_per_prompt": 1,
    "global_batch_size": None,
    "rollout_data_postprocess_path": None,
    "rollout_function_path": None,
}
"""Arguments that slime's parser always has; ``slime-lora doctor`` sees those alone that are given."""


def add_flags(parser: ArgumentParser) -> None:
    """The flags of distillation, ms-swift's and TRL's names as aliases where slime has no flag of that name."""
    group = parser.add_argument_group(
        "distillation (with --use-lora)", "a student's adapters learn the whole distribution of a teacher"
    )

    def add(*flags: str, **options: Any) -> None:
        group.add_argument(*(flag for flag in flags if flag not in parser._option_string_actions), **options)

    add(
        "--use-gkd", action="store_true", help="distil; in place of the policy loss, unless --gkd-coef adds it to that"
    )
    add("--gkd-teacher", default="base", metavar="base|live|ema|DIR", help="base: the adapters off (%(default)s)")
    add("--gkd-teacher-prompt-template", default=None, metavar="TEXT", help="{prompt}, {label}, {metadata[KEY]}")
    add("--gkd-beta", "--beta", type=float, default=0.5, help="0: KL(teacher || student), 1: reverse (%(default)s)")
    add("--gkd-lmbda", "--lmbda", type=float, default=0.5, help="share of rollouts that are sampled (%(default)s)")
    add("--gkd-temperature", type=float, default=1.0, help="of both in the loss, not of sampling (%(default)s)")
    add("--gkd-coef", type=float, default=None, help="weight of the divergence beside the policy loss")
    add("--sft-alpha", type=float, default=0.0, help="weight of cross-entropy on given responses (%(default)s)")
    add("--gkd-ema-decay", type=float, default=None, help="of --gkd-teacher ema, per optimizer step (0.99)")
    add("--gkd-chunk-size", type=int, default=512, help="tokens whose distributions are compared at a time")
    add("--seq-kd", action="store_true", help="refused: there is no sequence-level distillation")


def _names() -> dict[str, Any]:
    parser = ArgumentParser(add_help=False)
    add_flags(parser)
    return vars(parser.parse_args([]))


def refuse_unread(args: Namespace) -> None:
    """Raise UsageError for flags of distillation without ``--use-gkd``, or that without ``--use-lora``."""
    if getattr(args, "use_gkd", False):
        if not args.use_lora:
            raise UsageError("--use-gkd without --use-lora: teacher and student share a frozen base; add --use-lora")
        return
    given = [name for name, default in _names().items() if getattr(args, name, default) != default]
    if given:
        shown = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(f"{shown} given without --use-gkd; add --use-gkd, or drop them")


def set_up(args: Namespace) -> None:
    """Check the flags, and let slime call this plugin for loss, teacher pass and responses. At launch, once.

    Raises:
        UsageError: with the reason and the way out.
    """
    refuse_unread(args)
    if not getattr(args, "use_gkd", False):
        return
    from slime_plugins.lora.objectives import make_objective
    from slime_plugins.lora.objectives.gkd import GKD

    for name, default in _SLIMES.items():
        if not hasattr(args, name):
            setattr(args, name, default)
    check_teacher(args)
    objective = make_objective("gkd", args)
    assert isinstance(objective, GKD)
    for name in ("gkd_temperature", "gkd_chunk_size"):
        if not getattr(args, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number above 0")
    resumes = resumed_step(args) is not None
    sampled = not args.debug_train_only
    objective.check_values(copies=args.n_samples_per_prompt if sampled else 1, resumed=resumes)
    if args.gkd_teacher_prompt_template is not None:
        TeacherPrompt(args.gkd_teacher_prompt_template)
    _warn_of_a_teacher_that_lags(args)
    if args.gkd_coef is None:
        objective.check_difference(args.load if resumes else args.lora_adapter_path)
        args.compute_advantages_and_returns = False  # nobody reads them: no reference pass, no log-probs
    args.loss_type, args.custom_loss_function_path = "custom_loss", f"{_HERE}.gkd.loss"
    args.gkd_own_postprocess = args.rollout_data_postprocess_path
    args.rollout_data_postprocess_path = f"{_HERE}.gkd.teach"
    if sampled and args.gkd_lmbda < 1:
        args.gkd_sampler = args.rollout_function_path
        args.rollout_function_path = f"{_HERE}.distillation.generate_rollout"


def _warn_of_a_teacher_that_lags(args: Namespace) -> None:
    if args.gkd_teacher != "live":
        return
    step = args.global_batch_size
    if step is not None and step < (samples := args.rollout_batch_size * args.n_samples_per_prompt):
        logger.warning(
            "--gkd-teacher live: %d optimizer steps on each rollout, and the teacher is the student before the first "
            "of them; --global-batch-size %d makes it the student of every step",
            samples // step,
            samples,
        )


def is_given(args: Namespace, rollout_id: int) -> bool:
    """Are the responses of this rollout those of the data?"""
    from slime_plugins.lora.objectives.gkd import on_policy

    return not on_policy(args.gkd_lmbda, rollout_id, args.seed)


def generate_rollout(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """slime's rollout function: the user's own where the student samples, else prompts with the labels of the data."""
    if evaluation or not is_given(args, rollout_id):
        from slime.utils.misc import load_function

        return load_function(args.gkd_sampler)(args, rollout_id, data_source, evaluation=evaluation)
    tokenizer = _tokenizer(args.hf_checkpoint)
    groups = data_source.get_samples(args.rollout_batch_size)
    for group in groups:
        for sample in group:
            if not isinstance(sample.prompt, str) or sample.label is None:
                raise ValueError(
                    f"--gkd-lmbda {args.gkd_lmbda:g}: sample {sample.index} has a {type(sample.prompt).__name__} "
                    f"for a prompt and {sample.label!r} for a label; expected text for both (--apply-chat-template, "
                    "--label-key)"
                )
            prompt, response = given_tokens(tokenizer, sample.prompt, sample.label)
            sample.tokens, sample.response, sample.response_length = [*prompt, *response], sample.label, len(response)
            sample.reward, sample.status = 0.0, type(sample).Status.COMPLETED
    return groups


def given_tokens(tokenizer: Any, prompt: str, label: str) -> tuple[list[int], list[int]]:
    """Of a prompt and of a response that the data gives, its end with it."""
    response = tokenizer(label, add_special_tokens=False).input_ids
    return tokenizer(prompt, add_special_tokens=False).input_ids, [*response, tokenizer.eos_token_id]


def teacher_prompts(convert):
    """Hook: samples into training data, with the teacher's tokens under a name that slime carries to the trainer."""
    signature = inspect.signature(convert)

    @functools.wraps(convert)
    def hooked(self, *more, **kwargs):
        data = convert(self, *more, **kwargs)
        template = getattr(self.args, "gkd_teacher_prompt_template", None)
        if getattr(self.args, "use_gkd", False) and template is not None:
            samples = signature.bind(self, *more, **kwargs).arguments["samples"]
            data["prompt"] = [_teacher_tokens(self.args, TeacherPrompt(template), sample) for sample in _flat(samples)]
        return data

    return hooked


def _teacher_tokens(args: Namespace, template: TeacherPrompt, sample: Any) -> list[int]:
    """Its prompt, then the sample's own response, token by token."""
    if getattr(sample, "multimodal_inputs", None) or getattr(sample, "multimodal_train_inputs", None):
        raise ValueError(
            f"--gkd-teacher-prompt-template: sample {sample.index} has images or sound, whose places in a prompt are "
            "not known here; distil without a template, or from text alone"
        )
    if not isinstance(sample.prompt, str):
        raise ValueError(
            f"--gkd-teacher-prompt-template: sample {sample.index} has a {type(sample.prompt).__name__} for a prompt, "
            "expected text (--apply-chat-template makes text of messages)"
        )
    shown = template.of(sample.prompt, sample.label, sample.metadata or {})
    prompt = _tokenizer(args.hf_checkpoint)(shown, add_special_tokens=False).input_ids
    return [*prompt, *sample.tokens[len(sample.tokens) - sample.response_length :]]


def _flat(samples: list) -> list:
    return [one for sample in samples for one in (_flat(sample) if isinstance(sample, list) else [sample])]


@functools.cache
def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=True)
