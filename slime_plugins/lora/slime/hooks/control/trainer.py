"""What the loop's decisions need of the trainer: validation loss, learning rate, the adapter of this rollout.

All of it happens while slime has the trainer on its devices: in ``train_actor``, after the last step of a rollout.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.adapters import has_adapters
from slime_plugins.lora.control.history import FINAL, History
from slime_plugins.lora.control.keep import keep, keep_best
from slime_plugins.lora.control.rates import scale_schedule
from slime_plugins.lora.ends.export import export_peft
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.parallel import all_gather, rank
from slime_plugins.lora.slime.hooks.control import flags
from slime_plugins.lora.slime.hooks.control.data import Given, read
from slime_plugins.lora.slime.hooks.replay import no_replay

logger = logging.getLogger(__name__)

CANDIDATE = "candidate"
"""Below --lora-export-dir: the adapter of the last validated rollout, which may become the best or the final one."""


@dataclass
class _State:
    """Of one actor of slime's, as ``lora_state``."""

    num_rollout_per_epoch: int | None
    samples: list[Given] | None = None
    val_loss: dict[int, float] = field(default_factory=dict)
    """By rollout: of the last one alone."""


def validating(train_actor):
    """Hook: one rollout's training. Where this rollout is to be validated, that is done while the model is there."""
    signature = inspect.signature(train_actor)

    @functools.wraps(train_actor)
    def hooked(self, *words, **kwargs):
        if flags.wanted(self.args) and has_adapters(self.model) and not hasattr(self, "lora_state"):
            raise UsageError(
                "--lr-plateau-metric and --val-interval are decided in the loops of train.py and train_async.py, and "
                "this run's script has no line of slime-lora's at its loop; use one of those, or drop the flags"
            )
        result = train_actor(self, *words, **kwargs)
        if flags.wanted(self.args) and has_adapters(self.model):
            _measure(self, signature.bind(self, *words, **kwargs).arguments["rollout_id"])
        return result

    return hooked


def lora_control(self, what: str, *words: Any) -> Any:
    """Member of slime's actor: does one of ``_DOES``."""
    return _DOES[what](self, *words)


def _begin(actor, factor: float, num_rollout_per_epoch: int | None) -> None:
    actor.lora_state = _State(num_rollout_per_epoch)
    if factor != 1:
        _set_rate(actor, factor)


def _set_rate(actor, factor: float) -> None:
    scale_schedule(actor.opt_param_scheduler, factor)


def _measured(actor, rollout_id: int) -> float:
    return actor.lora_state.val_loss[rollout_id]


def _measure(actor, rollout_id: int) -> None:
    """Validation loss and the candidate, as far as this rollout needs them."""
    args, state = actor.args, actor.lora_state
    if flags.validates(args, rollout_id):
        if state.samples is None:
            state.samples = read(args)
        state.val_loss = {rollout_id: validation_loss(args, actor.model, state.samples)}
    last = rollout_id == args.num_rollout - 1
    if args.lora_export_dir and (last or flags.decides(args, rollout_id, state.num_rollout_per_epoch)):
        export_peft(actor.model, Path(args.lora_export_dir) / CANDIDATE, hf_checkpoint=args.hf_checkpoint)


def _measure_awake(actor, rollout_id: int) -> None:
    with _awake(actor):
        _measure(actor, rollout_id)


def _keep(actor, name: str, history: History) -> None:
    """Make the candidate the best, or the final adapter."""
    if rank() != 0:
        return
    place = Path(actor.args.lora_export_dir)
    if name != FINAL:
        keep_best(place / CANDIDATE, place, history)
    elif (place / CANDIDATE).is_dir():
        keep(place / CANDIDATE, place / FINAL)
        shutil.rmtree(place / CANDIDATE)


def _save(actor, rollout_id: int) -> None:
    with _awake(actor):
        offloads, actor.args.offload_train = actor.args.offload_train, False  # it is awake
        try:
            actor.save_model(rollout_id, force_sync=True)
        finally:
            actor.args.offload_train = offloads


