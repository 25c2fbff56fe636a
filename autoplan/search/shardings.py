"""The Pareto set of tensor-parallel shardings of one layer: every way that no other way beats.

The operations are taken in the order in which they run. A *state* is what the rest of the layer can see: the layout and
the memory of every live tensor, and which of those memories are already counted as saved. From each state an operation
continues by every outcome of its sharding rule (cost.rules), a border by every redistribution. Two partial shardings
that meet in one state have the same future, so only those are kept that are not beaten in all of

    (forward seconds, backward seconds, saved bytes, parameters, largest temporary)

which is a dynamic program over the layer's frontier (`_advance`): exact, and independent of how many layers are equal.
Beforehand one pass forward and one backward find the layouts of every tensor that can be reached and from which the end
can be reached (`_viable`): a query sharded along its sequence, say, ends at the attention, and need not be carried there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from autoplan.cost.prices import LayerModel
from autoplan.cost.rules import Outcome, conversions, outcomes
from autoplan.cost.walk import borders_of, call_borders, changes_memory, saved_values, stream_layout
from autoplan.strategy import REPLICATE, Border, Layout, Sharding, shard
from autoplan.units import Seconds

_ROUNDING = 1 + 1e-12


class Live(NamedTuple):
    """A live tensor: its layout, the memory it lives in (numbered in the order of live tensors), that memory's bytes."""

    layout: Layout
    memory: int
    size: float


class Decision(NamedTuple):
    """How one operation runs, and the decision before it."""

    operation: int
    outcome: Outcome
    before: Decision | None


