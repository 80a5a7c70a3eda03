"""Insertions into a Python source file, at places found through its syntax tree. Pure, stdlib only.

Every inserted line ends with ``MARK``, so taking the edit out is deleting those lines: the file is as it was, byte for
byte, whatever else has been changed in it meanwhile.
"""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass

MARK = "# [slime-lora]"
MODULE = "slime_lora"
"""The name under which an edited file imports the hooks."""
IMPORT = f"from slime_plugins.lora import slime as {MODULE}"

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class MissingSeamError(ValueError):
    """The place where an edit goes is not in this file, or not in a form that the edit understands."""


@dataclass(frozen=True)
class Insertion:
    """Text that goes in front of line ``line`` (counted from 0), at ``column`` spaces of indentation."""

    line: int
    column: int
    text: str


@dataclass(frozen=True)
class Decorate:
    """``@slime_lora.<hook>`` as the outermost decorator of a function."""

    symbol: str
    """Qualified name: ``load_checkpoint``, ``MegatronTrainRayActor.update_weights``."""
    hook: str
    parameters: tuple[str, ...] = ()
    """Parameters that the hook relies on, by name."""

    def place(self, tree: ast.Module) -> Insertion:
        node = find(tree, self.symbol)
        if not isinstance(node, _FUNCTIONS):
            raise MissingSeamError(f"{self.symbol} is a class, expected a function")
        have = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        lost = [name for name in self.parameters if name not in have]
        if lost:
            raise MissingSeamError(f"{self.symbol}({', '.join(have)}) has no parameter {', '.join(lost)}")
        return Insertion(_first_line(node), node.col_offset, f"@{MODULE}.{self.hook}")


@dataclass(frozen=True)
class Rebind:
    """``name = slime_lora.<hook>(name)`` for a name that the file imports."""

    name: str
    hook: str

    def place(self, tree: ast.Module) -> Insertion:
        imports = _leading_imports(tree)
        if not any(self.name == (alias.asname or alias.name) for node in imports for alias in node.names):
            raise MissingSeamError(f"no import of {self.name}")
        return Insertion(imports[-1].end_lineno, 0, f"{self.name} = {MODULE}.{self.hook}({self.name})")


@dataclass(frozen=True)
class AroundAssignment:
    """A statement after (or in front of) the one assignment to ``target`` in a function."""

    symbol: str
    target: str
    """As it is written: ``self.weight_updater``."""
    text: str
    after: bool

    def place(self, tree: ast.Module) -> Insertion:
        function = find(tree, self.symbol)
        found = [node for node in ast.walk(function) if self.target in _targets(node)]
        if len(found) != 1:
            raise MissingSeamError(
                f"{self.symbol} has {len(found) or 'no'} assignments to {self.target}, expected one"
            )
        node = found[0]
        return Insertion(node.end_lineno if self.after else node.lineno - 1, node.col_offset, self.text)


@dataclass(frozen=True)
class Member:
    """``name = slime_lora.<hook>`` in front of the first method of a class."""

    symbol: str
    name: str
    hook: str

    def place(self, tree: ast.Module) -> Insertion:
        node = find(tree, self.symbol)
        methods = [child for child in getattr(node, "body", ()) if isinstance(child, _FUNCTIONS)]
        if not isinstance(node, ast.ClassDef) or not methods:
            raise MissingSeamError(f"{self.symbol} is not a class with methods")
        return Insertion(_first_line(methods[0]), methods[0].col_offset, f"{self.name} = {MODULE}.{self.hook}")


@dataclass(frozen=True)
class DictEntry:
    """``**slime_lora.<call>,`` as the first entry of the one dict literal in a function that has all of ``keys``."""

    symbol: str
    keys: tuple[str, ...]
    call: str
    names: tuple[str, ...] = ()
    """Local names that ``call`` uses."""

    def place(self, tree: ast.Module) -> Insertion:
        function = find(tree, self.symbol)
        stored = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        lost = [name for name in self.names if name not in stored]
        found = [
            node
            for node in ast.walk(function)
            if isinstance(node, ast.Dict)
            and {key.value for key in node.keys if isinstance(key, ast.Constant)} >= set(self.keys)
        ]
        if lost or len(found) != 1 or found[0].keys[0] is None or found[0].keys[0].lineno == found[0].lineno:
            raise MissingSeamError(
                f"{self.symbol} has no single dict over several lines with the keys {', '.join(self.keys)}"
                + (f", or no name {', '.join(lost)}" if lost else "")
            )
        first = found[0].keys[0]
        return Insertion(first.lineno - 1, first.col_offset, f"**{MODULE}.{self.call},")


def find(tree: ast.Module, symbol: str) -> ast.AST:
    """The function or class of a qualified name. Raises MissingSeamError if there is none, or more than one."""
    node: ast.AST = tree
    for part in symbol.split("."):
        found = [
            child
            for child in getattr(node, "body", ())
            if isinstance(child, (*_FUNCTIONS, ast.ClassDef)) and child.name == part
        ]
        if len(found) != 1:
            raise MissingSeamError(
                f"{'no' if not found else len(found)} definition{'s' * (len(found) > 1)} of {symbol}"
            )
        node = found[0]
    return node


def insert(source: str, edits) -> str:
    """The source with every edit in it, and the import of the hooks in front of the first definition.

    Args:
        source: text without edits of ours (see ``strip``), line ends as in the file.
    Raises:
        MissingSeamError: naming what was looked for; SyntaxError: the file is no Python.
    """
    tree = parse(source)
    insertions = [_import(tree), *(edit.place(tree) for edit in edits)]
    lines = source.splitlines(keepends=True)
    newline = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    if lines and not lines[-1].endswith("\n"):
        raise MissingSeamError("the last line has no line end")
    # From the bottom up, equal lines last edit first: every insertion pushes down what is already in place.
    for _, insertion in sorted(enumerate(insertions), key=lambda item: (item[1].line, item[0]), reverse=True):
        text = f"{' ' * insertion.column}{insertion.text}  {MARK}{newline}"
        lines.insert(insertion.line, text)
    result = "".join(lines)
    parse(result)
    return result


def parse(source: str) -> ast.Module:
    """The syntax tree; what Python has to say about slime's string escapes is not the user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def strip(source: str) -> str:
    """The source without our lines."""
    return "".join(line for line in source.splitlines(keepends=True) if not is_ours(line))


def is_ours(line: str) -> bool:
    """Is this a line that ``insert`` put there?"""
    return line.rstrip("\r\n").endswith(MARK)


def _import(tree: ast.Module) -> Insertion:
    imports = _leading_imports(tree)
    if not imports:
        raise MissingSeamError("no import in front of the first definition")
    return Insertion(imports[-1].end_lineno, 0, IMPORT)


def _leading_imports(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """The top-level imports in front of the first function or class."""
    imports = []
    for node in tree.body:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            break
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(node)
    return imports


def _first_line(node: ast.AST) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))]) - 1


def _targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    return []
