"""Insertions into a Python source file, at places found through its syntax tree. Pure, stdlib only.

Every inserted line ends with ``MARK``, so taking the edit out is deleting those lines: the file is as it was, byte for
byte, whatever else has been changed in it meanwhile. Somebody's own line may end so too: ours are those of the shape
that ``insert`` gives them whose mark is a comment to Python, not text in a string.

Lines are Python's: they end in LF, CRLF or CR. ``str.splitlines`` also ends them at form feeds and the like.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

MARK = "# [slime-lora]"
MODULE = "slime_lora"
"""The name under which an edited file imports the hooks."""
IMPORT = f"from slime_plugins.lora import slime as {MODULE}"

_SHAPE = re.compile(
    rf"[ \t\f]*(?:{re.escape(IMPORT)}|@{MODULE}\.\w+|[\w.]+ = {MODULE}\.\w+(?:\(.*\))?|\*\*{MODULE}\.\w+\(.*\),"
    rf"|if {MODULE}\.\w+\(.*\): break)"
    rf"  {re.escape(MARK)}[\r\n]*"
)
"""The lines that ``insert`` writes, and wrote in earlier versions."""

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class MissingSeamError(ValueError):
    """The place where an edit goes is not in this file, or not in a form that the edit understands."""


class NotPythonError(ValueError):
    """Python does not understand the file."""


@dataclass(frozen=True)
class Insertion:
    """Text that goes in front of line ``line`` (counted from 0), indented as the statement of line ``like`` is."""

    line: int
    text: str
    like: int | None = None
    """None: not indented."""
    column: int = 0
    """Where that statement begins: with anything but white space before it, it shares its line, and is refused."""


class Edit(Protocol):
    """One of the classes below."""

    def place(self, tree: ast.Module) -> Insertion:
        """Where it goes, and what. Raises MissingSeamError."""


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
        return Insertion(_first_line(node), f"@{MODULE}.{self.hook}", _first_line(node), node.col_offset)


@dataclass(frozen=True)
class Rebind:
    """``name = slime_lora.<hook>(name)`` for a name that the file imports."""

    name: str
    hook: str

    def place(self, tree: ast.Module) -> Insertion:
        imports = _leading_imports(tree)
        if not any(self.name == (alias.asname or alias.name) for node in imports for alias in node.names):
            raise MissingSeamError(f"no import of {self.name}")
        return Insertion(_end(imports[-1]), f"{self.name} = {MODULE}.{self.hook}({self.name})")


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
        assert isinstance(node, (ast.Assign, ast.AnnAssign))
        return Insertion(_end(node) if self.after else node.lineno - 1, self.text, node.lineno - 1, node.col_offset)


@dataclass(frozen=True)
class AtLoop:
    """A statement in front of the one loop over ``target``, or as the last one in it."""

    symbol: str
    target: str
    text: str
    inside: bool
    names: tuple[str, ...] = ()
    """Local names that ``text`` uses."""

    def place(self, tree: ast.Module) -> Insertion:
        function = find(tree, self.symbol)
        found = [node for node in ast.walk(function) if isinstance(node, ast.For)]
        found = [node for node in found if ast.unparse(node.target) == self.target]
        stored = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        stored |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        lost = [name for name in self.names if name not in stored]
        if len(found) != 1 or lost:
            raise MissingSeamError(
                f"{self.symbol} has {len(found) or 'no'} loops over {self.target}, expected one"
                + (f", or no name {', '.join(lost)}" if lost else "")
            )
        node = found[0].body[-1] if self.inside else found[0]
        return Insertion(_end(node) if self.inside else node.lineno - 1, self.text, node.lineno - 1, node.col_offset)


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
        first = _first_line(methods[0])
        return Insertion(first, f"{self.name} = {MODULE}.{self.hook}", first, methods[0].col_offset)


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
        return Insertion(first.lineno - 1, f"**{MODULE}.{self.call},", first.lineno - 1, first.col_offset)


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


class Source:
    """A text without edits of ours (see ``strip``), line ends as in the file, parsed once for all edits.

    Raises NotPythonError.
    """

    def __init__(self, text: str) -> None:
        self.text, self._tree, self._lines = text, parse(text), split_lines(text)

    def insert(self, edits: Sequence[Edit]) -> str:
        """The text with every edit in it, and the import of the hooks in front of the first definition.

        Raises:
            MissingSeamError: naming what was looked for; NotPythonError: with an edit in it, it is none.
        """
        result = self.draft(edits)
        parse(result)
        if strip(result) != self.text:
            raise MissingSeamError("the edit would land inside a string")
        return result

    def draft(self, edits: Sequence[Edit]) -> str:
        """The same, not read again: a line may lie in a string, or be no Python there. Raises MissingSeamError."""
        insertions = [_import(self._tree), *(edit.place(self._tree) for edit in edits)]
        newline = "\r\n" if self._lines[0].endswith("\r\n") else "\n"
        for number, line in enumerate(self._lines, 1):
            if not line.endswith("\n"):  # git and editors do not call a lone CR a line end
                end = "a lone CR" if line.endswith("\r") else "no line end"
                raise MissingSeamError(f"line {number} ends in {end}")
        # From the bottom up, equal lines last edit first: every insertion pushes down what is already in place.
        lines = list(self._lines)
        for _, insertion in sorted(enumerate(insertions), key=lambda item: (item[1].line, item[0]), reverse=True):
            lines.insert(insertion.line, f"{_indentation(self._lines, insertion)}{insertion.text}  {MARK}{newline}")
        return "".join(lines)


def parse(source: str) -> ast.Module:
    """The syntax tree; what Python has to say about slime's string escapes is not the user's business.

    Raises:
        NotPythonError: with Python's reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source.removeprefix("\ufeff"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # NUL bytes; nesting without end
        raise NotPythonError(f"not Python: {error or type(error).__name__}") from error


