"""What one layer costs on one device, for one micro-batch, under one sharding of the `tp` axis.

For a layer (a `Body`) whose operations `o` run with the layouts that `walk` finds,

    forward  = sum_o kernel_time(flops_o / s_o, bytes_o * q_o)      s_o = n if the operation is sharded, else 1
    backward = likewise                                             q_o = local / global bytes of its operands
    tp       = sum over borders of their collectives, + all_reduce of the gradient of every GATHERED parameter
    saved    = sum over distinct memories that the backward pass reads, local bytes, each once

(`LayerModel.op`, `.border`, `.parameter_sync`, `layer_cost`). A memory is new where an operation allocates or a border
really moves data; a view, an unchanged border and REPLICATE -> GATHERED share their source's. The search adds up the
same terms operation by operation; `layer_cost` is the one that a plan's prediction uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

from autoplan.cost.collectives import collective_time
from autoplan.cost.compute import MULTIPLIES, kernel_time
from autoplan.cost.rules import BORDER_COLLECTIVES, Outcome, outcomes, packings
from autoplan.errors import UsageError
from autoplan.graph import DTYPE_BYTES, Body, Op, Parameter, Value
from autoplan.hardware import HardwareProfile
from autoplan.strategy import GATHERED, REPLICATE, Border, Layout, Sharding
from autoplan.units import Bytes, Seconds

BorderKey = tuple[str, str, str]
"""(module, side, leaf)"""
Cross = Callable[[BorderKey, Value, Layout], Layout]
"""What leaves a border when a value arrives there in a layout."""


@dataclass(frozen=True, slots=True)
class OpCost:
    """One operation on one device: seconds forward and backward (its own collectives apart), bytes kept and held for a moment."""

    forward: Seconds
    backward: Seconds
    tp_forward: Seconds
    tp_backward: Seconds
    saved_extra: Bytes
    temporary: Bytes


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """A parameter's piece on one tp rank: `shape` is local, `fsdp_dim` the dim that FSDP cuts further."""

    name: str
    shape: tuple[int, ...]
    fsdp_dim: int
    trainable: bool

    def numel(self, dp_shard: int) -> int:
        """Elements on the fullest of `dp_shard` ranks (FSDP cuts into equal chunks, the last ones shorter or empty)."""
        if not self.shape:
            return 1
        cut = ceil(self.shape[self.fsdp_dim] / dp_shard)
        return cut * prod(self.shape) // max(self.shape[self.fsdp_dim], 1)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer, one micro-batch, one device. Seconds and bytes."""

    forward: Seconds
    backward: Seconds
    tp_forward: Seconds
    tp_backward: Seconds
    saved: Bytes
    """Kept for the backward pass when nothing is recomputed."""
    inputs: Bytes
    """Kept when the whole layer is recomputed: what it is called with."""
    temporary: Bytes
    """Most that one operation holds beyond what is saved."""
    parameters: tuple[LocalParameter, ...]
    buffers: Bytes
    products: tuple[Seconds, Seconds] = (0.0, 0.0)
    """What of `forward` and `backward` are matrix products."""
    attention: tuple[Seconds, Seconds] = (0.0, 0.0)
    """What of `forward` and `backward` are attention kernels."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on the way through a layer, with the layouts it runs in; a border's outcome has one input and one output."""

    index: int
    op: Op
    outcome: Outcome


def border_leaf(body: Body, value: int) -> str:
    """Where a block returns `value`: the leaf of the `exit` operation that made it."""
    for op in body.ops:
        if op.kind == "exit" and op.outputs[0] == value:
            return op.leaf
    return ""


