"""Train PEFT-wrapped tiny models under DeepSpeed on the CPU and save ZeRO checkpoints, as a user's run does.

    torchrun --nproc_per_node 2 make_zero.py OUT CASE...

A case is stage-dtype[-option...], for example ``3-bf16``, ``2-fp32-head-groups``. Options: ``head`` trains a score
layer outside the adapter, ``groups`` gives lora_B a learning rate of its own, ``lean`` leaves frozen parameters out.
OUT/CASE is what HF's Trainer leaves: adapter_config.json, the adapter as save_pretrained writes it, latest, the tag.
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForSequenceClassification

STEPS = 3


def build(head: bool, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForSequenceClassification(config).to(dtype)
    lora = LoraConfig(
        r=5, lora_alpha=10, target_modules=["q_proj", "v_proj", "down_proj"],
        modules_to_save=["score"] if head else None,
    )  # fmt: skip
    model = get_peft_model(model, lora)
    return model.to(dtype)


def main(out: Path, case: str) -> None:
    stage, dtype, *options = case.split("-")
    model = build("head" in options, torch.bfloat16 if dtype == "bf16" else torch.float32)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for _, p in trained]}]
    if "groups" in options:
        groups = [
            {"params": [p for name, p in trained if "lora_B" in name], "lr": 3e-2},
            {"params": [p for name, p in trained if "lora_B" not in name]},
        ]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": int(stage), "stage3_param_persistence_threshold": 100},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    torch.manual_seed(engine.global_rank)
    for _ in range(STEPS):
        ids = torch.randint(1, 31, (2, 7))
        loss = (engine(input_ids=ids).logits.float() - 1).square().mean()
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(out / case, exclude_frozen_parameters="lean" in options)
    if engine.global_rank == 0:
        engine.module.save_pretrained(out / case)  # stage 3: not gathered, the mistake that users make
    torch.distributed.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    deepspeed.init_distributed("gloo")
    for each in sys.argv[2:]:
        main(Path(sys.argv[1]), each)
        deepspeed.utils.groups._WORLD_GROUP = None
    torch.distributed.destroy_process_group()