class Label(NamedTuple):
    """A partial sharding: its costs, and its last decision."""

    forward: float
    backward: float
    saved: float
    numel: float
    temporary: float
    last: Decision | None


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to continue at an operation, priced."""

    outcome: Outcome
    forward: float
    backward: float
    numel: float
    saved_extra: float
    temporary: float


State = tuple[tuple[tuple[int, Live], ...], frozenset[int]]


def pareto_shardings(model: LayerModel, stream: Layout) -> list[Sharding]:
    """Every unbeaten sharding of the layer whose activations enter and leave as `stream`; empty when there is none."""
    return _Frontier(model, stream).shardings()


def fastest_seconds(model: LayerModel, stream: Layout) -> Seconds | None:
    """Forward and backward of the fastest sharding, recomputation and data parallelism apart; None when there is none."""
    return _Frontier(model, stream, seconds_only=True).seconds()


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


class _Frontier:
    def __init__(self, model: LayerModel, stream: Layout, *, seconds_only: bool = False) -> None:
        self.model, self.stream, self.body = model, stream, model.body
        self.seconds_only = seconds_only
        self.prune = fastest if seconds_only else unbeaten
        self.trainable = {p.name: p for p in self.body.parameters}
        self.last_use = {i: len(self.body.ops) for i in self.body.outputs}
        for index, op in reversed(list(enumerate(self.body.ops))):
            for i in op.inputs:
                self.last_use.setdefault(i, index)
        self.used_outside = {i for op in self.body.ops if op.kind not in ("call", "enter") for i in op.inputs}
        """Values that something other than a block uses."""
        calls = [op for op in self.body.ops if op.kind == "call"]
        self.from_blocks = {i for op in calls for i in op.outputs} - self.used_outside
        """Values that only pass from block to block, in the stream's layout."""
        self.cache: dict[tuple[int, tuple[Layout | None, ...]], list[Choice]] = {}
        self.viable = self._viable()

    def _viable(self) -> dict[int, set[Layout | None]]:
        """For every value the layouts that can occur in a complete sharding, correlations between values ignored."""
        body = self.body
        reached: dict[int, set[Layout | None]] = {i: {stream_layout(body.values[i], self.stream)} for i in body.inputs}
        runs: list[list[tuple[tuple[Layout | None, ...], Outcome]]] = []
        for index, op in enumerate(body.ops):
            arriving = product(*(sorted(reached.setdefault(i, {self._layout(i, {})}), key=str) for i in op.inputs))
            runs.append([(layouts, choice.outcome) for layouts in arriving for choice in self._choices(index, layouts)])
            for position, i in enumerate(op.outputs):
                reached[i] = {outcome.outputs[position] for _, outcome in runs[-1]}
            for position, i in enumerate(op.inputs):  # a free parameter is decided by its first use
                if body.values[i].parameter:
                    reached[i] = reached[i] | {outcome.inputs[position] for _, outcome in runs[-1]}
        alive = {i: set(layouts) for i, layouts in reached.items()}
        for i in body.outputs:
            alive[i] &= {REPLICATE if self.model.outer else stream_layout(body.values[i], self.stream)}
        for op, run in zip(reversed(body.ops), reversed(runs), strict=True):
            usable = [
                (layouts, outcome)
                for layouts, outcome in run
                if all(layout in alive[i] for i, layout in zip(op.outputs, outcome.outputs, strict=True))
            ]
            for position, i in enumerate(op.inputs):
                alive[i] &= {layouts[position] for layouts, _ in usable} | {None}
        return alive

    def shardings(self) -> list[Sharding]:
        return list(dict.fromkeys(self._sharding(label) for label in self._finals()))

    def seconds(self) -> Seconds | None:
        return min((label.forward + label.backward for label in self._finals()), default=None)

    def _finals(self) -> list[Label]:
        body = self.body
        arriving = {i: stream_layout(body.values[i], self.stream) for i in body.inputs}
        live = {i: Live(layout, i, self.model.local_bytes(body.values[i], layout)) for i, layout in arriving.items()}
        frontier: dict[State, list[Label]] = {self._state(live, frozenset(), -1): [Label(0.0, 0.0, 0.0, 0.0, 0.0, None)]}
        index = 0
        while index < len(body.ops):
            end = self._settled(index)
            frontier = self._pass_on(index, end, frontier) if end > index else self._advance(index, frontier)
            index = max(end, index + 1)
        finals: list[Label] = []
        for (live_items, _), labels in frontier.items():
            if self._leaves_right(dict(live_items)):
                finals.extend(labels)
        return self.prune(finals) if finals else []

    def _settled(self, index: int) -> int:
        """The end of the run of calls from `index` on at which nothing is decided: blocks that take the outputs of blocks."""
        body, end = self.body, index
        while end < len(body.ops) and body.ops[end].kind == "call":
            op = body.ops[end]
            if any(i in self.used_outside for i in op.outputs):
                break
            if not all(i in self.from_blocks or (self.viable[i] <= {REPLICATE, None} and not body.values[i].requires_grad)
                       for i in op.inputs):  # fmt: skip
                break
            end += 1
        return end

    def _pass_on(self, index: int, end: int, frontier: dict[State, list[Label]]) -> dict[State, list[Label]]:
        """The frontier after the calls `index ... end - 1`, at which nothing is decided."""
        made = [i for op in self.body.ops[index:end] for i in op.outputs]
        grown: dict[State, list[Label]] = {}
        for (live_items, counted), labels in frontier.items():
            live = dict(live_items) | {i: self._fresh(i, stream_layout(self.body.values[i], self.stream)) for i in made}
            grown.setdefault(self._state(live, counted, end - 1), []).extend(labels)
        return {state: self.prune(labels) for state, labels in grown.items()}

    def _leaves_right(self, live: dict[int, Live]) -> bool:
        return all(
            live[i].layout == (REPLICATE if self.model.outer else stream_layout(self.body.values[i], self.stream))
            for i in self.body.outputs
            if i in live
        )

    def _advance(self, index: int, frontier: dict[State, list[Label]]) -> dict[State, list[Label]]:
        grown: dict[State, list[Label]] = {}
        op = self.body.ops[index]
        for (live_items, counted), labels in frontier.items():
            live = dict(live_items)
            arriving = tuple(self._layout(i, live) for i in op.inputs)
            for choice in self._choices(index, arriving):
                if any(layout not in self.viable[i] for i, layout in zip(op.outputs, choice.outcome.outputs, strict=True)):
                    continue
                state, saved = self._next(index, choice, live, counted)
                bucket = grown.setdefault(state, [])
                for label in labels:
                    bucket.append(
                        Label(
                            label.forward + choice.forward,
                            label.backward + choice.backward,
                            label.saved + saved,
                            label.numel + choice.numel,
                            max(label.temporary, choice.temporary),
                            Decision(index, choice.outcome, label.last),
                        )
                    )
        return {state: self.prune(labels) for state, labels in grown.items()}

    def _layout(self, i: int, live: dict[int, Live]) -> Layout | None:
        if i in live:
            return live[i].layout
        name = self.body.values[i].parameter
        if name is not None and self.trainable[name].trainable and not self.trainable[name].buffer:
            return None
        return REPLICATE

    def _choices(self, index: int, arriving: tuple[Layout | None, ...]) -> list[Choice]:
        key = (index, arriving)
        if key not in self.cache:
            self.cache[key] = list(self._priced(index, arriving))
        return self.cache[key]

    def _priced(self, index: int, arriving: tuple[Layout | None, ...]) -> Iterator[Choice]:
        op, model, body = self.body.ops[index], self.model, self.body
        if op.kind in ("enter", "exit"):
            source, value = arriving[0] or REPLICATE, body.values[op.inputs[0]]
            for target in (source,) if index in model.fixed_borders else conversions(value, source, model.tp):
                forward, backward = model.border(value, source, target)
                yield Choice(Outcome((source,), (target,), False), forward, backward, 0.0, 0.0, 0.0)
        elif op.kind == "call":
            for outcome in self._calls(index, arriving):
                forward, backward = call_borders(model, index, outcome, self.stream)
                yield Choice(outcome, forward, backward, 0.0, 0.0, 0.0)
        else:
            for outcome in outcomes(op, body, arriving, model.tp, model.packings.get(index, ())):
                cost = model.op(index, outcome)
                forward, backward, numel = cost.forward + cost.tp_forward, cost.backward + cost.tp_backward, 0.0
                for i, before, after in zip(op.inputs, arriving, outcome.inputs, strict=True):
                    name = body.values[i].parameter
                    if before is None and name is not None:
                        numel += model.local_parameter(self.trainable[name], after).numel(1)
                        backward += model.parameter_sync(body.values[i], after)
                yield Choice(outcome, forward, backward, numel, cost.saved_extra, cost.temporary)

    def _calls(self, index: int, arriving: tuple[Layout | None, ...]) -> Iterator[Outcome]:
        """A block takes its inputs in the stream's layout, if a border can bring them there; its outputs may be brought
        elsewhere where something other than a block uses them."""
        op, model, body = self.body.ops[index], self.model, self.body
        named = {position for position, _, _ in model.enters(index)}
        for position, (i, source) in enumerate(zip(op.inputs, arriving, strict=True)):
            wanted = stream_layout(body.values[i], self.stream)
            reachable = conversions(body.values[i], source or REPLICATE, model.tp) if position in named else (source,)
            if wanted not in reachable:
                return
        options = []
        for i in op.outputs:
            source = stream_layout(body.values[i], self.stream)
            options.append(list(conversions(body.values[i], source, model.tp)) if i in self.used_outside else [source])
        inputs = tuple(layout or REPLICATE for layout in arriving)
        for outputs in product(*options):
            yield Outcome(inputs, outputs, False)

    def _next(self, index: int, choice: Choice, live: dict[int, Live], counted: frozenset[int]) -> tuple[State, float]:
        op, body, outcome = self.body.ops[index], self.body, choice.outcome
        after = dict(live)
        for i, layout in zip(op.inputs, outcome.inputs, strict=True):
            if body.values[i].parameter and i not in after:
                after[i] = self._fresh(i, layout)
        for i, layout in zip(op.outputs, outcome.outputs, strict=True):
            after[i] = self._made(index, i, layout, outcome, after)
        saved = choice.saved_extra
        if op.saved and not self.seconds_only:
            marked = set(counted)
            for i in saved_values(body, op):
                at = after.get(i) or self._fresh(i, REPLICATE)
                if at.memory not in marked:
                    marked.add(at.memory)
                    saved += at.size
            counted = frozenset(marked)
        return self._state(after, counted, index), saved

    def _state(self, live: dict[int, Live], counted: frozenset[int], index: int) -> State:
        """What the operations after `index` can see, memories numbered anew so that equal futures are equal states."""
        last_use = self.last_use
        kept = [(i, at) for i, at in live.items() if last_use.get(i, -1) > index]
        if self.seconds_only:
            return tuple([(i, Live(at.layout, 0, 0.0)) for i, at in kept]), counted
        numbers: dict[int, int] = {}
        renamed = tuple([(i, Live(at.layout, numbers.setdefault(at.memory, len(numbers)), at.size)) for i, at in kept])
        return renamed, frozenset([numbers[m] for m in counted if m in numbers])

    def _fresh(self, i: int, layout: Layout) -> Live:
        """A tensor in a memory of its own (its number must differ from those in use: they count from 0)."""
        return Live(layout, -1 - i, self.model.local_bytes(self.body.values[i], layout))

    def _made(self, index: int, output: int, layout: Layout, outcome: Outcome, live: dict[int, Live]) -> Live:
        """Where an output lives: in the memory of the input that it is a view of, else in its own."""
        op, values = self.body.ops[index], self.body.values
        if op.kind in ("enter", "exit"):
            source = live.get(op.inputs[0])
            moved = source is None or changes_memory(outcome.inputs[0], layout)
            return self._fresh(output, layout) if moved or source is None else source._replace(layout=layout)
        for i in op.inputs:
            if values[output].storage != output and values[i].storage == values[output].storage and i in live:
                return live[i]._replace(layout=layout)
        return self._fresh(output, layout)

    def _sharding(self, label: Label) -> Sharding:
        parameters: dict[str, Layout] = {}
        borders: list[Border] = []
        decision = label.last
        while decision is not None:
            index, outcome, decision = decision
            op = self.body.ops[index]
            borders.extend(borders_of(index, self.model, outcome, self.stream))
            for i, layout in zip(op.inputs, outcome.inputs, strict=True):
                name = self.body.values[i].parameter
                if name is not None and layout != REPLICATE:
                    parameters[name] = layout
        order = {p.name: n for n, p in enumerate(self.body.parameters)}
        borders.reverse()
        return Sharding(tuple(sorted(parameters.items(), key=lambda item: order[item[0]])), tuple(borders), self.stream)


def fastest(labels: list[Label]) -> list[Label]:
    """The one with the fewest seconds."""
    return [min(labels, key=lambda label: label.forward + label.backward)]


def unbeaten(labels: list[Label]) -> list[Label]:
    """Those that no other label equals or beats in every cost (seconds that differ by rounding are equal)."""
    if len(labels) == 1:
        return labels
    kept: list[Label] = []
    for label in sorted(labels, key=lambda x: (x[0] + x[1], *x[2:5])):
        f, b, s, n, t = label[0] * _ROUNDING, label[1] * _ROUNDING, label[2], label[3], label[4]
        if not any(k[0] <= f and k[1] <= b and k[2] <= s and k[3] <= n and k[4] <= t for k in kept):
            kept.append(label)
    return kept