class LayerModel:
    """The prices of one body at one tp degree and micro-batch."""

    def __init__(self, body: Body, bodies: tuple[Body, ...], blocks: tuple[tuple[str, int], ...], *, tp: int, micro_batch: int,
                 hardware: HardwareProfile, dtype: str) -> None:  # fmt: skip
        self.body, self.bodies, self.blocks = body, bodies, blocks
        self.tp, self.micro_batch, self.hardware, self.dtype = tp, micro_batch, hardware, dtype
        self._op_costs: dict[tuple[int, tuple[Layout, ...], tuple[Layout, ...]], OpCost] = {}
        self._border_costs: dict[tuple[int, Layout, Layout], tuple[Seconds, Seconds]] = {}

    @cached_property
    def outer(self) -> bool:
        """Whether this is the body around the blocks: what leaves it is the loss."""
        return all(self.body is not body for body in self.bodies)

    @cached_property
    def fixed_borders(self) -> frozenset[int]:
        """Borders (by index) that may not redistribute: a module that is called several times has one hook for all calls."""
        seen: dict[tuple[str, str, str], list[int]] = {}
        for index, op in enumerate(self.body.ops):
            if op.kind in ("enter", "exit"):
                seen.setdefault((op.kind, op.module, op.leaf), []).append(index)
        return frozenset(index for calls in seen.values() if len(calls) > 1 for index in calls)

    @cached_property
    def packings(self) -> dict[int, tuple[int, ...]]:
        return packings(self.body)

    def local_bytes(self, value: Value, layout: Layout) -> Bytes:
        return value.bytes_at(self.micro_batch) / (self.tp if layout.sharded else 1)

    def op(self, index: int, outcome: Outcome) -> OpCost:
        """Price of running operation `index` as `outcome` says."""
        key = (index, outcome.inputs, outcome.outputs)
        if key not in self._op_costs:
            self._op_costs[key] = self._price(self.body.ops[index], outcome)
        return self._op_costs[key]

    def _price(self, op: Op, outcome: Outcome) -> OpCost:
        batch = self.micro_batch
        share = (self.tp if outcome.sharded else 1) * (2 if op.causal else 1)  # a causal kernel skips half of the products
        operands = [
            (self.body.values[i], layout)
            for i, layout in zip(op.inputs + op.outputs, outcome.inputs + outcome.outputs, strict=True)
        ]
        whole = sum(value.bytes_at(batch) for value, _ in operands)
        local = sum(self.local_bytes(value, layout) for value, layout in operands)
        fraction = local / whole if whole else 1.0

        def seconds(flops: float, moved: float, kernels: int) -> Seconds:
            return kernel_time(op.kind, flops / share, moved * fraction, kernels, self.dtype, self.hardware.device)

        forward = seconds(op.forward_flops.at(batch), op.forward_bytes.at(batch), op.forward_kernels)
        backward = seconds(op.backward_flops.at(batch), op.backward_bytes.at(batch), op.backward_kernels)
        tp_forward = 0.0
        if op.kind == "cross_entropy" and outcome.sharded:
            rows = self.body.values[op.inputs[0]].shape[0] * batch
            statistic = rows * DTYPE_BYTES["float32"]
            tp_forward = self._collective("all_reduce", statistic) + self._collective("all_reduce", 2 * statistic)
        return OpCost(
            forward,
            backward,
            tp_forward,
            0.0,
            op.saved_extra.at(batch) / (self.tp if outcome.sharded else 1),
            self._temporary(op, outcome),
        )

    def _temporary(self, op: Op, outcome: Outcome) -> Bytes:
        """Gradients of inputs and outputs meet in the backward pass of an operation; a vocabulary-sharded embedding makes
        the gradient of the whole table first (DTensor has no sharded rule for it)."""
        if op.kind in ("enter", "exit", "view", "dims", "split", "call"):
            return 0.0
        gradients = sum(
            self.local_bytes(self.body.values[i], layout)
            for i, layout in zip(op.inputs + op.outputs, outcome.inputs + outcome.outputs, strict=True)
            if self.body.values[i].requires_grad and not self.body.values[i].parameter
        )
        if op.kind == "cross_entropy" and not outcome.sharded:
            # softmax and its gradient in float32, both of the logits' shape; the vocabulary-parallel form works in place
            gradients = max(gradients, 2 * prod(self.body.values[op.inputs[0]].shape) * self.micro_batch * DTYPE_BYTES["float32"])
        if op.kind == "embedding" and outcome.sharded:
            table = self.body.values[op.inputs[1]]
            gradients += prod(table.shape) * DTYPE_BYTES[self.dtype]
        return gradients

    def border(self, value: Value, source: Layout, target: Layout) -> tuple[Seconds, Seconds]:
        """Seconds (forward, backward) of redistributing `value` at a border."""
        if source == target:
            return 0.0, 0.0
        key = (value.id, source, target)
        if key not in self._border_costs:
            pair = BORDER_COLLECTIVES[source.kind, target.kind]
            size = value.bytes_at(self.micro_batch)
            forward, backward = (self._collective(kind, size) if kind else 0.0 for kind in pair)
            self._border_costs[key] = forward, backward
        return self._border_costs[key]

    def parameter_sync(self, value: Value, layout: Layout) -> Seconds:
        """Seconds of all-reducing the gradient of a GATHERED parameter, once a micro-batch."""
        return self._collective("all_reduce", prod(value.shape) * DTYPE_BYTES[self.dtype]) if layout == GATHERED else 0.0

    def _collective(self, kind: str, size: Bytes) -> Seconds:
        return collective_time(kind, size, self.tp, 1, self.hardware)

    def local_parameter(self, parameter: Parameter, layout: Layout) -> LocalParameter:
        shape = list(parameter.shape)
        if layout.sharded:
            shape[layout.dim] //= self.tp
        # FSDP cuts dim 0, but a packed parameter's dim 0 is strided already: it cuts dim 1 there
        return LocalParameter(parameter.name, tuple(shape), 1 if layout.blocks > 1 else 0, parameter.trainable)

    def enters(self, index: int) -> Iterator[tuple[int, str, str]]:
        """(position, block name, leaf) of the inputs of the `call` at `index` that an outer border may redistribute."""
        op = self.body.ops[index]
        name, body = self.blocks[op.block]
        for position, leaf in enumerate(self.bodies[body].input_leaves):
            if leaf:
                yield position, name, leaf

    def leaves(self, index: int) -> Iterator[tuple[int, str, str]]:
        """(position, block name, leaf) of the outputs of the `call` at `index`."""
        op = self.body.ops[index]
        name, body = self.blocks[op.block]
        for position, value in enumerate(self.bodies[body].outputs):
            yield position, name, border_leaf(self.bodies[body], value)


