"""LoRA in a Megatron program of your own: from a Hugging Face checkpoint to a PEFT adapter, in one file to copy from.

    torchrun --nproc-per-node 2 examples/lora/megatron_program.py \
        --hf-checkpoint Qwen3-0.6B --text notes.txt --out runs/notes --tp 2

Trains on the lines of a text file, held to the base by a KL term. Started again it goes on where it was, at another
--tp too. With GPUs it runs on NCCL in bfloat16, without one on gloo in float32, by the same code. What it writes:
OUT/checkpoint (adapters and their optimizer) and OUT/adapter, for transformers, vLLM, SGLang.
"""
# ruff: noqa: E402, I001  # one call has to come before Megatron is imported

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoTokenizer

from slime_plugins.lora.rehearsal import cpu

# Megatron calls torch.cuda in many places. Where there is no GPU this puts stand-ins there; else it does nothing.
ON_CPU = cpu.enable()

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from slime_plugins.lora import LoRAConfig, adapters_disabled, apply_lora, export_peft
from slime_plugins.lora import load_adapter, load_base, save_adapter

BATCH = 8  # lines a step, on each data-parallel rank
MAX_LENGTH = 512  # tokens of a line; what is longer is cut


def main() -> None:
    args = parse_args()
    dtype = torch.float32 if ON_CPU else torch.bfloat16

    # Process groups. Ranks that --tp leaves over are data-parallel replicas.
    if ON_CPU:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks the host's name up, which many lack
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo" if ON_CPU else "nccl")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=args.tp)
    tensor_parallel.model_parallel_cuda_manual_seed(0)

    # Base and adapters. Adapt before DDP and the optimizer look: only adapters get gradients and moments.
    [model] = load_base(args.hf_checkpoint, dtype=dtype)
    config = LoRAConfig(rank=args.rank, alpha=2 * args.rank, target_modules=("all-linear",))
    say(apply_lora(model, config))
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(model.config, ddp_config, model)
    optimizer_config = OptimizerConfig(  # the learning rate: about 10x that of full training
        optimizer="adam",
        lr=args.lr,
        weight_decay=0.0,
        bf16=not ON_CPU,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(optimizer_config, [model])

    # Go on where an earlier start was. Hand the optimizer over: it keeps float32 copies of the adapters.
    first = 0
    if (args.out / "checkpoint").is_dir():
        first = load_adapter(model, args.out / "checkpoint", optimizer=optimizer).step
        say(f"goes on after step {first}")

    tokens, mask = read_text(args)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = torch.arange(rank, len(tokens), size)  # the lines of this data-parallel rank
    for step in range(first, args.steps):
        rows = mine[torch.arange(step * BATCH, (step + 1) * BATCH) % len(mine)]
        model.zero_grad_buffer()
        optimizer.zero_grad()
        # The reference is the same model, its adapters off: no second copy of the weights.
        with torch.no_grad(), adapters_disabled(model):
            reference = token_losses(model, tokens[rows])
        losses = token_losses(model, tokens[rows])
        log_ratio = losses - reference  # log(reference / policy) of every token
        kl = mean(log_ratio.exp() - log_ratio - 1, mask[rows])  # not negative, zero where the policies agree
        loss = mean(losses, mask[rows])
        (loss + args.kl_coef * kl).backward()
        finalize_model_grads([model])  # sums over data-parallel ranks, and what tensor-parallel ones hold in part
        _, grad_norm, _ = optimizer.step()
        say(f"step {step + 1}/{args.steps}  loss {loss:.4f}  kl {kl:.4f}  grad norm {grad_norm:.3f}")

    with torch.no_grad():
        say(f"loss over all lines {mean(token_losses(model.eval(), tokens), mask):.5f}")
    # Both on all ranks: each has its own shards.
    save_adapter(model, args.out / "checkpoint", optimizer=optimizer, step=max(first, args.steps))
    export_peft(model, args.out / "adapter", hf_checkpoint=args.hf_checkpoint)
    say(args.out / "adapter")
    torch.distributed.destroy_process_group()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LoRA on the lines of a text file, by Megatron.")
    parser.add_argument("--hf-checkpoint", required=True, help="directory of the base")
    parser.add_argument("--text", type=Path, required=True, help="a file with one example a line")
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoint and adapter")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--steps", type=int, default=20, help="in all, those of earlier starts included")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    return parser.parse_args()


def read_text(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [N, S], padded on the right, and where a next token is to be learnt [N, S - 1]."""
    lines = [line for line in args.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise SystemExit(f"{args.text}: no line with text in it")
    tokenizer = AutoTokenizer.from_pretrained(args.hf_checkpoint)
    tokenizer.padding_side = "right"
    batch = tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH)
    device = torch.cuda.current_device()
    return batch["input_ids"].to(device), batch["attention_mask"][:, 1:].to(device)


def token_losses(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """-log p of every next token, float32 [N, S - 1]; Megatron takes the loss over logits that no rank holds whole."""
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)
    return model(inputs, positions, None, labels=labels).float()


def mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum() / mask.sum()


def say(what: object) -> None:
    if torch.distributed.get_rank() == 0:
        print(what, flush=True)


if __name__ == "__main__":
    main()
