"""What the choices of a lattice's levels keep under selective recomputation, as arrays (`cost.selective`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoplan.cost.prices import LayerModel
from autoplan.cost.rules import Outcome
from autoplan.cost.selective import Kept, Selection
from autoplan.search.dominance import Floats
from autoplan.search.lattice import Lattice, Level


def kept_by_choice(model: LayerModel, lattice: Lattice, prices: Sequence[Floats]) -> list[Floats]:
    """By level [choices, 3]: `Kept`. `prices`: as `search.shardings.Ways.prices` has them."""
    selection = Selection(model)
    return [_level(selection, level, price) for level, price in zip(lattice.levels, prices, strict=True)]


def _level(selection: Selection, level: Level, prices: Floats) -> Floats:
    found = np.zeros((len(level.choices), 3))
    if level.operation < 0 or selection.model.body.ops[level.operation].kind == "call":
        return found
    if selection.plain(level.operation):  # most are
        if selection.repeats(level.operation):
            found[:, 2] = prices[:, 0]
        return found
    return np.array([_one(selection, level.operation, choice.outcome) for choice in level.choices]).reshape(-1, 3)


def _one(selection: Selection, index: int, outcome: Outcome) -> Kept:
    if selection.model.body.ops[index].kind in ("enter", "exit"):
        return selection.border(index, outcome.inputs[0], outcome.outputs[0])
    return selection.operation(index, outcome)
