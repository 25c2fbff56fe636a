"""The sharding rules, one by one; what a view does to a sharded dim is checked against numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoplan.cost.rules import BORDER_COLLECTIVES, conversions, outcomes, packings
from autoplan.graph import Body, Op, Value
from autoplan.strategy import GATHERED, PARTIAL, REPLICATE, Layout, shard
from tests.bodies import Builder


def tensor(i: int, *shape: int, batch_dim: int | None = 0, grad: bool = True, parameter: str | None = None) -> Value:
    return Value(i, shape, "float32", None if parameter else batch_dim, grad, i, parameter)


def run(
    kind: str, inputs: list[Value], outputs: list[Value], layouts: list[Layout | None], tp: int = 2, **more: object
) -> list[tuple]:  # type: ignore[type-arg]
    values = tuple(replace(v, id=i, storage=i) for i, v in enumerate([*inputs, *outputs]))
    ids = range(len(values))
    op = Op(kind, kind, "", tuple(ids[: len(inputs)]), tuple(ids[len(inputs) :]), **more)  # type: ignore[arg-type]
    found = outcomes(op, Body(values, (op,), (), (), ()), layouts, tp)
    return [(o.inputs, o.outputs) for o in found]


X, Y = tensor(0, 1, 8, 16), tensor(2, 1, 8, 32)
W, B = tensor(1, 32, 16, parameter="w"), tensor(3, 32, parameter="b")


def test_linear() -> None:
    assert run("linear", [X, W], [Y], [REPLICATE, None]) == [((REPLICATE, REPLICATE), (REPLICATE,))]
    assert run("linear", [X, W], [Y], [GATHERED, None]) == [((GATHERED, shard(0)), (shard(2),))]
    assert run("linear", [X, W], [Y], [shard(2), None]) == [((shard(2), shard(1)), (PARTIAL,))]
    assert run("linear", [X, W], [Y], [shard(1), None]) == [], "a sequence-sharded input must be gathered first"
    assert run("linear", [X, W], [Y], [GATHERED, None], tp=5) == [], "32 rows do not divide by 5"


def test_linear_bias() -> None:
    assert run("linear", [X, W, B], [Y], [GATHERED, None, None]) == [((GATHERED, shard(0), shard(0)), (shard(2),))]
    assert run("linear", [X, W, B], [Y], [shard(2), None, None]) == [((shard(2), shard(1), REPLICATE), (PARTIAL,))]


def test_embedding() -> None:
    tokens, table, out = tensor(0, 1, 8, grad=False), tensor(1, 64, 16, parameter="w"), tensor(2, 1, 8, 16)
    found = run("embedding", [tokens, table], [out], [REPLICATE, None])
    assert found[0] == ((REPLICATE, REPLICATE), (REPLICATE,))
    assert ((REPLICATE, shard(0)), (PARTIAL,)) in found
    assert ((REPLICATE, shard(1)), (shard(2),)) in found


def test_attention_is_sharded_over_heads_only() -> None:
    q, k, v, o = (tensor(i, 1, 4, 8, 16) for i in range(4))
    assert run("attention", [q, k, v], [o], [shard(1)] * 3) == [((shard(1),) * 3, (shard(1),))]
    assert run("attention", [q, k, v], [o], [shard(2)] * 3) == []
    few = tensor(1, 1, 2, 8, 16)
    assert run("attention", [q, few, few], [o], [shard(1)] * 3, tp=4) == [((shard(1),) * 3, (shard(1),))]


def test_norm_shards_the_sequence_and_makes_its_weight_gathered() -> None:
    weight = tensor(1, 16, parameter="w")
    assert run("norm", [X, weight], [tensor(2, 1, 8, 16)], [shard(1), None], dims=(1,)) == [((shard(1), GATHERED), (shard(1),))]
    assert run("norm", [X, weight], [tensor(2, 1, 8, 16)], [shard(2), None], dims=(1,)) == []


def test_pointwise_broadcasting() -> None:
    out = tensor(2, 1, 8, 16)
    scale, mask = tensor(1, 16, parameter="w"), tensor(1, 8, 16, batch_dim=None, grad=False)
    assert run("pointwise", [X, scale], [out], [shard(1), None]) == [((shard(1), GATHERED), (shard(1),))]
    assert run("pointwise", [X, scale], [out], [shard(2), None]) == [((shard(2), shard(0)), (shard(2),))]
    assert run("pointwise", [X, mask], [out], [shard(1), REPLICATE]) == [((shard(1), REPLICATE), (shard(1),))]
    assert run("pointwise", [X, tensor(1, 1, 8, 16)], [out], [shard(1), REPLICATE]) == [], "its gradient would be a shard"


def test_a_partial_passes_only_what_is_linear() -> None:
    out = tensor(2, 1, 8, 16)
    other = tensor(1, 1, 8, 16)
    assert run("pointwise", [X, other], [out], [PARTIAL, PARTIAL], linear=True) == [((PARTIAL, PARTIAL), (PARTIAL,))]
    assert run("pointwise", [X], [out], [PARTIAL]) == []
    assert run("pointwise", [X, other], [out], [REPLICATE, PARTIAL], linear=True) == []


def test_split_of_a_packed_tensor() -> None:
    packed, parts = tensor(0, 1, 8, 48), [tensor(i, 1, 8, 16) for i in (1, 2, 3)]
    assert run("split", [packed], parts, [shard(2, 3)], dims=(2,)) == [((shard(2, 3),), (shard(2),) * 3)]
    assert run("split", [packed], parts, [shard(2)], dims=(2,)) == [], "the parts would not be whole shards"
    assert run("split", [packed], parts, [shard(1)], dims=(2,)) == [((shard(1),), (shard(1),) * 3)]


def test_cross_entropy_over_a_sharded_vocabulary() -> None:
    logits, target, loss = tensor(0, 8, 64), tensor(1, 8, grad=False), tensor(2, batch_dim=None)
    assert run("cross_entropy", [logits, target], [loss], [shard(1), REPLICATE]) == [((shard(1), REPLICATE), (REPLICATE,))]


def test_packings_are_found_where_the_result_is_taken_apart() -> None:
    b = Builder(hidden=16, seq=8)
    x = b.activation(16)
    y = b.linear("qkv", x, 48)
    b.op("split", "chunk", [y], [b.activation(16) for _ in range(3)], dims=(2,))
    z = b.linear("plain", x, 16)
    body = b.body([x], [z])
    assert packings(body) == {1: (3,)}


def test_every_conversion_has_its_collectives() -> None:
    value = tensor(0, 1, 8, 16)
    for source in (REPLICATE, PARTIAL, shard(1), shard(2)):
        for target in conversions(value, source, 2):
            assert source == target or (source.kind, target.kind) in BORDER_COLLECTIVES
    assert list(conversions(tensor(0, 1, 8, 16, grad=False), REPLICATE, 2)) == [REPLICATE]
    assert shard(0) not in list(conversions(value, REPLICATE, 2)), "never the batch"


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    factors = draw(st.lists(st.sampled_from([2, 3, 4]), min_size=2, max_size=4))
    after: list[int] = []
    for factor in factors:
        if after and draw(st.booleans()):
            after[-1] *= factor
        else:
            after.append(factor)
    return (factors, after) if draw(st.booleans()) else (after, factors)


@given(reshapes(), st.integers(0, 3))
def test_a_view_of_shards_is_a_shard_of_the_view(shapes: tuple[list[int], list[int]], dim: int) -> None:
    before, after = shapes
    if dim >= len(before) or before[dim] % 2:
        return
    source = tensor(0, *before, batch_dim=None)
    found = run("view", [source], [tensor(1, *after, batch_dim=None)], [shard(dim)])
    data = np.arange(np.prod(before)).reshape(before)
    shards = np.split(data, 2, axis=dim)
    for _, (target,) in found:
        wanted = np.split(data.reshape(after), 2, axis=target.dim)
        for part, whole in zip(shards, wanted, strict=True):
            assert np.array_equal(part.reshape(whole.shape), whole)
    leads = [d for d in range(len(after)) if after[d] % 2 == 0 and _same(shards, data, after, d)]
    assert bool(found) or not leads or _misses_only_trivially(before, after, dim, leads)


def _same(shards: list[np.ndarray], data: np.ndarray, after: list[int], d: int) -> bool:  # type: ignore[type-arg]
    wanted = np.split(data.reshape(after), 2, axis=d)
    return all(p.size == w.size and np.array_equal(p.reshape(w.shape), w) for p, w in zip(shards, wanted, strict=True))


def _misses_only_trivially(before: list[int], after: list[int], dim: int, leads: list[int]) -> bool:
    """The rule needs the group's leading dim to divide by tp; a shard boundary inside a longer dim is left to borders."""
    return after[leads[0]] % 2 != 0


def test_a_view_never_shards_through_the_batch() -> None:
    rows = tensor(1, 8, 16)
    assert run("view", [X], [rows], [shard(1)]) == [], "batch and sequence are merged: the sequence does not lead"
    assert run("view", [X], [rows], [shard(2)]) == [((shard(2),), (shard(1),))]


@pytest.mark.parametrize("layout", [GATHERED, PARTIAL])
def test_views_pass_partial_values_and_gradients(layout: Layout) -> None:
    assert run("view", [X], [tensor(1, 8, 16)], [layout]) == [((layout,), (layout,))]
