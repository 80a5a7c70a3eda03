"""Steps of Adam with trained vocabulary rows: PEFT's in one process, Megatron's on every rank, and the comparison."""

from __future__ import annotations

import adapted
import pytest
import reference
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config

from slime_plugins.lora import load_adapter, save_adapter, summing_stages
from slime_plugins.lora.adapters import base_parameters, iter_token_rows

STEPS, LR, CLIP = 5, 1e-3, 0.05


def batches(vocab_size: int) -> list[torch.Tensor]:
    """One for each step."""
    return [(reference.batch(vocab_size) + step) % vocab_size for step in range(STEPS)]


def of_peft(model, tokens: list[torch.Tensor]):
    """Gradients of the first step, rows after all of them, gradient norms: name -> tensor; list."""
    rows = {
        ("output_layer" if "lm_head" in name else "embedding.word_embeddings"): p
        for name, p in model.named_parameters()
        if "trainable_tokens_delta" in name
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LR)
    grads, norms = {}, []
    for batch in tokens:
        optimizer.zero_grad()
        logits = model(batch[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        grads = grads or {name: p.grad.clone() for name, p in rows.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(trained, CLIP).item())
        optimizer.step()
    return grads, {name: p.detach().clone() for name, p in rows.items()}, norms


def train(
    chunks,
    tokens: list[torch.Tensor],
    finalize=summing_stages,
    first: int = 0,
    last: int = STEPS,
    load=None,
    save=None,
    distributed_optimizer: bool = True,
):
    """The same of Megatron, rows as W + D from every rank that has them; and: is the base what it was?"""
    before = [parameter.clone() for _, parameter in base_parameters(chunks)]
    model = adapted.wrap(chunks, distributed_optimizer=distributed_optimizer)
    for chunk in model:
        get_model_config(chunk).finalize_model_grads_func = finalize(finalize_model_grads)
    optimizer = adapted.optimizer_for(model, lr=LR, clip_grad=CLIP, distributed_optimizer=distributed_optimizer)
    optimizer.reload_model_params()
    if load is not None:
        load_adapter(model, load, optimizer=optimizer)
    carriers = [carrier for carrier in iter_token_rows(model) if carrier.lora_table]
    grads, norms = [], []
    for batch in tokens[first:last]:
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        adapted.run_schedule(model, batch, microbatches=2)
        grads = grads or [(c.lora_name, c.lora_rows.main_grad.clone()) for c in carriers]
        norms.append(optimizer.step()[1])
    if save is not None:
        save_adapter(model, save, optimizer=optimizer, step=last)
    rows = []
    for carrier in carriers:
        weight = carrier.lora_merged()[carrier.lora_columns]
        rows.append((carrier.lora_name, carrier.lora_here, weight))
    frozen = all(torch.equal(a, b) for a, (_, b) in zip(before, base_parameters(model)))
    return grads, rows, norms, frozen


def check(results, expected, *, whole_gradients: bool = True) -> None:
    """Gradients and rows to 1e-5, gradient norms to 1e-6; after a step of Adam, which amplifies rounding, to 2e-6."""
    grads, rows, norms = expected
    seen = set()
    for found_grads, found_rows, found_norms, frozen in results:
        assert frozen
        assert found_norms[0] == pytest.approx(norms[0], rel=1e-6)
        assert found_norms == pytest.approx(norms, rel=2e-6)
        for name, grad in found_grads if whole_gradients else ():
            assert adapted.relative(grad - grads[name], grads[name]) <= 1e-5, name
        for name, here, values in found_rows:
            seen.add(name)
            assert adapted.relative(values - rows[name][here], rows[name]) <= 1e-5, name
    assert seen == grads.keys()