def stream_layout(value: Value, stream: Layout) -> Layout:
    """The layout in which a tensor passes between layers: the stream's if it carries a gradient, else replicated."""
    return stream if value.requires_grad else REPLICATE


def walk(model: LayerModel, sharding: Sharding) -> Iterator[Step]:
    """Follow `sharding` through the layer. Raises `UsageError`, naming operation and module, where a rule forbids it."""
    body = model.body
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

    for index, op in enumerate(body.ops):
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
    for position, name, leaf in model.enters(index):
        targets[position] = cross((name, "in", leaf), body.values[op.inputs[position]], sources[position])
    for position, target in enumerate(targets):
        wanted = stream_layout(body.values[op.inputs[position]], sharding.stream)
        if target != wanted:
            raise UsageError(
                f"block '{model.blocks[op.block][0]}' expects {wanted}, but its input {position} arrives as {target}."
            )
    results = [stream_layout(body.values[i], sharding.stream) for i in op.outputs]
    for position, name, leaf in model.leaves(index):
        results[position] = cross((name, "out", leaf), body.values[op.outputs[position]], results[position])
    return Outcome(sources, tuple(results), False)


def _fixed(model: LayerModel, index: int, sources: tuple[Layout, ...]) -> Outcome:
    op = model.body.ops[index]
    for outcome in outcomes(op, model.body, sources, model.tp, model.packings.get(index, ())):
        if outcome.inputs == sources:
            return outcome
    where = f"'{op.name}' in module '{op.module or '(the layer itself)'}'"
    raise UsageError(f"operation {where} cannot run on inputs {', '.join(map(str, sources))} with tp {model.tp}.")


