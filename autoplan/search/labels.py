"""What a partial sharding costs so far, as numbers that a lattice's transitions add to: a label.

    forward seconds, backward seconds, saved bytes, parameters, seconds that run again, peak, what is beneath

(cost.layer; the last two: cost.peak; what runs again: of full recomputation).

Each of them grows with all of them: that is why a label which equals or beats another in all of them
does so at the end as well, and why the least of each alone is a bound (`search.corner`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from autoplan.cost.prices import LayerModel
from autoplan.search.dominance import Floats, Ints
from autoplan.search.lattice import Lattice, at

LABELS = 7
SAVED, PEAK, BENEATH = 2, 5, 6


@dataclass(frozen=True)
class Addition:
    """What the transitions of a level add."""

    sums: Floats
    """[5, transitions]: of seconds, saved bytes, parameters and seconds that run again."""
    besides: Floats
    """By transition: bytes that its operation's backward pass holds, and gradients that wait."""
    made: Floats
    """By transition: bytes of gradients of parameters."""
    calls: Literal["before", "at", "after"]
    """Whether a layer is called here; or all of them later, or one of them before."""

    def to(self, labels: Floats, by: Ints) -> Floats:
        """Labels [LABELS, n] after transitions `by` [n]."""
        grown = np.empty_like(labels)
        grown[:PEAK] = labels[:PEAK] + self.sums[:, by]
        made = self.made[by]
        grown[PEAK] = np.maximum(labels[PEAK], grown[SAVED] + self.besides[by]) + made
        if self.calls == "before":
            grown[BENEATH] = labels[BENEATH]
        elif self.calls == "at":
            grown[BENEATH] = np.maximum(labels[BENEATH], grown[SAVED])
        else:
            grown[BENEATH] = labels[BENEATH] + made
        return grown


def additions(lattice: Lattice, prices: Sequence[Floats], model: LayerModel) -> Iterator[Addition]:
    """Of every level. `prices`: as `search.shardings.Ways` has them, of `model`."""
    called, here = False, at(model.samples, model.tp)
    for level, price in zip(lattice.levels, prices, strict=True):
        call = level.operation < 0 or lattice.body.ops[level.operation].kind == "call"
        called = called or call
        added = price[level.choice].T
        saved, waiting = (level.sizes @ here).T
        added[SAVED] += saved
        yield Addition(added[:PEAK], added[PEAK] + waiting, added[PEAK + 1], "at" if call else "after" if called else "before")
