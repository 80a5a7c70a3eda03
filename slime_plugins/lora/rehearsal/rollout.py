"""Sampling from the exported adapter with transformers and PEFT: what any Hugging Face user of it would run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

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
    """Sampled tokens up to and with the end token, or cut at the length limit."""
    text: str
    """The response decoded, special tokens left out."""


class Rollout:
    """A frozen Hugging Face base and the adapter that was exported last."""

    def setup(self, settings: Settings, device: str, num_threads: int) -> None:
        """Load base and tokenizer. Raises ValueError if there is no end token."""
        from transformers import AutoTokenizer, GenerationConfig

        from slime_plugins.lora.quant.hf_model import load_base

        self.settings, self.device = settings, device
        hf_dir = settings.hf_checkpoint
        self.tokenizer = AutoTokenizer.from_pretrained(hf_dir, padding_side="left")
        base = load_base(hf_dir, getattr(torch, settings.dtype), device, settings.base_quant).eval()
        torch.set_num_threads(num_threads if base.num_parameters() > _SMALL else 1)
        eos = base.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        if eos is None:
            raise ValueError(f"{hf_dir}: no end token, neither in generation_config.json nor in the tokenizer")
        self.eos_ids = set(eos) if isinstance(eos, list) else {eos}
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = min(self.eos_ids)
        # The checkpoint's own sampling defaults (top_k 20 and the like) are not the policy that is trained.
        base.generation_config = GenerationConfig(
            do_sample=True,
            temperature=settings.rollout_temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=settings.rollout_max_response_len,
            eos_token_id=sorted(self.eos_ids),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.base, self.model = base, None

    def sample(self, adapter_dir: str, prompts: list[str | list], step: int) -> list[Sample]:
        """``n_samples_per_prompt`` samples of every prompt under this adapter, the samples of one prompt adjacent.

        The random state depends on seed and step alone: a resumed run draws what the unbroken one would have.
        """
        self.load_adapter(adapter_dir)  # before seeding: making a PEFT model draws initial values
        torch.manual_seed(self.settings.seed * 1_000_003 + step)
        samples = []
        for start in range(0, len(prompts), _PROMPTS_AT_A_TIME):
            samples += self._generate(self.encode(prompts[start : start + _PROMPTS_AT_A_TIME]))
        return samples

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

    def encode(self, prompts: list[str | list]) -> list[list[int]]:
        """Token ids of prompts. Messages, and text with ``apply_chat_template``, go through the chat template.

        Raises ValueError for a prompt without a token, and for one that leaves no room for the response.
        """
        encoded = []
        for prompt in prompts:
            if self.settings.apply_chat_template or not isinstance(prompt, str):
                messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
                prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                encoded.append(self.tokenizer(prompt, add_special_tokens=False).input_ids)
            else:
                encoded.append(self.tokenizer(prompt).input_ids)
        if [] in encoded:
            raise ValueError(
                f"{type(self.tokenizer).__name__} makes no token of the prompt {prompts[encoded.index([])]!r}; is it "
                "empty, or is the checkpoint's tokenizer.json not that of this model_type?"
            )
        room = self.base.config.max_position_embeddings - self.settings.rollout_max_response_len
        longest = max(len(ids) for ids in encoded)
        if longest > room:
            raise ValueError(
                f"a prompt of {longest} tokens and --rollout-max-response-len "
                f"{self.settings.rollout_max_response_len} exceed this model's "
                f"{self.base.config.max_position_embeddings} positions"
            )
        return encoded

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]]) -> list[Sample]:
        n = self.settings.n_samples_per_prompt
        inputs = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.device)
        output = self.model.generate(**inputs, num_return_sequences=n)
        responses = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._sample(prompts[i // n], response) for i, response in enumerate(responses)]

    def _sample(self, prompt: list[int], response: list[int]) -> Sample:
        end = next((i + 1 for i, token in enumerate(response) if token in self.eos_ids), len(response))
        return Sample(prompt, response[:end], self.tokenizer.decode(response[:end], skip_special_tokens=True))

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
