"""Sampling from the exported adapter with transformers and PEFT: what any Hugging Face user of it would run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.rehearsal.encode import Encoder
from slime_plugins.lora.rehearsal.settings import Settings

_SMALL = 10_000_000
"""Parameters below which threads cost more than they give."""
_PROMPTS_AT_A_TIME = 64
"""Prompts, times samples of each, in one call of generate."""


@dataclass
class Sample:
    """One answer to one prompt."""

    prompt: list[int]
    response: list[int]
    """Tokens up to and with the end token, or cut at the length limit."""
    text: str
    """The response decoded, special tokens left out."""
    ended: bool
    """Is the last token an end token?"""


class Rollout:
    """A frozen Hugging Face base and the adapter that was exported last."""

    model: Any

    def setup(self, settings: Settings, device: str, num_threads: int) -> None:
        """Load base and tokenizer. Raises ValueError if there is no end token."""
        from transformers import GenerationConfig

        from slime_plugins.lora.quant.hf_model import load_base

        self.settings, self.device = settings, device
        hf_dir = settings.hf_checkpoint
        base = load_base(hf_dir, getattr(torch, settings.dtype), device, settings.base_quant).eval()
        torch.set_num_threads(num_threads if base.num_parameters() > _SMALL else 1)
        self.encoder = Encoder.read(
            hf_dir,
            apply_chat_template=settings.apply_chat_template,
            max_positions=base.config.max_position_embeddings,
        )
        self.tokenizer = self.encoder.tokenizer
        eos = base.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        if eos is None:
            raise ValueError(f"{hf_dir}: no end token, neither in generation_config.json nor in the tokenizer")
        self.eos_ids = set(eos) if isinstance(eos, list) else {eos}
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = min(self.eos_ids)
        ends = {
            "max_new_tokens": settings.rollout_max_response_len,
            "eos_token_id": sorted(self.eos_ids),
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        # The checkpoint's own sampling defaults (top_k 20 and the like) are not the policy that is trained.
        self.sampling = GenerationConfig(
            do_sample=True, temperature=settings.rollout_temperature, top_k=0, top_p=1.0, **ends
        )
        self.greedy = GenerationConfig(do_sample=False, **ends)
        base.generation_config = self.sampling
        self.base, self.model = base, None

    def template_unused(self) -> bool:
        """Has the tokenizer a chat template that text prompts are not put through?"""
        return self.encoder.template_unused

    def sample(self, adapter_dir: str, prompts: list[str | list], step: int) -> list[Sample]:
        """``n_samples_per_prompt`` samples of every prompt under this adapter, the samples of one prompt adjacent.

        The random state depends on seed and step alone: a resumed run draws what the unbroken one would have.
        """
        self.load_adapter(adapter_dir)  # before seeding: making a PEFT model draws initial values
        torch.manual_seed(self.settings.seed * 1_000_003 + step)
        return self._in_turns(prompts, self.sampling, self.settings.n_samples_per_prompt)

    def draw(self, adapter_dir: str | None, prompts: list[str | list], copies: int) -> list[Sample]:
        """``copies`` samples of every prompt, under the base alone without an adapter; every call draws alike."""
        if adapter_dir is not None:
            self.load_adapter(adapter_dir)
        torch.manual_seed(self.settings.seed)
        off = self.model.disable_adapter() if adapter_dir is None else contextlib.nullcontext()
        with off:
            return self._in_turns(prompts, self.sampling, copies)

    def encode(self, prompts: list[str | list]) -> list[list[int]]:
        """Token ids of prompts that nothing is sampled after here."""
        return self.encoder.prompts(prompts, room=0)

    def answer(self, adapter_dir: str, prompts: list[str | list]) -> list[Sample]:
        """The likeliest token at every place, once for every prompt."""
        self.load_adapter(adapter_dir)
        return self._in_turns(prompts, self.greedy, 1)

    def given(self, prompts: list[str | list], responses: list[str]) -> list[Sample]:
        """Given responses in the form of sampled ones, each with the end token."""
        end = self.tokenizer.eos_token_id
        end = end if end in self.eos_ids else min(self.eos_ids)
        pairs = zip(*self.encoder.pairs(prompts, responses, end), responses)
        return [Sample(prompt, response, text, ended=True) for prompt, response, text in pairs]

    def load_adapter(self, adapter_dir: str | Path) -> None:
        """Use this adapter from now on. Raises ValueError unless its tensors are exactly those that PEFT wants."""
        from peft import PeftModel, set_peft_model_state_dict
        from safetensors.torch import load_file

        if self.model is None:
            self.model = PeftModel.from_pretrained(self.base, adapter_dir).eval()
        tensors = load_file(Path(adapter_dir) / "adapter_model.safetensors")
        result = set_peft_model_state_dict(self.model, tensors)
        missing = [name for name in result.missing_keys if "lora_" in name]
        if missing or result.unexpected_keys:
            raise ValueError(f"{adapter_dir}: missing {missing}, unexpected {result.unexpected_keys}")

    def _in_turns(self, prompts: list[str | list], how, copies: int) -> list[Sample]:
        samples, room = [], self.settings.rollout_max_response_len
        for start in range(0, len(prompts), _PROMPTS_AT_A_TIME):
            encoded = self.encoder.prompts(prompts[start : start + _PROMPTS_AT_A_TIME], room=room)
            samples += self._generate(encoded, how, copies)
        return samples

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], how, copies: int) -> list[Sample]:
        inputs = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.device)
        output = self.model.generate(**inputs, generation_config=how, num_return_sequences=copies)
        responses = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._sample(prompts[i // copies], response) for i, response in enumerate(responses)]

    def _sample(self, prompt: list[int], response: list[int]) -> Sample:
        end = next((i + 1 for i, token in enumerate(response) if token in self.eos_ids), None)
        response = response[:end]
        text = self.tokenizer.decode(response, skip_special_tokens=True)
        return Sample(prompt, response, text, ended=end is not None)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [N, S, vocab] for right-padded tokens [N, S]. Positions of padding are not masked: ignore them."""
        return self.model(tokens.to(self.device)).logits.float().cpu()

    @torch.no_grad()
    def log_probs(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [N, S]: log-prob of token t at position t, at the rollout's temperature; 0 at t = 0."""
        scaled = self.logits(tokens)[:, :-1] / self.settings.rollout_temperature
        picked = scaled.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        return torch.nn.functional.pad(picked, (1, 0))
