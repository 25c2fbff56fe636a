"""The tp, cp and ep collectives of one micro-batch of a layer, from its sharding and the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

from autoplan.cost.prices import LayerModel
from autoplan.cost.rules import BORDER_COLLECTIVES
from autoplan.cost.walk import Step, stream_layout, walk
from autoplan.graph import DTYPE_BYTES, Value
from autoplan.strategy import GATHERED, Layout, Sharding, Strategy
from autoplan.units import Bytes

Collective = tuple[str, Bytes]
"""(kind, size of the whole tensor)"""


@dataclass(frozen=True, slots=True)
class _Sent:
    """What one step of the forward pass sends, and the gradients of what it made."""

    index: int
    inside: bool
    """Within the layer's own forward, not in a hook at its border, which recomputation leaves alone."""
    forward: tuple[Collective, ...] = ()
    backward: tuple[Collective, ...] = ()
    kept: bool = False
    """What it brings is itself kept for the backward pass."""


def tensor_parallel(model: LayerModel, strategy: Strategy, wanted: Callable[[Step], bool]) -> Iterator[Collective]:
    """Over tp: forward, recomputation and backward of the `wanted` steps.

    Raises `UsageError` where the sharding breaks a rule.
    """
    return _passes(model, strategy, wanted, _over_tp)


def context_parallel(model: LayerModel, strategy: Strategy, wanted: Callable[[Step], bool]) -> Iterator[Collective]:
    """The same over cp."""
    return _passes(model, strategy, wanted, _over_cp)


def expert_parallel(model: LayerModel, strategy: Strategy, wanted: Callable[[Step], bool]) -> Iterator[Collective]:
    """The same over ep: what a device sends to the experts of others. The rows of a tp group are gathered over tp."""
    return _passes(model, strategy, wanted, _over_ep)


def _passes(
    model: LayerModel,
    strategy: Strategy,
    wanted: Callable[[Step], bool],
    sent_by: Callable[[LayerModel, Step, Layout], Iterator[_Sent]],
) -> Iterator[Collective]:
    again = strategy.recompute == "full" and not model.outer
    for step in filter(wanted, walk(model, strategy.sharding)):
        for sent in sent_by(model, step, strategy.sharding.stream):
            yield from sent.forward
            yield from sent.backward
            if again and sent.inside and (sent.kept or sent.index < model.body.rerun):
                yield from sent.forward


def _over_cp(model: LayerModel, step: Step, stream: Layout) -> Iterator[_Sent]:
    op, outcome, values = step.op, step.outcome, model.body.values
    brought, back = (tuple(("all_gather", size) for size in model.gathers(step.index, outcome, b)) for b in (False, True))
    if brought or back:
        yield _Sent(step.index, True, brought, back)
    if op.kind == "attention":
        exchanged, ring = model.exchanged(op, outcome), model.ring(op, outcome)
        rounds = (ring.forward, ring.backward) if ring else ((), ())
        forward, backward = (tuple(("all_to_all", size) for size in (*exchanged, *some)) for some in rounds)
        yield _Sent(step.index, True, forward, backward)
    elif op.kind == "cross_entropy":  # how many labels there are, and the loss
        sizes = DTYPE_BYTES["int64"], DTYPE_BYTES[values[op.outputs[0]].dtype]
        yield _Sent(step.index, True, tuple(("all_reduce", float(size)) for size in sizes))


def _over_ep(model: LayerModel, step: Step, stream: Layout) -> Iterator[_Sent]:
    dealing = model.dealing(step.index)
    forward, backward = (
        tuple((kind, size / model.ep) for kind, size, _ in sent if kind == "all_to_all")
        for sent in (dealing.forward, dealing.backward)
    )
    weights = [each.weights for each in model.dealt if each.last == step.index]
    kept = any(i is not None and model.body.values[i].requires_grad for i in weights)  # results, for the gradient of weights
    yield _Sent(step.index, True, forward, backward, kept)


def _over_tp(model: LayerModel, step: Step, stream: Layout) -> Iterator[_Sent]:
    op, outcome, values = step.op, step.outcome, model.body.values
    dealing = model.dealing(step.index)
    forward, backward = (
        tuple((kind, size) for kind, size, _ in sent if kind != "all_to_all") for sent in (dealing.forward, dealing.backward)
    )
    if forward or backward:
        yield _Sent(step.index, True, forward, backward)
    if op.kind in ("enter", "exit"):
        yield _border(model, step, values[op.inputs[0]], outcome.inputs[0], outcome.outputs[0], op.module != "")
    elif op.kind == "call":
        for i, layout in zip(op.inputs, outcome.inputs, strict=True):
            yield _border(model, step, values[i], layout, stream_layout(values[i], stream), False)
        for i, layout in zip(op.outputs, outcome.outputs, strict=True):
            yield _border(model, step, values[i], stream_layout(values[i], stream), layout, False)
    elif op.kind == "cross_entropy" and outcome.sharded:
        rows = values[op.inputs[0]].shape[0] * model.samples * DTYPE_BYTES["float32"]
        yield _Sent(step.index, True, (("all_reduce", rows), ("all_reduce", 2 * rows)))


def _border(model: LayerModel, step: Step, value: Value, source: Layout, target: Layout, inside: bool) -> _Sent:
    if source == target:
        return _Sent(step.index, inside)
    size = value.bytes_at(model.samples)
    forward, backward = BORDER_COLLECTIVES[source.kind, target.kind]
    return _Sent(step.index, inside, _one(forward, size), _one(backward, size if value.requires_grad else 0))


def _one(kind: str | None, size: Bytes) -> tuple[Collective, ...]:
    return ((kind, size),) if kind and size else ()


def parameter_gradients(model: LayerModel, sharding: Sharding, wanted: Callable[[Step], bool]) -> Iterator[int]:
    """Elements of each GATHERED parameter that the `wanted` steps use: its gradient needs an all_reduce."""
    values = model.body.values
    steps = [step for step in walk(model, sharding) if wanted(step)]
    used = {i: layout for s in steps for i, layout in zip(s.op.inputs, s.outcome.inputs, strict=True) if values[i].parameter}
    return (prod(values[i].shape) for i, layout in used.items() if layout == GATHERED and values[i].requires_grad)
