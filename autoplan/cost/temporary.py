"""What an operation holds while it runs: `d_k` of cost.peak."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from autoplan.cost.rules import Outcome
from autoplan.graph import DTYPE_BYTES, Op, Value
from autoplan.units import Bytes

if TYPE_CHECKING:
    from autoplan.cost.prices import LayerModel


def temporary(model: LayerModel, op: Op, outcome: Outcome) -> Bytes:
    """The larger of its forward pass (`_forward`) and its backward pass, in which gradients of inputs and outputs meet."""
    forward, values = _forward(model, op, outcome), model.body.values
    if op.kind in ("view", "dims", "call"):
        return forward
    backward = sum(
        model.local_bytes(values[i], layout)
        for i, layout in zip(op.inputs + op.outputs, outcome.inputs + outcome.outputs, strict=True)
        if values[i].requires_grad and not values[i].parameter
    )
    if op.kind == "cross_entropy" and not outcome.sharded:
        # softmax and its gradient in float32, both of the logits' shape; the vocabulary-parallel form works in place
        backward = max(backward, 2 * prod(values[op.inputs[0]].shape) * model.samples * DTYPE_BYTES["float32"])
    if op.kind == "embedding" and outcome.inputs[1].sharded and outcome.inputs[1].dim == 0:
        # the gradient of the whole table first: DTensor has no sharded rule for it
        backward += prod(values[op.inputs[1]].shape) * DTYPE_BYTES[model.dtype]
    if op.name == "pow":  # gradient * (exponent * x ** (exponent - 1)), each its own kernel
        backward += 2 * sum(model.local_bytes(values[i], layout) for i, layout in zip(op.outputs, outcome.outputs, strict=True))
    return max(forward, backward)


def _forward(model: LayerModel, op: Op, outcome: Outcome) -> Bytes:
    """What an operation that allocates a tensor works on and returns, each memory once, needed later or not: a buffer of zeros, a
    table that is summed up at once."""
    values = model.body.values
    if op.kind in ("enter", "exit", "call") or all(values[i].storage != i for i in op.outputs):
        return 0.0
    operands = zip(op.inputs + op.outputs, outcome.inputs + outcome.outputs, strict=True)
    memories = {values[i].storage: layout for i, layout in operands}
    held = sum(model.local_bytes(values[i], layout) for i, layout in memories.items() if not values[i].parameter)
    if op.kind == "cross_entropy":
        held += _cast_from(model, values[values[op.inputs[0]].storage]) / (model.tp if outcome.sharded else 1)
    return held


def _cast_from(model: LayerModel, value: Value) -> Bytes:
    """What a tensor was made from that differs in dtype alone: the model's code may still hold it."""
    makers = (op.inputs for op in model.body.ops if value.id in op.outputs and op.kind == "pointwise")
    sources = (model.body.values[i] for inputs in makers for i in inputs)
    return sum(v.bytes_at(model.samples) for v in sources if v.shape == value.shape and v.dtype != value.dtype)
