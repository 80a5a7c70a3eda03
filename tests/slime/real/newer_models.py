"""The CPU harness's ``run.py`` with models that it does not know: Qwen3.5 as text and with an image, Qwen3-Next.

SLIME_PYTHON newer_models.py HARNESS_DIR --model qwen3_5|qwen3_5_vl|qwen3_next ...(run.py's arguments)
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

HARNESS = Path(sys.argv.pop(1)).resolve()
sys.path.insert(0, str(HARNESS))
import fixtures  # noqa: E402
import run  # noqa: E402

LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    linear_conv_kernel_dim=4, layer_types=[*["linear_attention"] * 3, "full_attention"],
)  # fmt: skip
EXPERTS = dict(experts=8, topk=2, expert_ffn=32)
fixtures.EXPERTS |= {"qwen3_5": None, "qwen3_5_vl": None, "qwen3_next": EXPERTS}
IMAGE, VIDEO, START, END = 500, 501, 502, 503
GRID, MERGED = [[1, 4, 4]], 4
ROPE = dict(rope_type="default", rope_theta=1000000.0, partial_rotary_factor=0.5)
VISION = dict(
    depth=1, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2, out_hidden_size=fixtures.MODEL["hidden"], num_position_embeddings=16,
)  # fmt: skip


def make_model(path, seed=0, tie=True, kind="qwen3"):
    """The checkpoint and its tokenizer."""
    import torch
    import transformers

    if kind not in ("qwen3_5", "qwen3_5_vl", "qwen3_next") or (Path(path) / "config.json").is_file():
        return known(path, seed, tie, kind)
    m = fixtures.MODEL
    known(path, seed, tie, "qwen3")  # for its tokenizer
    (Path(path) / "model.safetensors").unlink()
    text = dict(
        vocab_size=m["vocab"], hidden_size=m["hidden"], intermediate_size=m["ffn"], num_hidden_layers=m["layers"],
        num_attention_heads=m["heads"], num_key_value_heads=m["kv_heads"], head_dim=m["head_dim"],
        max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **LINEAR,
    )  # fmt: skip
    torch.manual_seed(seed)
    if kind == "qwen3_next":
        experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
        experts |= dict(shared_expert_intermediate_size=32, rope_theta=1000000.0, partial_rotary_factor=0.5)
        model = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**text, **experts))
    else:
        text |= dict(rope_parameters=ROPE | dict(mrope_section=[2, 1, 1], mrope_interleaved=True))
        tokens = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
        config = transformers.Qwen3_5Config(
            text_config=text, vision_config=VISION, tie_word_embeddings=False, **tokens
        )
        model = transformers.Qwen3_5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif name.endswith("mlp.gate.weight"):
                parameter.mul_(5)
    model.to(torch.bfloat16).save_pretrained(path)
    config = Path(path) / "config.json"  # the recording engine looks for the vocabulary's size there
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": m["vocab"]}))
    return path


def make_rollouts(path, model_path, steps, prompts=4, samples=4, seed=0):
    """As the harness's; with an image at the start of every prompt where the model is to see one."""
    if "--model" not in sys.argv or sys.argv[sys.argv.index("--model") + 1] != "qwen3_5_vl":
        return known_rollouts(path, model_path, steps, prompts, samples, seed)
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(model_path).float().eval()
    rng, path = random.Random(seed), Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for step in range(steps):
        rows = []
        for group in range(prompts):
            pixels = torch.randn(16, 96)
            prompt = [START, *[IMAGE] * MERGED, END, *(rng.randrange(4, 490) for _ in range(rng.randint(3, 8)))]
            for _ in range(samples):
                length = rng.randint(4, 16)
                length += (len(prompt) + length) % 2  # slime v0.3.1 takes no sequence of odd length here
                response = [rng.randrange(4, 490) for _ in range(length)]
                tokens = torch.tensor([prompt + response])
                with torch.no_grad():
                    logits = model(
                        input_ids=tokens, pixel_values=pixels, image_grid_thw=torch.tensor(GRID),
                        mm_token_type_ids=(tokens == IMAGE).int(),
                    ).logits[0, len(prompt) - 1 : -1]  # fmt: skip
                picked = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
                rows.append(
                    dict(
                        group_index=step * prompts + group,
                        index=len(rows) + step * prompts * samples,
                        prompt="an image", tokens=prompt + response, response="t4",
                        response_length=len(response), label="", status="completed", metadata={},
                        loss_mask=[1] * len(response),
                        reward=sum(t % 2 == 0 for t in response) / len(response), rollout_log_probs=picked.tolist(),
                        multimodal_train_inputs={"pixel_values": pixels, "image_grid_thw": torch.tensor(GRID)},
                    )
                )  # fmt: skip
        torch.save({"rollout_id": step, "samples": rows}, path / f"rollout_{step}.pt")
    (path / "prompts.jsonl").write_text(json.dumps({"input": "t4 t5", "label": "t4"}) + "\n")
    return path


def flags(a, work):
    """run.py's, and those of slime's scripts/models."""
    found, gpus = known_flags(a, work)
    if a.model in ("qwen3_5", "qwen3_5_vl", "qwen3_next"):
        found += [
            "--apply-layernorm-1p",
            "--attention-output-gate",
            "--use-gated-attention",
            "--rotary-percent",
            "0.5",
        ]
        found += [] if "--untie-embeddings-and-output-weights" in found else ["--untie-embeddings-and-output-weights"]
        function = "model_provider" if a.model == "qwen3_5_vl" else "spec"
        found += ["--spec", f"slime_plugins.models.{a.model}", f"get_{a.model}_{function}"]
    if a.model == "qwen3_next":
        found += ["--moe-shared-expert-intermediate-size", "32", "--moe-shared-expert-gate"]
    return found, gpus


known, known_rollouts, known_flags = fixtures.make_model, fixtures.make_rollouts, run.flags
fixtures.make_model, fixtures.make_rollouts, run.flags = make_model, make_rollouts, flags

if __name__ == "__main__":
    sys.exit(run.main())
