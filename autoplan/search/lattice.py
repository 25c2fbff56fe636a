"""Every way to run one layer on the tp axis, as a lattice: states after every operation, and the choices between them.

The operations are taken in the order in which they run. A *state* is what the rest of the layer can see: the layout and
the memory of every live tensor, and which of those memories are already counted as saved. From each state an operation
continues by every outcome of its sharding rule (cost.rules), a border by every redistribution: a *transition*, to a state of
the next level. Two partial shardings that meet in one state have the same future.

Which layouts can follow each other does not depend on the micro-batch, nor on anything else that only changes prices, and on
the tp degree only by what it divides (`cost.rules.divided`): the lattice is made once for a body, a stream and all such degrees,
and priced as often as need be (`search.shardings`). Sizes are kept in four parts: bytes a sample and bytes whatever the batch, of
what every device has and of what tp cuts (`at`).

Beforehand one pass forward and one backward find the layouts of every tensor that can be reached and from which the end
can be reached (`_viable`): a query sharded along its sequence, say, ends at the attention, and need not be carried there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np

from autoplan.cost.context import misplaced
from autoplan.cost.prices import LayerModel
from autoplan.cost.rules import Outcome, conversions, outcomes
from autoplan.cost.walk import changes_memory, entering, saved_values, stream_layout
from autoplan.graph import Op, Value
from autoplan.search.dominance import Floats, Ints
from autoplan.strategy import REPLICATE, Layout

Size = tuple[float, float, float, float]
"""Of what every device has (bytes a sample, bytes whatever the batch), then the same of what tp cuts, whole."""
NOTHING: Size = (0.0, 0.0, 0.0, 0.0)


def at(samples: float, tp: int) -> Floats:
    """What a `Size` is to be multiplied with for bytes on one device."""
    return np.array((samples, 1.0, samples / tp, 1.0 / tp))


def _sum(sizes: Iterable[Size]) -> Size:
    a = b = c = d = 0.0
    for e, f, g, h in sizes:
        a, b, c, d = a + e, b + f, c + g, d + h
    return a, b, c, d


class Sizes(NamedTuple):
    """What is saved at an operation, and what waits."""

    saved: Size
    waiting: Size


class Live(NamedTuple):
    """A live tensor: its layout, the memory it lives in (numbered in the order of live tensors), that memory's size."""

    layout: Layout
    memory: int
    size: Size


State = tuple[tuple[tuple[int, Live], ...], frozenset[int]]


class Choice(NamedTuple):
    """One way to run an operation whose inputs arrive in these layouts (None: a parameter whose layout is still free)."""

    arriving: tuple[Layout | None, ...]
    outcome: Outcome


@dataclass(frozen=True)
class Level:
    """What can be done at one operation. Transitions are sorted by the state that they lead to."""

    operation: int
    """Its index; -1 where nothing is decided."""
    choices: tuple[Choice, ...]
    source: Ints
    """By transition: the state (a number in the level before) that it comes from."""
    choice: Ints
    """By transition: which of `choices`."""
    sizes: Floats
    """By transition, [n, 2, 4]: size of what is kept for the backward pass and was not counted before, and of the gradients that
    wait while the backward pass of the operation runs."""
    first: Ints
    """By state of this level: the first transition that leads to it."""

    @cached_property
    def straight(self) -> bool:
        """Whether every state goes on in one way, and to a state of its own, in the same order: most levels are so."""
        every = np.arange(len(self.source))
        return np.array_equal(self.source, every) and np.array_equal(self.first, every)