def layer_cost(model: LayerModel, sharding: Sharding, only: Callable[[Step], bool] | None = None) -> LayerCost:
    """Price of a layer, or `only` of some of its steps: the embedding apart from the head, what is run again.

    Raises `UsageError` when the sharding is not legal for it.
    """
    body = model.body
    forward = backward = tp_forward = tp_backward = saved = temporary = 0.0
    layouts: dict[int, Layout] = {i: stream_layout(body.values[i], sharding.stream) for i in body.inputs}
    root: dict[int, int] = {i: i for i in body.inputs}
    counted: set[int] = set()
    synced: set[int] = set()
    inside: dict[int, tuple[int, Layout]] = {}
    named: set[str] = set()
    products = attention = 0.0, 0.0
    for step in walk(model, sharding):
        op, outcome = step.op, step.outcome
        layouts.update(zip(op.inputs, outcome.inputs, strict=True))
        layouts.update(zip(op.outputs, outcome.outputs, strict=True))
        wanted = only is None or only(step)
        if op.kind in ("enter", "exit"):
            source, target = op.inputs[0], op.outputs[0]
            f, b = model.border(body.values[source], outcome.inputs[0], outcome.outputs[0])
            if wanted:
                tp_forward, tp_backward = tp_forward + f, tp_backward + b
            moved = changes_memory(outcome.inputs[0], outcome.outputs[0])
            root[target] = target if moved else root.get(source, source)
            if op.kind == "enter" and op.module == "" and source in body.inputs:
                inside[root[target]] = (target, outcome.outputs[0])
            continue
        if op.kind == "call":
            f, b = call_borders(model, step.index, outcome, sharding.stream)
            if wanted:
                tp_forward, tp_backward = tp_forward + f, tp_backward + b
            root.update({i: i for i in op.outputs})
            continue
        if not wanted:
            root.update({i: shared_root(body, op, i, root) for i in op.outputs})
            continue
        named.update(name for i in op.inputs if (name := body.values[i].parameter))
        cost = model.op(step.index, outcome)
        forward, backward = forward + cost.forward, backward + cost.backward
        if op.kind == "attention":
            attention = attention[0] + cost.forward, attention[1] + cost.backward
        elif op.kind in MULTIPLIES:
            products = products[0] + cost.forward, products[1] + cost.backward
        tp_forward, tp_backward = tp_forward + cost.tp_forward, tp_backward + cost.tp_backward
        saved, temporary = saved + cost.saved_extra, max(temporary, cost.temporary)
        for i, layout in zip(op.inputs, outcome.inputs, strict=True):
            if body.values[i].parameter and i not in synced:
                synced.add(i)
                tp_backward += model.parameter_sync(body.values[i], layout)
        for i in op.outputs:
            root[i] = shared_root(body, op, i, root)
        for i in saved_values(body, op):
            r = root.get(i, body.values[i].storage)
            if r not in counted:
                counted.add(r)
                saved += model.local_bytes(body.values[r], layouts.get(r, layouts.get(i, REPLICATE)))
    inputs = sum(model.local_bytes(body.values[i], layout) for i, layout in inside.values() if body.values[i].requires_grad)
    own = [p for p in body.parameters if not p.buffer and (only is None or p.name in named)]
    parameters = tuple(model.local_parameter(p, sharding.layout(p.name) if p.trainable else REPLICATE) for p in own)
    buffers = sum(p.numel * DTYPE_BYTES[p.dtype] for p in body.parameters if p.buffer)
    return LayerCost(
        forward, backward, tp_forward, tp_backward, saved, inputs, temporary, parameters, buffers, products, attention
    )


def shared_root(body: Body, op: Op, output: int, root: dict[int, int]) -> int:
    """The memory that `output` lives in: that of the input it is a view of, else its own."""
    storage = body.values[output].storage
    for i in op.inputs:
        if storage != output and body.values[i].storage == storage:
            return root.get(i, i)
    return output


def saved_values(body: Body, op: Op) -> Iterator[int]:
    """The values that the operation keeps, as it sees them: past the borders that may have moved their data."""
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
        for position, name, leaf in model.enters(index):
            target = stream_layout(model.body.values[op.inputs[position]], stream)
            if outcome.inputs[position] != target:
                yield Border(name, "in", leaf, outcome.inputs[position], target)
        for position, name, leaf in model.leaves(index):
            source = stream_layout(model.body.values[op.outputs[position]], stream)
            if outcome.outputs[position] != source:
                yield Border(name, "out", leaf, source, outcome.outputs[position])
