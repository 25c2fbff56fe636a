"""From samples to the short curves of a profile. Plain arithmetic: no torch.

A sample is (size, seconds) of one kernel or collective; the curve is the fraction of a nominal rate by size, at a few
knots. What the samples say near a knot is their median (an outlier is a busy machine, not the hardware), made to grow
with the size, and not so fast that more work would take less time (`files.hardware` refuses such a curve).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log
from statistics import median

from autoplan.errors import UsageError
from autoplan.hardware import Curve

Sample = tuple[float, float]


def fractions(samples: Sequence[Sample], rate: float, overhead: float = 0.0) -> list[Sample]:
    """(size, seconds) -> (size, achieved fraction of `rate`), after a constant `overhead`; at least a tenth of the time stays."""
    return [(size, size / rate / max(seconds - overhead, seconds / 10)) for size, seconds in samples]


def fit_curve(samples: Sequence[Sample], knots: Sequence[float], growing: bool = True) -> Curve:
    """The curve through (size, fraction) samples at `knots`; knots without a sample nearby are dropped.

    A sample counts for a knot when it lies within half the way to the next one. With `growing` the fraction never
    falls with the size: dips are taken for noise and levelled with their neighbours.
    """
    bounds = [0.0, *(exp((log(a) + log(b)) / 2) for a, b in pairwise(knots)), float("inf")]
    points = []
    for knot, low, high in zip(knots, bounds, bounds[1:], strict=False):
        near = [fraction for size, fraction in samples if low <= size < high]
        if near:
            points.append((knot, median(near), len(near)))
    if not points:
        raise UsageError("nothing was measured at the sizes of the curve.")
    values = _isotonic([(value, weight) for _, value, weight in points]) if growing else [value for _, value, _ in points]
    fitted: list[Sample] = []
    for (knot, _, _), value in zip(points, values, strict=True):
        value = min(value, 1.0)
        if fitted:
            size, before = fitted[-1]
            value = min(value, before * (1 + 0.999 * log(knot / size)))
        fitted.append((knot, _three_digits(value)))
    return Curve(tuple(fitted))


def error_of(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Mean absolute relative error of `predicted`."""
    return sum(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)) / len(measured)


def _isotonic(points: list[tuple[float, float]]) -> list[float]:
    """The growing values nearest to (value, weight): pool adjacent violators."""
    blocks: list[list[float]] = []  # value, weight, count
    for value, weight in points:
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            value_b, weight_b, count_b = blocks.pop()
            value_a, weight_a, count_a = blocks.pop()
            total = weight_a + weight_b
            blocks.append([(value_a * weight_a + value_b * weight_b) / total, total, count_a + count_b])
    return [value for value, _, count in blocks for _ in range(int(count))]


def _three_digits(value: float) -> float:
    """Rounded down at the third digit, so that rounding never breaks the law."""
    return max(float(f"{value - 0.0005:.3f}"), 0.001)
