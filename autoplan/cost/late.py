"""What a backward pass leaves for later under the zero-bubble schedule: the gradients of weights (`apply.split` does it).

Of a linear with a weight of its own `w` of the backward pass's FLOPs are the gradient of the weight, as many as the forward pass
has: half of them, or all where its input needs no gradient; so are its seconds. Nothing else is split: attention, norms and
pointwise operations have no weights, or small ones, whose gradients come with those of inputs. Until then are held, for every
micro-batch that waits,

    the inputs of these linears, each memory once, and the gradients of their outputs

and, as soon as one micro-batch waits, the gradients of all other parameters in whole, if they would be reduced with every
micro-batch (level 2 and 3): FSDP reduces a layer's gradients together.

So rank `s` of `p`, with (p - s) K of activations under 1f1b, holds s D besides (see `schedule`), where D is what one micro-batch
leaves: together p D + (p - s)(K - D). That is how it is counted: to what stays comes p D, and a micro-batch in flight keeps K - D
(nothing, if that is less). While a layer's backward pass runs, later layers have freed what they kept, and hold D of it: K - D;
and what it leaves itself is counted with its own moment.
"""

from __future__ import annotations

from typing import NamedTuple

from autoplan.cost.prices import LayerModel
from autoplan.cost.rules import Outcome
from autoplan.cost.step import LayerStep
from autoplan.cost.walk import Step, changes_memory, shared_root, stream_layout, walk
from autoplan.graph import DTYPE_BYTES, Op
from autoplan.strategy import GATHERED, REPLICATE, Layout, Sharding
from autoplan.units import Bytes, Seconds
from autoplan.workload import Workload


class Late(NamedTuple):
    """Of one layer and one micro-batch on one device."""

    seconds: Seconds = 0.0
    bytes: Bytes = 0.0
    weights: float = 0.0
    """Elements of the weights whose gradients come late."""


def late(model: LayerModel, sharding: Sharding, regions: frozenset[int] | None = None, of: tuple[int, ...] = ()) -> Late:
    """What a layer leaves under a sharding; of the outer body some `regions`, `of` being that of every operation."""
    account = _Account(model, sharding)
    for step in walk(model, sharding, every=False):
        account.take(step, regions is None or of[step.index] in regions)
    return Late(account.seconds, account.bytes, account.weights)


def _split(model: LayerModel, op: Op, outcome: Outcome) -> str | None:
    """The name of the weight whose gradient comes late; None where it doesn't. Packed ones and those that need an all_reduce over
    tp are computed with as plain tensors (`apply.local_ops`), whose gradients autograd makes."""
    if op.kind != "linear" or len(op.inputs) < 2:
        return None
    name, layout = model.body.values[op.inputs[1]].parameter, outcome.inputs[1]
    if name is None or not model.body.parameter(name).trainable:
        return None
    return None if model.tp > 1 and (layout == GATHERED or layout.blocks > 1) else name


class _Account:
    def __init__(self, model: LayerModel, sharding: Sharding) -> None:
        self.model, body = model, model.body
        self.seconds = self.bytes = self.weights = 0.0
        self.layouts: dict[int, Layout] = {i: stream_layout(body.values[i], sharding.stream) for i in body.inputs}
        self.root = {i: i for i in body.inputs}
        self.counted: set[int] = set()
        self.named: set[str] = set()

    def take(self, step: Step, wanted: bool) -> None:
        op, outcome, model = step.op, step.outcome, self.model
        self.layouts.update(zip(op.outputs, outcome.outputs, strict=True))
        if op.kind in ("enter", "exit"):
            apart = changes_memory(outcome.inputs[0], outcome.outputs[0]) or step.index in model.doors
            self.root[op.outputs[0]] = op.outputs[0] if apart else self.root.get(op.inputs[0], op.inputs[0])
        elif op.kind == "call":
            self.root.update({i: i for i in op.outputs})
        else:
            self.root.update({i: shared_root(model.body, op, i, self.root) for i in op.outputs})
        name = _split(model, op, outcome) if wanted else None
        if name is None:
            return
        if not model.holder(name):  # experts that are dealt may be computed with as plain tensors, too
            self._weight(step, name)
        self.bytes += sum(
            model.local_bytes(model.body.values[i], layout) for i, layout in zip(op.outputs, outcome.outputs, strict=True)
        )
        root = self.root.get(op.inputs[0], op.inputs[0])
        if root not in self.counted:
            self.counted.add(root)
            self.bytes += model.local_bytes(model.body.values[root], self.layouts.get(root, REPLICATE))

    def _weight(self, step: Step, name: str) -> None:
        op, model = step.op, self.model
        forward, backward = op.forward_flops.at(1), op.backward_flops.at(1)
        self.seconds += model.op(step.index, step.outcome).backward * (min(1.0, forward / backward) if backward else 0.0)
        if name not in self.named:
            self.named.add(name)
            self.weights += model.local_parameter(model.body.parameter(name), step.outcome.inputs[1]).numel(1)


def split_step(
    step: LayerStep, left: Late, trained: float, ranks: int, reduced: bool, load: Workload, *, outer: bool
) -> LayerStep:
    """A layer's share of a step whose backward passes are split over `ranks` (see above); `trained`: elements of its trainable
    parameters, cut by tp alone; `reduced`: with every micro-batch."""
    others = max(0.0, trained - left.weights) if reduced else 0.0
    whole = others * max(DTYPE_BYTES[load.compute_dtype], DTYPE_BYTES[load.reduce_dtype])
    less = max(0.0, step.less - left.bytes) if outer else step.less
    waiting = ranks * left.bytes
    return step._replace(
        kept=max(0.0, step.kept - left.bytes),
        less=less,
        waiting=waiting,
        unsharded=step.unsharded + whole,
        inside=step.inside if outer else step.inside + left.bytes,
        reducing=step.buffer,
        ending=step.ending - (step.less - less),
        state_bytes=step.state_bytes + waiting + whole + step.less - less,
        late_seconds=left.seconds,
        early=0.0,
        come=0.0,
    )
