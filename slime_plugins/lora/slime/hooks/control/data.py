"""``--val-data``: given responses as tokens, made as slime's SFT and this plugin's distillation make theirs."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.slime.hooks.distillation import given_tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """One sample."""

    tokens: list[int]
    response: int
    """Tokens from the end that are its response."""
    mask: list[int]
    """Of the response: 1 where the loss counts."""


def read(args: Namespace) -> list[Given]:
    """The samples with a token that counts, in the order of the file.

    Messages go through slime's loss mask, as in its SFT; text is a prompt, with a response under ``--label-key``.

    Raises:
        UsageError: the file cannot be read by these flags, or no token of it counts.
    """
    from slime.utils.data import Dataset
    from slime.utils.processing_utils import load_tokenizer

    tokenizer = load_tokenizer(args.hf_checkpoint, trust_remote_code=True)
    try:
        samples = Dataset(
            args.val_data,
            tokenizer=tokenizer,
            processor=None,
            max_length=None,
            prompt_key=args.input_key,
            label_key=args.label_key,
            metadata_key=args.metadata_key,
            tool_key=args.tool_key,
            apply_chat_template=args.apply_chat_template,
            apply_chat_template_kwargs=args.apply_chat_template_kwargs,
        ).samples
    except Exception as error:  # slime's reader raises many kinds
        raise UsageError(
            f"--val-data {args.val_data}: slime cannot read it with --input-key {args.input_key} and --label-key "
            f"{args.label_key}: {type(error).__name__}: {error}"
        ) from error
    found = list(_given(args, tokenizer, samples))
    counting = [sample for sample in found if any(sample.mask)]
    if not counting:
        raise UsageError(
            f"--val-data {args.val_data}: none of its {len(found)} samples has a response token that counts"
        )
    if len(counting) < len(found):
        logger.warning("LoRA: %d of %d samples of --val-data count nothing", len(found) - len(counting), len(found))
    return counting


def _given(args: Namespace, tokenizer, samples) -> Iterator[Given]:
    masks = None
    for number, sample in enumerate(samples):
        where = f"--val-data {args.val_data}: sample {number}"
        if not isinstance(sample.prompt, str):
            if masks is None:
                from slime.utils.mask_utils import MultiTurnLossMaskGenerator

                masks = MultiTurnLossMaskGenerator(tokenizer, tokenizer_type=args.loss_mask_type)
            tokens, mask = masks.get_loss_mask(sample.prompt, tools=(sample.metadata or {}).get("tools"))
            length = masks.get_response_lengths([mask])[0]
        elif sample.label is None:
            raise UsageError(
                f"{where} is a prompt without a response; name the key of responses with --label-key, or give messages"
            )
        else:
            prompt, response = given_tokens(tokenizer, sample.prompt, str(sample.label))
            tokens, length, mask = [*prompt, *response], len(response), [1] * len(response)
        if length == len(tokens):
            raise UsageError(f"{where} has no token in front of its response, which nothing predicts then")
        yield Given(tokens, length, mask[len(mask) - length :])
