"""Break the code on purpose, once per hazard of docs/design.md, and see the tests go red.

    python tests/hazards.py            # all; some 30 s each on 2 cores
    python tests/hazards.py 3 19       # by hazard number
    python tests/hazards.py --list

Each entry replaces a piece of text in a copy of the tree (it must occur exactly once: an entry that no longer fits is
an error, not a pass) and runs the tests named. Exit 0: every broken copy failed its tests. The tree is not touched.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LORA = "slime_plugins/lora/"


@dataclass(frozen=True)
class Break:
    hazard: str
    what: str
    file: str
    old: str
    new: str
    tests: str


BREAKS = [
    Break(
        "1",
        "gather a gated B by plain concatenation of shards",
        LORA + "ends/export.py",
        "            B = _gather_tp(B, linear.lora_tp_group, dim=0)\n",
        "            n = B.shape[0] * linear.lora_tp_size\n"
        "            whole = _gather_tp(linear.lora_B.detach(), linear.lora_tp_group, dim=0)\n"
        "            gathered = _gather_tp(B, linear.lora_tp_group, dim=0)\n"
        "            B = whole[i * n : i * n + n] if len(spec.parts) == 2 else gathered\n",
        "tests/ends/test_export.py -k families",
    ),
    Break(
        "2",
        "take q, k, v for consecutive blocks of rows",
        LORA + "layout.py",
        "    heads, pieces = num_heads // num_query_groups, 2 if gated else 1\n",
        "    head_dim, num_heads, num_query_groups = head_dim * num_query_groups, num_heads // num_query_groups, 1\n"
        "    heads, pieces = num_heads, 2 if gated else 1\n",
        "tests/core/test_layout.py tests/rehearsal/test_base_model.py",
    ),
    Break(
        "3",
        "leave out the sum of replicated gradients under sequence parallelism",
        LORA + "layers/adapter.py",
        "parameter.sequence_parallel = linear.lora_sequence_parallel",
        "parameter.sequence_parallel = False",
        "tests/layers/test_training.py -k sizes_agree",
    ),
    Break(
        "3",
        "sum replicated gradients twice",
        "tests/support/adapted.py",
        "    finalize_model_grads(model)\n",
        "    finalize_model_grads(model)\n    finalize_model_grads(model)\n",
        "tests/layers/test_training.py -k sizes_agree",
    ),
    Break(
        "3",
        "draw A from a seed of each rank's own",
        LORA + "layers/adapter.py",
        'key = f"{spec.config.seed}:',
        'key = f"{tp_rank}{spec.config.seed}:',
        "tests/layers/test_adapters.py -k same_full_A",
    ),
    Break(
        "4",
        "mark replicated halves as sharded, so that the grad norm counts them once per rank",
        LORA + "layers/adapter.py",
        "is_parallel=sharded, dim",
        "is_parallel=True, dim",
        "tests/layers/test_training.py -k sizes_agree",
    ),
    Break(
        "5",
        "leave the frozen embedding's output without a gradient under recompute",
        LORA + "inject.py",
        "        hidden_states.requires_grad_(True)\n",
        "        pass\n",
        "tests/layers/test_parity.py -k recompute",
    ),
    Break(
        "6",
        "mask shards from the common RNG",
        LORA + "layers/adapter.py",
        "        if sharded and self.lora_tp_group.size() > 1:\n",
        "        if False:\n",
        "tests/layers/test_adapters.py -k dropout_masks",
    ),
    Break(
        "6",
        "mask replicated inputs from the model-parallel RNG",
        LORA + "layers/adapter.py",
        "        if sharded and self.lora_tp_group.size() > 1:\n",
        "        if self.lora_tp_group.size() > 1:\n",
        "tests/layers/test_adapters.py -k dropout",
    ),
    Break(
        "6",
        "draw masks from a generator that recompute does not restore",
        LORA + "layers/adapter.py",
        "        return torch.nn.functional.dropout(x, self.lora.config.dropout)\n\n",
        "        keep = torch.rand(x.shape, generator=_PRIVATE) >= self.lora.config.dropout\n"
        "        return x * keep / (1 - self.lora.config.dropout)\n\n",
        "tests/layers/test_adapters.py -k recompute_replays",
    ),
    Break(
        "7",
        "freeze the embedding on the first stage alone",
        LORA + "inject.py",
        "            chunk.requires_grad_(False)\n",
        "            for name, parameter in chunk.named_parameters():\n"
        '                parameter.requires_grad_("output_layer" in name)\n',
        "tests/layers/test_training.py -k pipeline",
    ),
    Break(
        "8",
        "show the adapters to savers and loaders of the base",
        LORA + "layers/adapter.py",
        'if isinstance(linear, LoRALinear) and "lora_A" in linear._parameters:\n            hidden',
        'if isinstance(linear, LoRALinear) and "lora_C" in linear._parameters:\n            hidden',
        "tests/layers/test_adapters.py -k can_hide",
    ),
    Break(
        "11",
        "write values that are not finite",
        LORA + "peft/checks.py",
        "    if not math.isfinite(tensor.sum(dtype=torch.float64).item()):\n",
        "    if False:\n",
        "tests/ends/test_export.py -k not_finite",
    ),
    Break(
        "11",
        "export what one pipeline stage has",
        LORA + "ends/export.py",
        "    found = _gather_on_first(local, pipeline_group())\n",
        "    found = local\n",
        "tests/ends/test_export.py -k layer_numbers",
    ),
    Break(
        "12",
        "take the merged delta out by subtracting it",
        LORA + "adapters.py",
        "                _write(linear.weight, weight)\n",
        "                _write(linear.weight, linear.weight.float() - linear.lora_delta_weight())\n",
        "tests/layers/test_adapters.py -k merged",
    ),
    Break(
        "13",
        "give A the input from before the fused norm",
        LORA + "layers/forms/te.py",
        "self._lora_down(normed)",
        "self._lora_down(x)",
        "tests/layers/test_te.py -k test_parity",
    ),
    Break(
        "14",
        "reduce the gradients of experts over the dense data-parallel group",
        LORA + "layers/adapter.py",
        "linear.lora_A.allreduce = linear.lora_B.allreduce = _expert_groups_are_dense(linear)",
        "linear.lora_A.allreduce = linear.lora_B.allreduce = True",
        "tests/layers/test_experts.py -k twenty_steps",
    ),
    Break(
        "14",
        "count copies of experts' halves once per expert-tensor-parallel rank in the grad norm",
        LORA + "layers/adapter.py",
        "parameter.shared = etp_group.rank() > 0",
        "parameter.shared = False",
        "tests/layers/test_experts.py -k test_grouped",
    ),
    Break(
        "14",
        "exchange the low-rank outputs of shared experts, and let Megatron do it again",
        LORA + "layers/adapter.py",
        'if self.lora.parallel != "duplicated" and _leaves_exchange_to_caller(self):',
        "if False:",
        "tests/layers/test_experts.py -k test_shared_experts",
    ),
    Break(
        "14",
        "give the first expert of every rank the same A",
        LORA + "layers/spec.py",
        "    first = ep_group.rank() * num_local\n",
        "    first = 0\n",
        "tests/layers/test_experts.py -k buffers_and_groups",
    ),
    Break(
        "14",
        "stack the experts' B expert by expert, as A is",
        LORA + "peft/experts_form.py",
        "B.permute(1, 2, 0).flatten(1)",
        "B.permute(1, 0, 2).flatten(1)",
        "tests/peft/test_moe_form.py",
    ),
    Break(
        "15",
        "name layers by their number in the pipeline chunk",
        LORA + "inject.py",
        "{layer.layer_number - 1}",
        "{match[2]}",
        "tests/ends/test_export.py -k layer_numbers",
    ),
    Break(
        "16",
        "let q, k and v share the fused A's storage",
        LORA + "peft/directory.py",
        "            tensor = tensor.clone()\n",
        "            pass\n",
        "tests/peft/test_peft_files.py",
    ),
    Break(
        "17",
        "write the config's alpha beside a padded rank",
        LORA + "peft/form.py",
        "alpha=_alpha(scaling, rank)",
        "alpha=config.alpha",
        "tests/ends/test_export.py -k no_patterns",
    ),
    Break(
        "18",
        "forget to freeze the norms",
        LORA + "inject.py",
        "            chunk.requires_grad_(False)\n",
        "            for parameter in chunk.parameters():\n"
        "                parameter.requires_grad_(parameter.dim() == 1)\n",
        "tests/layers/test_training.py -k sizes_agree",
    ),
    Break(
        "19",
        "leave the adapters on in the reference policy",
        LORA + "adapters.py",
        "        linear.lora_enabled = False\n",
        "        linear.lora_enabled = True\n",
        "tests/layers/test_adapters.py -k switched_off",
    ),
    Break(
        "21",
        "take a learning rate for full training without a word",
        LORA + "arguments.py",
        "0 < lr < LOW_LR",
        "0 < lr < 0",
        "tests/core/test_arguments.py",
    ),
    Break(
        "1",
        "save the rows of a gated B as they lie on a rank",
        LORA + "layers/pieces.py",
        '        yield Piece(spec.name, f"lora_B.{part.name}", spec.rows_of(i), expert, B_dim)\n',
        '        if i == 0:\n            yield Piece(spec.name, "lora_B", slice(None), expert, B_dim)\n',
        "tests/checkpoint/test_checkpoint.py::test_resume[tp1]",
    ),
    Break(
        "2",
        "cut q, k, v of a saved B as consecutive blocks",
        LORA + "layers/pieces.py",
        "spec.rows_of(i), expert, B_dim)",
        "spec.blocks[i].rows if len(spec.blocks) > 1 else slice(i * part.size, (i + 1) * part.size), expert, B_dim)",
        "tests/checkpoint/test_checkpoint_export.py -k live_model",
    ),
    Break(
        "9",
        "load weights behind the optimizer's back",
        LORA + "checkpoint/load.py",
        "        state.restart()\n",
        "        pass\n",
        "tests/checkpoint/test_checkpoint_faults.py -k masters_follow",
    ),
    Break(
        "9",
        "rebuild masters from bf16 weights on resume",
        LORA + "checkpoint/load.py",
        "states[slot.parameter].setdefault(MASTER, weights[slot.parameter])",
        "states[slot.parameter][MASTER] = weights[slot.parameter]",
        "tests/checkpoint/test_checkpoint.py -k bf16",
    ),
    Break(
        "10",
        "save the tensor-parallel shard of the first rank alone",
        LORA + "layers/pieces.py",
        "return self.replica == 0 and (piece.sharded_dim is not None or self.shard == 0)",
        "return self.replica == 0 and self.shard == 0",
        "tests/checkpoint/test_checkpoint.py::test_resume[tp1]",
    ),
    Break(
        "10",
        "let every data-parallel rank write its copy",
        LORA + "layers/pieces.py",
        "return self.replica == 0 and (",
        "return (",
        "tests/checkpoint/test_checkpoint.py::test_resume[dp2]",
    ),
    Break(
        "10",
        "tell Megatron that adapters are replicated",
        LORA + "layers/pieces.py",
        "        sharded = piece.sharded_dim is not None\n",
        "        sharded = False\n",
        "tests/checkpoint/test_checkpoint_saving.py -k megatrons_own",
    ),
    Break(
        "11",
        "load what matches",
        LORA + "checkpoint/load.py",
        "        found = adapter_differences(manifest.adapters, adapters)\n",
        "        found = []\n",
        "tests/checkpoint/test_checkpoint_faults.py -k another_config",
    ),
    Break(
        "11",
        "save values that are not finite",
        LORA + "checkpoint/save.py",
        "    everywhere(lambda: _check_finite(slots, shards))\n",
        "",
        "tests/checkpoint/test_checkpoint_faults.py -k would_lie",
    ),
    Break(
        "11",
        "read tensor data without comparing its checksum",
        LORA + "checkpoint/storage.py",
        "        if hashlib.sha256(data).hexdigest() != record.sha256:\n",
        "        if False:\n",
        "tests/checkpoint/test_checkpoint_faults.py -k flipped_bytes",
    ),
    Break(
        "12",
        "round the delta before it is added to the base",
        LORA + "projections.py",
        "    merged = update.add(weight).to(weight.dtype)\n",
        "    merged = weight + update.to(weight.dtype)\n",
        "tests/base/test_merge.py tests/checkpoint/test_checkpoint_export.py -k rounded_once",
    ),
    Break(
        "17",
        "take an edited alpha in adapter.json",
        LORA + "checkpoint/manifest.py",
        'checksums.get("this file") != _self_digest(content)',
        'checksums.get("this file") is None',
        "tests/checkpoint/test_checkpoint_files.py -k edited",
    ),
    Break(
        "20",
        "name a checkpoint the latest before it is there",
        LORA + "checkpoint/directory.py",
        "    flush_tree(staged)\n    move_in(staged, target, old)\n    fsync(root)\n    _write_tracker(root, name)\n",
        "    _write_tracker(root, name)\n    flush_tree(staged)\n    move_in(staged, target, old)\n    fsync(root)\n",
        "tests/checkpoint/test_checkpoint_files.py -k killed_at_every",
    ),
    Break(
        "20",
        "leave what a killed writer left",
        LORA + "checkpoint/directory.py",
        "            shutil.rmtree(leftover)\n",
        "            pass\n",
        "tests/checkpoint/test_checkpoint_files.py -k killed_at_every",
    ),
    Break(
        "20",
        "write while training goes on, from the live tensors",
        LORA + "checkpoint/model.py",
        'weight.to("cpu", copy=True, memory_format=torch.contiguous_format)',
        "weight",
        "tests/checkpoint/test_checkpoint_saving.py -k asynchronous",
    ),
    Break(
        "resume",
        "start Adam's step count anew",
        LORA + "checkpoint/optimizer.py",
        '            if "step" in scalars:\n',
        "            if False:\n",
        "tests/checkpoint/test_checkpoint.py::test_resume[dp2]",
    ),
    Break(
        "resume",
        "leave random states where they are",
        LORA + "checkpoint/load.py",
        '        rng.set_local_state(rng.unpack(common["rng"], rank()))\n',
        "        pass\n",
        "tests/checkpoint/test_checkpoint_saving.py -k random_states",
    ),
]


def run(item: Break) -> bool:
    """Did the tests fail on the broken copy?"""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory, "tree")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "out"))
        target = copy / item.file
        text = target.read_text()
        if text.count(item.old) != 1:
            sys.exit(f"hazard {item.hazard}: {item.file} has {text.count(item.old)} times, not once: {item.old!r}")
        broken = text.replace(item.old, item.new)
        if "_PRIVATE" in item.new:
            broken += "\n\n_PRIVATE = torch.Generator().manual_seed(0)\n"
        target.write_text(broken)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-W",
            "ignore",
            "-p",
            "no:cacheprovider",
            *item.tests.split(),
        ]
        paths = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HAZARDS_TREE": str(copy)}
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    last = (result.stdout.strip().splitlines() or ["no output"])[-1]
    red = result.returncode == 1
    print(f"{'red ' if red else 'GREEN'}  hazard {item.hazard:>2}: {item.what}  [{item.tests}] {last}", flush=True)
    return red


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hazards", nargs="*", help="hazard numbers; default all")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    chosen = [item for item in BREAKS if not args.hazards or item.hazard in args.hazards]
    if args.list:
        print("\n".join(f"{item.hazard:>2}  {item.what}  ({item.file})" for item in chosen))
        return 0
    verdicts = [run(item) for item in chosen]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