class Lattice:
    """See the module. `model` is of any micro-batch, and of one of the tp degrees; with experts that are dealt of the only one.
    `wanted`: layouts that parameters must have. Where there is no way through, no state `leaves`."""

    def __init__(self, model: LayerModel, stream: Layout, wanted: Mapping[str, Layout] | None = None) -> None:
        self.wanted = wanted or {}
        self.model, self.stream, self.body = model, stream, model.body
        self.trainable = {p.name for p in self.body.parameters if p.trainable and not p.buffer}
        self.used_outside = {i for op in self.body.ops if op.kind not in ("call", "enter") for i in op.inputs}
        """Values that something other than a block uses."""
        calls = [op for op in self.body.ops if op.kind == "call"]
        self.from_blocks = {i for op in calls for i in op.outputs} - self.used_outside
        """Values that only pass from block to block, in the stream's layout."""
        self._known: dict[tuple[int, tuple[Layout | None, ...]], list[Choice]] = {}
        self.outcomes: dict[int, list[Outcome]] = {}
        """By operation: those that can occur in a complete sharding, correlations between values ignored."""
        self.viable = self._viable()

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        return self._built[0]

    @cached_property
    def leaves(self) -> Ints:
        """The states of the last level in which the layer's outputs are in the layout that the next layer expects."""
        return self._built[1]

    def whole(self, name: str) -> bool:
        """Whether a parameter is whole on every device in every way to run the layer."""
        layouts = [self.viable[value.id] for value in self.body.values if value.parameter == name and value.id in self.viable]
        return not any(layout is not None and layout.sharded for some in layouts for layout in some)

    @cached_property
    def entrances(self) -> list[tuple[int, int]]:
        """(level, value inside) of what the layer is called with."""
        found = []
        for number, level in enumerate(self.levels):
            op = self.body.ops[level.operation]
            if level.operation >= 0 and op.kind == "enter" and not op.module and op.inputs[0] in self.body.inputs:
                found.append((number, op.outputs[0]))
        return found

    @cached_property
    def _built(self) -> tuple[tuple[Level, ...], Ints]:
        body = self.body
        arriving = {i: stream_layout(body.values[i], self.stream) for i in body.inputs}
        live = {i: Live(layout, i, self._size(body.values[i], layout)) for i, layout in arriving.items()}
        states: list[State] = [self._state(live, frozenset(), -1)]
        levels: list[Level] = []
        index = 0
        while index < len(body.ops):
            end = self._settled(index)
            level, states = self._pass_on(index, end, states) if end > index else self._advance(index, states)
            levels.append(level)
            index = max(end, index + 1)
        wanted = {i: REPLICATE if self.model.outer else stream_layout(body.values[i], self.stream) for i in body.outputs}
        leaves = [n for n, (items, _) in enumerate(states) if all(at.layout == wanted.get(i, at.layout) for i, at in items)]
        return tuple(levels), np.array(leaves, dtype=np.int64)

    def _viable(self) -> dict[int, set[Layout | None]]:
        """For every value the layouts that can occur in a complete sharding, correlations between values ignored."""
        body = self.body
        reached: dict[int, set[Layout | None]] = {i: {stream_layout(body.values[i], self.stream)} for i in body.inputs}
        runs: list[list[Choice]] = []
        for index, op in enumerate(body.ops):
            arriving = product(*(sorted(reached.setdefault(i, {self._layout(i, {})}), key=str) for i in op.inputs))
            runs.append([choice for layouts in arriving for choice in self._choices(index, layouts)])
            for position, i in enumerate(op.outputs):
                reached[i] = {choice.outcome.outputs[position] for choice in runs[-1]}
            for position, i in enumerate(op.inputs):  # a free parameter is decided by its first use
                if body.values[i].parameter:
                    reached[i] = reached[i] | {choice.outcome.inputs[position] for choice in runs[-1]}
        alive = {i: set(layouts) for i, layouts in reached.items()}
        for i in body.outputs:
            alive[i] &= {REPLICATE if self.model.outer else stream_layout(body.values[i], self.stream)}
        for index, op, run in zip(reversed(range(len(runs))), reversed(body.ops), reversed(runs), strict=True):
            usable = [
                choice
                for choice in run
                if all(layout in alive[i] for i, layout in zip(op.outputs, choice.outcome.outputs, strict=True))
            ]
            self.outcomes[index] = list(dict.fromkeys(choice.outcome for choice in usable))
            for position, i in enumerate(op.inputs):
                kept = {choice.arriving[position] for choice in usable} | {None}
                if body.values[i].parameter:
                    kept |= {choice.outcome.inputs[position] for choice in usable}
                alive[i] &= kept
        return alive

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

    def _pass_on(self, index: int, end: int, states: Sequence[State]) -> tuple[Level, list[State]]:
        """The level of the calls `index ... end - 1`, at which nothing is decided."""
        made = [i for op in self.body.ops[index:end] for i in op.outputs]
        found: dict[State, list[tuple[int, int, Sizes]]] = {}
        for number, (items, counted) in enumerate(states):
            live = dict(items) | {i: self._fresh(i, stream_layout(self.body.values[i], self.stream)) for i in made}
            counted, saved = self._keep(self.body.ops[index:end], live, counted)
            found.setdefault(self._state(live, counted, end - 1), []).append((number, 0, Sizes(saved, NOTHING)))
        return _level(-1, [Choice((), Outcome((), (), False))], found), list(found)

    def _advance(self, index: int, states: Sequence[State]) -> tuple[Level, list[State]]:
        op = self.body.ops[index]
        numbers: dict[Choice, int] = {}
        found: dict[State, list[tuple[int, int, Sizes]]] = {}
        for number, (items, counted) in enumerate(states):
            live = dict(items)
            for choice in self._choices(index, tuple(self._layout(i, live) for i in op.inputs)):
                if any(layout not in self.viable[i] for i, layout in zip(op.outputs, choice.outcome.outputs, strict=True)):
                    continue
                state, sizes = self._next(index, choice.outcome, live, counted)
                found.setdefault(state, []).append((number, numbers.setdefault(choice, len(numbers)), sizes))
        return _level(index, list(numbers), found), list(found)

    def _layout(self, i: int, live: dict[int, Live]) -> Layout | None:
        if i in live:
            return live[i].layout
        return None if self.body.values[i].parameter in self.trainable else REPLICATE

    def _choices(self, index: int, arriving: tuple[Layout | None, ...]) -> list[Choice]:
        key = (index, arriving)
        if key not in self._known:
            self._known[key] = [Choice(arriving, outcome) for outcome in self._outcomes(index, arriving)]
        return self._known[key]

    def _outcomes(self, index: int, arriving: tuple[Layout | None, ...]) -> Iterator[Outcome]:
        op, model, body = self.body.ops[index], self.model, self.body
        if op.kind in ("enter", "exit"):
            source, value = arriving[0] or REPLICATE, body.values[op.inputs[0]]
            for target in (source,) if index in model.fixed_borders else conversions(value, source, model.tp):
                yield Outcome((source,), (target,), False)
        elif op.kind == "call":
            yield from self._calls(index, arriving)
        else:
            for outcome in outcomes(op, body, arriving, model.tp, model.packings.get(index, ())):
                strewn = misplaced(model.gathered.get(index, ()), op, outcome)
                if (not self.wanted or self._as_wanted(op, outcome)) and not strewn:
                    yield outcome

    def _as_wanted(self, op: Op, outcome: Outcome) -> bool:
        names = [self.body.values[i].parameter for i in op.inputs]
        return all(self.wanted.get(name, layout) == layout for name, layout in zip(names, outcome.inputs, strict=True) if name)

    def _calls(self, index: int, arriving: tuple[Layout | None, ...]) -> Iterator[Outcome]:
        """A block takes its inputs in the stream's layout, if a border can bring them there; its outputs may be brought
        elsewhere where something other than a block uses them."""
        op, model, body = self.body.ops[index], self.model, self.body
        named = {position for position, _, _ in entering(model, index)}
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

    def _next(self, index: int, outcome: Outcome, live: dict[int, Live], counted: frozenset[int]) -> tuple[State, Sizes]:
        op, body = self.body.ops[index], self.body
        after = dict(live)
        for i, layout in zip(op.inputs, outcome.inputs, strict=True):
            if body.values[i].parameter and i not in after:
                after[i] = self._fresh(i, layout)
        for i, layout in zip(op.outputs, outcome.outputs, strict=True):
            after[i] = self._made(index, i, layout, outcome, after)
        counted, saved = self._keep((op,), after, counted)
        return self._state(after, counted, index), Sizes(saved, self._waiting(index, after))

    def _keep(self, ops: Sequence[Op], live: dict[int, Live], counted: frozenset[int]) -> tuple[frozenset[int], Size]:
        """The memories that are counted as saved after some operations, and the size of those that were not before."""
        marked, found = set(counted), []
        for i in (i for op in ops for i in saved_values(self.body, op)):
            tensor = live.get(i) or self._fresh(i, REPLICATE)
            if tensor.memory not in marked:
                marked.add(tensor.memory)
                found.append(tensor.size)
        return frozenset(marked), _sum(found)

    def _waiting(self, index: int, live: dict[int, Live]) -> Size:
        if self.body.ops[index].kind == "call":
            return NOTHING
        return _sum({live[i].memory: live[i].size for i in self.body.waiting[index]}.values())

    def _state(self, live: dict[int, Live], counted: frozenset[int], index: int) -> State:
        """What the operations after `index` can see, memories numbered anew so that equal futures are equal states."""
        last_use = self.body.last_use
        numbers: dict[int, int] = {}
        renamed = tuple(
            [
                (i, Live(at.layout, numbers.setdefault(at.memory, len(numbers)), at.size))
                for i, at in live.items()
                if last_use.get(i, -1) > index
            ]
        )
        return renamed, frozenset([numbers[m] for m in counted if m in numbers])

    def _size(self, value: Value, layout: Layout) -> Size:
        cut = layout.sharded and not self.model.dealt
        size, fixed = value.bytes_at(1) * (1.0 if cut else self.model.share(value, layout)), value.batch_dim is None
        mine = (0.0, size) if fixed else (size, 0.0)
        return (0.0, 0.0, *mine) if cut else (*mine, 0.0, 0.0)

    def _fresh(self, i: int, layout: Layout) -> Live:
        """A tensor in a memory of its own (its number must differ from those in use: they count from 0)."""
        return Live(layout, -1 - i, self._size(self.body.values[i], layout))

    def _made(self, index: int, output: int, layout: Layout, outcome: Outcome, live: dict[int, Live]) -> Live:
        """Where an output lives: in the memory of the input that it is a view of, else in its own."""
        op, values = self.body.ops[index], self.body.values
        if op.kind in ("enter", "exit"):
            source = live.get(op.inputs[0])
            moved = source is None or changes_memory(outcome.inputs[0], layout) or index in self.model.doors
            return self._fresh(output, layout) if moved or source is None else source._replace(layout=layout)
        for i in op.inputs:
            if values[output].storage != output and values[i].storage == values[output].storage and i in live:
                return live[i]._replace(layout=layout)
        return self._fresh(output, layout)


def _level(operation: int, choices: Sequence[Choice], found: dict[State, list[tuple[int, int, Sizes]]]) -> Level:
    transitions = [transition for some in found.values() for transition in some]
    sizes = [len(some) for some in found.values()]
    return Level(
        operation,
        tuple(choices),
        np.array([source for source, _, _ in transitions], dtype=np.int64),
        np.array([choice for _, choice, _ in transitions], dtype=np.int64),
        np.array([sizes for _, _, sizes in transitions], dtype=np.float64).reshape(-1, 2, 4),
        np.cumsum([0, *sizes[:-1]]) if sizes else np.zeros(0, dtype=np.int64),
    )
