"""The integer program against brute force over every assignment of strategies to layers."""

from __future__ import annotations

from itertools import combinations_with_replacement, product

from hypothesis import given, settings
from hypothesis import strategies as st

from autoplan.cost.model import LayerStep
from autoplan.plan import MemoryBreakdown, TimeBreakdown
from autoplan.search.ilp import Column, choose, memory, unbeaten_columns
from autoplan.strategy import Strategy

MIB = 2.0**20


def column(seconds: float, mib: float, moment: float) -> Column:
    memory_, moment_ = MemoryBreakdown(activations=mib * MIB), MemoryBreakdown(temporary=moment * MIB)
    return Column(Strategy(), LayerStep(TimeBreakdown(forward=seconds), 0.0, memory_, moment_))


columns = st.builds(column, st.floats(0.1, 10), st.integers(1, 60), st.integers(0, 20))
problems = st.tuples(
    st.lists(st.tuples(st.integers(1, 4), st.lists(columns, min_size=1, max_size=4)), min_size=1, max_size=3), st.integers(2, 400)
)


@settings(max_examples=150, deadline=None)
@given(problems)
def test_equals_brute_force(problem: tuple[list[tuple[int, list[Column]]], int]) -> None:
    classes, limit = problem
    best = None
    choices = [list(combinations_with_replacement(options, number)) for number, options in classes]
    for assignment in product(*choices):
        counts = {g: [(c, 1) for c in layers] for g, layers in enumerate(assignment)}
        # the program keeps one mebibyte back: every size here is whole, so that this moves the limit by exactly one
        if memory(counts) <= (limit - 1) * MIB:
            seconds = sum(c.step.seconds for layers in assignment for c in layers)
            best = seconds if best is None else min(best, seconds)
    found = choose({g: n for g, (n, _) in enumerate(classes)}, {g: c for g, (_, c) in enumerate(classes)}, limit * MIB, gap=1e-4)
    if best is None:
        assert found is None
    else:
        assert found is not None
        assert found.bound <= best * (1 + 1e-9)
        assert found.seconds <= best * (1 + 1.01e-4)
        assert memory(found.counts) <= limit * MIB


@given(st.lists(columns, min_size=1, max_size=12))
def test_unbeaten_columns_lose_nothing(options: list[Column]) -> None:
    kept = unbeaten_columns(options)
    for option in options:
        assert any(all(a <= b for a, b in zip(k.costs, option.costs, strict=True)) for k in kept)
