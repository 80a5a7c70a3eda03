"""Random Hugging Face checkpoints of the supported families, small enough for a test, with an offline tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

FAMILIES = ("qwen2", "qwen3", "llama")
"""Dense ones."""
WITH_LINEAR = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
WITH_EXPERTS = ("qwen3_moe", "qwen3_next", "qwen3_5_moe")
_MADE = {
    "qwen3_moe": "Qwen3MoeConfig",
    "qwen3_next": "Qwen3NextConfig",
    "qwen3_5": "Qwen3_5TextConfig",
    "qwen3_5_moe": "Qwen3_5MoeTextConfig",
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Not the 8192 of the real models: with it, nothing would differ at the lengths of a test.
    "original_max_position_embeddings": 64,
}


def make_tiny(
    path: str | Path,
    family: str = "qwen3",
    *,
    num_layers: int = 2,
    hidden: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 96,
    vocab_size: int = 128,
    tied: bool | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
    seed: int = 0,
) -> Path:
    """Write a random checkpoint: ``config.json``, safetensors and, if asked, tokenizer files. Returns ``path``.

    Norms and biases are perturbed, so that swapping two of them shows. ``head_dim`` defaults to ``hidden /
    num_heads``; ``tied`` to the habit of the family's small models (Qwen tied, Llama not). ``max_shard_size`` as in
    ``save_pretrained``: a small one gives several files and an index.
    """
    import transformers

    common = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": family != "llama" if tied is None else tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # As large as in trained models: with the default 0.02 attention is uniform, and an error in it does not show.
        "initializer_range": 0.15,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    head_dim = head_dim or hidden // num_heads
    if family == "qwen2":
        config = transformers.Qwen2Config(**common, rope_parameters=rope)
    elif family == "qwen3":
        config = transformers.Qwen3Config(**common, head_dim=head_dim, rope_parameters=rope)
    elif family == "llama":
        config = transformers.LlamaConfig(**common, head_dim=head_dim, rope_parameters=dict(_LLAMA3_ROPE))
    elif family in _MADE:
        common |= _experts(family, ffn) | _linear_attention(family, head_dim, num_layers)
        rope |= {"partial_rotary_factor": 0.5} if family in WITH_LINEAR else {}
        config = getattr(transformers, _MADE[family])(**common, head_dim=head_dim, rope_parameters=rope)
    else:
        raise ValueError(f"family {family!r} is not one of {', '.join((*FAMILIES, *_MADE))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "norm" in name or name.endswith(".bias"):
                    param.add_(0.2 * torch.randn_like(param))
    path = Path(path)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        words = [f"t{i}" for i in range(4, vocab_size)]
        # transformers 5 reads any tokenizer of these model_types as byte-level BPE, in which only added words survive.
        write_tokenizer(
            path, ["<pad>", "<bos>", "<eos>", "<unk>", *words], added=family in ("qwen2", "qwen3_5", "qwen3_5_moe")
        )
    return path


def _experts(family: str, ffn: int) -> dict:
    """Eight routed experts, of which a token has two; a shared one in the families that have it."""
    if family not in WITH_EXPERTS:
        return {}
    shared = {} if family == "qwen3_moe" else {"shared_expert_intermediate_size": ffn // 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": ffn // 4}
    return experts | shared | ({} if family == "qwen3_5_moe" else {"norm_topk_prob": True})


def _linear_attention(family: str, head_dim: int, num_layers: int) -> dict:
    """In three layers of four, as in the models on the hub; in the first of two."""
    if family not in WITH_LINEAR:
        return {}
    every = min(4, num_layers)
    kinds = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(num_layers)]
    return {
        "layer_types": kinds,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
        "linear_conv_kernel_dim": 4,
    }


def write_tokenizer(path: str | Path, words: list[str], *, added: bool = False) -> None:
    """Write a word-level tokenizer: words between spaces, id = position. The first four are pad, bos, eos, unk.

    ``added``: the words are added tokens too, which every kind of tokenizer finds.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AddedToken, PreTrainedTokenizerFast

    pad, bos, eos, unk = words[:4]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unk))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk, padding_side="left"
    )
    if added:
        fast.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words[4:]])
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(path)
