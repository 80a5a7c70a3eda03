"""The table in docs/models.md: what is adapted, run, exported and served of each family, read off the code.

python tests/project/models_table.py        # writes the table anew; test_models_table.py compares
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
MARK = "<!-- table: tests/project/models_table.py -->\n"


@dataclass(frozen=True)
class Family:
    name: str
    architecture: str
    key: str
    """In the tests, and so in their files."""
    served: str
    """Its column in docs/servers.md."""
    mla: bool = False
    experts: bool = False
    shared: bool = False
    dense_mlp: bool = True
    linear: tuple[str, ...] = ()
    """Projections of its linear attention."""


DENSE = "Llama, Qwen2.5, Qwen3"
FAMILIES = (
    Family("Llama 3", "LlamaForCausalLM", "llama", DENSE),
    Family("Qwen2, Qwen2.5", "Qwen2ForCausalLM", "qwen2", DENSE),
    Family("Qwen3", "Qwen3ForCausalLM", "qwen3", DENSE),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", "qwen3_moe", "Qwen3-MoE", experts=True, dense_mlp=False),
    Family("Qwen2-MoE", "Qwen2MoeForCausalLM", "qwen2_moe", "Qwen2-MoE", experts=True, shared=True, dense_mlp=False),
    Family("GLM-4.5", "Glm4MoeForCausalLM", "glm4_moe", "GLM-4.5", experts=True, shared=True),
    Family("DeepSeek-V3, Kimi-K2", "DeepseekV3ForCausalLM", "deepseek_v3", "DeepSeek-V3, Kimi-K2", True, True, True),
    Family(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        "qwen3_next",
        "Qwen3-Next",
        experts=True,
        shared=True,
        dense_mlp=False,
        linear=("in_proj_qkvz", "out_proj"),
    ),
    Family(
        "Qwen3.5",
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        "Qwen3.5",
        linear=("in_proj_qkv", "in_proj_z", "out_proj"),
    ),
    Family(
        "Qwen3.5-MoE",
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        "Qwen3.5-MoE",
        experts=True,
        shared=True,
        dense_mlp=False,
        linear=("in_proj_qkv", "in_proj_z", "out_proj"),
    ),
)


def adapted(family: Family) -> list[str]:
    """Megatron linears that ``all-linear`` means."""
    from slime_plugins.lora.names import LINEARS, in_linear_attention

    found = []
    for path, linear in LINEARS.items():
        if linear.by_name_only or (linear.mla is not None and linear.mla is not family.mla):
            continue
        if (linear.is_expert and not family.experts) or ("shared_experts" in path and not family.shared):
            continue
        if path.startswith("mlp.linear") and not family.dense_mlp:
            continue
        if in_linear_attention(path) and linear.leaves[0] not in family.linear:
            continue
        if path == "self_attention.linear_q_proj":  # where the query has no low rank
            continue
        found.append(path.partition(".")[2].removeprefix("linear_attn."))
    return found


def served(family: Family, version: str) -> str:
    """The cell of ``all-linear`` in docs/servers.md."""
    text = (ROOT / "docs" / "servers.md").read_text().partition(f"SGLang {version}:")[2]
    rows = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cell = rows[1][rows[0].index(family.served)]
    assert rows[1][0] == "all-linear"
    return re.sub(r"refused.*", "not with all-linear", cell)


def tested(family: Family) -> str:
    """The test files that hold this family against transformers + PEFT."""
    found = []
    for name in (
        "layers/test_parity.py",
        "layers/test_experts.py",
        "layers/test_linear_attention.py",
        "ends/test_experts_files.py",
        "ends/test_export.py",
    ):
        text = (ROOT / "tests" / name).read_text() + (ROOT / "tests/support/reference.py").read_text()
        if re.search(rf"\"{family.key}\"", text):
            found.append(f"`{name}`")
    assert found, family
    return ", ".join(found)


def table() -> str:
    header = (
        "family",
        "`all-linear` adapts",
        "PEFT forms",
        "`rehearse`, `plan`",
        "adapter sync, SGLang",
        "held against PEFT in",
    )
    rows = [header, ("---",) * len(header)]
    for family in FAMILIES:
        versions = {version: served(family, version) for version in ("0.5.15.post1", "0.5.23")}
        words = set(versions.values())
        serving = words.pop() if len(words) == 1 else ", ".join(f"{v}: {cell}" for v, cell in versions.items())
        rows.append(
            (
                family.name,
                ", ".join(adapted(family)),
                "per expert, fused" if family.experts else "plain",
                _known(family),
                serving,
                tested(family),
            )
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _known(family: Family) -> str:
    """By ``rehearse``, by ``plan``, or by both."""
    from slime_plugins.lora.base import decoder, moe

    rehearsed = family.architecture in decoder.ARCHITECTURES
    planned = family.architecture in (*decoder.DENSE, *moe.ARCHITECTURES)
    return {(True, True): "yes", (True, False): "`rehearse`", (False, True): "`plan`"}.get((rehearsed, planned), "no")


def main() -> None:
    head, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(f"{head}{MARK}\n{table()}")


if __name__ == "__main__":
    main()
