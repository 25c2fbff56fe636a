"""Following one sharding through a layer: the layout of every tensor on the way, and the memory that it lives in.

`walk` takes the operations in the order in which they run and lets the rules (cost.rules) and the plan's borders decide
the layouts; where a rule forbids what the plan says, that is a `UsageError` with its place. A memory is new where an
operation allocates or a border really moves data; a view, an unchanged border and REPLICATE -> GATHERED share their
source's (`shared_root`, `changes_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from autoplan.cost.prices import LayerModel
from autoplan.cost.rules import BORDER_COLLECTIVES, Outcome, outcomes
from autoplan.errors import UsageError
from autoplan.graph import Body, Op, Value
from autoplan.strategy import GATHERED, REPLICATE, Border, Layout, Sharding
from autoplan.units import Seconds

BorderKey = tuple[str, str, str]
"""(module, side, leaf)"""
Cross = Callable[[BorderKey, Value, Layout], Layout]
"""What leaves a border when a value arrives there in a layout."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on the way through a layer, with the layouts it runs in; a border's outcome has one input and one output."""

    index: int
    op: Op
    outcome: Outcome


def stream_layout(value: Value, stream: Layout) -> Layout:
    """The layout in which a tensor passes between layers: the stream's if it carries a gradient, else replicated."""
    return stream if value.requires_grad else REPLICATE


def walk(model: LayerModel, sharding: Sharding, *, every: bool = True) -> Iterator[Step]:
    """Follow `sharding` through the layer; without `every` past calls that add nothing to those before them (`Body.repeated`).
    Raises `UsageError`, naming operation and module, where a rule forbids it."""
    body = model.body
    dealt = tuple(each.experts for each in model.dealt)
    if sharding.experts != dealt:
        has = ", ".join(f"'{each.module}'" for each in dealt) or "none"
        raise UsageError(f"the plan deals other experts over ep than the layer has: it has {has}.")
    borders: dict[BorderKey, Border] = {(b.module, b.side, b.leaf): b for b in sharding.borders}
    used: set[BorderKey] = set()
    layouts = {i: stream_layout(body.values[i], sharding.stream) for i in body.inputs}
    trainable = {p.name for p in body.parameters if p.trainable}

    def layout_of(i: int) -> Layout:
        name = body.values[i].parameter
        if i not in layouts and name is not None:
            layouts[i] = sharding.layout(name) if name in trainable else REPLICATE
        return layouts.get(i, REPLICATE)

    def cross(key: BorderKey, value: Value, source: Layout) -> Layout:
        border = borders.get(key)
        if border is None:
            return source
        used.add(key)
        if border.source != source:
            raise UsageError(
                f"border '{key[2]}' of '{key[0]}' ({key[1]}) expects {border.source}, but the tensor arrives as {source}."
            )
        if border.target != source and (source.kind, border.target.kind) not in BORDER_COLLECTIVES:
            raise UsageError(f"border '{key[2]}' of '{key[0]}' ({key[1]}) cannot turn {source} into {border.target}.")
        if border.target.sharded and value.shape[border.target.dim] % model.tp:
            raise UsageError(
                f"border '{key[2]}' of '{key[0]}': dim {border.target.dim} of {value.shape} does not divide by tp {model.tp}."
            )
        return border.target

    moved = [n for n, op in enumerate(body.ops) if op.kind == "call" and model.blocks[op.block][0] in sharding.modules]
    passed = frozenset() if every else body.repeated.difference(moved, (n + 1 for n in moved))
    for index, op in enumerate(body.ops):
        if index in passed:  # it is given what the call before it was given or returned, which is as it should be
            layouts.update((i, stream_layout(body.values[i], sharding.stream)) for i in op.outputs)
            continue
        sources = tuple(layout_of(i) for i in op.inputs)
        if op.kind in ("enter", "exit"):
            target = cross((op.module, "in" if op.kind == "enter" else "out", op.leaf), body.values[op.inputs[0]], sources[0])
            outcome = Outcome(sources, (target,), False)
        elif op.kind == "call":
            outcome = _call(model, sharding, index, sources, cross)
        else:
            outcome = _fixed(model, index, sources)
        layouts.update(zip(op.outputs, outcome.outputs, strict=True))
        yield Step(index, op, outcome)
    for i in body.outputs:
        wanted = REPLICATE if model.outer else stream_layout(body.values[i], sharding.stream)
        if layout_of(i) != wanted:
            raise UsageError(f"the layer's output leaves as {layout_of(i)}, but the next layer expects {wanted}.")
    unused = [key for key in borders if key not in used]
    if unused:
        module, side, leaf = unused[0]
        raise UsageError(f"no tensor '{leaf}' passes the border ({side}) of a module '{module}'.")


