"""The Pareto set of tensor-parallel shardings of one layer: every way that no other way beats.

A way through the layer's lattice (search.lattice) is a sharding. Two partial shardings that meet in one state have the same
future, so only those are kept that are not beaten in all that they cost (search.labels), which is a dynamic program over the
lattice's levels: exact, and independent of how many layers are equal. All labels of a level are one array; they are compared
where several transitions lead to one state. Selective recomputation is tried with these shardings; that one which is beaten in
all of this would keep less is not looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplan.cost.layer import LayerCost
from autoplan.cost.parameters import LocalParameter, Sizes, sizes
from autoplan.cost.peak import made, moved
from autoplan.cost.prices import LayerModel
from autoplan.cost.selective import Kept
from autoplan.cost.walk import borders_of, call_borders, changes_memory
from autoplan.search.corner import Corner
from autoplan.search.dominance import Bools, Floats, Ints, unbeaten
from autoplan.search.keeping import kept_by_choice
from autoplan.search.labels import LABELS, additions
from autoplan.search.lattice import Choice, Lattice
from autoplan.strategy import REPLICATE, Border, Layout, Sharding, shard
from autoplan.units import Bytes, Seconds

Decisions = NDArray[np.int16]
"""[levels, shardings]: which choice of each level."""

_ROUNDING = np.array([1 + 1e-12, 1 + 1e-12, 1.0, 1.0, 1 + 1e-12, 1.0, 1.0])
"""Seconds that differ by rounding are equal."""


def streams(model_inputs: Sequence[tuple[tuple[int, ...], int | None]], tp: int) -> list[Layout]:
    """The layouts in which activations may pass between layers: replicated, or sharded on a dim that is neither the batch
    nor the features, when all of them allow it. Each input is (shape, batch dim)."""
    found = [REPLICATE]
    ranks = {len(shape) for shape, _ in model_inputs}
    if tp > 1 and ranks and min(ranks) >= 3:
        for dim in range(min(ranks) - 1):
            if all(dim != batch and shape[dim] % tp == 0 for shape, batch in model_inputs):
                found.append(shard(dim))
    return found


def pareto_shardings(model: LayerModel, stream: Layout) -> list[Sharding]:
    """Every unbeaten sharding of the layer whose activations enter and leave as `stream`; empty when there is none."""
    found = Ways(model, Lattice(model, stream)).unbeaten
    return list(dict.fromkeys(found.sharding(i) for i in range(found.number)))


class Ways:
    """The ways through a lattice at the prices of `model`: its micro-batch, its cp."""

    def __init__(self, model: LayerModel, lattice: Lattice) -> None:
        self.model, self.lattice = model, lattice
        self.trainable = {p.name: p for p in lattice.body.parameters}

    @cached_property
    def prices(self) -> list[Floats]:
        """By level [choices, 7]: forward, backward, saved besides tensors, parameters, what of the forward runs again, temporary,
        unreduced gradients."""
        return [self._priced(level.operation, level.choices) for level in self.lattice.levels]

    def _priced(self, index: int, choices: Sequence[Choice]) -> Floats:
        again = float(index < self.lattice.body.rerun)
        prices = (self._price(index, choice) for choice in choices)
        return np.array([(*price[:4], again * price[0], *price[4:]) for price in prices]).reshape(-1, 7)

    def _price(self, index: int, choice: Choice) -> tuple[float, float, float, float, float, float]:
        if index < 0:
            return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        model, body, outcome = self.model, self.model.body, choice.outcome
        op = body.ops[index]
        if op.kind in ("enter", "exit"):
            value, before, after = body.values[op.inputs[0]], outcome.inputs[0], outcome.outputs[0]
            return *model.border(value, before, after), 0.0, 0.0, moved(model, value, before, after), 0.0
        if op.kind == "call":
            return *call_borders(model, index, outcome, self.lattice.stream), 0.0, 0.0, 0.0, 0.0
        cost = model.op(index, outcome)
        backward, numel = cost.backward + cost.tp_backward, 0.0
        for i, arriving, layout in zip(op.inputs, choice.arriving, outcome.inputs, strict=True):
            name = body.values[i].parameter
            if arriving is None and name is not None:
                numel += model.local_parameter(self.trainable[name], layout).numel(1)
                backward += model.parameter_sync(body.values[i], layout)
        gradients = made(model, index, outcome)
        return cost.forward + cost.tp_forward, backward, cost.saved_extra, numel, cost.temporary, gradients

    @cached_property
    def least_seconds(self) -> Seconds | None:
        """No sharding is faster: every operation at its cheapest, whatever comes before and after; None when one can't run. It
        needs no states, and tells already which degrees are too many."""
        seconds = 0.0
        for index, outcomes in self.lattice.outcomes.items():
            if not outcomes:
                return None
            if self.lattice.body.ops[index].kind not in ("enter", "exit", "call"):  # a border may cost nothing
                costs = [self.model.op(index, outcome) for outcome in outcomes]
                seconds += min(cost.forward + cost.tp_forward + cost.backward + cost.tp_backward for cost in costs)
        return seconds * (1 - 1e-12)  # summed in another order than `fastest_seconds`

    @cached_property
    def fastest_seconds(self) -> Seconds | None:
        """Forward and backward of the fastest sharding, recomputation and data parallelism apart; None when there is none."""
        return self.corner.seconds

    @cached_property
    def corner(self) -> Corner:
        """No sharding is better in any cost."""
        return Corner(self.model, self.lattice, self.prices, lambda: self.kept)

    @cached_property
    def kept(self) -> list[Floats]:
        """See `search.keeping`."""
        return kept_by_choice(self.model, self.lattice, self.prices)

    @cached_property
    def unbeaten(self) -> Unbeaten:
        """Every sharding that no other beats."""
        costs, counts = np.zeros((LABELS, 1)), np.ones(1, dtype=np.int64)
        state = np.zeros(1, dtype=np.int64)
        before: list[Ints | None] = []
        chosen: list[Ints] = []
        for level, added in zip(self.lattice.levels, additions(self.lattice, self.prices, self.model), strict=True):
            if level.straight and len(counts) == len(level.source):
                costs = added.to(costs, state)
                before.append(None)
                chosen.append(level.choice[state])
                continue
            sizes = counts[level.source]
            starts = np.cumsum(counts) - counts
            by = np.repeat(np.arange(len(sizes)), sizes)
            parents = np.arange(len(by)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + starts[level.source][by]
            grown = added.to(costs[:, parents], by)
            counts = np.add.reduceat(sizes, level.first) if len(level.first) else np.zeros(0, dtype=np.int64)
            every = _kept(grown, counts, np.diff(level.first, append=len(level.source)) > 1)
            state = np.repeat(np.arange(len(counts)), counts)[every]
            counts = np.bincount(state, minlength=len(counts))
            costs, parents, by = grown[:, every], parents[every], by[every]
            before.append(parents)
            chosen.append(level.choice[by])
        starts = np.cumsum(counts) - counts
        leaving = [np.arange(starts[state], starts[state] + counts[state]) for state in self.lattice.leaves]
        ends = np.concatenate(leaving) if leaving else np.zeros(0, dtype=np.int64)
        ends = ends[unbeaten(costs[:, ends], _ROUNDING)]
        decisions = np.zeros((len(chosen), len(ends)), dtype=np.int16)
        at = ends
        for number in reversed(range(len(chosen))):
            decisions[number] = chosen[number][at]
            parents_of = before[number]
            at = at if parents_of is None else parents_of[at]
        return Unbeaten(self, costs[:, ends], decisions)


def _kept(costs: Floats, counts: Ints, merged: Bools) -> Ints:
    """The labels to keep, in the order of their states; those of a state to which one transition leads beat each other no
    more than they did before."""
    state = np.repeat(np.arange(len(counts)), counts)
    compared = np.flatnonzero(merged[state])
    if not len(compared):
        return np.arange(len(state))
    better = compared[unbeaten(costs[:, compared], _ROUNDING, state[compared])]
    every = np.concatenate((np.flatnonzero(~merged[state]), better))
    return every[np.argsort(state[every], kind="stable")]


class Unbeaten:
    """The unbeaten shardings of a layer as arrays, one entry each. A `Sharding` is written when it is asked for."""

    def __init__(self, ways: Ways, costs: Floats, decisions: Decisions) -> None:
        self.model, self.lattice, self.decisions, self._ways = ways.model, ways.lattice, decisions, ways
        self.number = costs.shape[1]
        self.forward, self.backward, self.saved, _, self.rerun, self.peak, self.beneath = costs
        self._written: dict[int, Sharding] = {}

    @cached_property
    def cost(self) -> LayerCost:
        """Of all shardings, its numbers arrays; communication over tp is in `forward` and `backward`."""
        first, which = self._distinct([number for number, _ in self.lattice.entrances])
        inputs = np.array([self._inputs(i) for i in first])[which]
        zero = np.zeros(self.number)
        numbers: list[Any] = [self.forward, self.backward, zero, zero, self.saved, inputs, self.peak, (), self.model.buffers]
        rerun: Any = self.rerun
        beneath: Any = self.beneath
        return replace(LayerCost(*numbers), kept=self._kept, rerun=rerun, beneath=beneath, batch=self.model.batch)

    @property
    def _kept(self) -> Kept:
        total: Any = np.zeros((self.number, 3))
        for kept, decided in zip(self._ways.kept, self.decisions, strict=True):
            if kept.any():
                total += kept[decided]
        return Kept._make(total.T)

    @cached_property
    def held(self) -> tuple[list[tuple[LocalParameter, ...]], Ints]:
        """The parameters as one device has them in each of their different layouts, and of every sharding which these are."""
        own = [p for p in self.lattice.body.parameters if not p.buffer]
        found: dict[tuple[Layout, ...], int] = {}
        first, which = self._distinct([number for number, _ in self._uses])
        numbers = []
        for i in first:
            layouts = self._layouts(i)
            key = tuple(layouts.get(p.name, REPLICATE) if p.trainable else REPLICATE for p in own)
            numbers.append(found.setdefault(key, len(found)))
        local = self.model.local_parameter
        return [tuple(map(local, own, layouts)) for layouts in found], np.array(numbers, dtype=np.int64)[which]

    def _distinct(self, levels: Sequence[int]) -> tuple[list[int], Ints]:
        """Shardings that differ in what they choose at `levels`, and of every sharding which of them does as it does."""
        if not levels:
            return [0], np.zeros(self.number, dtype=np.int64)
        _, first, which = np.unique(self.decisions[levels], axis=1, return_index=True, return_inverse=True)
        return first.tolist(), which.reshape(-1)

    def sizes(self, dealt: bool, shards: int) -> Sizes:
        """See `cost.data_parallel.HasParameters`: of every sharding, but of experts, which are dealt alike in all."""
        kinds, which = self.held
        if dealt:
            return sizes(kinds[0], dealt, shards)
        length, rest, trainable = self._cuts
        local = -(-length // shards) * rest
        numbers: list[Any] = [local.sum(axis=1)[which], local[:, trainable].sum(axis=1)[which]]
        return Sizes(*numbers)

    @cached_property
    def _cuts(self) -> tuple[Ints, Ints, Bools]:
        """By kind and parameter that is not dealt: the size of the dim that FSDP cuts, and of all the others; what is trained."""
        kinds = [[p for p in kind if not p.dealt] for kind in self.held[0]]
        length = np.array([[p.shape[p.fsdp_dim] if p.shape else 1 for p in kind] for kind in kinds], dtype=np.int64)
        whole = np.array([[prod(p.shape) for p in kind] for kind in kinds], dtype=np.int64)
        return length, whole // np.maximum(length, 1), np.array([p.trainable for p in kinds[0]], dtype=bool)

    def cut_by(self, shards: int) -> Bools:
        """Whether FSDP can cut all parameters: a packed one along dim 1, and only evenly."""
        kinds, which = self.held
        packed = [[p.shape[p.fsdp_dim] for p in kind if p.fsdp_dim and not p.dealt] for kind in kinds]
        return np.array([not any(size % shards for size in kind) for kind in packed], dtype=bool)[which]

    @cached_property
    def _uses(self) -> list[tuple[int, list[tuple[tuple[str, Layout], ...]]]]:
        """Of every level that uses parameters, by choice: which, in which layout."""
        body, found = self.lattice.body, []
        for number, level in enumerate(self.lattice.levels):
            inputs = body.ops[level.operation].inputs if level.operation >= 0 else ()
            names = [(position, name) for position, i in enumerate(inputs) if (name := body.values[i].parameter) is not None]
            if names:
                found.append((number, [tuple((n, c.outcome.inputs[at]) for at, n in names) for c in level.choices]))
        return found

    def _layouts(self, i: int) -> dict[str, Layout]:
        """The layouts of a sharding's parameters."""
        decided = self.decisions[:, i]
        return {name: layout for number, uses in self._uses for name, layout in uses[decided[number]]}

    def _inputs(self, i: int) -> Bytes:
        """What is kept of a layer that is recomputed: what it is called with, as it comes in."""
        body, inside = self.lattice.body, dict[int, Bytes]()
        for number, target in self.lattice.entrances:
            level = self.lattice.levels[number]
            source, outcome = body.ops[level.operation].inputs[0], level.choices[self.decisions[number, i]].outcome
            memory = target if changes_memory(outcome.inputs[0], outcome.outputs[0]) else source
            value = body.values[target]
            inside[memory] = self.model.local_bytes(value, outcome.outputs[0]) if value.requires_grad else 0.0
        return sum(inside.values())

    def sharding(self, i: int) -> Sharding:
        if i not in self._written:
            self._written[i] = self._write(i)
        return self._written[i]

    def _write(self, i: int) -> Sharding:
        borders: list[Border] = []
        for level, choice in zip(self.lattice.levels, self.decisions[:, i].tolist(), strict=True):
            if level.operation >= 0:
                outcome = level.choices[choice].outcome
                borders.extend(borders_of(level.operation, self.model, outcome, self.lattice.stream))
        order = {p.name: n for n, p in enumerate(self.lattice.body.parameters)}
        layouts = [(name, layout) for name, layout in self._layouts(i).items() if layout != REPLICATE]
        experts = tuple(each.experts for each in self.model.dealt)
        return Sharding(tuple(sorted(layouts, key=lambda item: order[item[0]])), tuple(borders), self.lattice.stream, experts)
