"""The integer program and its bounds against brute force over every assignment of options to layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement, permutations, product
from math import ceil, inf, isinf
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplan.cost.step import NOTHING
from autoplan.search import ilp
from autoplan.search.bounds import least_bytes, least_seconds, relaxed_seconds
from autoplan.search.dominance import unbeaten
from autoplan.search.ilp import choose, memory
from autoplan.search.options import Column, Costs, Group, Option, Options
from autoplan.strategy import Strategy

MIB = 2.0**20


def column(
    seconds: float, mib: float, moment: float, once: float = 0.0, kept: float = 0.0, ending: float = 0.0, window: float = 0.0,
    buffer: float = 0.0, gathered: float = 0.0,
) -> Column:  # fmt: skip
    """Of a layer; where it has an ending, of what stands outside the layers."""
    gathered = 0.0 if ending else min(gathered, mib)
    mibs = {"state_bytes": mib, "resharded": gathered, "kept": kept, "ending": ending}
    mibs |= {"alone": moment} if ending else {"inside": moment, "window": window}
    mibs |= {} if ending else {"buffer": buffer, "reducing": max(buffer - kept - gathered, 0.0)}
    sizes = {name: size * MIB for name, size in mibs.items()}
    return Column.of(Strategy(), NOTHING._replace(slot_seconds=seconds, once_seconds=once, **sizes))


columns = st.builds(
    column,
    st.floats(0.1, 10),
    st.integers(1, 60),
    st.integers(0, 20),
    kept=st.integers(0, 20),
    ending=st.one_of(st.just(0), st.integers(0, 60)),
    window=st.one_of(st.just(0), st.integers(0, 20)),
    buffer=st.one_of(st.just(0), st.integers(0, 20)),
    gathered=st.one_of(st.just(0), st.integers(0, 20)),
)
classes_of_layers = st.lists(st.tuples(st.integers(1, 4), st.lists(columns, min_size=1, max_size=4)), min_size=1, max_size=3)
problems = st.tuples(classes_of_layers, st.integers(2, 400))


def groups_of(classes: list[tuple[int, list[Column]]], unit: float = 1.0) -> list[Group]:
    """`unit`: so many times the sizes."""
    return [
        Group(g, 0, number, Options.of([in_units(option, unit) for option in options], 1.0, 1))
        for g, (number, options) in enumerate(classes)
    ]


def in_units(option: Column, unit: float) -> Column:
    costs = option.costs
    return replace(option, costs=Costs(costs.slot_seconds, costs.once_seconds, *(unit * size for size in costs[2:])))


def held(groups: list[Group], assignment: Sequence[Sequence[Option]]) -> float:
    """The bytes of a stage: its backward passes run one after another, of a group those layers first that need least in theirs
    (in quarters of a mebibyte)."""
    layers = [o for options in assignment for o in options]
    window, alone = max(o.window for o in layers), max(o.alone for o in layers)
    one_kind = len(groups) == 1 and groups[0].frees
    moments = []

    def needed(o: Option) -> tuple[float, ...]:
        own = o.inside + (o.reducing if one_kind else 0.0)
        return ceil(4 * own / MIB), ceil(4 * o.inside / MIB), own, o.inside, o.buffer

    for group, options in zip(groups, assignment, strict=True):
        forward = sorted(options, key=needed, reverse=True)
        for k, layer in enumerate(forward):
            later = forward[k + 1 :] if group.frees else []
            beside = layer.reducing if one_kind else max(o.reducing for o in layers)
            others = [o.buffer for o in later if o != layer]
            moments.append(layer.inside + max([beside, *others]) - sum(o.bytes - o.left for o in later))
    at_once = sum(o.bytes for o in layers) + max(alone, max(moments) + window)
    return max(at_once, sum(o.left for o in layers) + max(o.ending for o in layers))


@given(st.lists(columns, min_size=1, max_size=5))
def test_no_order_of_layers_needs_less(options: list[Column]) -> None:
    """Buffers aside."""
    layers = list(Options.of(options, 1.0, 1))

    def most(order: Sequence[Option]) -> float:
        return max(o.inside - sum(each.goes for each in order[k + 1 :]) for k, o in enumerate(order))

    ordered = sorted(layers, key=lambda o: -o.inside)
    assert most(ordered) == min(map(most, permutations(layers)))


def cheapest(groups: list[Group], limit: float) -> float:
    """By trying everything."""
    best = inf
    choices = [list(combinations_with_replacement(group.options, group.number)) for group in groups]
    for assignment in product(*choices):
        if held(groups, assignment) <= limit:
            best = min(best, sum(o.seconds for layers in assignment for o in layers))
    return best


@given(classes_of_layers, st.sampled_from([1.0, 0.3]), st.booleans(), st.data())
def test_memory_is_what_the_passes_need(
    classes: list[tuple[int, list[Column]]], unit: float, frees: bool, data: st.DataObject
) -> None:
    groups = [group._replace(frees=frees) for group in groups_of(classes, unit)]
    chosen = [[data.draw(st.sampled_from(list(group.options))) for _ in range(group.number)] for group in groups]
    counts = [
        (group, [(option, layers.count(option)) for option in dict.fromkeys(layers)])
        for group, layers in zip(groups, chosen, strict=True)
    ]
    assert memory(counts) == pytest.approx(held(groups, chosen), rel=1e-12)


@settings(max_examples=500)
@given(classes_of_layers, st.floats(-0.1, 1.1), st.sampled_from([1.0, 0.3]), st.booleans(), st.booleans())
def test_equals_brute_force(
    classes: list[tuple[int, list[Column]]], share: float, unit: float, by_solver: bool, frees: bool
) -> None:
    """Where the fastest options of all layers need more than there is, mostly."""
    groups = [group._replace(frees=frees) for group in groups_of(classes, unit)]
    least, most = least_bytes(groups), memory([(group, [(group.fastest, group.number)]) for group in groups])
    limit = least + share * (most - least)
    best = cheapest(groups, limit * (1 - 1e-12))
    with patch.object(ilp, "_FEW", 0 if by_solver else ilp._FEW):
        found = choose(groups, limit + MIB, gap=1e-4)  # a mebibyte is kept back
    if isinf(best):
        assert found is None or not isinf(cheapest(groups, limit + MIB))  # of that mebibyte the program may use some
    else:
        assert found is not None
        assert found.bound <= best * (1 + 1e-9)
        assert found.seconds <= best * (1 + 1.01e-4)
    if found is not None:
        layers = [[option for option, n in used for _ in range(n)] for _, used in found.counts]
        assert memory(found.counts) == pytest.approx(held(groups, layers), rel=1e-12)
        assert memory(found.counts) <= limit + MIB


@settings(max_examples=150)
@given(problems)
def test_bounds_hold(problem: tuple[list[tuple[int, list[Column]]], int]) -> None:
    classes, limit = problem
    groups = groups_of(classes)
    best = cheapest(groups, limit * MIB)
    everything = cheapest(groups, inf)
    assert least_seconds(groups) <= everything * (1 + 1e-12)
    assert isinf(cheapest(groups, least_bytes(groups) * (1 - 1e-9))), "the least is not the least"
    if not any(
        len(group.options) > 1 or group.options[0].ending or group.options[0].goes for group in groups
    ):  # else it is a bound
        assert not isinf(cheapest(groups, least_bytes(groups) * (1 + 1e-9))), "nothing needs as little"
    assert relaxed_seconds(groups, limit * MIB) <= best * (1 + 1e-9)
    if not isinf(best):
        assert least_bytes(groups) <= limit * MIB


@given(st.lists(st.builds(column, *[st.floats(0.1, 9)] * 6), min_size=1, max_size=12), st.floats(1, 20), st.integers(1, 9))
def test_unbeaten_columns_lose_nothing(options: list[Column], slots: float, in_flight: int) -> None:
    kept = [options[i] for i in unbeaten(np.array([column.costs for column in options]).T)]
    for option in options:
        assert any(all(a <= b for a, b in zip(k.costs, option.costs, strict=True)) for k in kept)
    everything, few = Options.of(options, slots, in_flight), Options.of(kept, slots, in_flight)
    assert [o[:-1] for o in everything] == [o[:-1] for o in few]


@given(st.lists(columns, min_size=1, max_size=8), st.integers(1, 6), st.floats(0, 400))
def test_a_point_of_the_hull_is_the_relaxed_mix(options: list[Column], number: int, limit: float) -> None:
    group = Group(0, 0, number, Options.of(options, 1.0, 1))
    mixed = number * group.options.at((limit * MIB - group.options.peak) / number)
    relaxed = relaxed_seconds([group], limit * MIB)
    if least_bytes([group]) > limit * MIB:
        assert isinf(relaxed)
    else:
        assert abs(mixed - relaxed) <= 1e-9 * relaxed
