"""``examples/lora/megatron_program.py`` run by torchrun on two CPU processes, resumed at another parallelism, and its
adapter under transformers + PEFT; the README's snippet is taken from it.

Run: pytest tests/project/test_megatron_program.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "examples" / "lora" / "megatron_program.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from slime_plugins.lora.rehearsal.tiny import make_tiny

    root = tmp_path_factory.mktemp("program")
    make_tiny(root / "base")
    lines = [" ".join(f"t{10 + (start + 2 * i) % 40}" for i in range(6 + start % 8)) for start in range(20)]
    (root / "text.txt").write_text("\n".join(lines) + "\n")
    return root


def run(files, *words, processes=2):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        PROGRAM,
    ]
    command += [
        "--hf-checkpoint",
        files / "base",
        "--text",
        files / "text.txt",
        "--out",
        files / "out",
        "--lr",
        "5e-3",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*map(str, command), *words], env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def steps_of(printed):
    found = re.findall(r"^step (\d+)/\d+  loss ([\d.]+)  kl ([\d.]+)", printed, re.M)
    return {int(step): (float(loss), float(kl)) for step, loss, kl in found}


def test_it_trains_resumes_at_another_parallelism_and_exports_what_it_trained(files):
    printed = run(files, "--tp", "2", "--steps", "5")
    steps = steps_of(printed)
    assert list(steps) == [1, 2, 3, 4, 5] and steps[5][0] < steps[1][0]
    assert steps[1][1] == 0 and steps[2][1] > 0  # the reference is the base, and the policy leaves it
    assert "linear_qkv" in printed
    assert peft_loss(files) == pytest.approx(loss_over_all(printed), abs=2e-5)

    printed = run(files, "--tp", "1", "--steps", "7")  # two data-parallel ranks
    assert "goes on after step 5" in printed and list(steps_of(printed)) == [6, 7]
    assert steps_of(printed)[6][1] > 0  # the adapter is there, not a new one
    assert peft_loss(files) == pytest.approx(loss_over_all(printed), abs=2e-5)


def loss_over_all(printed):
    return float(re.search(r"^loss over all lines ([\d.]+)$", printed, re.M)[1])


def peft_loss(files):
    """The mean loss of a next token over the text, by transformers + PEFT from what was exported."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(files / "base", attn_implementation="eager")
    model = PeftModel.from_pretrained(base, files / "out" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "base")
    losses = []
    for line in (files / "text.txt").read_text().splitlines():
        tokens = tokenizer(line, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(tokens).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


def test_the_readme_shows_lines_of_it():
    """In order, without indentation; "..." stands for what is left out."""
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = [line.strip() for line in block.splitlines() if line.strip() not in ("", "...")]
    program = iter([line.strip() for line in PROGRAM.read_text().splitlines()])
    assert len(lines) >= 8
    for line in lines:
        assert line in program, f"{line!r} is not in {PROGRAM.name}, or not in this order"  # consumes the iterator


def test_load_base_says_what_has_to_come_first(files):
    from slime_plugins.lora.errors import UsageError

    script = (
        "import sys; {enable}\n"
        "from slime_plugins.lora import load_base\n"
        "from slime_plugins.lora.errors import UsageError\n"
        "import torch.distributed as dist\n"
        "{groups}\n"
        "try:\n    load_base({base!r})\n"
        "except UsageError as error:\n    print(error)\n"
    )
    groups = (
        "dist.init_process_group('gloo', init_method='file://{}', rank=0, world_size=1)\n"
        "from megatron.core import parallel_state\nparallel_state.initialize_model_parallel()"
    ).format(files / "store")
    enable = "from slime_plugins.lora.rehearsal import cpu; cpu.enable()"
    assert issubclass(UsageError, ValueError)
    for has_enable, has_groups, expected in ((1, 0, "initialize_model_parallel"), (0, 1, "cpu.enable()")):
        code = script.format(
            enable=enable if has_enable else "", groups=groups if has_groups else "", base=str(files / "base")
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and done.stdout.count("\n") == 1 and expected in done.stdout, done.stderr[-2000:]
