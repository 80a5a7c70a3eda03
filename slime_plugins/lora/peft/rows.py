"""Trained vocabulary rows in a PEFT adapter: ``trainable_token_indices`` of LoRA, or ``TRAINABLE_TOKENS`` alone. Pure.

PEFT holds the rows' new values, W[ids] + D; here a row is the change D of it (``layers.forms.tokens``). Keys, with
PEFT 0.21, of a module ``model.embed_tokens`` or ``lm_head``:

    beside lora_A and lora_B    base_model.model.<module>.token_adapter.trainable_tokens_delta    [N, H]
    alone                       base_model.model.<module>.trainable_tokens_delta                  [N, H]

Tied to the embedding, an output layer has the embedding's rows. vLLM and SGLang take neither form: ``bake_rows``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.tokens import runs
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files.safetensors import Stored
from slime_plugins.lora.peft.config import PREFIX

ALONE = "TRAINABLE_TOKENS"
"""``peft_type`` of an adapter that is nothing else."""
EMBEDDING, HEAD = "embed_tokens", "lm_head"
LEAVES = {"embedding.word_embeddings": EMBEDDING, "output_layer": HEAD}
"""Megatron's names of the matrices over the vocabulary -> Hugging Face's."""
Change = Callable[[str, torch.Tensor], torch.Tensor]
Adapter = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""Config and tensors."""
_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta")


@dataclass(frozen=True)
class VocabularyRows:
    """Some rows of one matrix over the vocabulary, gathered from every shard."""

    leaf: str
    """``embed_tokens`` or ``lm_head``."""
    ids: tuple[int, ...]
    delta: torch.Tensor
    """[N, H]: what is added to the base's rows."""

    def values(self, base: BaseCheckpoint) -> torch.Tensor:
        """W[ids] + D, summed in float32, [N, H] in D's dtype.

        Raises:
            UsageError: an id that the base has no row for.
        """
        rows = base_rows(base, self.leaf, self.ids)
        return (rows.float() + self.delta.detach().cpu().float()).to(self.delta.dtype)


def base_rows(base: BaseCheckpoint, leaf: str, ids: Sequence[int]) -> torch.Tensor:
    """These rows of the base's own matrix, [N, H]; of a tied output layer the embedding's."""
    weight = _matrix(base, leaf, ids)
    return torch.cat([weight.read(rows=slice(run.start, run.stop)) for run in runs(ids)])


def _matrix(base: BaseCheckpoint, leaf: str, ids: Iterable[int]) -> Stored:
    """The base's own matrix. Raises UsageError for an id that it has no row for."""
    weight = base.weights[matrix_of(base, leaf)]
    beyond = [i for i in ids if i >= weight.shape[0]]
    if beyond:
        raise UsageError(
            f"{base.directory}: its {leaf} has {weight.shape[0]:,} rows, none for token {beyond[0]}; add the tokens "
            "first (slime-lora add-tokens)"
        )
    return weight


def matrix_of(base: BaseCheckpoint, leaf: str) -> str:
    """Name of the weight in the base's files."""
    return "lm_head.weight" if leaf == HEAD and not base.tied else base.embedding


def with_rows(
    adapter: Adapter | None,
    rows: Sequence[VocabularyRows],
    base: BaseCheckpoint,
) -> Adapter:
    """An adapter's config and tensors with the rows in them; None: of the rows alone."""
    ids = list(rows[0].ids)
    modules = {one.leaf: _module(base, one.leaf) for one in rows}
    if adapter is None:
        config: dict[str, Any] = {
            "peft_type": ALONE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base.directory.absolute()),
            "target_modules": sorted(modules),
            "token_indices": ids,
            "init_weights": True,
            "inference_mode": True,
        }
        tensors, infix = {}, ""
    else:
        config, tensors, infix = dict(adapter[0]), dict(adapter[1]), ".token_adapter"
        config["trainable_token_indices"] = ids if base.tied else dict.fromkeys(sorted(modules), ids)
    for one in rows:
        tensors[f"{PREFIX}{modules[one.leaf]}{infix}.trainable_tokens_delta"] = one.values(base)
    if adapter is None and base.tied:  # PEFT saves both, and misses the second where it is not there
        tensors[f"{PREFIX}{HEAD}.trainable_tokens_delta"] = rows[0].values(base)
    return config, tensors


