"""One deliberate defect, and how it is put into a copy of the tree."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path("slime_plugins") / "lora"


@dataclass(frozen=True)
class Break:
    """One deliberate defect."""

    hazard: str
    what: str
    where: str
    """File, below the package (or ``tests/...``), and qualified name of a function: ``adapters.py::merged``."""
    old: str | None
    """What is replaced in the function; None: all of its body, behind the docstring."""
    new: str
    tests: str
    needs: str = ""
    """Environment variable without which the tests are skipped."""

    @property
    def file(self) -> Path:
        path = Path(self.where.partition("::")[0])
        return path if path.parts[0] == "tests" else PACKAGE / path

    def applied(self, source: str) -> str:
        """The source with the defect in it. Raises LookupError if it no longer fits."""
        node: ast.AST = ast.parse(source)
        name = self.where.partition("::")[2]
        for part in name.split("."):
            children = [c for c in ast.walk(node) if isinstance(c, (ast.FunctionDef, ast.ClassDef)) and c.name == part]
            if len(children) != 1:
                raise LookupError(f"{self.where}: {part} is defined {len(children)} times, not once")
            node = children[0]
        lines = source.splitlines(keepends=True)
        before, after = "".join(lines[: node.lineno - 1]), "".join(lines[node.end_lineno :])
        function = "".join(lines[node.lineno - 1 : node.end_lineno])
        if self.old is None:
            first = node.body[1] if ast.get_docstring(node, clean=False) is not None else node.body[0]
            indent = " " * node.body[0].col_offset
            if first is not node.body[0]:
                signature = "".join(lines[node.lineno - 1 : node.body[0].end_lineno])
            else:
                signature = "".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
            return f"{before}{signature}{indent}{self.new}\n{after}"
        if function.count(self.old) != 1:
            raise LookupError(f"{self.where} has {function.count(self.old)} times, not once: {self.old!r}")
        return before + function.replace(self.old, self.new) + after
