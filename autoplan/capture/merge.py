"""Recordings of two and of three samples become one `Graph` whose costs are affine in the batch.

Samples may meet each other (a contrastive loss compares all pairs): a tensor then has two dims that grow with the batch
and costs are quadratic. A third recording fits them, and the graph holds the chord up to a micro-batch of `MEETING`,
which is never too low below it; such operations are opaque, and the user is warned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from autoplan.capture.bundle import bundle
from autoplan.capture.private import storage_key
from autoplan.capture.record import Recorder
from autoplan.capture.scope import Call, Item, Owned, Scope
from autoplan.errors import UsageError
from autoplan.graph import Block, Body, Cost, Graph, Op, Parameter, Value

BATCHES = (2, 3)
"""The two batch sizes. Neither is 1, so that no dim of length one is taken for the batch."""

MEETING = 1024
"""The micro-batch up to which quadratic costs are not underestimated."""

SAME = "Capture needs a program that does not depend on the batch size."


def samples_meet(two: Recorder, three: Recorder) -> bool:
    """Whether a tensor has more than one dim that grows with the batch."""
    scopes = [(two.outer, three.outer), *((scope, three.layers.get(layer)) for layer, scope in two.layers.items())]
    pairs = [pair for a, b in scopes if b is not None for pair in zip(a.items, b.items, strict=False)]
    return any(len(_grows(a, b)) > 1 for a, b in pairs if len(a.shape) == len(b.shape))


def _grows(two: Item, three: Item) -> list[int]:
    return [dim for dim, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]


def merge(name: str, dtype: str, root: nn.Module, recorders: Sequence[Recorder], batches: Sequence[int]) -> Graph:
    """The graph of a model that was recorded at some batch sizes. Raises `UsageError` when the batch changes more than sizes."""
    merger = _Merger(name, root, tuple(batches), recorders[0].owned)
    two, three = recorders[:2]
    if any(list(two.layers) != list(other.layers) for other in recorders):
        raise UsageError(f"{name} runs other layers for a batch of {batches[1]} than for a batch of {batches[0]}.", SAME)
    bodies: dict[Body, int] = {}
    known: dict[tuple[int, ...], int] = {}
    blocks = []
    for layer in two.layers:
        scopes = [recorder.layers[layer] for recorder in recorders]
        key = tuple(id(scope) for scope in scopes)
        if key not in known:
            known[key] = bodies.setdefault(merger.body(scopes), len(bodies))
        blocks.append(Block(layer, known[key]))
    outer = merger.body([recorder.outer for recorder in recorders])
    inputs = tuple(
        (leaf, outer.values[i].shape, outer.values[i].dtype) for leaf, i in zip(outer.input_leaves, outer.inputs, strict=True)
    )
    return Graph(
        name,
        dtype,
        outer,
        tuple(bodies),
        tuple(blocks),
        two.tied,
        inputs,
        tuple({**two.warnings, **three.warnings, **merger.warnings}),
    )


class _Merger:
    """Merges the recordings of one body at several batch sizes."""

    def __init__(self, name: str, root: nn.Module, batches: tuple[int, ...], owned: Mapping[int, Owned]) -> None:
        self.warnings: dict[str, None] = {}
        self._name = name
        self._root = root
        self._batches = batches
        self._owned = owned

    def body(self, scopes: Sequence[Scope]) -> Body:
        bundle(scopes, self._batches)
        two, three = scopes[:2]
        if any(len(two.calls) != len(other.calls) or len(two.items) != len(other.items) for other in scopes):
            raise UsageError(f"{self._name} {self._first_difference(two, three)}.", SAME)
        users = {value: call for call in reversed(two.calls) for value in call.outputs}
        values = tuple(self._value(i, a, b, users.get(i)) for i, (a, b) in enumerate(zip(two.items, three.items, strict=True)))
        wide = {i for i, (a, b) in enumerate(zip(two.items, three.items, strict=True)) if len(_grows(a, b)) > 1}
        kept: list[set[int]] = [set() for _ in scopes]
        ops = tuple(self._op(calls, scopes, values, kept) for calls in zip(*(scope.calls for scope in scopes), strict=True))
        ops = tuple(_opaque(op) if wide.intersection((*op.inputs, *op.outputs)) else op for op in ops)
        parameters = _parameters(self._root, two.name, self._owned)
        return Body(values, ops, tuple(two.inputs), tuple(two.outputs), parameters, tuple(two.input_leaves))

    def _first_difference(self, two: Scope, three: Scope) -> str:
        where = f" in {two.name}" if two.name else ""
        for a, b in zip(two.calls, three.calls, strict=False):
            if (a.kind, a.name, a.module, a.inputs, a.outputs) != (b.kind, b.name, b.module, b.inputs, b.outputs):
                return self._runs(a, b) + where
        return f"runs {len(two.calls)} operations for a batch of {self._batches[0]} and {len(three.calls)} for one more{where}"

    def _runs(self, two: Call, three: Call) -> str:
        first, second = self._batches[:2]
        here, there = (call.place or call.module or "the model" for call in (two, three))
        return f"runs {two.name} at {here} for a batch of {first}, where {there} runs {three.name} for a batch of {second}"

    def _value(self, index: int, two: Item, three: Item, maker: Call | None) -> Value:
        small, large = self._batches[:2]
        where = f"{maker.name} at {maker.place}" if maker is not None and maker.place else "an input of the model"
        made = f"makes a tensor of {list(two.shape)} for a batch of {small} and of {list(three.shape)} for a batch of {large}"
        shape, batch_dim = list(two.shape), None
        for dim in _grows(two, three):
            length, rest = divmod(three.shape[dim] - two.shape[dim], large - small)
            if rest or two.shape[dim] != small * length:
                raise UsageError(f"{where} {made}.", "Capture needs sizes that are proportional to the batch.")
            shape[dim] = length if batch_dim is None else length * MEETING
            if batch_dim is not None:
                self._warn_of_meeting(where)
            batch_dim = dim if batch_dim is None else batch_dim
        if two.each_sample and batch_dim is None and shape:
            batch_dim = 0
        return Value(index, tuple(shape), two.dtype, batch_dim, two.requires_grad, two.storage, two.parameter)

    def _warn_of_meeting(self, where: str) -> None:
        if not self.warnings:
            self.warnings[
                f"samples meet each other at {where}: costs there grow with the square of the batch and are taken high, for a "
                f"micro-batch of {MEETING}; on several devices each one compares its own samples"
            ] = None

    def _op(self, calls: Sequence[Call], scopes: Sequence[Scope], values: tuple[Value, ...], kept: Sequence[set[int]]) -> Op:
        two = calls[0]
        same = ("kind", "name", "module", "inputs", "outputs", "leaf", "block")
        for other in calls[1:]:
            if any(getattr(two, key) != getattr(other, key) for key in same):
                raise UsageError(f"{self._name} {self._runs(two, other)}.", SAME)
        found = [_saved(call, scope, values, seen) for call, scope, seen in zip(calls, scopes, kept, strict=True)]
        return Op(
            two.kind,
            two.name,
            two.module,
            two.inputs,
            two.outputs,
            two.dims,
            two.dim_map,
            two.linear,
            two.causal,
            two.dropout,
            two.leaf,
            two.block,
            self._cost([call.forward.flops for call in calls]),
            self._cost([call.backward.flops for call in calls]),
            self._cost([call.forward.bytes for call in calls]),
            self._cost([call.backward.bytes for call in calls]),
            two.forward.kernels,
            two.backward.kernels,
            found[0][0],
            self._cost([extra for _, extra in found]),
        )

    def _cost(self, at: Sequence[float]) -> Cost:
        """The line through two points; for three that are on none, the chord of their parabola from 0 to MEETING."""
        a, b = self._batches[:2]
        slope = (at[1] - at[0]) / (b - a)
        if len(at) == 2:
            return Cost(slope, at[0] - a * slope)
        c = self._batches[2]
        bend = ((at[2] - at[1]) / (c - b) - slope) / (c - a)
        start = slope - bend * (a + b)
        return Cost(start + max(bend, 0.0) * MEETING, at[0] - a * start - a * a * bend)


def _opaque(op: Op) -> Op:
    return op if op.kind in ("enter", "exit", "call") else replace(op, kind="opaque", dims=(), dim_map=(), linear=False)


def _saved(call: Call, scope: Scope, values: tuple[Value, ...], kept: set[int]) -> tuple[tuple[int, ...], float]:
    """The values that a call keeps, and the bytes of kept memory that is no value.

    `kept`: what earlier calls counted.
    """
    saved: dict[int, None] = {}
    extra = 0.0
    for tensor in call.packed:
        root = scope.root(tensor)
        if root is not None:
            if values[root].parameter is not None or _constant(scope, root):
                continue
            saved[root] = None
        key = storage_key(tensor)
        if key not in kept:
            kept.add(key)
            extra += tensor.untyped_storage().nbytes() - (0 if root is None else _size(scope.items[root].tensor))
    return tuple(saved), extra


def _size(tensor: Tensor) -> int:
    """Bytes that the value stands for; a slice keeps all of its storage, an expanded tensor less than its size."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _constant(scope: Scope, root: int) -> bool:
    return any(scope.items[root].tensor is tensor for tensor in scope.constants)


def _parameters(root: nn.Module, block: str, owned: Mapping[int, Owned]) -> tuple[Parameter, ...]:
    """All parameters and buffers under `block` and under no other ("" : under none), tied ones under their first name."""
    found = []
    prefix = f"{block}." if block else ""
    module = root.get_submodule(block)
    seen: set[int] = set()
    for buffer, table in ((False, module.named_parameters()), (True, module.named_buffers())):
        for _, tensor in table:
            home = owned[id(tensor)]
            if home.block == block and id(tensor) not in seen:
                seen.add(id(tensor))
                found.append(_parameter(home.name.removeprefix(prefix), tensor, buffer))
    return tuple(found)


def _parameter(name: str, tensor: Tensor, buffer: bool) -> Parameter:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Parameter(name, tuple(tensor.shape), dtype, trainable=tensor.requires_grad and not buffer, buffer=buffer)
