"""Breaks in the modules that lie in no room, and in what the tests share."""

from breaks.entry import Break

BREAKS = [
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
        "sum replicated gradients twice",
        "tests/support/adapted.py::train_step",
        "    finalize_model_grads(model)\n",
        ("    finalize_model_grads(model)\n    finalize_model_grads(model)\n"),
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
        "15",
        "name layers by their number in the pipeline chunk",
        "inject.py::_survey",
        'f"{match[1]}{layer.layer_number - 1}.{path}"',
        'f"{match[1]}{match[2]}.{path}"',
        "tests/ends/test_export.py -k layer_numbers",
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
        "12",
        "round the delta before it is added to the base",
        "projections.py::merge",
        "    merged = update.add(weight).to(weight.dtype)\n",
        "    merged = weight + update.to(weight.dtype)\n",
        "tests/base/test_merge.py tests/checkpoint/test_checkpoint_export.py -k rounded_once",
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
        "rows",
        "leave tied rows of two stages to themselves",
        "tokens.py::summing_stages",
        "dist.all_reduce(",
        "(lambda *_, **__: None)(",
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
        "merge a model and leave its rows out",
        "adapters.py::iter_merging",
        "    yield from (rows for rows in iter_token_rows(model) if rows.lora_table)\n",
        "",
        "tests/layers/test_token_rows.py -k merged_is_on",
    ),
]
