"""Weights & Biases beside TensorBoard, by slime's flags. Imported only where it is asked for."""

from __future__ import annotations

from typing import Any

from slime_plugins.lora.rehearsal.settings import Settings


def start(settings: Settings) -> Any:
    """A run: ``log(values, step=...)`` and ``finish(exit_code=...)``.

    Raises:
        ValueError: what wandb says of a login or a server that it cannot reach.
    """
    import wandb  # type: ignore[import-not-found,unused-ignore]

    try:
        if settings.wandb_mode != "offline" and settings.wandb_key is not None:
            wandb.login(key=settings.wandb_key, host=settings.wandb_host)
        return wandb.init(
            mode=settings.wandb_mode,
            dir=settings.wandb_dir,
            entity=settings.wandb_team,
            project=settings.wandb_project,
            group=settings.wandb_group,
            config=settings.to_dict(),
        )
    except Exception as error:  # wandb has many kinds of its own
        raise ValueError(f"--use-wandb: {type(error).__name__}: {error}") from error