def split_lines(source: str) -> list[str]:
    """Lines as Python counts them, with their ends."""
    return list(io.StringIO(source, newline=""))


def strip(source: str) -> str:
    """The source without our lines."""
    return "".join(line for line, ours in marked_lines(source) if not ours)


def strangers(source: str) -> list[int]:
    """Numbers, from 1, of lines that have our mark or name our module without being lines of ours."""
    return [
        number
        for number, (line, ours) in enumerate(marked_lines(source), 1)
        if not ours and (MARK in line or f"{MODULE}." in line)
    ]


def marked_lines(source: str) -> list[tuple[str, bool]]:
    """(line, is it one that ``insert`` put there?) for every line.

    Raises:
        NotPythonError: a line has the shape of ours, and Python cannot tell whether it lies in a string. Any other
            fault in the file (a merge conflict, half a file) does no harm.
    """
    lines = split_lines(source)
    shaped = {i for i, line in enumerate(lines) if is_ours(line)}
    comments, readable = _comments(source) if shaped else (frozenset(), 0)
    unclear = [i for i in shaped if i >= readable]
    if unclear:
        raise NotPythonError(
            f"not Python from line {readable + 1} on: whether line {min(unclear) + 1} is ours or lies in a string of "
            "yours cannot be told; mend the file first"
        )
    return [(line, i in shaped & comments) for i, line in enumerate(lines)]


def is_ours(line: str) -> bool:
    """Does this line have the shape of those that ``insert`` writes?"""
    return _SHAPE.fullmatch(line) is not None


@lru_cache(maxsize=64)  # a verb asks of the same few files again and again
def _comments(source: str) -> tuple[frozenset[int], int]:
    """Lines, from 0, that end in a comment which is our mark; and how many lines Python could read."""
    lines = split_lines(source)
    plain = (line.rstrip("\r\n") + "\n" for line in lines)
    found, readable = set(), 0
    try:
        for token in tokenize.generate_tokens(lambda: next(plain, "")):
            readable = token.end[0] - (token.end[1] == 0)
            if token.type == tokenize.COMMENT and token.string == MARK:
                found.add(token.start[0] - 1)
    except (tokenize.TokenError, SyntaxError, ValueError):
        return frozenset(found), readable
    return frozenset(found), len(lines)


def _indentation(lines: list[str], insertion: Insertion) -> str:
    if insertion.like is None:
        return ""
    before = lines[insertion.like][: insertion.column]
    if before.strip(" \t\f"):
        raise MissingSeamError(f"line {insertion.like + 1}: the statement there shares its line with another")
    return before


def _import(tree: ast.Module) -> Insertion:
    imports = _leading_imports(tree)
    if not imports:
        raise MissingSeamError("no import in front of the first definition")
    return Insertion(_end(imports[-1]), IMPORT)


def _leading_imports(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """The top-level imports in front of the first function or class."""
    imports = []
    for node in tree.body:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            break
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(node)
    return imports


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1


def _end(node: ast.stmt) -> int:
    assert node.end_lineno is not None  # set by ast.parse
    return node.end_lineno


def _targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    return []
