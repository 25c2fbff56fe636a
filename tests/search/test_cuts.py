"""Cutting a row of layers into stages, against every cut there is."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import inf, isinf

from hypothesis import given, settings
from hypothesis import strategies as st

from autoplan.search.cuts import Value, best_cut, least_bottleneck

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
        assert found is None
        assert isinf(bottleneck)
        return
    assert found is not None
    assert abs(found.cost - best) <= 1e-9 * best
    assert bottleneck <= slowest * (1 + 1e-12)
    told = [value(s, i, j) for s, (i, j) in enumerate(pairwise((0, *found.edges)))]
    assert abs(many * max(told) + few * sum(told) - best) <= 1e-9 * best
    assert best_cut(stages, len(layers), value, many, few, least, best * 0.999) is None