def _call(model: LayerModel, sharding: Sharding, index: int, sources: tuple[Layout, ...], cross: Cross) -> Outcome:
    body, op = model.body, model.body.ops[index]
    targets = list(sources)
    moved = model.blocks[op.block][0] in sharding.modules
    for position, name, leaf in entering(model, index) if moved else ():
        targets[position] = cross((name, "in", leaf), body.values[op.inputs[position]], sources[position])
    for position, target in enumerate(targets):
        wanted = stream_layout(body.values[op.inputs[position]], sharding.stream)
        if target != wanted:
            raise UsageError(
                f"block '{model.blocks[op.block][0]}' expects {wanted}, but its input {position} arrives as {target}."
            )
    results = [stream_layout(body.values[i], sharding.stream) for i in op.outputs]
    for position, name, leaf in leaving(model, index) if moved else ():
        results[position] = cross((name, "out", leaf), body.values[op.outputs[position]], results[position])
    return Outcome(sources, tuple(results), False)


def entering(model: LayerModel, index: int) -> Iterator[tuple[int, str, str]]:
    """(position, block name, leaf) of the inputs of the `call` at `index` that an outer border may redistribute."""
    name, body = model.blocks[model.body.ops[index].block]
    for position, leaf in enumerate(model.bodies[body].input_leaves):
        if leaf:
            yield position, name, leaf


def leaving(model: LayerModel, index: int) -> Iterator[tuple[int, str, str]]:
    """(position, block name, leaf) of the outputs of the `call` at `index`: a leaf of the `exit` operation that made it."""
    name, number = model.blocks[model.body.ops[index].block]
    body = model.bodies[number]
    for position, value in enumerate(body.outputs):
        leaf = next((op.leaf for op in body.ops if op.kind == "exit" and op.outputs[0] == value), "")
        yield position, name, leaf


def _fixed(model: LayerModel, index: int, sources: tuple[Layout, ...]) -> Outcome:
    op = model.body.ops[index]
    for outcome in outcomes(op, model.body, sources, model.tp, model.packings.get(index, ())):
        if outcome.inputs == sources:
            return outcome
    where = f"'{op.name}' in module '{op.module or '(the layer itself)'}'"
    raise UsageError(f"operation {where} cannot run on inputs {', '.join(map(str, sources))} with tp {model.tp}.")


def shared_root(body: Body, op: Op, output: int, root: dict[int, int]) -> int:
    """The memory that `output` lives in: that of the input it is a view of, else its own."""
    storage = body.values[output].storage
    for i in op.inputs:
        if storage != output and body.values[i].storage == storage:
            return root.get(i, i)
    return output


def saved_values(body: Body, op: Op) -> Iterator[int]:
    """The values that the operation keeps, as it sees them: past the borders that may have moved their data. A call keeps what it
    is given that no layer counts, as it carries no gradient: masks, positions; but of the model's inputs and buffers."""
    if op.kind == "call":
        yield from (i for i in op.inputs if not body.values[i].requires_grad and body.made(i))
    for i in op.saved:
        storage = body.values[i].storage
        seen = (j for j in (*op.inputs, *op.outputs) if body.values[j].storage == storage)
        yield next(seen, i)


def changes_memory(source: Layout, target: Layout) -> bool:
    """Whether a redistribution makes a new tensor in the forward pass."""
    return source != target and not (source == REPLICATE and target == GATHERED)


def call_borders(model: LayerModel, index: int, outcome: Outcome, stream: Layout) -> tuple[Seconds, Seconds]:
    """Seconds of the outer borders around a block: its inputs brought to the stream's layout, its outputs away from it."""
    body, op = model.body, model.body.ops[index]
    if not stream.sharded and all(layout == REPLICATE for layout in outcome.inputs + outcome.outputs):
        return 0.0, 0.0  # most of the many calls
    pairs = [
        (body.values[i], layout, stream_layout(body.values[i], stream))
        for i, layout in zip(op.inputs, outcome.inputs, strict=True)
    ]
    pairs += [
        (body.values[i], stream_layout(body.values[i], stream), layout)
        for i, layout in zip(op.outputs, outcome.outputs, strict=True)
    ]
    costs = [model.border(value, source, target) for value, source, target in pairs]
    return sum(f for f, _ in costs), sum(b for _, b in costs)


def borders_of(index: int, model: LayerModel, outcome: Outcome, stream: Layout) -> Iterator[Border]:
    """The borders that a step of a search stands for (none where nothing changes)."""
    op = model.body.ops[index]
    if op.kind in ("enter", "exit"):
        source, target = outcome.inputs[0], outcome.outputs[0]
        if source != target:
            yield Border(op.module, "in" if op.kind == "enter" else "out", op.leaf, source, target)
    elif op.kind == "call":
        for position, name, leaf in entering(model, index):
            target = stream_layout(model.body.values[op.inputs[position]], stream)
            if outcome.inputs[position] != target:
                yield Border(name, "in", leaf, outcome.inputs[position], target)
        for position, name, leaf in leaving(model, index):
            source = stream_layout(model.body.values[op.outputs[position]], stream)
            if outcome.outputs[position] != source:
                yield Border(name, "out", leaf, source, outcome.outputs[position])
