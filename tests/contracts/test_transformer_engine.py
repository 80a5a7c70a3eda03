"""TransformerEngine's own Python against what the package and its stand-in (tests/te_stub) take it to be.

make contracts
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from wheels import TRANSFORMER_ENGINE, Wheel, unpacked

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.layers.guards import BULK_OVERLAP, guard_frozen

pytestmark = pytest.mark.contracts
STUB = Path(__file__).parents[1] / "te_stub" / "transformer_engine" / "pytorch" / "module.py"
MODULES = {"Linear": "linear", "LayerNormLinear": "layernorm_linear", "GroupedLinear": "grouped_linear"}


@pytest.fixture(params=TRANSFORMER_ENGINE)
def te(request):
    return Wheel(unpacked("transformer-engine", request.param), "transformer_engine")


def source(te, name: str) -> ast.ClassDef:
    path = te.path(f"transformer_engine.pytorch.module.{MODULES[name]}")
    return defined(path, name)


def defined(path: Path, name: str) -> ast.ClassDef:
    tree = ast.parse(path.read_text())
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)


def method(cls: ast.ClassDef, name: str) -> ast.FunctionDef:
    return next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == name)


def parameters(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)][1:]


@pytest.mark.parametrize("name", MODULES)
def test_the_stand_in_has_no_parameter_that_te_has_not(te, name):
    """In TE's order, as far as they are positional."""
    for which in ("__init__", "forward"):
        real, ours = (parameters(method(cls, which)) for cls in (source(te, name), defined(STUB, name)))
        named = [p for p in ours if not p.startswith("_") and p != "ignored"]
        assert named, which
        assert [p for p in real if p in named] == named, (which, [p for p in named if p not in real])


@pytest.mark.parametrize("name", MODULES)
def test_forms_of_what_forward_returns(te, name):
    """out, (out, bias), (out, normed) and (out, bias, normed), by TE's return statements."""
    returned = [node.value for node in ast.walk(method(source(te, name), "forward")) if isinstance(node, ast.Return)]
    lengths = {len(value.elts) if isinstance(value, ast.Tuple) else 1 for value in returned if value is not None}
    assert lengths == ({1, 2, 3} if name == "LayerNormLinear" else {1, 2})


@pytest.mark.parametrize("name", ["Linear", "LayerNormLinear"])
def test_bulk_overlap_is_read_at_every_forward(te, name):
    """So turning the attributes off at freeze time is enough."""
    functions = [f for f in source(te, name).body if isinstance(f, ast.FunctionDef) and f.name != "__init__"]
    for attribute in BULK_OVERLAP:
        assert any(ast.unparse(node) == f"self.{attribute}" for f in functions for node in ast.walk(f)), attribute


class Linear(torch.nn.Module):
    """A frozen TE linear, as far as the guards look."""

    def __init__(self, store, **attributes) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.wgrad_store = store
        for name, value in attributes.items():
            setattr(self, name, value)


def test_guards_on_tes_own_store(te):
    import queue

    module = "transformer_engine.pytorch.module._common"
    store = te.take(module, "WeightGradStore", queue=queue, torch=torch).WeightGradStore
    with pytest.raises(UsageError, match="0 delays its weight gradient"):
        guard_frozen([torch.nn.Sequential(Linear(store(delay_wgrad_compute=True)))])
    overlapping = torch.nn.Sequential(Linear(store(), ub_bulk_wgrad=True, ub_bulk_dgrad=True))
    assert guard_frozen([overlapping]) == ["0"]
    assert not overlapping[0].ub_bulk_wgrad and not overlapping[0].ub_bulk_dgrad
    nothing_put = store(delay_wgrad_compute=True)
    with pytest.raises(RuntimeError, match="Pop empty queue"):  # why: a frozen layer pops all the same
        nothing_put.pop()
