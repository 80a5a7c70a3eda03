"""What a run decides by its validations: the learning rate, when to stop, which adapter is the best."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slime_plugins.lora.checkpoint import directory
from slime_plugins.lora.checkpoint.manifest import Manifest
from slime_plugins.lora.control import history
from slime_plugins.lora.control.history import BEST, FILE, FINAL, History
from slime_plugins.lora.control.plateau import VAL_LOSS
from slime_plugins.lora.files.atomic import replaced_directory
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
            _copy(self.source.adapter_dir, self.place / BEST)
        self.history.write(self.place)  # last: what it says of the best adapter is so
        if entry.decision:
            self.source.display.line(f"validation after step {step}: {entry.decision}")
        if self.history.state.lr != rate:
            self._set_rate()

    def end(self) -> dict:
        """Leave the final adapter. Returns a part of the summary."""
        _copy(self.source.adapter_dir, self.place / FINAL)
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
            _keep_best(before, place, past, source)
    return Control(source, past, place)


def stopped(settings: Settings) -> str | None:
    """Why the run that ``--load`` names has stopped, if it has by these flags. Before any process starts."""
    if not settings.load or settings.plateau is None:
        return None
    step = Manifest.read(directory.find(settings.load)).step or 0
    past = history.read(_run_of(settings.load), settings.plateau, settings.lr, until=step)
    if past is None or past.state.stopped is None:
        return None
    return (
        f"{settings.load}: this run has stopped, after step {past.stopped_at}: {past.state.stopped}; nothing is done. "
        "To go on, change what stopped it, or drop --lr-plateau-metric"
    )


def _run_of(load: str) -> Path:
    """The directory of a run, of what ``--load`` may name."""
    return directory.find(load).parent


def _keep_best(before: Path, place: Path, past: History, source: Source) -> None:
    """Take the best adapter along; or take it away, if it is of a step that is done again now."""
    if not (before / BEST).is_dir() or past.state.best_step is None:
        return
    of_step = history.load(before / FILE).state.best_step
    if of_step == past.state.best_step:
        if before.resolve() != place.resolve():
            _copy(before / BEST, place / BEST)
        return
    source.display.line(
        f"{before / BEST} is of step {of_step}, which is done again; that of step {past.state.best_step}, the best "
        "until here, is not kept"
    )
    if before.resolve() == place.resolve():
        shutil.rmtree(before / BEST)


def _copy(adapter: Path, place: Path) -> None:
    files = [path for path in adapter.iterdir() if path.is_file()]
    with replaced_directory(place, drop=tuple(path.name for path in files)) as new:
        for path in files:
            shutil.copyfile(path, new / path.name)
