"""What LoRA adds to a step's memory traffic, counted and not timed. Exit 1 if it adds more than is allowed.

    python bench/traffic.py                          local and TransformerEngine linears and experts; TP=1, 2, 2+SP
    python bench/traffic.py --layouts split --settings TP=2+SP

A GPU's time for rank-r products is the bytes they move, and a CPU's is not, so a CPU's seconds say nothing about it.
Counted instead, of one linear with an adapter minus the same linear frozen, forward and backward under Megatron's DDP:

    kernels       operations that launch one: everything torch dispatches but views, allocations and collectives
    NI, NO        bytes read and written of tensors as wide as the linear's input or output, in bf16, for N tokens and
                  the I and O of this rank: 4NI is one read and one write of the input. A norm is one kernel that
                  reads and writes once, as TransformerEngine's and torch's are on a GPU
    in base's     the same, of kernels that multiply by the base's weight: reads beside a product that computes
    again         the same, of an activation function that the backward runs again rather than keep what it gave
    kept          what the forward keeps for the backward and the frozen linear does not
    sent          elements that go through collectives, per token: the whole tensor's, whatever the algorithm

The four linears of a Qwen layer, fc2 behind its SwiGLU, and the two of a layer of experts. TransformerEngine is the
stand-in of tests/te_stub (its products and exchanges are TE's, its kernels torch's). ``recompute`` is a forward more,
as under full activation recompute. PEFT's layer beside them, on one projection and so for a plain linear;
Megatron-Bridge's with

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
        weights: storages of the base.
    """

    def __init__(self, widths: dict[int, tuple[str, float]], weights: set[int]) -> None:
        super().__init__()
        self._widths, self._weights, self._paused = widths, weights, False
        self.count: Counter[str] = Counter()
        """``kernels``, ``NI``, ``NO`` (passes over such a tensor), ``sent`` (elements); passes of the base's products
        and of the activation function as ``base NI``, ``activation NI``, the latter's launches too."""
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
            of_base = any(t.untyped_storage().data_ptr() in self._weights for t in _tensors(args))
            self._add(name, read, written or result, "base " if of_base else "")
        return result

    def one_kernel(self, function, of: str = ""):
        """``function``, counted as one kernel that reads its arguments and writes its results."""

        def run(*args):
            if self._paused:
                return function(*args)
            self._paused = True
            try:
                result = function(*args)
            finally:
                self._paused = False
            self._add(function.__name__, args, result, of)
            return result

        return run

    def _add(self, name: str, read: Any, written: Any, of: str) -> None:
        self.count["activation kernels" if of == "activation " else "kernels"] += 1
        self.names[name] += 1
        for tensor in (*_tensors(read), *_tensors(written)):
            bytes_of_all, element = tensor.untyped_storage().nbytes(), tensor.element_size()
            side, share = self._widths.get(bytes_of_all // element, ("", 0))
            if side:  # a view of it moves its own part
                self.count[of + side] += share * tensor.numel() * element / bytes_of_all


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
    base_NI: float
    base_NO: float
    """In the base's products."""
    again: str
    """Of the activation function: kernels and bytes."""
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
        first, forward, again = linears[0], total("forward", "kernels"), total("backward", "activation kernels")
        return cls(
            **{key: first[key] for key in ("setting", "implementation", "layout", "linears")},
            kernels=forward + total("backward", "kernels"),
            recompute=2 * forward + total("backward", "kernels"),
            NI=most("NI"),
            NO=most("NO"),
            base_NI=most("base NI"),
            base_NO=most("base NO"),
            again=f"{again:g} kernel, {most('activation NI'):g}NI" if again else "",
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
            most = {"NI": 6, "NO": 6, "base_NI": 2, "base_NO": 2}
            extra = {"TP=1": 0, "TP=2": 4, "TP=2+SP": 2}[self.setting]
            most["kernels"] = 24 + 4 * (self.implementation == "te") + 8 * (self.layout == "split") + extra
            exchanged = {"TP=1": (), "TP=2": tuple(LINEARS), "TP=2+SP": ("qkv", "fc1")}[self.setting]
            most["sent_forward"] = 0
            most["sent_backward"] = RANK * sum(STACKED[self.layout].get(linear, 1) for linear in exchanged)
        elif self.layout == "fused":
            most["kernels"] = 38
        found = {what: getattr(self, what) for what in most}
        problems = [f"{what} {found[what]:g}, allowed {most[what]:g}" for what in most if found[what] > most[what]]
        alone = [] if self.linears != "fused" else ["fc2", *(["qkv", "fc1"] if self.implementation == "te" else [])]
        if any(linear in self.kept_wide for linear in alone):
            problems.append(f"keeps {self.kept_wide} for the backward; of {', '.join(alone)}, h alone is allowed")
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
        "in base's",
        "again",
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
                f"{layer.base_NI:g}NI + {layer.base_NO:g}NO",
                layer.again,
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
    from megatron.core.fusions import fused_bias_swiglu

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
    behind_swiglu = case.linear == "fc2" and not case.of_experts
    x = torch.randn(*shape[:-1], shape[-1] * (1 + behind_swiglu), requires_grad=True) * 1.0
    weights = {p.untyped_storage().data_ptr() for p in module.parameters() if not p.requires_grad and p.ndim > 1}
    forward, backward = (Traffic(case.widths(setting), weights) for _ in range(2))
    kept: Counter[str] = Counter()
    with _fused_kernels(case, forward), _kept_for_backward(model, case.widths(setting), kept), forward:
        result = model(fused_bias_swiglu.bias_swiglu_impl(x, None) if behind_swiglu else x, *inputs)
    y = result[0] if isinstance(result, tuple) else result
    dy = torch.randn_like(y)
    with _fused_kernels(case, backward), backward:
        y.backward(dy)
    return {
        "forward": forward.count,
        "backward": backward.count,
        "kept": kept,
        "names": forward.names + backward.names,
    }


@contextlib.contextmanager
def _fused_kernels(case: Case, traffic: Traffic):
    """Inside, what is one kernel on a GPU counts as one: norms in front of linears, the stand-in's and ours, and
    Megatron's SwiGLU, which it compiles."""
    from megatron.core.fusions import fused_bias_swiglu

    functions = [(fused_bias_swiglu, name, "activation ") for name in ("swiglu", "swiglu_back")]
    if case.implementation == "te":
        from transformer_engine.pytorch import module

        from slime_plugins.lora.layers.fused import Norm

        norms = ((module, "norm"), (module, "norm_backward"), (Norm, "__call__"), (Norm, "backward"))
        functions += [(owner, name, "") for owner, name in norms]
    with contextlib.ExitStack() as patched:
        for owner, name, of in functions:
            function = getattr(owner, name)
            function = getattr(function, "_torchdynamo_orig_callable", function)
            patched.enter_context(mock.patch.object(owner, name, traffic.one_kernel(function, of)))
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
