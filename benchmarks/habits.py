"""What a training framework does beside a layer's own kernels: cp's ring, FSDP's copies, the sums of asynchronous tp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from autoplan.cost.collectives import collective_time
from autoplan.cost.compute import memory_time
from autoplan.cost.layer import LayerCost
from autoplan.cost.walk import Step, walk
from autoplan.graph import DTYPE_BYTES
from autoplan.strategy import PARTIAL
from autoplan.units import Seconds
from benchmarks.memory import numel

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


def copies(arranged: Arranged, cost: LayerCost, at: Arrangement) -> tuple[Seconds, Seconds]:
    """Seconds (forward, backward) of FSDP's copies beside the products: gathered parameters are put where they belong, gradients
    into what is reduced, each read and written."""
    if not (arranged.software.copies and at.zero == 3):
        return 0.0, 0.0
    compute, device = DTYPE_BYTES[arranged.costs.workload.compute_dtype], arranged.costs.hardware.device
    out, back = (memory_time(numel(cost) * each, device) for each in (2 * compute, compute + arranged.gradient()))
    return out, (0.0 if at.stays else out) + back


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
