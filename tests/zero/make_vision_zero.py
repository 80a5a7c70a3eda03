"""Train language and vision LoRA of a toy Qwen2.5-VL-3B under DeepSpeed ZeRO-3, as a run under an older transformers.

    torchrun --nproc_per_node 2 make_vision_zero.py BASE OUT

36 layers, 32 blocks of the tower, rank 128 and the names of such a run: ``base_model.base_model.model.model.layers``,
which are those of the base's files, not those of the model that transformers makes of them today.
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

TARGETS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv", "attn.proj", "merger.mlp.0",
    "merger.mlp.2",
]  # fmt: skip
RANK, ALPHA = 128, 256
PATCHES, MERGED = 16, 4


class Older(torch.nn.Module):
    """The same modules under the names that they had."""

    def __init__(self, model):
        super().__init__()
        self.config = model.config
        self.visual, self.model, self.lm_head = model.model.visual, model.model.language_model, model.lm_head

    def forward(self, input_ids, pixel_values):
        embedded = self.model.embed_tokens(input_ids)
        seen = self.visual(pixel_values, grid_thw=torch.tensor([[1, 4, 4]])).pooler_output
        embedded = torch.cat([seen.to(embedded)[None], embedded[:, MERGED:]], 1)
        return self.lm_head(self.model(inputs_embeds=embedded).last_hidden_state)


class Trainer(torch.nn.Module):
    """What put the first ``base_model`` in front of the names."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def forward(self, **inputs):
        return self.base_model(**inputs)


def main(base: Path, out: Path) -> None:
    torch.manual_seed(0)
    model = Older(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16))
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    model = Trainer(model).to(torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=1e-2), config=config)
    torch.manual_seed(engine.global_rank)
    for _ in range(2):
        pixels = torch.randn(PATCHES, 96, dtype=torch.bfloat16)
        logits = engine(input_ids=torch.randint(1, 60, (1, 9)), pixel_values=pixels)
        engine.backward((logits.float() - 1).square().mean())
        engine.step()
    engine.save_checkpoint(out)
    if engine.global_rank == 0:
        engine.module.base_model.save_pretrained(out)  # not gathered: empty tensors, which is why there is a rescue
    torch.distributed.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    deepspeed.init_distributed("gloo")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
