"""What a stage sees of a layer's columns: the same in arrays and in plain numbers; and how many layers it can have."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from autoplan.search import options
from autoplan.search.options import Column, Columns, Options
from tests.search.test_ilp import MIB, columns

few = st.lists(columns, min_size=1, max_size=6)


def in_arrays(some: list[Column], slots: float, in_flight: int) -> Options:
    with patch.object(options, "_FEW", 0):
        return Options.of(Columns.of(some), slots, in_flight)


@given(few, st.floats(1, 8), st.integers(1, 5))
def test_plain_numbers_and_arrays_say_the_same(some: list[Column], slots: float, in_flight: int) -> None:
    plain, arrays = Options.of(some, slots, in_flight), in_arrays(some, slots, in_flight)
    assert [option[:-1] for option in plain] == [option[:-1] for option in arrays]
    assert plain.hull == arrays.hull
    for name in ("peak", "bytes", "left", "ending", "tail"):
        assert getattr(plain, name) == getattr(arrays, name)


@given(few, st.integers(1, 3), st.integers(0, 500), st.integers(0, 40), st.floats(0.5, 60), st.integers(1, 12))
def test_the_most_layers_are_those_that_fit_in_time(
    some: list[Column], in_flight: int, limit: int, peak: int, seconds: float, number: int
) -> None:
    """`most` counts at least those that `fit` and `at` let pass, and none that either refuses clearly."""
    seen = in_arrays(some, 1.0, in_flight)
    bytes_, moment = limit * MIB, peak * MIB
    size = (bytes_ - max(moment, seen.peak)) / number
    passes = seen.fit(number, bytes_, moment) and number * seen.at(size) <= seconds
    most = seen.most(bytes_, moment, seconds)
    if passes:
        assert most >= number
    elif not (seen.fit(number, bytes_ + 1, moment) and number * seen.at(size + 1) <= seconds * (1 + 1e-9)):
        assert most < number
