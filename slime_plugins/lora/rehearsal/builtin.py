"""The default base: a tiny Qwen3 that answers the recall task well-formed and at random. Made once, then cached.

It has been pre-trained to answer with any of the five digits shown, so one answer in five is right; what the ordinal
word means is left for RL to find.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slime_plugins.lora.base.tokens import NewToken
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files.cache import cache_dir
from slime_plugins.lora.rehearsal.task import DIGITS, ORDINALS, recall_prompts

RECIPE: dict[str, Any] = {
    "words": ["<pad>", "<bos>", "<eos>", "<unk>", *DIGITS, *ORDINALS],
    "model": {"num_layers": 2, "hidden": 64, "num_heads": 4, "num_kv_heads": 2, "ffn": 128, "vocab_size": 32},
    "steps": 500,
    "batch_size": 64,
    "lr": 3e-3,
    "prompts": 4096,
    "seed": 0,
}


_NAME = "recall-qwen3-"
_HELD_OUT, _HELD_OUT_SEED = 256, 1


def builtin_checkpoint(progress: Callable[[str], None] = lambda line: None) -> tuple[Path, Path]:
    """Directory of the default base and its prompt file; made on first use, some 10 seconds.

    The cache key is the recipe and this module's code, so an edited recipe is never served from an old cache.
    """
    code = inspect.getsource(sys.modules[__name__]) + inspect.getsource(recall_prompts)
    key = hashlib.sha256((json.dumps(RECIPE, sort_keys=True) + code).encode()).hexdigest()[:12]
    path = cache_dir() / f"{_NAME}{key}"
    if not path.is_dir():
        progress(f"making the built-in base (once, cached in {path}) ...")
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            with _quiet_single_thread():
                _make(work)
            os.rename(work, path)
        except OSError:
            if not path.is_dir():  # else another run was faster, and its copy is as good
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path, path / "prompts.jsonl"


def task_in_new_tokens(tokens: Sequence[NewToken], progress: Callable[[str], None] = print) -> dict[str, str]:
    """The built-in base and task where a new token stands for each digit of an answer, ten in order; cached too.

    A token's rows start as its digit's, unless it has a description: the base gives either one.

    Returns:
        values of ``--hf-checkpoint``, ``--prompt-data`` and ``--eval-data``.
    Raises:
        UsageError: other than ten tokens, or some that ``add_tokens`` refuses.
    """
    if len(tokens) != len(DIGITS):
        raise UsageError(
            f"--new-tokens: {len(tokens)} tokens; the built-in task takes {len(DIGITS)}, one for each digit in order "
            "(or give --hf-checkpoint and --prompt-data)"
        )
    base, _ = builtin_checkpoint(progress)
    words = {digit: token.text for digit, token in zip(DIGITS, tokens)}
    described = [NewToken(token.text, token.description or digit) for digit, token in zip(DIGITS, tokens)]
    key = hashlib.sha256(repr((base.name, described)).encode()).hexdigest()[:12]
    path = cache_dir() / f"new-tokens-{key}"
    if not path.is_dir():
        from slime_plugins.lora.base.grow import add_tokens

        work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            add_tokens(base, described, work / "base")
            rows = recall_prompts(RECIPE["prompts"], RECIPE["seed"])
            shown = {row["input"] for row in rows}
            held_out = [row for row in recall_prompts(2 * _HELD_OUT, _HELD_OUT_SEED) if row["input"] not in shown]
            for name, part in (("prompts", rows), ("eval", held_out[:_HELD_OUT])):
                lines = (json.dumps({**row, "label": words[row["label"]]}) + "\n" for row in part)
                (work / "base" / f"{name}.jsonl").write_text("".join(lines))
            with contextlib.suppress(OSError):  # another run was faster, and its copy is as good
                os.rename(work / "base", path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    files = {"prompt_data": "prompts.jsonl", "eval_data": "eval.jsonl"}
    return {"hf_checkpoint": str(path)} | {name: str(path / file) for name, file in files.items()}


def is_builtin_file(path: str) -> bool:
    """Is this, by its name, what ``builtin_checkpoint`` makes, here or on another machine?"""
    return Path(path).parent.name.startswith(_NAME) and Path(path).name == "prompts.jsonl"


@contextlib.contextmanager
def _quiet_single_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, and lose much where other programs use the cores."""
    import torch
    from transformers.utils import logging

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.enable_progress_bar()


def _make(path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slime_plugins.lora.rehearsal.tiny import make_tiny, write_tokenizer

    rows = recall_prompts(RECIPE["prompts"], RECIPE["seed"])
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_tiny(path, "qwen3", **RECIPE["model"], tokenizer=False, seed=RECIPE["seed"])
    write_tokenizer(path, RECIPE["words"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompts = torch.tensor([tokenizer(row["input"]).input_ids for row in rows])
    _pretrain(model, prompts, tokenizer.eos_token_id)
    model.save_pretrained(path)


def _pretrain(model, prompts, eos_id: int) -> None:
    """Teach the model to answer with a random one of the digits shown, then to stop."""
    import torch

    generator = torch.Generator().manual_seed(RECIPE["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["lr"], weight_decay=0.0)
    steps, batch_size = RECIPE["steps"], RECIPE["batch_size"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 20) * (1 - s / steps))
    model.train()
    for _ in range(steps):
        rows = prompts[torch.randint(len(prompts), (batch_size,), generator=generator)]
        shown = torch.randint(len(ORDINALS), (batch_size, 1), generator=generator)
        answers = torch.cat([rows.gather(1, shown), torch.full_like(shown, eos_id)], dim=1)
        logits = model(torch.cat([rows, answers], dim=1)).logits[:, -3:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
