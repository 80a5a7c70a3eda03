"""The parameter table is a real seam: a variant of LoRA with a third parameter, whole in this file.

y = (1 + m) * (W x + scaling * B A x), m [rows], sharded with the rows of a column-parallel base and replicated on a
row-parallel one. It is put in, counted, trained, hidden, merged, saved, resharded and swapped by the package as it is.

pytest tests/layers/test_new_variant.py
"""

from __future__ import annotations

import contextlib

import adapted
import pytest
import reference
import slime_stand_ins
import torch
from harness import Layout
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig, adapters_disabled, apply_lora, load_adapter, merged, save_adapter
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.layers import KINDS, Kind, LoRALinear, hide_adapters
from slime_plugins.lora.parameters import AdapterParameter
from slime_plugins.lora.rehearsal.model import build_chunks

TOKENS = reference.batch(128)
LAYOUTS = {"tp1": {}, "tp2": dict(tp=2), "tp2-sp": dict(tp=2, sp=True)}


class Magnitude(LoRALinear):
    """The variant: a description, a forward, a merge."""

    def lora_describe(self):
        dim = 0 if self.lora.parallel == "column" else None
        m = AdapterParameter(name="lora_m", shape=(self.lora.rows,), sharded_dim=dim, rows="projections")
        return (*super().lora_describe(), m)

    def _factors(self):
        rows = torch.cat([block.out.run_index() for block in self.lora.blocks])
        return torch.ones(self.lora_base.shape[0]).index_add(0, rows, self.lora_m.float())

    def _lora_up(self, y, *args, **kwargs):
        return super()._lora_up(y, *args, **kwargs) * self._factors().to(y.dtype)

    @torch.no_grad()
    def lora_merged(self, index=0, stored=None, rounding=None):
        return (super().lora_merged(index, stored, rounding) * self._factors()[:, None]).to(self.lora_base.dtype)


@contextlib.contextmanager
def the_variant():
    """Inside, ``apply_lora`` puts it in."""
    before = dict(KINDS)
    for cls, kind in before.items():
        if cls.__name__ in ("ColumnParallelLinear", "RowParallelLinear"):
            KINDS[cls] = Kind(type(f"Magnitude{cls.__name__}", (Magnitude, kind.form), {}), kind.parallel, kind.frozen)
    try:
        yield
    finally:
        KINDS.update(before)


def model_of(layout: Layout, hf_dir, lora_layout):
    """Chunks with non-zero values, and what ``apply_lora`` said."""
    reports = []
    config = LoRAConfig(rank=3, layout=lora_layout)
    with the_variant():
        chunks = build_chunks(
            hf_dir, sequence_parallel=layout.sp, apply=lambda c: reports.append(apply_lora(c, config))
        )
    adapted.randomize(chunks)
    return chunks, reports[0]


def whole(model) -> dict[str, torch.Tensor]:
    """Every tensor of every adapter, gathered."""
    found = {}
    for linear in iter_adapters(model):
        parameters, place = linear.lora_parameters(), linear.lora_placement()
        for name, pieces in linear.lora_pieces().items():
            found |= {key: t.clone() for key, t in place.gather(pieces, parameters[name].detach()).items()}
    return found


def train(layout: Layout, hf_dir, lora_layout, out):
    chunks, report = model_of(layout, hf_dir, lora_layout)
    local = sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad)
    model = adapted.wrap(chunks, distributed_optimizer=False)
    optimizer = adapted.optimizer_for(model, name="sgd", lr=0.1, distributed_optimizer=False)
    norms = [adapted.train_step(model, optimizer, TOKENS)[1] for _ in range(5)]
    save_adapter(model, out, optimizer=optimizer, step=5)
    return whole(model), norms, report, local


def load(layout: Layout, hf_dir, lora_layout, out):
    chunks, _ = model_of(layout, hf_dir, lora_layout)
    load_adapter(chunks, out)
    return whole(chunks)


@pytest.mark.parametrize("lora_layout", ["fused", "split"])
def test_trains_saves_reshards_and_is_counted(pool1, pool2, tmp_path_factory, tmp_path, lora_layout):
    path = tiny(tmp_path_factory)
    ends = {}
    for name, sizes in LAYOUTS.items():
        pool = pool2 if sizes else pool1
        results = pool.run(train, path, lora_layout, tmp_path / name, **sizes)
        ends[name] = results[0][:2]
        for _, _, report, local in results:
            assert report.trainable_parameters == sum(t.numel() for t in ends["tp1"][0].values())
            assert local == report.trainable_parameters if not sizes else local < report.trainable_parameters
    expected, norms = ends["tp1"]
    assert any(key.endswith("lora_m.q_proj") for key in expected)
    assert all(value.abs().max() > 1e-6 for key, value in expected.items() if ".lora_m." in key)
    for name, (seen, seen_norms) in ends.items():
        assert seen_norms == pytest.approx(norms, rel=1e-5), name
        for key, value in expected.items():
            # Of m, which starts at zero, k's gradient is what is left of terms that cancel: measured on all of m.
            m = [v.abs().max() for k, v in expected.items() if ".lora_m." in k]
            largest = max(m) if ".lora_m." in key else value.abs().max()
            assert (seen[key] - value).abs().max() <= 5e-6 * largest, f"{name}: {key}"
    for source, target in (("tp2-sp", "tp1"), ("tp1", "tp2-sp")):
        pool = pool2 if LAYOUTS[target] else pool1
        for loaded in pool.run(load, path, lora_layout, tmp_path / source, **LAYOUTS[target]):
            assert all(torch.equal(loaded[key], value) for key, value in ends[source][0].items())


def switched(layout: Layout, hf_dir):
    """Off, hidden, merged, and swapped through slime's policies."""
    slime_stand_ins.install()
    from slime_plugins.lora.slime.hooks.policies import Policies

    def logits():
        return adapted.run_schedule(chunks, TOKENS, forward_only=True, collect_logits=True)

    base_chunks = build_chunks(hf_dir, sequence_parallel=layout.sp)
    base = adapted.run_schedule(base_chunks, TOKENS, forward_only=True, collect_logits=True)
    chunks, _ = model_of(layout, hf_dir, "split")
    with torch.no_grad():
        for i, linear in enumerate(iter_adapters(chunks)):
            # Replicated values must be equal on all ranks; sharded ones need not.
            linear.lora_m.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    on = logits()
    with adapters_disabled(chunks):
        off = logits()
    with merged(chunks):
        inside = logits()
    with hide_adapters(chunks[0]):
        hidden = [name for name, _ in chunks[0].named_parameters() if "lora" in name]
    policies = Policies(type("Args", (), {"offload_train": False})(), chunks)
    policies.backup("actor")
    with torch.no_grad():
        for linear in iter_adapters(chunks):
            linear.lora_m.zero_()
    moved = logits()
    policies.restore("actor")
    parameters = [p for linear in iter_adapters(chunks) for p in linear.lora_parameters().values()]
    sizes = sum(p.numel() * p.element_size() for p in parameters)
    return {
        "off": torch.equal(off, base),
        "merged": adapted.relative(inside - on, on),
        "hidden": hidden,
        "moved": not torch.equal(moved, on),
        "restored": torch.equal(logits(), on),
        "host": policies.host_bytes["actor"] == sizes,
    }


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp"])
def test_switched_off_merged_hidden_and_swapped(pool2, tmp_path_factory, layout):
    for seen in pool2.run(switched, tiny(tmp_path_factory), **LAYOUTS[layout]):
        assert seen.pop("merged") <= 1e-5
        assert seen == {"off": True, "hidden": [], "moved": True, "restored": True, "host": True}
