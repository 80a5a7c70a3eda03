"""The table in docs/servers.md: what SGLang's own code serves, what is refused at launch. Needs ``make contracts``.

PYTHONPATH=. python tests/contracts/serving_table.py        # writes the table anew
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "support")]
from serving_cases import FAMILIES, TARGETS, Outcome, outcome  # noqa: E402
from wheels import SGLANG  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "servers.md"
BEGIN, END = "<!-- table: tests/contracts/serving_table.py -->", "<!-- end of table -->"


def outcomes(root: Path) -> dict[tuple[str, str, str], Outcome | None]:
    """(SGLang version, targets, family) -> outcome."""
    return {
        (version, targets, family): outcome(root, version, family, words)
        for version in SGLANG
        for targets, words in TARGETS.items()
        for family in FAMILIES.values()
    }


def table(found: dict[tuple[str, str, str], Outcome | None]) -> str:
    """Markdown: a table per version, then the reasons that the numbers stand for."""
    reasons: list[str] = []

    def cell(result: Outcome | None) -> str:
        if result is None:
            return ""
        if not result.refusals:
            return "served"
        for row in result.refusals:
            if row.reason not in reasons:
                reasons.append(row.reason)
        return "refused " + ", ".join(f"({reasons.index(row.reason) + 1})" for row in result.refusals)

    lines = []
    for version in SGLANG:
        lines += [f"SGLang {version}:", "", "| targets | " + " | ".join(FAMILIES) + " |"]
        lines.append("|---" * (len(FAMILIES) + 1) + "|")
        for targets in TARGETS:
            cells = [cell(found[version, targets, family]) for family in FAMILIES.values()]
            lines.append(f"| {targets} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join(lines)


def in_page(page: str) -> str:
    """The table that the page holds."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    page = PAGE.read_text()
    with tempfile.TemporaryDirectory() as folder:
        made = table(outcomes(Path(folder)))
    PAGE.write_text(page.split(BEGIN)[0] + f"{BEGIN}\n\n{made}\n\n{END}" + page.split(END)[1])
    print(PAGE)


if __name__ == "__main__":
    main()
