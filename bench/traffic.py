"""What LoRA adds to a step's memory traffic, counted and not timed. Exit 1 if it adds more than is allowed.

    python bench/traffic.py                          local and TransformerEngine linears and experts; TP=1, 2, 2+SP
    python bench/traffic.py --layouts split --settings TP=2+SP

A GPU's time for rank-r products is the bytes they move, and a CPU's is not, so a CPU's seconds say nothing about it.
Counted instead, of one linear with an adapter minus the same linear frozen, forward and backward under Megatron's DDP:

    kernels       operations that launch one: everything torch dispatches but views, allocations and collectives
    NI, NO        bytes read and written of tensors as wide as the linear's input or output, in bf16, for N tokens and
                  the I and O of this rank: 4NI is one read and one write of the input. A norm is one kernel that
                  reads and writes once, as TransformerEngine's and torch's are on a GPU
    kept          of those, what the forward keeps for the backward
    sent          elements that go through collectives, per token: the whole tensor's, whatever the algorithm

The four linears of a Qwen layer, and the two of a layer of experts. TransformerEngine is the stand-in of tests/te_stub
(its products and exchanges are TE's, its kernels torch's). ``recompute`` is a forward more, as under full activation
recompute. PEFT's layer beside them, on one projection and so for a plain linear; Megatron-Bridge's with

    pip download --no-deps megatron-bridge && python bench/traffic.py --bridge megatron_bridge-*.whl
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _harness import SETTINGS, Setting, run_ranks, table, write_json
from _linears import EXPERTS, LINEARS, RANK, TOKENS, Case, cases_of, find_bridge, in_ddp, linear_of
from torch.utils._python_dispatch import TorchDispatchMode

STAND_IN = Path(__file__).resolve().parent.parent / "tests" / "te_stub"
LAYOUTS = ("fused", "split")
STACKED = {"fused": {}, "split": {"qkv": 3, "fc1": 2}}
"""How many As a linear stacks."""
NOT_KERNELS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh")
WRITTEN_ONLY = ("copy_", "zero_", "fill_")


class Traffic(TorchDispatchMode):
    """Counts what is dispatched inside.

    Args:
        widths: storage size in elements -> ``NI`` or ``NO``, and the share of such a tensor that it is.
    """

    def __init__(self, widths: dict[int, tuple[str, float]]) -> None:
        super().__init__()
        self._widths, self._paused = widths, False
        self.count: Counter[str] = Counter()
        """``kernels``, ``NI``, ``NO`` (passes over such a tensor), ``sent`` (elements)."""
        self.names: Counter[str] = Counter()
        """Of the kernels, to look into a difference."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self._paused:
            return result
        namespace, _, name = func.name().split(".")[0].partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            self.count["sent"] += max(_numel(args[0]), _numel(args[1])) if name != "barrier" else 0
        elif not func.is_view and name not in NOT_KERNELS:
            written = [a for a, s in zip(args, func._schema.arguments) if s.alias_info and s.alias_info.is_write]
            read = [a for a in args if not (name in WRITTEN_ONLY and any(a is w for w in written))]
            self._add(name, read, written or result)
        return result

    def one_kernel(self, function):
        """``function``, counted as one kernel that reads its arguments and writes its results."""

        def run(*args):
            if self._paused:
                return function(*args)
            self._paused = True
            try:
                result = function(*args)
            finally:
                self._paused = False
            self._add(function.__name__, args, result)
            return result

        return run

    def _add(self, name: str, read: Any, written: Any) -> None:
        self.count["kernels"] += 1
        self.names[name] += 1
        for tensor in (*_tensors(read), *_tensors(written)):
            side, share = self._widths.get(tensor.untyped_storage().nbytes() // tensor.element_size(), ("", 0))
            if side:  # a view of it moves its own part
                self.count[side] += share * tensor.numel() * tensor.element_size() / tensor.untyped_storage().nbytes()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _numel(value: Any) -> int:
    return sum(tensor.numel() for tensor in _tensors(value))


def main() -> int:
    args = parse_args()
    # Before Megatron is imported: a rank decides then whether there is a TransformerEngine.
    sys.path.insert(0, str(STAND_IN))
    results = []
    for setting in SETTINGS:
        if not args.settings or str(setting) in args.settings:
            results += run_ranks(count_all, setting, args.layouts, args.bridge)[0]
    layers = [Layer.of(linears) for linears in by_layer(results)]
    print(f"LoRA minus frozen base, per layer; NI and NO: bytes in bf16 of the linear with most; rank r = {RANK}")
    print(render(layers))
    problems = [problem for layer in layers for problem in layer.over_limit()]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(write_json("traffic.json", {"rank": RANK, "results": results}, args.json))
    return 1 if problems else 0


def by_layer(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    keys = ("setting", "implementation", "layout", "linears")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return list(groups.values())


@dataclasses.dataclass(frozen=True)
class Layer:
    """The linears of one layer together."""

    setting: str
    implementation: str
    layout: str
    linears: str
    kernels: float
    recompute: float
    """The same with a forward more."""
    NI: float
    NO: float
    kept_wide: str
    """What is kept as wide as an input or output: of which linears."""
    kept: float
    """Other elements kept, per token."""
    sent_forward: float
    sent_backward: float

    @classmethod
    def of(cls, linears: list[dict[str, Any]]) -> Layer:
        def total(when: str, what: str) -> float:
            return sum(linear[when].get(what, 0) for linear in linears)

        def most(what: str) -> float:
            return 2 * max(linear["forward"].get(what, 0) + linear["backward"].get(what, 0) for linear in linears)

        wide = [
            f"{linear['linear']} {linear['kept'].get(side, 0):g}{side}"
            for linear in linears
            for side in ("NI", "NO")
            if linear["kept"].get(side, 0)
        ]
        first, forward = linears[0], total("forward", "kernels")
        return cls(
            **{key: first[key] for key in ("setting", "implementation", "layout", "linears")},
            kernels=forward + total("backward", "kernels"),
            recompute=2 * forward + total("backward", "kernels"),
            NI=most("NI"),
            NO=most("NO"),
            kept_wide=", ".join(wide),
            kept=total("kept", "elements") / TOKENS,
            sent_forward=total("forward", "sent") / TOKENS,
            sent_backward=total("backward", "sent") / TOKENS,
        )

    def over_limit(self) -> list[str]:
        """What is more than the design allows, in words."""
        if self.linears in ("peft", "bridge"):
            return []
        most = {"NI": 12 if (self.implementation, self.linears) == ("te", "taps") else 8, "NO": 8}
        if self.linears == "fused":
            extra = {"TP=1": 0, "TP=2": 4, "TP=2+SP": 2}[self.setting]
            most["kernels"] = 24 + 4 * (self.implementation == "te") + 8 * (self.layout == "split") + extra
            exchanged = {"TP=1": (), "TP=2": tuple(LINEARS), "TP=2+SP": ("qkv", "fc1")}[self.setting]
            most["sent_forward"] = 0
            most["sent_backward"] = RANK * sum(STACKED[self.layout].get(linear, 1) for linear in exchanged)
        elif self.layout == "fused":
            most["kernels"] = 38
        found = {what: getattr(self, what) for what in most}
        problems = [f"{what} {found[what]:g}, allowed {most[what]:g}" for what in most if found[what] > most[what]]
        behind_norm = self.implementation == "te" and self.linears == "fused"
        if behind_norm and ("qkv" in self.kept_wide or "fc1" in self.kept_wide):
            problems.append(f"keeps {self.kept_wide} for the backward; of a linear behind a norm, h alone is allowed")
        return [f"{self}: {problem}" for problem in problems]

    def __str__(self) -> str:
        return f"{self.setting} {self.implementation}, {self.layout}, {self.linears}"


def render(layers: list[Layer]) -> str:
    header = (
        "setting, linears, layout, way",
        "kernels",
        "recompute",
        "NI",
        "NO",
        "sent forward",
        "backward",
        "kept",
        "",
    )
    return table(
        header,
        [
            (
                str(layer),
                *(f"{value:g}" for value in (layer.kernels, layer.recompute, layer.NI, layer.NO)),
                *(f"{value / RANK:g} r" for value in (layer.sent_forward, layer.sent_backward, layer.kept)),
                layer.kept_wide,
            )
            for layer in layers
        ],
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    parser.add_argument("--settings", nargs="+", metavar="SETTING", help="of TP=1 TP=2 TP=2+SP (default: all)")
    parser.add_argument("--bridge", metavar="WHEEL", help="count Megatron-Bridge's LoRA too: its wheel, not installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/out/traffic.json")
    return parser.parse_args()


def count_all(setting: Setting, layouts: list[str], bridge: str | None) -> list[dict[str, Any]]:
    """One rank: a result per case, layout and way."""
    if bridge is not None:
        find_bridge(bridge)
    from slime_plugins.lora.layers import grouped

    grouped.LARGE = TOKENS // EXPERTS  # experts as they are with thousands of rows each
    results = []
    for case in cases_of(setting):
        frozen = count(case, setting, None)
        for layout, linears in case.ways(setting, layouts, bridge is not None):
            lora = count(case, setting, layout, linears)
            extra = {when: _minus(lora[when], frozen[when]) for when in ("forward", "backward", "kept")}
            results.append(
                {"setting": str(setting), "implementation": case.implementation, "linear": case.linear}
                | {"layout": layout, "linears": linears, **extra}
                | {"kernel_names": _minus(lora["names"], frozen["names"])}
            )
    return results


def _minus(one: Counter, other: Counter) -> dict[str, float]:
    return {key: round(one[key] - other[key], 6) for key in one | other}


def count(case: Case, setting: Setting, layout: str | None, linears: str = "fused") -> dict[str, Counter]:
    """One forward and backward of one linear: ``forward``, ``backward``, ``kept`` and the kernels' ``names``.

    Args:
        layout: of its adapter; None leaves it frozen.
        linears: as ``--lora-linears``.
    """
    torch.manual_seed(0)
    module = linear_of(case, setting, layout, linears)
    model = in_ddp(module)
    _, parallel, size_in, _ = LINEARS[case.linear]
    sequence = setting.sequence_parallel and setting.tp > 1 and not case.of_experts
    shards = setting.tp if parallel == "row" and not case.of_experts else 1
    tokens = TOKENS // setting.tp if sequence and parallel == "column" else TOKENS
    splits = [TOKENS // 4, TOKENS // 2, 0, TOKENS // 4]
    inputs = ([torch.tensor(splits)] if case.implementation == "te experts" else [splits]) if case.of_experts else []
    shape = (tokens, size_in) if case.of_experts or case.implementation == "peft" else (tokens, 1, size_in // shards)
    x = torch.randn(shape, requires_grad=True) * 1.0
    forward, backward = (Traffic(case.widths(setting)) for _ in range(2))
    kept: Counter[str] = Counter()
    with _norms_as_one_kernel(case, forward), _kept_for_backward(model, case.widths(setting), kept), forward:
        result = model(x, *inputs)
    y = result[0] if isinstance(result, tuple) else result
    dy = torch.randn_like(y)
    with _norms_as_one_kernel(case, backward), backward:
        y.backward(dy)
    return {
        "forward": forward.count,
        "backward": backward.count,
        "kept": kept,
        "names": forward.names + backward.names,
    }


@contextlib.contextmanager
def _norms_as_one_kernel(case: Case, traffic: Traffic):
    """Inside, norms in front of linears count as what they are on a GPU: TransformerEngine's stand-in's, and ours."""
    if case.implementation != "te":
        yield
        return
    from transformer_engine.pytorch import module

    from slime_plugins.lora.layers.fused import Norm

    with contextlib.ExitStack() as patched:
        for owner, name in ((module, "norm"), (module, "norm_backward"), (Norm, "__call__"), (Norm, "backward")):
            patched.enter_context(mock.patch.object(owner, name, traffic.one_kernel(getattr(owner, name))))
        yield


@contextlib.contextmanager
def _kept_for_backward(model: torch.nn.Module, widths: dict[int, tuple[str, float]], kept: Counter):
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen, alive = set(), []  # alive, or an address would be handed out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters | seen:
            seen.add(storage.data_ptr())
            alive.append(tensor)
            side, share = widths.get(storage.nbytes() // tensor.element_size(), ("elements", 0))
            kept[side] += share or storage.nbytes() / tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


if __name__ == "__main__":
    sys.exit(main())
