"""What one layer costs on one device, for one micro-batch, under one sharding of the `tp` axis.

For a layer (a `Body`) whose operations `o` run with the layouts that `cost.walk` finds, at the prices of `cost.prices`,

    forward, backward  = sum of the operations' seconds
    tp                 = sum over borders of their collectives, + all_reduce of the gradient of every GATHERED parameter
    saved              = sum over distinct memories that the backward pass reads, local bytes, each once
    peak, beneath      see cost.peak

(`layer_cost`). The search adds up the same terms operation by operation; this is the sum that a plan's prediction uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autoplan.cost.compute import MULTIPLIES
from autoplan.cost.parameters import LocalParameter, Sizes, sizes
from autoplan.cost.peak import grown, made, moved
from autoplan.cost.prices import LayerModel
from autoplan.cost.selective import Kept, Selection
from autoplan.cost.walk import Step, call_borders, changes_memory, saved_values, shared_root, stream_layout, walk
from autoplan.graph import Op
from autoplan.strategy import REPLICATE, Layout, Sharding
from autoplan.units import Bytes, Seconds

NOTHING = Kept()


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
    peak: Bytes
    """Most that its backward pass holds, of one micro-batch: with what is saved, and with unreduced gradients."""
    parameters: tuple[LocalParameter, ...]
    buffers: Bytes
    products: tuple[Seconds, Seconds] = (0.0, 0.0)
    """What of `forward` and `backward` are matrix products."""
    attention: tuple[Seconds, Seconds] = (0.0, 0.0)
    """What of `forward` and `backward` are attention kernels."""
    kept: Kept = NOTHING
    """Under selective recomputation, besides the inputs."""
    rerun: Seconds = 0.0
    """Of `forward` and `tp_forward`: what runs again when the whole layer is recomputed (`Body.rerun`)."""
    beneath: Bytes = 0.0
    """Of the outer body: what is there while the layers' backward passes run."""
    batch: Bytes = 0.0
    """Of the outer body: what the model is given."""

    def sizes(self, dealt: bool, shards: int) -> Sizes:
        """See `cost.data_parallel.HasParameters`."""
        return sizes(self.parameters, dealt, shards)


def layer_cost(model: LayerModel, sharding: Sharding, only: Callable[[Step], bool] | None = None) -> LayerCost:
    """Price of a layer, or `only` of some of its steps: what is run again.

    Raises `UsageError` when the sharding is not legal for it.
    """
    return layer_costs(model, sharding, [only])[0]


def layer_costs(model: LayerModel, sharding: Sharding, parts: Sequence[Callable[[Step], bool] | None]) -> list[LayerCost]:
    """`layer_cost` of several sets of steps, followed together: all, the embedding, the head."""
    accounts = [_Account(model, sharding) for _ in parts]
    for step in walk(model, sharding, every=False):
        for account, only in zip(accounts, parts, strict=True):
            account.take(step, only is None or only(step))
    return [account.total(everything=only is None) for account, only in zip(accounts, parts, strict=True)]


