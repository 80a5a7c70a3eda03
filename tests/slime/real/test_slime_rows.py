"""slime's own train.py with trained vocabulary rows: what trains, is sent to engines, exported and resumed."""

from __future__ import annotations

import pytest
from peft_merged import merge_and_unload
from runs import LORA

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

IDS = [5, 17, 63, 64, 65]
ROWS = "--trainable-token-indices 5 17 63-65"


@pytest.mark.parametrize("alone", [False, True], ids=["beside-lora", "alone"])
def test_rows_train_are_sent_exported_and_resumed(run, alone):
    import torch
    from safetensors.torch import load_file

    extra = f"{LORA} {ROWS}" + (" --freeze-llm" if alone else "")
    words = ("--steps", "4", "--save-interval", "2")
    trained = run(*words, "--mode", "colocate", "--tp", "2", extra=f"{extra} --save-hf hf_{{rollout_id}}")
    kl, norms = trained.of("kl_loss"), trained.of("lora/rows_norm")
    assert kl[0] == 0.0 and all(value > 0 for value in kl[1:])
    assert norms == sorted(norms) and norms[0] > 0, norms
    base = load_file(trained.work / "hf" / "model.safetensors")
    first, *_, last = (load_file(file) for file in trained.received("weights_*.safetensors"))
    assert all(torch.equal(first[name], tensor) for name, tensor in base.items())
    expected = merge_and_unload(trained.work / "hf", trained.work / "hf_3")
    wrong = [name for name, tensor in last.items() if not torch.equal(tensor, expected[name])]
    assert wrong == []
    embedding = "model.embed_tokens.weight"
    changed = (last[embedding] != base[embedding]).any(1).nonzero().flatten().tolist()
    assert changed == IDS
    others = [name for name in base if name != embedding and not torch.equal(last[name], base[name])]
    assert bool(others) is not alone
    # Tied over two stages now.
    resumed = run(*words, "--pp", "2", "--resume", extra=f"{extra} --ckpt-step 1", of=trained)
    # bf16 sums in another order; the rows alone move the policy by a KL that is no larger than that noise.
    assert resumed.of("kl_loss") == pytest.approx(kl[2:], rel=0.03, abs=1e-6)
    assert resumed.of("grad_norm") == pytest.approx(trained.of("grad_norm")[2:], rel=0.005)
    assert resumed.of("lora/rows_norm") == pytest.approx(norms[2:], rel=5e-3)
