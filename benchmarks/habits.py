"""What a training framework does beside a layer's own kernels, or for them: cp's ring, DTensor's copies, the sums of asynchronous
tp, products and casts of fp8, the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from autoplan.cost.collectives import collective_time
from autoplan.cost.compute import MULTIPLIES, kernel_time, memory_time
from autoplan.cost.layer import LayerCost
from autoplan.cost.model import OUTER
from autoplan.cost.prices import LayerModel
from autoplan.cost.walk import Step, walk
from autoplan.graph import DTYPE_BYTES
from autoplan.strategy import PARTIAL, REPLICATE, Layout
from autoplan.units import Bytes, Seconds

if TYPE_CHECKING:
    from benchmarks.arrangement import Arranged, Arrangement


def ring(arranged: Arranged, block: LayerCost, at: Arrangement) -> tuple[Seconds, Seconds]:
    """Seconds (forward, backward) that passing keys and values round the cp ranks adds to a layer's attention; the backward pass
    sends their gradients too."""
    costs, waits = arranged.costs, arranged.software.ring_waits
    body, hardware = costs.graph.bodies[0], costs.hardware
    if at.cp == 1:
        return 0.0, 0.0
    operands = [op.inputs[:3] for op in body.ops if op.kind == "attention"]
    sent = [i for q, k, v in operands for i in ((q, q) if waits else (k, v))]
    size = sum(body.values[i].bytes_at(at.micro_batch * at.cp) for i in sent) / at.tp
    slower, wider = arranged.slower(at.cp * at.tp), DTYPE_BYTES["float32"] / DTYPE_BYTES[costs.workload.compute_dtype]
    gather = slower * collective_time("all_gather", size, at.cp, at.tp, hardware)
    reduce = slower * collective_time("reduce_scatter", wider * size if waits else size, at.cp, at.tp, hardware)
    if waits:
        return gather, gather + reduce
    return arranged.beside(block.attention[0], gather), arranged.beside(block.attention[1], gather + reduce)


def matrix_products(arranged: Arranged, at: Arrangement, only: Callable[[Step], bool]) -> tuple[Seconds, Seconds]:
    """Seconds (forward, backward) of the matrix products of `only` some of a layer's steps."""
    model = arranged.costs.layer_model(0, at.tp, at.samples, ep=at.ep)
    steps = [step for step in walk(model, at.block) if step.op.kind in MULTIPLIES - {"attention"} and only(step)]
    times = [product(arranged, model, step, at) for step in steps]
    return sum(forward for forward, _ in times), sum(backward for _, backward in times)


def product(arranged: Arranged, model: LayerModel, step: Step, at: Arrangement) -> tuple[Seconds, Seconds]:
    """Seconds (forward, backward) of a matrix product as the framework runs it; in fp8 one that is no linear takes as much less
    as the peak is more."""
    own, device, cost = arranged.software, model.hardware.device, model.op(step.index, step.outcome)
    forward, backward = cost.forward, cost.backward
    if at.float8:
        less = device.peak_of(model.dtype) / device.peak_of("float8")
        forward, backward = narrow(model, step) if step.op.kind == "linear" else (less * forward, less * backward)
        forward, backward = forward / own.float8, backward / own.float8 * own.float8_backward
    return own.compute * forward, own.compute * backward


def narrow(model: LayerModel, step: Step) -> tuple[Seconds, Seconds]:
    """Seconds (forward, backward) of a linear in fp8: operands of one byte, results in the compute dtype. A product reaches as
    much of the fp8 peak as one that takes as long reaches of the compute dtype's: it is one of so many FLOPs less."""
    op, device, wide = step.op, model.hardware.device, DTYPE_BYTES[model.dtype]
    (x, weight), (y,) = (
        [model.local_bytes(model.body.values[i], layout) for i, layout in zip(ids, layouts, strict=True)][:2]
        for ids, layouts in ((op.inputs, step.outcome.inputs), (op.outputs, step.outcome.outputs))
    )
    flops = op.forward_flops.at(model.samples) / (model.tp if step.outcome.sharded else 1)
    flops *= device.peak_of(model.dtype) / device.peak_of("float8")

    def seconds(first: Bytes, second: Bytes, result: Bytes) -> Seconds:
        return kernel_time("linear", flops, (first + second) / wide + result, 1, model.dtype, device)

    return seconds(x, weight, y), seconds(y, weight, x) + seconds(y, x, weight)