class _Account:
    """Adds up a layer step by step. `root` maps a value to the one that allocated its memory."""

    def __init__(self, model: LayerModel, sharding: Sharding) -> None:
        self.model, self.sharding, self.body = model, sharding, model.body
        self.forward = self.backward = self.tp_forward = self.tp_backward = self.saved = self.peak = self.beneath = 0.0
        self.rerun = 0.0
        self.products = self.attention = (0.0, 0.0)
        self.kept, self.selection = NOTHING, Selection(model)
        self.layouts: dict[int, Layout] = {i: stream_layout(self.body.values[i], sharding.stream) for i in self.body.inputs}
        self.root = {i: i for i in self.body.inputs}
        self.counted: set[int] = set()
        self.synced: set[int] = set()
        self.inside: dict[int, tuple[int, Layout]] = {}
        self.named: set[str] = set()
        self.called = False

    def take(self, step: Step, wanted: bool) -> None:
        """Follow a step; count it if it is wanted."""
        op, outcome, body = step.op, step.outcome, self.body
        self.layouts.update(zip(op.inputs, outcome.inputs, strict=True))
        self.layouts.update(zip(op.outputs, outcome.outputs, strict=True))
        if op.kind in ("enter", "exit"):
            self._border(step, wanted)
        elif op.kind == "call":
            if wanted:
                self._send(step, *call_borders(self.model, step.index, outcome, self.sharding.stream))
            self._keep(op)
            self.beneath, self.called = max(self.beneath, self.saved), True
            self.root.update({i: i for i in op.outputs})
        else:
            self.root.update({i: shared_root(body, op, i, self.root) for i in op.outputs})
            if wanted:
                self._operation(step)

    def _border(self, step: Step, wanted: bool) -> None:
        source, target = step.op.inputs[0], step.op.outputs[0]
        before, after = step.outcome.inputs[0], step.outcome.outputs[0]
        if wanted:
            self._send(step, *self.model.border(self.body.values[source], before, after))
            self.kept = self.kept.plus(self.selection.border(step.index, before, after))
            self._holds(step.index, moved(self.model, self.body.values[source], before, after), 0.0)
        apart = changes_memory(before, after) or step.index in self.model.doors
        self.root[target] = target if apart else self.root.get(source, source)
        if step.op.kind == "enter" and step.op.module == "" and source in self.body.inputs:
            self.inside[self.root[target]] = (target, after)

    def _send(self, step: Step, forward: Seconds, backward: Seconds) -> None:
        self.tp_forward, self.tp_backward = self.tp_forward + forward, self.tp_backward + backward
        self._repeat(step, forward)

    def _repeat(self, step: Step, forward: Seconds) -> None:
        self.rerun += forward if step.index < self.body.rerun else 0.0

    def _operation(self, step: Step) -> None:
        op, values = step.op, self.body.values
        cost = self.model.op(step.index, step.outcome)
        self.forward, self.backward = self.forward + cost.forward, self.backward + cost.backward
        if op.kind == "attention":
            self.attention = self.attention[0] + cost.forward, self.attention[1] + cost.backward
        elif op.kind in MULTIPLIES:
            self.products = self.products[0] + cost.forward, self.products[1] + cost.backward
        self._send(step, cost.tp_forward, cost.tp_backward)
        self._repeat(step, cost.forward)
        self.kept = self.kept.plus(self.selection.operation(step.index, step.outcome))
        for i, layout in zip(op.inputs, step.outcome.inputs, strict=True):
            name = values[i].parameter
            if name and i not in self.synced:
                self.synced.add(i)
                self.named.add(name)
                self.tp_backward += self.model.parameter_sync(values[i], layout)
        self.saved += cost.saved_extra
        self._keep(op)
        self._holds(step.index, cost.temporary, made(self.model, step.index, step.outcome))

    def _keep(self, op: Op) -> None:
        for i in saved_values(self.body, op):
            r = self.root.get(i, self.body.values[i].storage)
            if r not in self.counted:
                self.counted.add(r)
                self.saved += self._size(r, i)

    def _holds(self, index: int, besides: Bytes, gradients: Bytes) -> None:
        """See `cost.peak`."""
        waiting = {self.root.get(i, self.body.values[i].storage): i for i in self.body.waiting[index]}
        at_it = self.saved + besides + sum(self._size(r, i) for r, i in waiting.items())
        self.peak = grown(self.peak, at_it, gradients)
        self.beneath += gradients if self.called else 0.0

    def _size(self, root: int, value: int) -> Bytes:
        """Bytes of the memory in which a value lives."""
        return self.model.local_bytes(self.body.values[root], self.layouts.get(root, self.layouts.get(value, REPLICATE)))

    def total(self, everything: bool) -> LayerCost:
        """The sum; with `everything`, parameters that no step has used belong to the layer too."""
        body, model = self.body, self.model
        kept = [(body.values[i], layout) for i, layout in self.inside.values() if body.values[i].requires_grad]
        own = [p for p in body.parameters if not p.buffer and (everything or p.name in self.named)]
        return LayerCost(
            self.forward,
            self.backward,
            self.tp_forward,
            self.tp_backward,
            self.saved,
            sum(model.local_bytes(value, layout) for value, layout in kept),
            self.peak,
            tuple(model.local_parameter(p, self.sharding.layout(p.name) if p.trainable else REPLICATE) for p in own),
            model.buffers,
            self.products,
            self.attention,
            self.kept,
            self.rerun,
            self.beneath,
            model.batch,
        )
