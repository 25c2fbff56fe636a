import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoplan.errors import UsageError
from autoplan.units import BYTE, BYTE_PER_SECOND, FLOP, FLOP_PER_SECOND, SECOND, exact, parse, show

UNITS = (BYTE, SECOND, FLOP, BYTE_PER_SECOND, FLOP_PER_SECOND)
finite = st.floats(min_value=1e-15, max_value=1e24, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("80 GiB", BYTE, 80 * 2**30),
        ("80GB", BYTE, 80e9),
        ("450 GB/s", BYTE_PER_SECOND, 450e9),
        ("9 us", SECOND, 9e-6),
        ("1e-6", SECOND, 1e-6),
        ("989 TFLOP/s", FLOP_PER_SECOND, 989e12),
        ("1_000 FLOP", FLOP, 1000.0),
        ("-2 ms", SECOND, -2e-3),
        (5, BYTE, 5.0),
    ],
)
def test_a_quantity_is_read_in_base_units(text, unit, value):
    assert parse(text, unit) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "unit"), [("80 GiB", SECOND), ("fast", BYTE), ("", BYTE), ("1 2", BYTE), (True, BYTE), ("1 gb", BYTE)]
)
def test_what_is_no_quantity_of_the_unit_is_refused(text, unit):
    with pytest.raises(UsageError, match=r"quantity|unit"):
        parse(text, unit)


@given(finite, st.sampled_from(UNITS))
def test_exact_text_reads_back_to_the_same_float(value, unit):
    assert parse(exact(value, unit), unit) == value


@given(st.floats(min_value=1e-9, max_value=9e17, allow_nan=False), st.sampled_from(UNITS))
def test_shown_text_reads_back_to_three_digits(value, unit):
    assert math.isclose(parse(show(value, unit), unit), value, rel_tol=6e-3) or value < 1


def test_zero_is_shown_in_the_base_unit():
    assert show(0, BYTE) == "0 B"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(80 * 2**30, BYTE, "80 GiB"), (450e9, BYTE_PER_SECOND, "450 GB/s"), (9e-6, SECOND, "9 us"), (1.5e-3, SECOND, "1.5 ms")],
)
def test_people_see_the_largest_fitting_unit(value, unit, text):
    assert show(value, unit) == text
