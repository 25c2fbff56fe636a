from itertools import pairwise
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoplan.errors import UsageError
from autoplan.profile.fit import error_of, fit_curve, fractions

KNOTS = (1e3, 1e4, 1e6, 1e8)
samples = st.lists(st.tuples(st.floats(1.0, 1e10), st.floats(0.001, 1.5)), min_size=1, max_size=30)


def test_a_fraction_is_what_is_left_after_the_overhead():
    assert fractions([(1e9, 2.0)], 1e9) == [(1e9, 0.5)]
    assert fractions([(1e9, 2.0)], 1e9, 1.0) == [(1e9, 1.0)]
    assert fractions([(1e9, 2.0)], 1e9, 5.0) == [(1e9, 5.0)]  # a tenth of the time stays


def test_the_median_near_a_knot_counts():
    curve = fit_curve([(1e3, 0.2), (1.1e3, 0.3), (0.9e3, 0.9)], KNOTS)
    assert curve.points == ((1e3, pytest.approx(0.3, abs=2e-3)),)


def test_a_dip_is_levelled():
    curve = fit_curve([(1e3, 0.2), (1e4, 0.5), (1e6, 0.3)], KNOTS)
    values = [value for _, value in curve.points]
    assert values[1] == values[2] == pytest.approx(0.4, abs=2e-3)


def test_nothing_measured():
    with pytest.raises(UsageError):
        fit_curve([], KNOTS)


@given(samples, st.booleans())
def test_a_fit_obeys_the_laws_of_a_curve(found, growing):
    curve = fit_curve(found, KNOTS, growing)
    assert all(0 < value <= 1 for _, value in curve.points)
    for (x0, y0), (x1, y1) in pairwise(curve.points):
        assert y1 - y0 <= y0 * log(x1 / x0)
        assert x0 < x1
        assert not growing or y0 <= y1


def test_the_error_is_relative():
    assert error_of([1.0, 3.0], [2.0, 2.0]) == 0.5
