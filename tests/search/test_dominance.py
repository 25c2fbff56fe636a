"""What no other equals or beats, against comparing everything with everything."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplan.search.dominance import unbeaten

rows = st.lists(st.tuples(*[st.integers(0, 4)] * 4), min_size=1, max_size=300)


@settings(max_examples=60)
@given(rows, st.integers(1, 3))
def test_what_is_left_beats_everything_else_and_nothing_else(costs: list[tuple[int, ...]], kinds: int) -> None:
    groups = np.arange(len(costs)) % kinds
    kept = unbeaten(np.array(costs, dtype=float).T, None, groups).tolist()
    for kind in range(kinds):
        mine = [costs[i] for i in kept if groups[i] == kind]
        everything = [cost for i, cost in enumerate(costs) if groups[i] == kind]
        assert len(set(mine)) == len(mine)
        assert all(any(all(a <= b for a, b in zip(k, cost, strict=True)) for k in mine) for cost in everything)
        assert not any(k != o and all(a <= b for a, b in zip(k, o, strict=True)) for k in mine for o in mine)


def test_equal_but_for_rounding_is_equal() -> None:
    costs = np.array([[1.0, 1.0 + 1e-15], [2.0, 1.0]])
    assert unbeaten(costs).tolist() == [0, 1]
    assert unbeaten(costs, np.array([1 + 1e-12, 1.0])).tolist() == [1]