def loss(arranged: Arranged, at: Arrangement, head: tuple[Seconds, Seconds]) -> tuple[Seconds, Seconds]:
    """Seconds (forward, backward) of the head, which takes `head` with PyTorch's loss, with the framework's: compiled it reads
    the logits twice in the forward pass, and reads them and writes their gradient in the backward pass, in the compute dtype."""
    if not arranged.software.compiled_loss:
        return head
    model = arranged.costs.layer_model(OUTER, at.tp, at.samples)
    steps = list(walk(model, at.outer))
    last = max(step.index for step in steps if step.op.kind == "linear")
    costs = [model.op(step.index, step.outcome) for step in steps if step.index > last and step.op.kind not in ("enter", "exit")]
    logits = next(step for step in steps if step.index == last)
    moved = 2 * model.local_bytes(model.body.values[logits.op.outputs[0]], logits.outcome.outputs[0])
    again = memory_time(moved, arranged.costs.hardware.device)
    return head[0] - sum(cost.forward for cost in costs) + again, head[1] - sum(cost.backward for cost in costs) + again


def sums(arranged: Arranged, at: Arrangement, only: Callable[[Step], bool]) -> Seconds:
    """Seconds of adding up what the ranks sent of a layer's products: under asynchronous tp in a kernel after them."""
    if not (arranged.software.pieces and at.asynchronous):
        return 0.0
    model = arranged.costs.layer_model(0, at.tp, at.samples, ep=at.ep)
    moved = 0.0
    for step in walk(model, at.block):
        if step.op.kind == "exit" and step.outcome.inputs[0] == PARTIAL and only(step):
            for ids, layouts in ((step.op.inputs, step.outcome.inputs), (step.op.outputs, step.outcome.outputs)):
                moved += model.local_bytes(model.body.values[ids[0]], layouts[0])
    return memory_time(moved, arranged.costs.hardware.device)


def laid(arranged: Arranged, at: Arrangement, only: Callable[[Step], bool]) -> tuple[Seconds, Seconds]:
    """Seconds (forward, backward) of DTensor's copies: what is gathered along another dim than the first arrives rank after rank
    and is put in place, what is scattered along one is put in such an order before. Asynchronous tp has none."""
    if not (arranged.software.copies and at.tp > 1) or at.asynchronous:
        return 0.0, 0.0
    model, device = arranged.costs.layer_model(0, at.tp, at.samples, ep=at.ep), arranged.costs.hardware.device
    gathered = scattered = 0.0
    for step in filter(only, walk(model, at.block)):
        (before, *_), (after, *_) = step.outcome.inputs, step.outcome.outputs
        if step.op.kind == "enter" and before.sharded and before.dim and not after.sharded:
            gathered += 2 * model.body.values[step.op.inputs[0]].bytes_at(at.micro_batch)
        elif step.op.kind == "exit" and before == PARTIAL and after.sharded and after.dim:
            scattered += 2 * model.body.values[step.op.inputs[0]].bytes_at(at.micro_batch)
    size = 1 / DTYPE_BYTES[arranged.costs.workload.compute_dtype] if arranged.software.casts and at.float8 else 1.0
    return memory_time(size * gathered + scattered, device), memory_time(gathered + size * scattered, device)


def casts(arranged: Arranged, at: Arrangement, only: Callable[[Step], bool]) -> tuple[Seconds, Seconds]:
    """Seconds (forward, backward) of bringing operands into fp8's range, tensor by tensor: each is read for its largest element,
    read again and written. The backward pass does so with a linear's input once more, which its product wants laid out the other
    way, and with the gradient of the result, which it wants both ways. What tp gathers is cast before, and turned after."""
    if not (arranged.software.casts and at.float8):
        return 0.0, 0.0
    costs = arranged.costs
    model, wide = costs.layer_model(0, at.tp, at.samples, ep=at.ep), DTYPE_BYTES[costs.workload.compute_dtype]

    def moved(value: int, layout: Layout, each: float) -> Bytes:
        """`each` bytes an element of this device's."""
        return model.local_bytes(model.body.values[value], layout) / wide * each

    once, turned = 2 * wide + 1, 2.0
    origins: dict[int, tuple[int, Layout]] = {}
    cast: set[int] = set()
    forward = backward = 0.0
    for step in walk(model, at.block):
        op, (before, *_), (after, *_) = step.op, step.outcome.inputs, step.outcome.outputs
        if op.kind in ("enter", "exit"):
            origins[op.outputs[0]] = origins.get(op.inputs[0], (op.inputs[0], before))
            if before == PARTIAL and after.sharded:  # its gradient is gathered
                backward += moved(op.outputs[0], after, once) + moved(op.outputs[0], REPLICATE, turned)
        elif op.kind == "linear":
            value, layout = origins.get(op.inputs[0], (op.inputs[0], before))
            if value not in cast:  # as another linear's input it is cast once for both
                forward += moved(value, layout, once) if only(step) else 0.0
                backward += moved(value, before, turned) if layout.sharded and not before.sharded else moved(value, before, once)
                cast.add(value)
            backward += 0.0 if after == PARTIAL else moved(op.outputs[0], after, once + 1)
    return memory_time(forward, costs.hardware.device), memory_time(backward, costs.hardware.device)
