"""Rows of fused linears, against the loops that Megatron's own layout amounts to. Hazards 1 and 2.

pytest tests/core/test_layout.py
"""

from __future__ import annotations

import pytest
import torch

from slime_plugins.lora.layout import Part, gated_parts, qkv_parts, whole

HEADS, GROUPS, DIM = 6, 3, 5


def interleaved(q, k, v):
    """[q q k v] per query group, written as a loop over groups."""
    per_group = HEADS // GROUPS * DIM
    rows = []
    for g in range(GROUPS):
        rows += [q[g * per_group : (g + 1) * per_group], k[g * DIM : (g + 1) * DIM], v[g * DIM : (g + 1) * DIM]]
    return torch.cat(rows)


@pytest.fixture
def qkv():
    return [torch.randn(heads * DIM, 4) for heads in (HEADS, GROUPS, GROUPS)]


def test_qkv_rows_are_interleaved_per_query_group(qkv):
    fused = interleaved(*qkv)
    for part, rows in zip(qkv_parts(HEADS, GROUPS, DIM), qkv):
        assert part.size == len(rows) and torch.equal(part.take(fused), rows)


def test_put_undoes_take(qkv):
    fused = torch.zeros(sum(map(len, qkv)), 4)
    for part, rows in zip(qkv_parts(HEADS, GROUPS, DIM), qkv):
        part.put(fused, rows)
    assert torch.equal(fused, interleaved(*qkv))
    with pytest.raises(ValueError, match="q_proj: expected 30 rows, got 29"):
        qkv_parts(HEADS, GROUPS, DIM)[0].put(fused, torch.zeros(29, 4))


@pytest.mark.parametrize("tp", [1, 3])
def test_shards_of_a_part_concatenate_to_the_part(qkv, tp):
    shards = interleaved(*qkv).chunk(tp)
    for i, rows in enumerate(qkv):
        part = qkv_parts(HEADS // tp, GROUPS // tp, DIM)[i]
        assert torch.equal(torch.cat([part.take(shard) for shard in shards]), rows)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gated_shards_need_their_parts(tp):
    """Each shard is [gate_i; up_i]: plain concatenation would interleave the two."""
    gate, up = torch.randn(8, 3), torch.randn(8, 3)
    shards = [torch.cat(pair) for pair in zip(gate.chunk(tp), up.chunk(tp))]
    parts = gated_parts(16 // tp)
    assert torch.equal(torch.cat([parts[0].take(shard) for shard in shards]), gate)
    assert torch.equal(torch.cat([parts[1].take(shard) for shard in shards]), up)
    assert torch.equal(torch.cat(shards), torch.cat([gate, up])) == (tp == 1)


@pytest.mark.parametrize(
    "part", [*qkv_parts(HEADS, GROUPS, DIM), *gated_parts(50), whole("o_proj", 50)], ids=lambda p: p.name
)
def test_columns_is_a_view_of_the_parts_features(part):
    rows = GROUPS * part.stride if part.count > 1 else 50
    y = torch.randn(7, rows)
    view = part.columns(y)
    flat = view if part.count == 1 else view.transpose(0, 1).reshape(7, part.size)
    assert torch.equal(flat, y[:, part.index()])
    view += 1  # a view: writing reaches y
    assert torch.equal(y[:, part.index()], flat if part.count == 1 else flat + 1)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="7 attention heads are not a multiple of 3 query groups"):
        qkv_parts(7, 3, DIM)
    with pytest.raises(ValueError, match="even number of rows, got 9"):
        gated_parts(9)


def test_part_is_hashable_data():
    assert Part("q", 0, 1, 1, 1) == whole("q", 1) and len({whole("q", 1), whole("q", 1)}) == 1
