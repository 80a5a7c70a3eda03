"""Other projects' own code as judge: chosen modules out of their wheels, run on a CPU without what they depend on.

``make contracts`` fetches the wheels and unpacks their Python. A module is run as it is. What it imports is, in this
order: what a test has given, another module of the wheel that the test has named as real, a package that is installed,
and else a name that stands for nothing: it may be imported and written in annotations, and any use of it is an error.
A stand-in that answers yes to everything proves nothing.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

SGLANG = ("0.5.15.post1", "0.5.23")
"""What slime v0.3.1 and main of August 2026 pin, and the newest that has been read."""
TRANSFORMER_ENGINE = ("2.16.1", "2.20.2")
"""What slime's Dockerfile pins, and the newest that has been read."""
TRL = ("0.24.0", "1.16.0")
"""The last that has GKDTrainer outside ``experimental``, and the newest that has been read."""
VLLM = "0.33.0"
"""The newest that has been read. Its wheel is large: ``make contracts FETCH_ARGS=--vllm``."""


def cache() -> Path:
    """Where ``make contracts`` puts wheels: SLIME_LORA_WHEELS, else below the user's cache directory."""
    if os.environ.get("SLIME_LORA_WHEELS"):
        return Path(os.environ["SLIME_LORA_WHEELS"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slime-lora" / "wheels"


def unpacked(name: str, version: str) -> Path:
    """The directory of one unpacked wheel. Skips the test where there is none; fails it under ``make contracts``."""
    root = cache() / f"{name}-{version}"
    if not root.is_dir():
        reason = f"needs {name} {version} in {cache()}: make contracts"
        if os.environ.get("SLIME_LORA_CONTRACTS"):
            pytest.fail(reason)
        pytest.skip(reason)
    return root


def vllm() -> Path:
    """vLLM's directory. Skips the test where there is none, under ``make contracts`` too."""
    if not (cache() / f"vllm-{VLLM}").is_dir():
        pytest.skip(f"needs vllm {VLLM} in {cache()}: make contracts FETCH_ARGS=--vllm")
    return unpacked("vllm", VLLM)


class Absent:
    """A name that could not be imported. It can be named; anything else is an error that says what was wanted."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{self._name} is used, and nothing stands for it here: give it, or name it as real")

    __call__ = __bool__ = __iter__ = __len__ = __contains__ = __mro_entries__ = __instancecheck__ = _refuse
    __enter__ = __getitem__ = __setattr__ = __add__ = __eq__ = _refuse
    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()


class Wheel:
    """The modules of one unpacked distribution."""

    def __init__(self, root: Path, package: str, real: tuple[str, ...] = ()) -> None:
        """``real``: modules of the package that imports may run; ``module`` runs any."""
        self.root, self.package, self.real = root, package, set(real)
        self._modules: dict[str, types.ModuleType] = {}

    def give(self, module: str, **attributes: Any) -> None:
        """Let these names stand for a module; with a module that is real already, in place of its own."""
        if module not in self._modules:
            self._modules[module] = types.ModuleType(module)
        self._modules[module].__dict__.update(attributes)

    def module(self, name: str) -> types.ModuleType:
        """Run a module, once."""
        if name not in self._modules:
            found = types.ModuleType(name)
            found.__dict__.update(self._namespace(name))
            self._modules[name] = sys.modules[found.__name__] = found  # dataclasses look their module up there
            path = self.path(name)
            found.__file__ = str(path)
            exec(self._compiled(ast.parse(path.read_text(), str(path)), path), found.__dict__)
        return self._modules[name]

    def take(self, module: str, *names: str, **given: Any) -> types.SimpleNamespace:
        """Definitions of a module that is too large to run: functions, classes (``Class.method``), assignments.

        They see each other, ``given`` and what their own imports give, nothing else of the module.
        """
        path = self.path(module)
        tree = ast.parse(path.read_text(), str(path))
        within = types.ModuleType(module)
        within.__dict__.update({**self._namespace(module), **given})
        namespace = within.__dict__
        sys.modules.setdefault(within.__name__, within)
        for name in names:
            body = [_definition(tree, name, path)]
            exec(self._compiled(ast.Module(body=body, type_ignores=[]), path), namespace)
        return types.SimpleNamespace(**{n.rsplit(".", 1)[-1]: namespace[n.rsplit(".", 1)[-1]] for n in names})

    def path(self, module: str) -> Path:
        """The file of a module."""
        base = self.root / module.replace(".", "/")
        return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")

    def _namespace(self, name: str) -> dict[str, Any]:
        package = name if self.path(name).name == "__init__.py" else name.rpartition(".")[0]
        own = {**vars(builtins), "__import__": self._import}
        # Two versions, or two settings of one, in a process: none of them is `sglang` to anybody else.
        return {"__name__": f"{self.root.name} {id(self):x}:{name}", "__package__": package, "__builtins__": own}

    @staticmethod
    def _compiled(tree: ast.Module, path: Path):
        lazy = __future__.annotations.compiler_flag  # annotations name what has not been imported
        return compile(tree, str(path), "exec", flags=lazy, dont_inherit=True)

    def _import(self, name, globals=None, locals=None, fromlist=(), level=0):
        if level:
            parts = globals["__package__"].split(".")
            parts = parts[: len(parts) - level + 1]
            name = ".".join([*parts, name] if name else parts)
        if name.split(".")[0] != self.package:
            return self._foreign(name, globals, locals, fromlist)
        found = self._found(name)
        if not fromlist:
            return self._found(self.package)
        for attribute in fromlist:
            if not hasattr(found, attribute):
                submodule = f"{name}.{attribute}"
                known = submodule in self._modules or submodule in self.real
                setattr(found, attribute, self._found(submodule) if known else Absent(submodule))
        return found

    def _found(self, name: str) -> types.ModuleType:
        if name in self._modules:
            return self._modules[name]
        return self.module(name) if name in self.real else types.ModuleType(name)

    def _foreign(self, name, globals, locals, fromlist):
        if name in self._modules:
            return self._modules[name]
        try:
            return builtins.__import__(name, globals, locals, fromlist)
        except ImportError:
            stand_in = types.ModuleType(name)
            stand_in.__getattr__ = lambda attribute: Absent(f"{name}.{attribute}")  # type: ignore[method-assign]
            return stand_in


def _definition(tree: ast.Module, name: str, path: Path) -> ast.stmt:
    body: list[ast.stmt] = tree.body
    *classes, leaf = name.split(".")
    for cls in classes:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == cls)
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == leaf:
            return node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == leaf for t in node.targets):
            return node
    raise AssertionError(f"{path} has no {name}")


def library(name: str) -> types.ModuleType:
    """A small third-party module that the wheels need, installed or out of the cache."""
    try:
        return importlib.import_module(name)
    except ImportError:
        folder = cache() / "lib"
        if (folder / name).is_dir():
            sys.path.append(str(folder))
            return importlib.import_module(name)
        pytest.skip(f"needs {name} in {folder}: make contracts")
