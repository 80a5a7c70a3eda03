"""Exports of every family, in every form and spelling, through vLLM's and SGLang's own code that takes an adapter's
names to their modules: what reaches them, what is dropped in silence, what is refused; and that ``verify`` says so.

make contracts FETCH_ARGS=--vllm
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import families
import pytest
import sglang_worker
import torch
import vllm_worker
from packaging.version import Version
from safetensors.torch import load_file
from wheels import SGLANG

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.peft import form as peft_form
from slime_plugins.lora.peft.config import key_of
from slime_plugins.lora.peft.dialect import for_sglang
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.form import to_peft
from slime_plugins.lora.peft.loaders import SGLANG as SGLANG_LOADER
from slime_plugins.lora.peft.loaders import VLLM, Adapted, left_out
from slime_plugins.lora.projections import Projection

pytestmark = pytest.mark.contracts
FAMILIES = [name for name in families.FAMILIES if " as text" not in name]
SEES = [name for name in FAMILIES if "vision_config" in families.FAMILIES[name].settings]
SPELLED = ("module", "checkpoint", "text")
NEVER_APPLIED = ".kv_b_proj"
"""Of latent attention: vLLM hands its module the weights, and its attention does not call that module."""


@dataclass
class Case:
    """An adapter on disk."""

    base: BaseCheckpoint
    directory: Path
    projections: dict[str, Projection]
    """By the name in the base's files, without a tower's."""
    modules: list[str]
    """As the adapter names them, the tower's too."""
    adapted: Adapted

    def said(self, loader: str, version: str) -> tuple[bool, set[str]]:
        """Is the adapter refused, and which of its linears are left out in silence, by our rules."""
        rules = left_out(self.adapted)[loader]
        holds = {r: m for r, m in rules.items() if r.before is None or Version(version) < Version(r.before)}
        silent = [module for rule, found in holds.items() if not rule.refuses for module in found]
        names = self.base.names(self.adapted.spelling)
        return any(rule.refuses for rule in holds), {names[m] for m in silent if not m.endswith(NEVER_APPLIED)}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("names"), {}

    def get(family: str, form: str, spelling: str, tower: bool = False, only: str | None = None) -> Case:
        key = family, form, spelling, tower, only
        if key not in made:
            made[key] = _made(root, *key)
        return made[key]

    return get


def _made(root: Path, family: str, form: str, spelling: str, tower: bool, only: str | None) -> Case:
    path = root / family
    base = BaseCheckpoint(path if path.is_dir() else families.make(path, family))
    adapter = families.projections(base, only)
    config, tensors = to_peft(adapter, base, moe_format=form, names=spelling)
    fused = form == "fused" and any(".experts." in p.name for p in adapter)
    modules = [base.renamed(base.spelled(p.name), spelling) for p in adapter]
    if tower:
        stored = next(n for n in sorted(base.linears) if "visual.blocks.0.mlp" in n or "encoder.layers.0.mlp" in n)
        rows, columns = base.linear_shape(stored)
        modules.append(base.named(stored, spelling))
        tensors |= {key_of(modules[-1], half): torch.randn(s) for half, s in (("A", (4, columns)), ("B", (rows, 4)))}
        config = config | {"exclude_modules": None} | peft_form.select(modules, base, spelling)
    out = root / f"adapter {len(list(root.iterdir()))}"
    write_adapter(out, config, tensors, base=base)
    adapted = Adapted(base, frozenset(modules), spelling, fused)
    return Case(base, out, {base.spelled(p.name): p for p in adapter}, modules, adapted)


def forms(family: str) -> tuple[str, ...]:
    experts = any(key in json.dumps(families.FAMILIES[family].settings) for key in ("num_experts", "n_routed"))
    return ("per-expert", "fused") if experts else ("per-expert",)


CASES = [(family, form, spelling) for family in FAMILIES for form in forms(family) for spelling in SPELLED]
CASES_WITH_TOWER = [(family, "per-expert", s) for family in SEES for s in ("module", "checkpoint")]


def through_vllm(case: Case) -> tuple[bool, set[str]]:
    """Is it refused, and of which linears nothing reaches a module; what reaches one must be the adapter's."""
    worker = vllm_worker.Worker(case.base.directory, max_rank=8)
    try:
        worker.load(case.directory)
    except ValueError:
        return True, set()
    except AssertionError as error:
        if str(error):  # ours have words, theirs in `pack_moe` have none
            raise
        return True, set()
    return False, _unreached(case, worker.served)


