"""What a layer keeps when it is recomputed selectively, and what of it runs again (`apply.selective` does it).

Kept are the layer's inputs, as under full recomputation, and of every operation inside it

    products    the result of a linear, a matrix product or grouped ones; of attention with its rows' statistics too
    borders     what a collective brings over tp: whole after an all_gather or all_reduce, its part after a reduce_scatter
    cp, ep      what attention and modules of experts receive from others, and what is brought together over cp

whether or not the backward pass needs it; of a product's partial sums, which a border reduces at once, the border's result alone.
Everything else runs again, up to the last operation that saves something: there PyTorch stops (`Body.rerun`). What is kept and is
also saved is one memory while the backward pass runs; `Kept.spare` is what may be none: results that nothing saves, and those
that a border moves before they are saved (an all_gather's are cut and joined again).

All of this adds up operation by operation, for the search.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from autoplan.cost.prices import LayerModel
from autoplan.cost.rules import BORDER_COLLECTIVES, Outcome
from autoplan.graph import DTYPE_BYTES, Body, Op
from autoplan.strategy import Layout
from autoplan.units import Bytes, Seconds

_KINDS = ("linear", "matmul", "attention")


class Kept(NamedTuple):
    """Of one operation or border, or of several."""

    results: Bytes = 0.0
    """Kept until the backward pass."""
    spare: Bytes = 0.0
    """What of this the backward pass may not need."""
    again: Seconds = 0.0
    """Seconds of running it again."""

    def plus(self, other: Kept) -> Kept:
        return Kept(self.results + other.results, self.spare + other.spare, self.again + other.again)


def keeps(op: Op) -> bool:
    """Whether its result is kept. Of an operation that nobody knows, and that multiplies, it may be."""
    return op.kind in _KINDS or (op.kind == "opaque" and op.forward_flops.at(1) > 0)


def runs_again(op: Op) -> bool:
    """Whether it runs again: an operation that nobody knows may."""
    return op.kind not in (*_KINDS, "enter", "exit", "call") and not op.name.endswith("grouped_mm")


class Selection:
    """The layer of `model`, recomputed selectively."""

    def __init__(self, model: LayerModel) -> None:
        self.model, body = model, model.body
        self._saved = {body.values[i].storage for op in body.ops for i in op.saved}
        self._of_kept = _of_kept(body)
        self._passed_on = _passed_on(body)

    def repeats(self, index: int) -> bool:
        """Whether an operation runs again."""
        return runs_again(self.model.body.ops[index]) and index < self.model.body.rerun

    def plain(self, index: int) -> bool:
        """Whether nothing is kept of an operation, nor sent by it."""
        model, op = self.model, self.model.body.ops[index]
        if op.kind in ("enter", "exit"):
            return model.tp == 1
        return not keeps(op) and not model.gathered and not model.dealt and op.kind != "cross_entropy"

    def operation(self, index: int, outcome: Outcome) -> Kept:
        """Of running operation `index` as `outcome` says."""
        model, op, values = self.model, self.model.body.ops[index], self.model.body.values
        received = sum(model.exchanged(op, outcome)) + sum(model.gathers(index, outcome, False))
        for kind, size, group in model.dealing(index).forward:
            if group > 1:
                received += size / (group if kind == "all_to_all" else 1)
        cost = model.op(index, outcome)
        again = cost.forward if self.repeats(index) else 0.0
        results = spare = 0.0
        if keeps(op):
            made = {values[i].storage: layout for i, layout in zip(op.outputs, outcome.outputs, strict=True)}
            for i, layout in made.items():
                size = model.local_bytes(values[i], layout)
                results, spare = results + size, spare + (0.0 if i in self._saved else size)
        if op.kind == "attention":
            extra = cost.saved_extra - model.copied(index, outcome)
            results += min(self._statistics(op, outcome, extra), extra)
        return Kept(results + received, spare + received, again)

    def _statistics(self, op: Op, outcome: Outcome, saved: Bytes) -> Bytes:
        """What attention's kernel returns besides its result: a float32 number a row, whole 32s of rows. Where there is no such
        kernel, which `saved` tells, attention is made of matrix products, whose scores are kept."""
        query, key = (self.model.body.values[i] for i in op.inputs[:2])
        length, width = query.shape[-2:]
        rows = self.model.local_bytes(query, outcome.inputs[0]) / DTYPE_BYTES[query.dtype] / (length * width)
        scores = rows * length * key.shape[-2] * DTYPE_BYTES[query.dtype]
        return scores if saved >= scores else rows * ceil(length / 32) * 32 * DTYPE_BYTES["float32"]

    def border(self, index: int, source: Layout, target: Layout) -> Kept:
        """Of redistributing a tensor at border `index`; the layer's own borders are outside, and run once."""
        model, op = self.model, self.model.body.ops[index]
        if op.module == "" or source == target:
            return Kept()
        value = model.body.values[op.inputs[0]]
        kind, needed = BORDER_COLLECTIVES[source.kind, target.kind][0], value.storage in self._saved
        results = model.local_bytes(value, target) if kind else 0.0
        if source.kind == "partial" and index in self._passed_on:  # counted with the product, as kept and as not needed
            results -= model.local_bytes(value, source)
            return Kept(results, 0.0 if needed else results)
        moved = needed and index in self._of_kept and (kind or target.sharded)
        left = model.local_bytes(value, source) if moved else 0.0
        return Kept(results, left + (0.0 if needed and kind != "all_gather" else results))


def _passed_on(body: Body) -> frozenset[int]:
    """Borders (by index) to which a product's result passes, through views and other such borders, with no other reader."""
    readers: dict[int, list[int]] = {}
    for index, op in enumerate(body.ops):
        for i in op.inputs:
            readers.setdefault(i, []).append(index)
    found: set[int] = set()
    for op in body.ops:
        at = op.outputs[0] if op.kind in ("linear", "matmul") else None
        while at is not None and at not in body.outputs and len(readers.get(at, ())) == 1:
            (index,) = readers[at]
            reader = body.ops[index]
            if reader.kind in ("enter", "exit"):
                found.add(index)
            views = [i for i in reader.outputs if body.values[i].storage == body.values[at].storage]
            at = views[0] if len(reader.outputs) == len(views) == 1 and reader.kind in ("enter", "exit", "view", "dims") else None
    return frozenset(found)


def _of_kept(body: Body) -> frozenset[int]:
    """Borders (by index) at which the result of a kept operation, or of another border, may arrive."""
    found: set[int] = set()
    made: set[int] = set()
    for index, op in enumerate(body.ops):
        storages = {body.values[i].storage for i in op.outputs}
        if op.kind in ("enter", "exit") and storages & made:
            found.add(index)
        if op.kind in ("enter", "exit") or keeps(op):
            made |= storages
    return frozenset(found)
