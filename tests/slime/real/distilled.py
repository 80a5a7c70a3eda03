"""One process of transformers + PEFT in float32 as the judge of distillation in slime: loss and gradient norm.

The formula is the paper's (arXiv:2306.13649, equation 1), over whole rows, by autograd; TRL's own is asked in
tests/contracts.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import moe_reference
import torch

BETA, TEMPERATURE, RANK, ALPHA, SCALE = 0.5, 2.0, 4, 8, 0.15
PREFIX = "t5 t6 t7 "


@dataclass(frozen=True)
class Reference:
    """The harness's model and samples, with a student's adapter of all linears.

    Runs start from a copy of the directory (``of=`` and ``--keep``): each transformers draws
    another model.
    """

    where: Path
    kind: str

    @classmethod
    def make(cls, harness_dir: Path, slime_python: str, where: Path, kind: str) -> Reference:
        """``slime_python`` writes model and tokenizer: an older transformers does not read those of a newer one."""
        reference = cls(where, kind)
        files = f"""
import sys; sys.path.insert(0, {str(harness_dir)!r})
import fixtures
fixtures.make_model({str(reference.hf)!r}, 0, kind={kind!r})
fixtures.make_model({str(reference.other)!r}, 1, kind={kind!r})
fixtures.make_rollouts({str(where / "rollouts")!r}, {str(reference.hf)!r}, 1, seed=0)
"""
        subprocess.run([slime_python, "-c", files], check=True, capture_output=True)
        reference._write(reference.adapter, reference._values(RANK), RANK, ALPHA)
        some = {name: pair for name, pair in reference._values(6).items() if "self_attn" in name}
        reference._write(reference.attention, some, 6, 6)
        return reference

    def _write(self, out: Path, values, rank: int, alpha: float) -> None:
        moe_reference.write_adapter(out, self.hf, values, rank=rank, alpha=alpha)
        config = json.loads((out / "adapter_config.json").read_text())
        config["target_parameters"] = None  # these models have no linear beside experts
        (out / "adapter_config.json").write_text(json.dumps(config))

    def _values(self, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Such as bfloat16 has: rounding a whole adapter is worth more than what is to be seen."""
        values = moe_reference.values_of(self.hf, rank, "split")
        return {name: (A.bfloat16().float(), (SCALE * B).bfloat16().float()) for name, (A, B) in values.items()}

    work = property(lambda self: self.where)
    hf = property(lambda self: self.where / "hf")
    other = property(lambda self: self.where / "other")
    """Weights of the same shape and vocabulary."""
    adapter = property(lambda self: self.where / "adapter")
    attention = property(lambda self: self.where / "attention")
    """Another adapter: of another rank and scaling, of attention alone."""

    @property
    def flags(self) -> str:
        """slime's, of a student with the adapter."""
        lora = f"--use-lora --lora-r {RANK} --lora-alpha {ALPHA} --lora-layout split"
        return (
            f"{lora} --lora-adapter-path {self.adapter} --use-gkd --gkd-lmbda 0 --gkd-beta {BETA} "
            f"--gkd-temperature {TEMPERATURE}"
        )

    def expected(self, teacher: str = "base", prefix: str = "") -> tuple[float, float]:
        """Loss and gradient norm, as slime's: the mean over samples of means over tokens."""
        from transformers import AutoTokenizer

        student = moe_reference.peft_model(self.hf, self.adapter).eval()
        answers = self._teacher(teacher, student)
        tokenizer = AutoTokenizer.from_pretrained(self.hf)
        rows = torch.load(self.where / "rollouts" / "rollout_0.pt", weights_only=False)["samples"]
        loss = torch.zeros(())
        for row in rows:
            count, tokens = row["response_length"], row["tokens"]
            shown = tokenizer(prefix + row["prompt"], add_special_tokens=False).input_ids + tokens[-count:]
            logits = student(torch.tensor([tokens])).logits[0, -count - 1 : -1]
            loss = loss + divergence(logits, answers(shown)[-count - 1 : -1]).mean() / len(rows)
        loss.backward()
        return loss.item(), self._norm(student)

    def _teacher(self, which: str, student):
        """Tokens -> logits [S, V]."""
        from transformers import AutoModelForCausalLM

        models = {
            "base": lambda: AutoModelForCausalLM.from_pretrained(self.hf, dtype=torch.float32),
            "other": lambda: AutoModelForCausalLM.from_pretrained(self.other, dtype=torch.float32),
            "attention": lambda: moe_reference.peft_model(self.hf, self.attention).eval(),
            "live": lambda: student,
        }
        model = models[which]()

        @torch.no_grad()
        def logits(tokens: list[int]) -> torch.Tensor:
            return model(torch.tensor([tokens])).logits[0]

        return logits

    @staticmethod
    def _norm(student) -> float:
        total = 0.0
        for name, parameter in student.named_parameters():
            if ".lora_A." not in name:
                continue
            module = name.removeprefix("base_model.model.").split(".lora_A.")[0]
            other = student.get_parameter(name.replace(".lora_A.", ".lora_B."))
            with contextlib.suppress(AttributeError):  # experts that no token chose
                pairs = moe_reference._unpack(module, parameter.grad, other.grad, RANK)
                total += sum((g.double() ** 2).sum().item() for _, pair in pairs for g in pair)
        return total**0.5


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """[S] of logits [S, V]."""
    p, q = (student / TEMPERATURE).softmax(-1), (teacher / TEMPERATURE).softmax(-1)
    m = BETA * q + (1 - BETA) * p
    kl = lambda one, other: (one * (one / other).log()).sum(-1)  # noqa: E731
    return BETA * kl(q, m) + (1 - BETA) * kl(p, m)
