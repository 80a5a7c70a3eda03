"""What a run decides by its validations: the learning rate, when to stop, which adapter is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slime_plugins.lora.checkpoint import directory
from slime_plugins.lora.checkpoint.manifest import Manifest
from slime_plugins.lora.control import history
from slime_plugins.lora.control.history import FILE, FINAL, History
from slime_plugins.lora.control.keep import keep, keep_best, resume_best
from slime_plugins.lora.control.plateau import VAL_LOSS
from slime_plugins.lora.rehearsal.samples import Source
from slime_plugins.lora.rehearsal.settings import EVAL_REWARD, Settings


@dataclass
class Control:
    """The history of a run, and what is done about it."""

    source: Source
    history: History
    place: Path
    """Where history, best and final adapter are left."""

    def begin(self) -> None:
        """Train with the rate that the run had."""
        if self.history.factor != 1:
            self._set_rate()

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        """Decide by what a step's metrics hold of validations. The step's adapter is exported already."""
        names = {"val_loss": VAL_LOSS, "eval_reward": EVAL_REWARD}
        found = {names[name]: metrics[name] for name in names if name in metrics}
        if not found:
            return
        rate = self.history.state.lr
        entry = self.history.add(step, found)
        if self.history.is_best(step):
            keep_best(self.source.adapter_dir, self.place, self.history)
        self.history.write(self.place)  # last: what it says of the best adapter is so
        if entry.decision:
            self.source.display.line(f"validation after step {step}: {entry.decision}")
        if self.history.state.lr != rate:
            self._set_rate()

    def end(self) -> dict:
        """Leave the final adapter. Returns a part of the summary."""
        keep(self.source.adapter_dir, self.place / FINAL)
        state = self.history.state
        best = {} if state.best_step is None else {"best_step": state.best_step, "best": state.best}
        return {**best, "lr_last": state.lr, "stopped": state.stopped}

    def _set_rate(self) -> None:
        self.source.cluster.ranks("scale_rates", self.history.factor)


def control_of(source: Source, first: int) -> Control | None:
    """Of a run that starts after ``first`` steps; None where nothing is validated by these flags."""
    settings = source.settings
    if settings.plateau is None and settings.val_interval is None:
        return None
    past = History(settings.plateau, settings.lr)
    place = Path(settings.save or settings.out)
    if settings.load:
        before = _run_of(settings.load)
        found = history.read(before, settings.plateau, settings.lr, until=first)
        if found is None:
            source.display.line(f"{before} has no {FILE}: validations count from here")
        else:
            past = found
            said = resume_best(before, place, past)
            if said:
                source.display.line(said)
    return Control(source, past, place)


def stopped(settings: Settings) -> str | None:
    """Why the run that ``--load`` names has stopped, if it has by these flags. Before any process starts."""
    if not settings.load or settings.plateau is None:
        return None
    step = Manifest.read(directory.find(settings.load)).step or 0
    past = history.read(_run_of(settings.load), settings.plateau, settings.lr, until=step)
    return None if past is None else past.stop_message(settings.load)


def _run_of(load: str) -> Path:
    """The directory of a run, of what ``--load`` may name."""
    return directory.find(load).parent
