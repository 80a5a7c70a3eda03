"""slime's train.py with engines that run a quantised copy: ``sync_lost`` against what the engines have received.

Its converter and quantisers are slime's; of them, ``quantised.py`` replaces two kernels that need a GPU.

    pytest -m "" tests/slime/real/test_quantised_engines.py  # three runs of half a minute
"""

from __future__ import annotations

import json
import subprocess

import engine_quantisers as reference
import pytest
from runs import LORA

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MAKE = (
    "import sys; sys.path.insert(0, sys.argv[1]); import fixtures; from pathlib import Path; fixtures.make_model({})"
)


@pytest.mark.parametrize(
    "kind, words, layers",
    [
        ("fp8 tensor", "--mode colocate --tp 2", (1, 3)),
        ("fp8 blocks", "--mode disk", (1, 3)),
        ("int4", "--mode distributed --pp 2", (0, 1, 2, 3)),  # two of every stage; gloo broadcasts no FP8
    ],
)
def test_sync_lost_is_that_of_the_engines(run, harness_dir, slime_python, tmp_path, kind, words, layers):
    config = reference.CONFIGS[kind]
    make = MAKE.format("Path(sys.argv[2]), 0, tie=True, kind='qwen3'")
    subprocess.run([slime_python, "-c", make, harness_dir, tmp_path / "hf"], check=True, cwd=tmp_path)
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    extra = f"{LORA} --hf-checkpoint {file.parent} --save-interval 1 --save-hf hf_{{rollout_id}}"
    synced = run("--steps", "2", *words.split(), extra=extra, also=("quantised",))
    lost = synced.of("lora/sync_lost")
    assert lost[0] == 0.0, "before the first step B is zero"
    assert lost[1] == pytest.approx(_of_the_engine(synced, config, layers), rel=0.01) and lost[1] > 0.1
    assert f"train/lora/sync_lost is {lost[1]:.2f} after slime's quantiser" in synced.log


def _of_the_engine(synced, config: dict, layers) -> float:
    """From the files of the engine and of the adapter after the first step."""
    from safetensors.torch import load_file

    before, after, _ = (load_file(file) for file in synced.received("weights_*.safetensors"))
    adapter = load_file(synced.work / "hf_0" / "adapter_model.safetensors")
    error = update = 0.0
    for key in (key for key in adapter if key.endswith("lora_A.weight")):
        stem = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if int(stem.split(".")[2]) not in layers:
            continue
        change = 2 * adapter[key.replace("lora_A", "lora_B")].double() @ adapter[key].double()
        read = []
        for weights in (after, before):
            sent = {name: tensor for name, tensor in weights.items() if name.startswith(f"{stem}.")}
            assert len(sent) > 1, (stem, "is not quantised")
            read.append(reference.dequantise(sent, config).double())
        error += (read[0] - read[1] - change).square().sum().item()
        update += change.square().sum().item()
    return (error / update) ** 0.5