@contextlib.contextmanager
def _awake(actor) -> Iterator[None]:
    """Inside, slime has the trainer's memory on its devices."""
    if actor.args.offload_train:
        actor.wake_up()
    yield
    if actor.args.offload_train:
        actor.sleep()


_DOES: dict[str, Callable[..., Any]] = {
    "begin": _begin,
    "measured": _measured,
    "measure_awake": _measure_awake,
    "set_rate": _set_rate,
    "keep": _keep,
    "save": _save,
}


def validation_loss(args: Namespace, model: Any, samples: list[Given]) -> float:
    """Mean of -log p over all response tokens that count, in nats; the same on every rank.

    The microbatches are the same in every layout, and are dealt out over data-parallel ranks; what they give is added
    exactly, so that layouts which compute a microbatch alike have the same loss.

    Collectives:
        slime's ``forward_only``, one all_gather_object over the world.
    """
    from megatron.core import mpu
    from slime.backends.megatron_utils.cp_utils import slice_log_prob_with_cp
    from slime.backends.megatron_utils.data import DataIterator
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy
    from slime.backends.megatron_utils.model import forward_only

    rows, indices = _share(list(_packed(args, samples)), *_places(model))
    device = torch.cuda.current_device()
    masks = [torch.tensor(row.mask, dtype=torch.int, device=device) for row in rows]
    data: dict[str, Any] = {
        "tokens": [torch.tensor(row.tokens, dtype=torch.long, device=device) for row in rows],
        "loss_masks": masks,
        "total_lengths": [len(row.tokens) for row in rows],
        "response_lengths": [row.response for row in rows],
    }
    chunks = mpu.get_virtual_pipeline_model_parallel_world_size() or 1
    iterators = [DataIterator(data, micro_batch_indices=indices) for _ in range(chunks)]
    plain = Namespace(**{**vars(args), "rollout_temperature": 1.0, "use_rollout_entropy": False})
    with torch.no_grad(), no_replay():
        found = forward_only(get_log_probs_and_entropy, plain, model, iterators, [len(indices)])
    nll: list[float] = []
    if mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0:
        for log_probs, mask, row in zip(found["log_probs"], masks, rows):
            mine = slice_log_prob_with_cp(mask, len(row.tokens), row.response)
            nll.append(-(log_probs.double() * mine.to(log_probs.device)).sum().item())
    return math.fsum(value for part in all_gather(nll) for value in part) / sum(sum(one.mask) for one in samples)


def _places(model: Any) -> tuple[int, int, int]:
    """This rank's place among data-parallel ranks, their number, and what a number of microbatches must divide by."""
    from megatron.core import mpu
    from megatron.core.utils import get_model_config

    several = (mpu.get_virtual_pipeline_model_parallel_world_size() or 1) > 1
    return (
        mpu.get_data_parallel_rank(with_context_parallel=False),
        mpu.get_data_parallel_world_size(with_context_parallel=False),
        get_model_config(model[0]).microbatch_group_size_per_vp_stage if several else 1,
    )


def _packed(args: Namespace, samples: list[Given]) -> Iterator[list[Given]]:
    """Microbatches, in the order of the samples: as large as those of training."""
    micro: list[Given] = []
    tokens = 0
    for sample in samples:
        if args.use_dynamic_batch_size:
            full = tokens + len(sample.tokens) > args.max_tokens_per_gpu * args.context_parallel_size
        else:
            full = len(micro) == args.micro_batch_size
        if micro and full:
            yield micro
            micro, tokens = [], 0
        micro.append(sample)
        tokens += len(sample.tokens)
    yield micro


def _share(micros: list[list[Given]], place: int, places: int, multiple: int) -> tuple[list[Given], list[list[int]]]:
    """One rank's samples and their indices by microbatch: as many of these on every rank, the last of no weight."""
    count = -(-len(micros) // (places * multiple)) * multiple
    first = micros[0][0]
    nothing = [Given(first.tokens, first.response, [0] * first.response)]
    mine = [micros[i] if i < len(micros) else nothing for i in range(place, place + count * places, places)]
    rows: list[Given] = []
    indices = []
    for micro in mine:
        indices.append(list(range(len(rows), len(rows) + len(micro))))
        rows += micro
    return rows, indices
