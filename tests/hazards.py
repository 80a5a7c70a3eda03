"""Break the code on purpose, once per hazard of docs/design.md, and see the tests go red.

    python tests/hazards.py            # all; some 30 s each on 2 cores
    python tests/hazards.py 3 19       # by hazard number; 4bit: of a 4-bit base; real: on real slime, if set up
    python tests/hazards.py --list

Each entry names a function, changes it in a copy of the tree and runs the tests named. A function that is not there,
or has not got the text once, is an error, not a pass. Exit 0: every broken copy failed its tests. The tree is not
touched.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("slime_plugins") / "lora"


@dataclass(frozen=True)
class Break:
    """One deliberate defect."""

    hazard: str
    what: str
    where: str
    """File, below the package (or ``tests/...``), and qualified name of a function: ``adapters.py::merged``."""
    old: str | None
    """What is replaced in the function; None: all of its body, behind the docstring."""
    new: str
    tests: str
    needs: str = ""
    """Environment variable without which the tests are skipped."""

    @property
    def file(self) -> Path:
        path = Path(self.where.partition("::")[0])
        return path if path.parts[0] == "tests" else PACKAGE / path

    def applied(self, source: str) -> str:
        """The source with the defect in it. Raises LookupError if it no longer fits."""
        node: ast.AST = ast.parse(source)
        name = self.where.partition("::")[2]
        for part in name.split("."):
            children = [c for c in ast.walk(node) if isinstance(c, (ast.FunctionDef, ast.ClassDef)) and c.name == part]
            if len(children) != 1:
                raise LookupError(f"{self.where}: {part} is defined {len(children)} times, not once")
            node = children[0]
        lines = source.splitlines(keepends=True)
        before, after = "".join(lines[: node.lineno - 1]), "".join(lines[node.end_lineno :])
        function = "".join(lines[node.lineno - 1 : node.end_lineno])
        if self.old is None:
            first = node.body[1] if ast.get_docstring(node, clean=False) is not None else node.body[0]
            indent = " " * node.body[0].col_offset
            if first is not node.body[0]:
                signature = "".join(lines[node.lineno - 1 : node.body[0].end_lineno])
            else:
                signature = "".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
            return f"{before}{signature}{indent}{self.new}\n{after}"
        if function.count(self.old) != 1:
            raise LookupError(f"{self.where} has {function.count(self.old)} times, not once: {self.old!r}")
        return before + function.replace(self.old, self.new) + after


BREAKS = [
    Break(
        "1",
        "gather a gated B by plain concatenation of shards",
        "layers/pieces.py::Placement.gather",
        "[piece.take(shard) for shard in shards]",
        "[shard if piece.key == 'lora_B.gate_proj' else piece.take(shard) for shard in shards]",
        "tests/ends/test_export.py -k families",
    ),
    Break(
        "2",
        "take q, k, v for consecutive blocks of rows",
        "layout.py::qkv_parts",
        "    heads, widths = num_heads // num_query_groups, (head_dim,) * (2 if gated else 1)\n",
        (
            "    head_dim, num_heads = head_dim * num_query_groups, num_heads // num_query_groups\n"
            "    num_query_groups = 1\n"
            "    heads, widths = num_heads, (head_dim,) * (2 if gated else 1)\n"
        ),
        "tests/core/test_layout.py tests/rehearsal/test_base_model.py",
    ),
    Break(
        "3",
        "leave out the sum of replicated gradients under sequence parallelism",
        "layers/carrier.py::install",
        "parameter.sequence_parallel = partial_gradients",
        "parameter.sequence_parallel = False",
        "tests/layers/test_training.py -k sizes_agree",
    ),
    Break(
        "3",
        "sum replicated gradients twice",
        "tests/support/adapted.py::train_step",
        "    finalize_model_grads(model)\n",
        ("    finalize_model_grads(model)\n    finalize_model_grads(model)\n"),
        "tests/layers/test_training.py -k sizes_agree",
    ),
    Break(
        "3",
        "draw A from a seed of each rank's own",
        "layers/adapter.py::LoRALinear.lora_initial",
        "        full = entry.shape[1]",
        (
            "        spec = __import__('dataclasses').replace(spec, name=f\"{spec.name}{self.lora_group.rank()}\")\n"
            "        full = entry.shape[1]"
        ),
        "tests/layers/test_adapters.py -k same_full_A",
    ),
    Break(
        "4",
        "mark replicated halves as sharded, so that the grad norm counts them once per rank",
        "layers/carrier.py::install",
        "is_parallel=sharded, dim",
        "is_parallel=True, dim",
        "tests/layers/test_training.py -k sizes_agree",
    ),
    Break(
        "5",
        "leave the frozen embedding's output without a gradient under recompute",
        "inject.py::_require_input_grad",
        "        hidden_states.requires_grad_(True)\n",
        "        pass\n",
        "tests/layers/test_parity.py -k recompute",
    ),
    Break(
        "6",
        "mask shards from the common RNG",
        "layers/adapter.py::LoRALinear._lora_dropout",
        "if sharded and self.lora_group.size() > 1:",
        "if False:",
        "tests/layers/test_adapters.py -k dropout_masks",
    ),
    Break(
        "6",
        "mask replicated inputs from the model-parallel RNG",
        "layers/adapter.py::LoRALinear._lora_dropout",
        "if sharded and self.lora_group.size() > 1:",
        "if self.lora_group.size() > 1:",
        "tests/layers/test_adapters.py -k dropout",
    ),
    Break(
        "6",
        "draw masks from a generator that recompute does not restore",
        "layers/adapter.py::LoRALinear._lora_dropout",
        "\n        return torch.nn.functional.dropout(x, self.lora.config.dropout)",
        (
            "\n        keep = torch.rand(x.shape, generator=_PRIVATE) >= self.lora.config.dropout"
            "\n        return x * keep / (1 - self.lora.config.dropout)"
        ),
        "tests/layers/test_adapters.py -k recompute_replays",
    ),
    Break(
        "7",
        "freeze the embedding on the first stage alone",
        "inject.py::apply_lora",
        "            chunk.requires_grad_(False)\n",
        (
            "            for name, parameter in chunk.named_parameters():\n"
            '                parameter.requires_grad_("output_layer" in name)\n'
        ),
        "tests/layers/test_training.py -k pipeline",
    ),
    Break(
        "8",
        "show the adapters to savers and loaders of the base",
        "layers/carrier.py::hide_adapters",
        None,
        "yield",
        "tests/layers/test_adapters.py -k can_hide",
    ),
    Break(
        "11",
        "write values that are not finite",
        "peft/checks.py::value_problems",
        "    if not math.isfinite(tensor.sum(dtype=torch.float64).item()):\n",
        "    if False:\n",
        "tests/ends/test_export.py -k not_finite",
    ),
    Break(
        "11",
        "export what one pipeline stage has",
        "ends/export.py::gather_projections",
        "found = gather_on_first(local, pipeline_group())",
        "found = local",
        "tests/ends/test_export.py -k layer_numbers",
    ),
    Break(
        "12",
        "take the merged delta out by subtracting it",
        "layers/frozen.py::_written",
        "parameter.copy_(saved)",
        "parameter.sub_(value - saved)",
        "tests/layers/test_adapters.py -k merged",
    ),
    Break(
        "13",
        "give A the input from before the fused norm",
        "layers/forms/te.py::LoRATELayerNormColumnParallelLinear.forward",
        "self._lora_down(normed)",
        "self._lora_down(x)",
        "tests/layers/test_te.py -k test_parity",
    ),
    Break(
        "14",
        "reduce the gradients of experts over the dense data-parallel group",
        "layers/carrier.py::install",
        "parameter.allreduce = not expert_buffers",
        "parameter.allreduce = True",
        "tests/layers/test_experts.py -k twenty_steps",
    ),
    Break(
        "14",
        "count copies of experts' halves once per expert-tensor-parallel rank in the grad norm",
        "layers/carrier.py::_mark_expert_replica",
        "parameter.shared = etp_group.rank() > 0",
        "parameter.shared = False",
        "tests/layers/test_experts.py -k test_grouped",
    ),
    Break(
        "14",
        "exchange the low-rank outputs of shared experts, and let Megatron do it again",
        "layers/frozen.py::FrozenLinear.tokens",
        'if self.parallel != "duplicated" and self.leaves_exchange_to_caller:',
        "if False:",
        "tests/layers/test_experts.py -k test_shared_experts",
    ),
    Break(
        "14",
        "give the first expert of every rank the same A",
        "layers/frozen.py::FrozenLinear.experts",
        "first = self.ep_group.rank() * self.count",
        "first = 0",
        "tests/layers/test_experts.py -k buffers_and_groups",
    ),
    Break(
        "14",
        "stack the experts' B expert by expert, as A is",
        "peft/experts_form.py::stack",
        "B.permute(1, 2, 0).flatten(1)",
        "B.permute(1, 0, 2).flatten(1)",
        "tests/peft/test_moe_form.py",
    ),
    Break(
        "15",
        "name layers by their number in the pipeline chunk",
        "inject.py::_survey",
        "{layer.layer_number - 1}",
        "{match[2]}",
        "tests/ends/test_export.py -k layer_numbers",
    ),
    Break(
        "16",
        "write the data in another order than the header's",
        "files/safetensors.py::write_tensors",
        "        for key in order:\n",
        "        for key in tensors:\n",
        "tests/peft/test_peft_files.py",
    ),
    Break(
        "17",
        "write the config's alpha beside a padded rank",
        "peft/form.py::to_peft",
        "alpha=_alpha(scaling, rank)",
        "alpha=config.alpha",
        "tests/ends/test_export.py -k no_patterns",
    ),
    Break(
        "18",
        "forget to freeze the norms",
        "inject.py::apply_lora",
        "            chunk.requires_grad_(False)\n",
        (
            "            for parameter in chunk.parameters():\n"
            "                parameter.requires_grad_(parameter.dim() == 1)\n"
        ),
        "tests/layers/test_training.py -k sizes_agree",
    ),
    Break(
        "19",
        "leave the adapters on in the reference policy",
        "adapters.py::adapters_disabled",
        "carrier.lora_enabled = False",
        "carrier.lora_enabled = True",
        "tests/layers/test_adapters.py -k switched_off",
    ),
    Break(
        "21",
        "take a learning rate for full training without a word",
        "arguments.py::validate_lora_args",
        "0 < lr < LOW_LR",
        "0 < lr < 0",
        "tests/core/test_arguments.py",
    ),
    Break(
        "1",
        "save the rows of a gated B as they lie on a rank",
        "layers/pieces.py::_pieces",
        'if parameter.rows == "whole" or (',
        'if not (spec.split and parameter.rows == "stacked") or (',
        "tests/checkpoint/test_checkpoint.py::test_resume[tp1]",
    ),
    Break(
        "2",
        "cut q, k, v of a saved B as consecutive blocks",
        "layers/pieces.py::_pieces",
        "spec.rows_of(i), part.spans)",
        "slice(i * part.size, (i + 1) * part.size), part.spans)",
        "tests/checkpoint/test_checkpoint_export.py -k live_model",
    ),
    Break(
        "11",
        "name the modules of an export as the base's files do",
        "base/spelling.py::module_name",
        None,
        "return stored",
        "tests/peft/test_families.py -k qwen2_5_vl-per-expert",
    ),
    Break(
        "3",
        "sum the gradients of linear attention over tensor-parallel ranks that all have the same",
        "layers/frozen.py::FrozenPlainLinear.tokens",
        'return "whole"',
        'return "sequence"',
        "tests/layers/test_linear_attention.py -k tp2-sp",
    ),
    Break(
        "9",
        "load weights behind the optimizer's back",
        "checkpoint/load.py::load_adapter",
        "        state.restart()\n",
        "        pass\n",
        "tests/checkpoint/test_checkpoint_faults.py -k masters_follow",
    ),
    Break(
        "9",
        "rebuild masters from bf16 weights on resume",
        "checkpoint/load.py::_read",
        "states[slot.parameter].setdefault(MASTER, weights[slot.parameter])",
        "states[slot.parameter][MASTER] = weights[slot.parameter]",
        "tests/checkpoint/test_checkpoint.py -k bf16",
    ),
    Break(
        "10",
        "save the tensor-parallel shard of the first rank alone",
        "layers/pieces.py::Placement.writes",
        "return self.replica == 0 and (piece.sharded_dim is not None or self.shard == 0)",
        "return self.replica == 0 and self.shard == 0",
        "tests/checkpoint/test_checkpoint.py::test_resume[tp1]",
    ),
    Break(
        "10",
        "let every data-parallel rank write its copy",
        "layers/pieces.py::Placement.writes",
        "return self.replica == 0 and (",
        "return (",
        "tests/checkpoint/test_checkpoint.py::test_resume[dp2]",
    ),
    Break(
        "10",
        "tell Megatron that adapters are replicated",
        "layers/pieces.py::_build",
        "        sharded = piece.sharded_dim is not None\n",
        "        sharded = False\n",
        "tests/checkpoint/test_checkpoint_saving.py -k megatrons_own",
    ),
    Break(
        "11",
        "load what matches",
        "checkpoint/load.py::_compare.compare",
        "        found = adapter_differences(manifest.adapters, adapters)\n",
        "        found = []\n",
        "tests/checkpoint/test_checkpoint_faults.py -k another_config",
    ),
    Break(
        "11",
        "save values that are not finite",
        "checkpoint/save.py::save_adapter",
        "    everywhere(lambda: _check_finite(slots, shards))\n",
        "",
        "tests/checkpoint/test_checkpoint_faults.py -k would_lie",
    ),
    Break(
        "11",
        "read tensor data without comparing its checksum",
        "checkpoint/storage.py::TensorReader._load",
        "        if hashlib.sha256(data).hexdigest() != record.sha256:\n",
        "        if False:\n",
        "tests/checkpoint/test_checkpoint_faults.py -k flipped_bytes",
    ),
    Break(
        "12",
        "round the delta before it is added to the base",
        "projections.py::merge",
        "    merged = update.add(weight).to(weight.dtype)\n",
        "    merged = weight + update.to(weight.dtype)\n",
        "tests/base/test_merge.py tests/checkpoint/test_checkpoint_export.py -k rounded_once",
    ),
    Break(
        "17",
        "take an edited alpha in adapter.json",
        "checkpoint/manifest.py::Manifest.read",
        'checksums.get("this file") != _self_digest(content)',
        'checksums.get("this file") is None',
        "tests/checkpoint/test_checkpoint_files.py -k edited",
    ),
    Break(
        "20",
        "name a checkpoint the latest before it is there",
        "checkpoint/directory.py::publish",
        (
            "    flush_tree(staged)\n"
            "    move_in(staged, target, old)\n"
            "    fsync(root)\n"
            "    _write_tracker(root, name)\n"
        ),
        (
            "    _write_tracker(root, name)\n"
            "    flush_tree(staged)\n"
            "    move_in(staged, target, old)\n"
            "    fsync(root)\n"
        ),
        "tests/checkpoint/test_checkpoint_files.py -k killed_at_every",
    ),
    Break(
        "20",
        "leave what a killed writer left",
        "checkpoint/directory.py::stage",
        "            shutil.rmtree(leftover)\n",
        "            pass\n",
        "tests/checkpoint/test_checkpoint_files.py -k killed_at_every",
    ),
    Break(
        "20",
        "write while training goes on, from the live tensors",
        "checkpoint/model.py::Slot.shards",
        'weight.to("cpu", copy=True, memory_format=torch.contiguous_format)',
        "weight",
        "tests/checkpoint/test_checkpoint_saving.py -k asynchronous",
    ),
    Break(
        "resume",
        "start Adam's step count anew",
        "checkpoint/optimizer.py::OptimizerState.restore",
        '            if "step" in scalars:\n',
        "            if False:\n",
        "tests/checkpoint/test_checkpoint.py::test_resume[dp2]",
    ),
    Break(
        "resume",
        "leave random states where they are",
        "checkpoint/load.py::load_adapter",
        '        rng.set_local_state(rng.unpack(common["rng"], rank()))\n',
        "        pass\n",
        "tests/checkpoint/test_checkpoint_saving.py -k random_states",
    ),
    Break(
        "22",
        "leave grouped weights of three dimensions out of the base's fingerprint",
        "checkpoint/model.py::_base_parts",
        "if base is not None and counted and layer:",
        "if base is not None and counted and layer and counted[0].dim() == 2:",
        "tests/checkpoint/test_fingerprint.py -k models_is_its_files",
    ),
    Break(
        "22",
        "count weights that every tensor-parallel rank has whole once per rank",
        "checkpoint/model.py::_over_shards",
        "replicated = bool((shards[:, n] == shards[0, n]).all())",
        "replicated = False",
        "tests/checkpoint/test_fingerprint.py -k models_is_its_files",
    ),
    Break(
        "22",
        "keep a fingerprint whatever happens to the base",
        "checkpoint/model.py::_marks",
        None,
        "return []",
        "tests/checkpoint/test_fingerprint.py -k computed_once",
    ),
    Break(
        "4bit",
        "compare a 4-bit base with what it was made of, whatever the directory holds",
        "checkpoint/model.py::_differences",
        "_remembered(model, of_source=of_source)",
        "_remembered(model, of_source=True)",
        "tests/quant/test_nf4_bases.py",
    ),
    Break(
        "4bit",
        "keep what was quantised while the base is loaded",
        "quant/packed.py::Packed.of",
        "return cls(*nf4.encode(weight), checksum(weight))",
        "cls.kept = [*getattr(cls, 'kept', []), weight.clone()]; return cls(*nf4.encode(weight), checksum(weight))",
        "tests/quant/test_nf4_slime.py -k memory",
    ),
    Break(
        "4bit",
        "nest the scales of every shard by themselves",
        "quantize.py::_nested",
        "whole = _gathered(mine, base)",
        "whole, rank = mine, 0",
        "tests/quant/test_nf4_base.py -k weights_are_those",
    ),
    Break(
        "4bit",
        "leave the dense weight to whoever still refers to it",
        "quant/hold.py::_free",
        None,
        "pass",
        "tests/quant/test_nf4_base.py -k nothing_dense",
    ),
    Break(
        "4bit",
        "write merged weights into the codes",
        "layers/frozen.py::FrozenLinear.replaced",
        "parameter.replaced(value) if isinstance(parameter, PackedWeight) else _written(parameter, value)",
        "_written(parameter, value)",
        "tests/quant/test_nf4_base.py -k said_of_the_base",
    ),
    Break(
        "4bit",
        "take the engines' base for the trainer's by its path",
        "slime/hooks/base_check.py::refuse_other_base",
        "if quant is None and same_base(",
        "if same_base(",
        "tests/quant/test_nf4_slime.py -k building",
    ),
    Break(
        "4bit",
        "load a teacher's weights into a 4-bit base",
        "slime/hooks/policies.py::other_policy",
        "if base_quant_of(self.model) is not None:",
        "if False:",
        "tests/quant/test_nf4_slime.py -k building",
    ),
    Break(
        "4bit",
        "make new codes of a checkpoint's dequantised weights",
        "quantize.py::codes_in",
        "    return base\n",
        "    return None\n",
        "tests/quant/test_nf4_checkpoints.py -k as_they_are",
    ),
    Break(
        "4bit",
        "take codes unseen, whatever was loaded",
        "quantize.py::_take",
        "if not torch.equal(checksum(packed.dense(one.parameter.dtype)), packed.source):",
        "if False:",
        "tests/quant/test_nf4_checkpoints.py -k codes_of_another",
    ),
    Break(
        "real",
        "unload no version after a rejected request",
        "slime/hooks/adapter_sync.py::AdapterUpdater._load",
        "while len(self._loaded) >= versions_kept(self.args):",
        "while False:",
        "tests/slime/real/test_upset_engines.py -m slow -k rejected_request",
        needs="SLIME_DIR",
    ),
    Break(
        "real",
        "load adapters into the engines that there were first",
        "slime/hooks/adapter_sync.py::AdapterUpdater.connect_rollout_engines",
        "self.rollout_engines = list(rollout_engines)",
        "self.rollout_engines = self.rollout_engines or list(rollout_engines)",
        "tests/slime/real/test_upset_engines.py -m slow -k slime_replaces",
        needs="SLIME_DIR",
    ),
    Break(
        "real",
        "answer with the base where an engine has lost its adapters",
        "server/sglang_plugin.py::_name_for",
        "    if name not in loaded:\n",
        "    if name not in loaded:\n        return None\n    if name not in loaded:\n",
        "tests/slime/real/test_upset_engines.py -m slow -k restarted_within",
        needs="SLIME_DIR",
    ),
    Break(
        "22",
        "export onto whatever directory is named",
        "ends/export.py::export_peft",
        "if different:",
        "if False:",
        "tests/checkpoint/test_fingerprint.py -k names_no_other_base",
    ),
    Break(
        "22",
        "compare the first layer of the base alone",
        "checkpoint/reader.py::AdapterCheckpoint.check_base",
        'layers = [int(n) for n in saved["layers"]]',
        'layers = [int(n) for n in saved["layers"]][:1]',
        "tests/checkpoint/test_whole_base.py",
    ),
    Break(
        "20",
        "forget an asynchronous save when the model comes in another wrapper",
        "checkpoint/save.py::finish_pending",
        "if pending is not None:",
        'if pending is not None and hasattr(model[0], "ddp_config"):',
        "tests/checkpoint/test_checkpoint_saving.py -k however_it_is_wrapped",
    ),
    Break(
        "19",
        "take an unknown policy for the base",
        "slime/hooks/policies.py::Policies.restore",
        "if tag not in self.backup_tags:",
        "if False:",
        "tests/slime/hooks/test_slime_hooks.py -k test_policies",
    ),
    Break(
        "table",
        "hide two parameters and not those of the table",
        "layers/carrier.py::Carrier.lora_parameters",
        "for entry in self.lora_table)",
        "for entry in self.lora_table[:2])",
        "tests/layers/test_new_variant.py -k swapped",
    ),
    Break(
        "23",
        "softmax sums over this rank's columns alone",
        "objectives/divergence.py::_chunk",
        '    reduce(sums, "sum")\n',
        "",
        "tests/objectives/test_divergence.py -k shared_vocabulary",
    ),
    Break(
        "24",
        "give padding columns a share of both policies",
        "objectives/divergence.py::Vocabulary.real",
        None,
        "return columns",
        "tests/objectives/test_divergence.py -k one_process",
    ),
    Break(
        "25",
        "leave the adapters on while the base teaches",
        "objectives/teacher.py::Teacher.active",
        'if self._kind == "base"',
        "if False",
        "tests/slime/hooks/test_slime_gkd.py -k loss",
    ),
    Break(
        "26",
        "take the teacher's rows one token late",
        "objectives/gkd.py::at_students_tokens",
        "hidden_NSH[source > 0]",
        "hidden_NSH[view.mask > 0]",
        "tests/rehearsal/test_gkd_trainer.py -k equals_oracle",
    ),
    Break(
        "26",
        "predict a response's tokens from one row late, in slime",
        "slime/hooks/gkd.py::_rows",
        "rows[:, 0].long()",
        "rows[:, 0].long() + 1",
        "tests/slime/hooks/test_slime_gkd.py -k loss",
    ),
    Break(
        "27",
        "find what the teacher said by the order of samples",
        "slime/hooks/gkd.py::_taught",
        "return _current.hidden.pop(id(tokens))[1]",
        "return _current.hidden.pop(next(iter(_current.hidden)))[1]",
        "tests/slime/hooks/test_slime_gkd.py -k loss",
    ),
    Break(
        "27",
        "leave a response where it was cut behind the teacher's prompt",
        "slime/hooks/gkd.py::_at_students_places",
        "group.size() == 1",
        "True",
        "tests/slime/hooks/test_slime_gkd.py -k states_move",
    ),
    Break(
        "table",
        "merge into what is stored instead of what multiplies",
        "layers/adapter.py::LoRALinear.lora_merged",
        "self.lora_base.dense(index, stored)",
        "self.lora_base.parameters[index].detach()",
        "tests/layers/test_new_base.py -k dense_base",
    ),
    Break(
        "tokens",
        "new ids from where the embedding ends, not from the tokenizer",
        "base/grow.py::add_tokens",
        "grown.token_to_id(token.text) for token in tokens",
        "rows + number for number, _ in enumerate(tokens)",
        "tests/base/test_add_tokens.py -k reads_it",
    ),
    Break(
        "tokens",
        "padding rows are part of the mean",
        "base/grow.py::_Start.rows",
        "torch.tensor(self.known).split(_ROWS)",
        "torch.arange(len(weight)).split(_ROWS)",
        "tests/base/test_add_tokens.py -k reads_it",
    ),
    Break(
        "plan",
        "the optimizer of experts is spread over all data-parallel ranks",
        "cost/model.py::Split.expert_dp",
        "self.tp * self.dp // (self.ep * self.experts_tp)",
        "self.dp",
        "tests/cost/test_experts_memory.py -k test_experts",
    ),
    Break(
        "plan",
        "frozen linears keep their inputs",
        "cost/activations.py::_Reckoning._input",
        "rows * width * self.e if self.trained.base else 0",
        "rows * width * self.e",
        "tests/cost/test_activations.py -k attention",
    ),
    Break(
        "plan",
        "sequence parallelism cuts no activation",
        "cost/activations.py::_Reckoning.__init__",
        "(split.tp if split.sp else 1)",
        "1",
        "tests/cost/test_activations.py -k test_dense",
    ),
    Break(
        "control",
        "take the validations of steps that are done again into a resumed run's decisions",
        "control/history.py::read",
        "if entry.step <= until",
        "if entry.step >= 0",
        "tests/control/test_plateau.py -k resume_anywhere",
    ),
    Break(
        "control",
        "torch's relative threshold, which takes a decline of negative rewards for progress",
        "control/plateau.py::Plateau.counts",
        "math.copysign(self.threshold, reference)",
        "self.threshold",
        "tests/control/test_plateau.py",
    ),
    Break(
        "control",
        "let a stopped run start again",
        "slime/hooks/control/flags.py::set_up",
        "    if message:",
        "    if False:",
        "tests/slime/hooks/test_slime_control.py -k ends_at_launch",
    ),
    Break(
        "control",
        "lose the validation of a run that was cut off behind its checkpoint",
        "slime/hooks/control/loop.py::_Run.catch_up",
        "missing = self.goes_on and",
        "missing = False and",
        "tests/slime/hooks/test_slime_control.py -k every_cut",
    ),
    Break(
        "control",
        "resume with the rate of the start",
        "slime/hooks/control/loop.py::_Run.begun",
        'run._trainer("begin", found.factor,',
        'run._trainer("begin", 1.0,',
        "tests/slime/hooks/test_slime_control.py -k every_cut",
    ),
    Break(
        "control",
        "let a fresh run resume from another one's history",
        "slime/hooks/control/loop.py::_Run.begun",
        "        found.write(args.save)\n",
        "",
        "tests/slime/hooks/test_slime_control.py -k fresh_run",
    ),
    Break(
        "control",
        "leave out validation samples that do not divide by the ranks",
        "slime/hooks/control/trainer.py::_share",
        "-(-len(micros) // (places * multiple))",
        "(len(micros) // (places * multiple))",
        "tests/slime/hooks/test_slime_validation.py -k any_layout",
    ),
    Break(
        "control",
        "count what fills up the ranks' microbatches",
        "slime/hooks/control/trainer.py::_share",
        "[0] * first.response",
        "[1] * first.response",
        "tests/slime/hooks/test_slime_validation.py -k any_layout",
    ),
    Break(
        "control",
        "drop what was trained beside the adapter",
        "zero/convert.py::convert_zero",
        "        if extra is None and beside:",
        "        if False:",
        "tests/zero/test_zero.py -k other_trained",
    ),
    Break(
        "control",
        "import an adapter and drop the head beside it",
        "peft/read.py::PeftAdapter.__init__",
        "        if not carries:",
        "        if False:",
        "tests/peft/test_extra.py -k lost",
    ),
    Break(
        "control",
        "carry a head into the adapter and not into the run",
        "rehearsal/adapter_start.py::carry_extra",
        "*([Path(settings.save)] if settings.save else ())",
        "",
        "tests/rehearsal/test_beside_the_start.py",
    ),
    Break(
        "control",
        "merge a 4-bit adapter onto the dense base, in silence",
        "cli/onto.py::onto",
        "    if quant is None or not found:",
        "    if True:",
        "tests/peft/test_merge_adapter.py -k 4_bit",
    ),
    Break(
        "control",
        "round a merge twice",
        "base/merge.py::merge_weight",
        "update, merged = projection.update(),",
        "update, merged = projection.update().to(weight.dtype).float(),",
        "tests/peft/test_merge_adapter.py -k dense_is",
    ),
    Break(
        "control",
        "measure the KL from the base under --lora-ref start",
        "slime/hooks/reference.py::_put",
        '    store.backup("ref")',
        '    store.use_base("ref")',
        "tests/slime/hooks/test_slime_reference.py -k stays",
    ),
    Break(
        "control",
        "LoRA+ for A instead of B",
        "control/rates.py::_Bs",
        'endswith(".lora_B")',
        'endswith(".lora_A")',
        "tests/control/test_rates.py -k five_steps",
    ),
    Break(
        "rows",
        "take a rank's part of a row's gradient for all of it",
        "layers/forms/tokens.py::TokenRows._parts",
        "_Multiplied.apply(delta, self.lora_group.size())",
        "delta",
        "tests/layers/test_token_rows.py -k two_processes",
    ),
    Break(
        "rows",
        "leave tied rows of two stages to themselves",
        "tokens.py::summing_stages",
        "dist.all_reduce(",
        "(lambda *_, **__: None)(",
        "tests/layers/test_token_rows.py -k two_processes",
    ),
    Break(
        "rows",
        "count both copies of tied rows in the gradient norm",
        "layers/forms/tokens.py::adapt_rows",
        "parameter.shared = copy",
        "parameter.shared = False",
        "tests/layers/test_token_rows.py -k two_processes",
    ),
    Break(
        "rows",
        "look up another rank's tokens under sequence parallelism",
        "layers/forms/tokens.py::TokenRowsEmbedding.forward",
        "[self.lora_group.rank()]",
        "[0]",
        "tests/layers/test_token_rows.py -k two_processes",
    ),
    Break(
        "rows",
        "pass over an output layer that is not known",
        "tokens.py::vocabulary_of",
        "if module is not None and type(module) not in FORMS:",
        "if False:",
        "tests/layers/test_token_rows.py -k refused",
    ),
    Break(
        "rows",
        "export the change of the rows as their values",
        "peft/rows.py::VocabularyRows.values",
        "rows.float() + self",
        "self",
        "tests/layers/test_token_rows.py -k exported",
    ),
    Break(
        "rows",
        "merge a model and leave its rows out",
        "adapters.py::iter_merging",
        "    yield from (rows for rows in iter_token_rows(model) if rows.lora_table)\n",
        "",
        "tests/layers/test_token_rows.py -k merged_is_on",
    ),
    Break(
        "control",
        "compute the validation loss at the sampling temperature",
        "slime/hooks/control/trainer.py::validation_loss",
        '"rollout_temperature": 1.0, ',
        "",
        "tests/slime/hooks/test_slime_validation.py -k temperature",
    ),
    Break(
        "control",
        "measure the KL from the base under --lora-ref start, in the rehearsal",
        "rehearsal/trainer.py::RankTrainer._model_as",
        "adapters_disabled(self.chunks) if self.reference is None else self.reference.worn()",
        "adapters_disabled(self.chunks)",
        "tests/rehearsal/test_control.py -m slow -k start_as_reference",
    ),
]


def run(item: Break) -> bool:
    """Did the tests fail on the broken copy?"""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory, "tree")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "out"))
        target = copy / item.file
        broken = item.applied(target.read_text())
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
        print("\n".join(f"{item.hazard:>2}  {item.what}  ({item.where})" for item in chosen))
        return 0
    for item in chosen:
        if item.needs and not os.environ.get(item.needs):
            print(f"not run: {item.what}: set {item.needs} (tests/slime/real/conftest.py)")
    verdicts = [run(item) for item in chosen if not item.needs or os.environ.get(item.needs)]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