def written(rows: Sequence[VocabularyRows], base: BaseCheckpoint) -> tuple[Change, set[str]]:
    """What a merge does with the rows: tensor name, value -> with the rows in it; and the names that it changes.

    Raises:
        UsageError: an id that the base has no row for.
    """
    by_name = {matrix_of(base, one.leaf): one for one in rows}
    for one in rows:
        _matrix(base, one.leaf, one.ids)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in by_name:
            return weight
        index, changed = torch.tensor(by_name[name].ids), weight.clone()
        changed[index] = (weight[index].float() + by_name[name].delta.cpu().float()).to(weight.dtype)
        return changed

    return change, set(by_name)


def with_rows_on(
    rows: Sequence[VocabularyRows], base: BaseCheckpoint, stored: Change | None = None, also: Iterable[str] = ()
) -> dict[str, Any]:
    """The arguments ``stored`` and ``also`` of ``merge_checkpoint``, with the rows in them."""
    change, changed = written(rows, base)
    return {
        "stored": lambda name, weight: change(name, weight if stored is None else stored(name, weight)),
        "also": {*also, *changed},
    }


def _module(base: BaseCheckpoint, leaf: str) -> str:
    return HEAD if leaf == HEAD else base.module(base.embedding).removesuffix(".weight")


def row_key(key: str) -> str | None:
    """The module of a key of trained rows; None for any other key."""
    match = _KEY.fullmatch(key)
    return match["module"] if match else None


def keys_by_leaf(keys: Iterable[str]) -> dict[str, str]:
    """``embed_tokens``, ``lm_head`` -> the key of its trained rows, of those of an adapter."""
    return {module.rpartition(".")[2]: key for key in keys if (module := row_key(key))}


def trained_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids whose rows are trained, as the config lists them; () of an adapter without.

    Raises:
        ValueError: as ``ids_of``, or others of lm_head than of embed_tokens.
    """
    found = set(ids_of(config).values())
    if len(found) > 1:
        raise ValueError("adapter_config.json: other rows of lm_head are trained than of embed_tokens")
    return found.pop() if found else ()


def ids_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Leaf -> the ids whose rows a config says are trained; ``embed_tokens`` for PEFT's list form.

    Raises:
        ValueError: that is not what ``trainable_token_indices`` or ``token_indices`` can be.
    """
    alone = config.get("peft_type") == ALONE
    field = "token_indices" if alone else "trainable_token_indices"
    found = config.get(field) or {}
    if alone:
        found = dict.fromkeys(config.get("target_modules") or [EMBEDDING], found)
    elif isinstance(found, list):
        found = {EMBEDDING: found}
    if not isinstance(found, dict) or not all(isinstance(ids, list) and ids for ids in found.values()):
        raise ValueError(
            f"adapter_config.json: {field} is {found!r:.60}, expected token ids, or lists of them by module"
        )
    for ids in found.values():
        if not all(type(i) is int and i >= 0 for i in ids) or len(set(ids)) < len(ids):
            raise ValueError(
                f"adapter_config.json: {field} has {ids!r:.60}, expected ids that are whole and each once"
            )
    return {leaf.rpartition(".")[2]: tuple(ids) for leaf, ids in found.items()}


def rows_in(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: BaseCheckpoint
) -> list[VocabularyRows]:
    """What an adapter's rows change in a base, ids in order. Tied: of the embedding alone.

    Raises:
        ValueError: tensors that are missing, of another shape or not finite, ids that differ between the two matrices,
            a matrix that is not trained beside one that is.
    """
    ids, listed = ids_of(config), trained_ids(config)
    if not ids:
        return []
    keys = keys_by_leaf(tensors)
    wanted = (EMBEDDING,) if base.tied else (EMBEDDING, HEAD)
    missing = [leaf for leaf in wanted if leaf not in ids or leaf not in keys]
    if missing:
        raise ValueError(
            f"the adapter trains rows of {', '.join(ids)} and holds no rows of {missing[0]}; a model trains both"
        )
    found = []
    order = sorted(range(len(listed)), key=listed.__getitem__)
    for leaf in wanted:
        values, theirs = tensors[keys[leaf]], base_rows(base, leaf, listed)
        if values.shape != theirs.shape or not torch.isfinite(values).all():
            raise ValueError(f"{keys[leaf]} is {list(values.shape)}, expected finite values, {list(theirs.shape)}")
        delta = values.float() - theirs.float()
        found.append(VocabularyRows(leaf, tuple(sorted(listed)), delta[order]))
    return found