def through_sglang(case: Case, version: str) -> tuple[bool, set[str]]:
    """The same of a server that is started with the adapter: it takes its targets from there."""
    config = json.loads((case.directory / "adapter_config.json").read_text())
    tensors = load_file(case.directory / "adapter_model.safetensors")
    targets = sorted({target.rpartition(".")[2] for target in config["target_modules"]})
    try:
        worker = sglang_worker.Worker(version, case.base.directory, targets, 4, strict=False)
        worker.load("a", config, tensors)
        worker.generate("a")
    except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
        if "nothing stands for it here" in str(error):
            raise
        return True, set()
    found = worker.served("a")

    def served(stored: str) -> torch.Tensor | None:
        name = case.base.canonical(stored)
        update = found.get(name, found.get(name.replace("shared_experts.", "shared_expert.")))
        return update if update is not None and update.any() else None

    return False, _unreached(case, served, tolerance=0.02)  # its buffers are bf16


def _unreached(case: Case, served, tolerance: float = 1e-5) -> set[str]:
    missing = set()
    for stored, projection in case.projections.items():
        found, expected = served(stored), projection.update()
        if found is None:
            missing.add(stored)
        else:
            assert (found - expected).abs().max() <= tolerance * expected.abs().max(), f"{stored} is served wrong"
    return missing


def without_tower(case: Case, said: tuple[bool, set[str]]) -> tuple[bool, set[str]]:
    """A refused adapter is refused whole; what is left out of a tower is not asked of the language model."""
    return (True, set()) if said[0] else (False, said[1] & case.projections.keys())


@pytest.mark.parametrize("family, form, spelling", CASES, ids=[" ".join(c) for c in CASES])
def test_vllm(case, family, form, spelling):
    one = case(family, form, spelling)
    assert through_vllm(one) == without_tower(one, one.said(VLLM, vllm_worker.VERSION))


@pytest.mark.parametrize("version", SGLANG)
@pytest.mark.parametrize("family, form, spelling", CASES, ids=[" ".join(c) for c in CASES])
def test_sglang(case, version, family, form, spelling):
    one = case(family, form, spelling)
    assert through_sglang(one, version) == without_tower(one, one.said(SGLANG_LOADER, version))


@pytest.mark.parametrize("version", SGLANG)
@pytest.mark.parametrize("family, only, outcome", families.PARTS, ids=[f"{f} {only}" for f, only, _ in families.PARTS])
def test_parts_in_sglang(case, version, family, only, outcome):
    """An adapter on some of the linears that SGLang has stacked; and on routers and gates, which it does not serve."""
    one = case(family, "per-expert", "module", only=only)
    found = refused, unreached = through_sglang(one, version)
    assert found == one.said(SGLANG_LOADER, version)
    left = f"leaves out {len(unreached)} of {len(one.modules)}" if unreached else "takes all"
    assert outcome.startswith("refuses ") if refused else outcome == left


@pytest.mark.parametrize("family, only", [part[:2] for part in families.PARTS])
def test_parts_in_vllm(case, family, only):
    """vLLM makes up for what is missing of q, k, v, gate and up, and not for experts."""
    one = case(family, "per-expert", "module", only=only)
    assert through_vllm(one) == one.said(VLLM, vllm_worker.VERSION)


@pytest.mark.parametrize("family, form, spelling", CASES_WITH_TOWER, ids=[f"{f} {s}" for f, _, s in CASES_WITH_TOWER])
def test_a_tower(case, family, form, spelling):
    """It is left out, and what is adapted of the language model still arrives; or the adapter is refused."""
    one = case(family, form, spelling, tower=True)
    for loader, version, through in (
        (VLLM, vllm_worker.VERSION, through_vllm),
        *((SGLANG_LOADER, version, lambda c, v=version: through_sglang(c, v)) for version in SGLANG),
    ):
        said = one.said(loader, version)
        assert through(one) == without_tower(one, said), f"{loader} {version}"
        assert said[0] or said[1] - one.projections.keys(), (
            f"{loader} {version}: the tower is left out, and verify says so"
        )


@pytest.mark.parametrize("version", SGLANG)
@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"])
def test_what_a_sync_sends_of_linear_attention(case, version, family):
    """In SGLang's dialect nothing is left out, and every slice of in_proj_qkv is its rows."""
    one = case(family, "per-expert", "module")
    config, tensors = for_sglang(*to_peft(list(one.projections.values()), one.base), one.base)
    targets = sorted({target.rpartition(".")[2] for target in config["target_modules"]})
    worker = sglang_worker.Worker(version, one.base.directory, targets, 4)
    worker.load("a", config, tensors)
    worker.generate("a")
    found = worker.served("a")

    def served(stored: str) -> torch.Tensor | None:
        name = one.base.canonical(stored)
        if name.endswith("in_proj_qkv"):
            return torch.cat([found[name.removesuffix("qkv") + part] for part in "qkv"])
        return found.get(name, found.get(name.replace("shared_experts.", "shared_expert.")))

    assert _unreached(one, served, tolerance=0.02) == set()
