"""From samples to the short curves of a profile. Plain arithmetic: no torch.

A sample is (size, seconds) of one kernel or collective; the curve is the fraction of a nominal rate by size, at a few knots `k`,
between which it is a line over the logarithm of the size. So a sample's fraction is a weighted sum of the values at the two
knots beside it, and the values `v` are those with the least sum of relative absolute errors,

    min over v of  sum_i a_i |f_i - sum_k w_ik v_k| / (sum_k w_ik v_k)

(`fit_curve`, by reweighted least squares): as a median, it does not mind an outlier, which is a busy machine and not the
hardware. `a_i` says how much of a sample's time the curve decides. Then the curve is made to grow with the size, and not so
fast that more work would take less time (`files.hardware` refuses such a curve).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log
from statistics import median

import numpy as np
from numpy.typing import NDArray

from autoplan.errors import UsageError
from autoplan.hardware import Curve

Sample = tuple[float, float]

_ROUNDS = 60
_LEAST = 1e-4
"""Fractions below this are no measurement of a rate."""


def fractions(samples: Sequence[Sample], rate: float, overhead: float = 0.0, least: float = 0.1) -> list[Sample]:
    """(size, seconds) -> (size, achieved fraction of `rate`), after a constant `overhead`; at least a share `least` of the
    time stays."""
    return [(size, size / rate / max(seconds - overhead, seconds * least)) for size, seconds in samples]


def fit_curve(
    samples: Sequence[Sample], knots: Sequence[float], growing: bool = True, shares: Sequence[float] | None = None
) -> Curve:
    """The curve through (size, fraction) samples with values at `knots`; knots without a sample nearby are dropped.

    A sample is near a knot when it lies within half the way to the next one. With `growing` the fraction never falls with
    the size: dips are taken for noise and levelled with their neighbours. `shares` are the `a_i`, by default 1.
    Raises `UsageError` without any sample.
    """
    bounds = [0.0, *(exp((log(a) + log(b)) / 2) for a, b in pairwise(knots)), float("inf")]
    near = [
        (knot, found)
        for knot, low, high in zip(knots, bounds, bounds[1:], strict=False)
        if (found := [fraction for size, fraction in samples if low <= size < high])
    ]
    if not near:
        raise UsageError("nothing was measured at the sizes of the curve.")
    used = [knot for knot, _ in near]
    values = _least_absolute(samples, used, [median(found) for _, found in near], shares or [1.0] * len(samples))
    if growing:
        values = _isotonic([(value, len(found)) for value, (_, found) in zip(values, near, strict=True)])
    values = [min(value, 1.0) for value in values]
    for i in range(len(used) - 1, 0, -1):  # the large sizes are the sure ones: the small give way
        values[i - 1] = max(values[i - 1], values[i] / (1 + 0.995 * log(used[i] / used[i - 1])))
    return Curve(tuple((knot, rounded(max(value, _LEAST))) for knot, value in zip(used, values, strict=True)))


def error_of(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Mean absolute relative error of `predicted`."""
    return sum(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)) / len(measured)


def rounded(value: float) -> float:
    """Four digits: what a measurement is good for."""
    return float(f"{value:.4g}")


def _least_absolute(
    samples: Sequence[Sample], knots: Sequence[float], start: Sequence[float], shares: Sequence[float]
) -> list[float]:
    """The values at `knots` with the least sum of relative absolute errors, from a `start` near them."""
    weights = np.array([_hat(size, knots) for size, _ in samples])
    found, matter = np.array([fraction for _, fraction in samples]), np.array(shares)
    values: NDArray[np.float64] = np.array(start, dtype=np.float64)
    for _ in range(_ROUNDS):
        curve = np.maximum(weights @ values, _LEAST)
        scale = np.sqrt(matter / np.maximum(abs(found - curve) / curve, 1e-5))
        left, right = weights * (scale / curve)[:, None], found * scale / curve
        pull = 1e-6 * np.linalg.norm(left)  # a knot that two samples leave open stays where it was
        both = np.vstack([left, pull * np.eye(len(knots)) / np.maximum(values, _LEAST)])
        found_values = np.linalg.lstsq(both, np.concatenate([right, pull * np.ones(len(knots))]), rcond=None)[0]
        before, values = values, np.clip(found_values, min(start) / 4, max(start) * 4)
        if abs(values - before).max() < 1e-4 * values.max():
            break
    return [float(value) for value in values]


def _hat(size: float, knots: Sequence[float]) -> list[float]:
    """What share each knot has in the curve's value at `size`."""
    shares = [0.0] * len(knots)
    if size <= knots[0] or len(knots) == 1:
        shares[0] = 1.0
    elif size >= knots[-1]:
        shares[-1] = 1.0
    else:
        i = next(i for i, knot in enumerate(knots) if size < knot)
        shares[i] = log(size / knots[i - 1]) / log(knots[i] / knots[i - 1])
        shares[i - 1] = 1.0 - shares[i]
    return shares


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
