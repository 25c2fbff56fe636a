"""Which of many costs no other equals or beats in every respect: for arrays of any number of rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_BLOCK = 128
"""Columns that are compared with each other at a time."""


def unbeaten(costs: Floats, rounding: Floats | None = None, groups: Ints | None = None) -> Ints:
    """Indices of the columns of `costs` [rows, n] that no other column equals or beats in every row, in the order of groups,
    then of the rows; of equal columns the first stays.

    `rounding` (a factor for every row, just above 1) makes what is nearly equal equal. Only columns of the same group are
    compared.
    """
    number = costs.shape[1]
    if number < 2:
        return np.arange(number)
    order = np.lexsort(costs[::-1] if groups is None else (*costs[::-1], groups))
    ordered = costs[:, order]
    limits = ordered if rounding is None else ordered * rounding[:, None]
    group = np.zeros(number, dtype=np.int64) if groups is None else groups[order]
    kept = np.zeros(0, dtype=np.int64)
    for start in range(0, number, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, number))
        near = kept[group[kept] == group[start]]
        if len(near):
            # those that are kept come first in order, so that they are no dearer in the first row
            block = block[~_beats(ordered[1:], limits[1:], group, near, block).any(axis=0)]
        inside = _beats(ordered, limits, group, block, block)
        inside &= ~inside.T | np.tri(len(block), k=-1, dtype=bool).T  # of two that equal each other the first stays
        kept = np.concatenate((kept, block[~inside.any(axis=0)]))
    return order[kept]


def _beats(costs: Floats, limits: Floats, group: Ints, by: Ints, columns: Ints) -> Bools:
    """[by, columns]: whether one equals or beats the other."""
    one = len(by) == 0 or len(columns) == 0 or group[by[0]] == group[by[-1]] == group[columns[0]] == group[columns[-1]]
    found: Bools = np.ones((len(by), len(columns)), dtype=bool) if one else group[by][:, None] == group[columns][None, :]
    for row in range(len(costs)):
        found &= costs[row][by][:, None] <= limits[row][columns][None, :]
    return found
