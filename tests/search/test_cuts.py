"""Cutting a row of layers into stages, against every cut there is."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import inf, isinf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplan.schedule import additive_seconds, pipeline_seconds
from autoplan.search.cuts import Value, best_cut, chunk_sizes, least_bottleneck

rows = st.lists(st.floats(0.1, 5), min_size=2, max_size=9)


def price(layers: list[float], rates: list[float], room: list[float]) -> Value:
    """Stage s takes rates[s] seconds a unit of its layers, and no more than room[s] units."""

    def value(s: int, i: int, j: int) -> float:
        size = sum(layers[i:j])
        return rates[s] * size if size <= room[s] else inf

    return value


def every_cut(stages: int, layers: int, least: int) -> list[tuple[int, ...]]:
    cuts = [(0, *inner, layers) for inner in combinations(range(1, layers), stages - 1)]
    return [edges for edges in cuts if all(j - i >= least for i, j in pairwise(edges))]


@given(rows, st.data())
def test_the_bottleneck_of_equal_stages_is_found(layers: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(layers)))
    value = price(layers, [1.0] * stages, [inf] * stages)
    slowest = min(max(value(s, i, j) for s, (i, j) in enumerate(pairwise(edges))) for edges in every_cut(stages, len(layers), 1))
    assert slowest * (1 - 1.1e-5) <= least_bottleneck(stages, len(layers), value, 0.0, inf) <= slowest * (1 + 1e-12)


@settings(max_examples=300)
@given(rows, st.data())
def test_equals_brute_force(layers: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, min(4, len(layers))))
    least = data.draw(st.integers(1, len(layers) // stages))
    rates = data.draw(st.lists(st.floats(0.5, 2), min_size=stages, max_size=stages))
    room = data.draw(st.lists(st.floats(2, 20), min_size=stages, max_size=stages))
    many, few = data.draw(st.floats(0.5, 20)), data.draw(st.floats(0.1, 1))
    value = price(layers, rates, room)
    prices = [[value(s, i, j) for s, (i, j) in enumerate(pairwise(edges))] for edges in every_cut(stages, len(layers), least)]
    best = min(many * max(found) + few * sum(found) for found in prices)
    found = best_cut(stages, len(layers), value, many, few, least)
    slowest = min(max(found) for found in prices)
    bottleneck = least_bottleneck(stages, len(layers), value, 0.0, inf, least)
    if isinf(best):
        assert found is None  # the bound may be finite: a stage that looks for an earlier start does not ask the one before
        return
    assert found is not None
    assert abs(found.cost - best) <= 1e-9 * best
    assert bottleneck <= slowest * (1 + 1e-12)
    told = [value(s, i, j) for s, (i, j) in enumerate(pairwise((0, *found.edges)))]
    assert abs(many * max(told) + few * sum(told) - best) <= 1e-9 * best
    assert best_cut(stages, len(layers), value, many, few, least, best * 0.999) is None


@given(st.integers(1, 9), st.lists(st.floats(0, 4), min_size=1, max_size=4))
def test_layers_are_dealt_so_that_no_chunk_takes_longer_than_it_must(layers: int, beside: list[float]) -> None:
    sizes = chunk_sizes(layers, tuple(beside))
    assert sum(sizes) == layers
    if layers < len(beside):
        return
    dealings = [[j - i for i, j in pairwise(edges)] for edges in every_cut(len(beside), layers, 1)]
    longest = min(max(n + load for n, load in zip(dealt, beside, strict=True)) for dealt in dealings)
    assert min(sizes) >= 1
    assert max(n + load for n, load in zip(sizes, beside, strict=True)) == pytest.approx(longest)


def test_of_equal_chunks_the_last_take_more() -> None:
    assert chunk_sizes(7, (0.0, 0.0, 0.0)) == (2, 2, 3)
    assert chunk_sizes(7, (0.0, 0.0, 2.3)) == (3, 3, 1)


def test_a_head_counts_as_layers_where_these_are_dealt() -> None:
    """Else the schedule's exact timeline is much longer than the price says, which knows of a rank's chunks together."""
    head, layers, none = 2.3, (9, 9, 8, 6), (0.0,) * 4
    price = additive_seconds("interleaved-1f1b", [9, 9, 8, 6 + head], 16, chunks=4)
    for loads, most in ((none, 1.2), ((0.0, 0.0, 0.0, head), 1.03)):
        ranks = [*(chunk_sizes(k, none) for k in layers[:-1]), chunk_sizes(layers[-1], loads)]
        virtual = [float(rank[chunk]) for chunk in range(4) for rank in ranks]
        virtual[-1] += head
        both = [tuple(share * t for t in virtual) for share in (1 / 3, 2 / 3)]
        assert most - 0.1 < pipeline_seconds("interleaved-1f1b", *both, 16, 0.0, 4) / price < most
