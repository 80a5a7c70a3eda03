"""A model that sees images, as slime has Qwen3.5: Megatron's language model, and beside it Hugging Face's tower.

Every sample of a batch starts with the same image, so that one set of rotary positions is all samples'.
"""

from __future__ import annotations

import torch

IMAGE, START, END, VIDEO = 90, 91, 92, 93
"""Tokens; IMAGE once per merged patch."""
GRID = [[1, 4, 4]]
PATCHES = 16
MERGED = 4


def config(text):
    """transformers' config of a language model, dense or with experts, and a tower of two blocks."""
    import transformers

    tower = dict(
        depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=text.hidden_size, num_position_embeddings=16,
    )  # fmt: skip
    made = transformers.Qwen3_5MoeConfig if text.model_type == "qwen3_5_moe_text" else transformers.Qwen3_5Config
    return made(
        text_config=text.to_dict(), vision_config=tower, tie_word_embeddings=False, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip


def pixels() -> torch.Tensor:
    """The image, as a processor hands it on: [patches, 3 * 2 * 4 * 4]."""
    return torch.randn(PATCHES, 96, generator=torch.Generator().manual_seed(3))


def batch(num_samples: int = 4, length: int = 16) -> torch.Tensor:
    """Tokens [num_samples, length + 1] of which the first are an image."""
    tokens = torch.randint(4, 80, (num_samples, length + 1), generator=torch.Generator().manual_seed(7))
    tokens[:, 1 : MERGED + 3] = torch.tensor([START, *[IMAGE] * MERGED, END])
    return tokens


def inputs(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What transformers' model takes for these tokens."""
    count = tokens.shape[0]
    return dict(
        input_ids=tokens,
        pixel_values=pixels().repeat(count, 1),
        image_grid_thw=torch.tensor(GRID * count),
        mm_token_type_ids=(tokens == IMAGE).int(),
    )


def WithTower(language_model, hf_dir, weights):
    """The chunk around a GPTModel."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.module import MegatronModule
    from transformers import AutoConfig
    from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

    hf = AutoConfig.from_pretrained(hf_dir)
    if hf.model_type == "qwen3_5_moe":
        whole, rotary_of, tower_of = (
            moe.Qwen3_5MoeForConditionalGeneration,
            moe.Qwen3_5MoeTextRotaryEmbedding,
            moe.Qwen3_5MoeVisionModel,
        )
    else:
        whole, rotary_of, tower_of = (
            dense.Qwen3_5ForConditionalGeneration,
            dense.Qwen3_5TextRotaryEmbedding,
            dense.Qwen3_5VisionModel,
        )

    with torch.device("meta"):
        indexer = whole(hf).model

    class Rotary(torch.nn.Module):
        """Angles of the batch's positions, in place of Megatron's of 0, 1, 2, ..."""

        def get_rotary_seq_len(self, *args, **kwargs):
            return 0

        def forward(self, *args, **kwargs):
            rotary = rotary_of(hf.text_config)
            angles = self.positions[..., None].float() * rotary.inv_freq
            return rotary.recomposition_frequencies(angles).transpose(0, 1)[:, None]  # [s, 1, 1, d]

    class Wrapper(MegatronModule):
        def __init__(self):
            super().__init__(config=language_model.config)
            self.pre_process, self.post_process = language_model.pre_process, language_model.post_process
            self.language_model = language_model
            self.language_model.rotary_pos_emb = Rotary()
            self.share_embeddings_and_output_weights, self.model_type = False, language_model.model_type
            self.model = torch.nn.Module()
            self.model.visual = None
            if self.pre_process:
                self.model.visual = tower_of._from_config(hf.vision_config)
                prefix = "model.visual."
                mine = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
                self.model.visual.load_state_dict(mine)

        def set_input_tensor(self, input_tensor):
            self.language_model.set_input_tensor(input_tensor)

        def shared_embedding_or_output_weight(self):
            return self.language_model.shared_embedding_or_output_weight()

        def forward(self, input_ids, position_ids, attention_mask, labels=None):
            one = {name: value[:1] for name, value in inputs(input_ids[:1]).items() if "pixel" not in name}
            self.language_model.rotary_pos_emb.positions = indexer.get_rope_index(**one)[0]
            embedded = None
            if self.pre_process:
                embedded = self.language_model.embedding(input_ids=input_ids, position_ids=None).clone()
                seen = self.model.visual(pixels(), grid_thw=torch.tensor(GRID)).pooler_output
                embedded[(input_ids == IMAGE).t()] = seen.repeat_interleave(len(input_ids), 0)
                if self.config.sequence_parallel:
                    embedded = tensor_parallel.scatter_to_sequence_parallel_region(embedded).contiguous()
            return self.language_model(input_ids, position_ids, attention_mask, decoder_input=embedded, labels=labels)

    return Wrapper()
