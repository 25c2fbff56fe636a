"""What one layer adds to a step: seconds of every micro-batch, seconds once a step, bytes.

For a layer (cost.layer) with forward `F = forward + tp_forward`, recomputed forward `R = F` if the layer is recomputed,
backward `B = backward + tp_backward + R`, and

    g  all_gather of its parameters over dp_shard, in the compute dtype
    r  reduce_scatter of its gradients over dp_shard, in the reduce dtype
    a  all_reduce of its gradient shards over dp_replicate, once a step
    e(c, q) = max(0, q - c) + overlap min(c, q)        what communication of q seconds beside c seconds of computation costs

the seconds are (`layer_step`)

    zero   every micro-batch                      once a step, besides
    3      F + e(F, g) + B + e(B, g + r)          e(B, g + r + a) - e(B, g + r)
    2      F + e(F, g) + B + e(B, r)              e(B, r + a) - e(B, r)
    1      F + B                                  e(F, g) + e(B, r + a)

The gather of the next layer runs under this one's computation, whatever is longer counts, and hidden communication slows
computation down by the profile's `overlap`. Nothing hides the gather of the outer layer (embeddings and head), with which a
step begins, nor the reduction of its gradients, with which it ends: there `c = 0`. The sum over layers is exact for equal
layers and for unequal ones differs from an event simulation by at most one layer's communication. To the backward pass
comes the adding up of gradients, if there are several micro-batches; once a step comes the optimizer.

Bytes: states (parameters, gradients, optimizer) are cut by tp and by dp_shard; activations are kept for every micro-batch in
flight. While a layer's backward pass runs, it needs besides what it recomputes, its gathered parameters and those of its
neighbour, its unreduced gradients and its largest temporary: of these moments only the largest of a rank counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from autoplan.cost.collectives import collective_time
from autoplan.cost.compute import memory_time, optimizer_time
from autoplan.cost.layer import LayerCost
from autoplan.graph import DTYPE_BYTES
from autoplan.hardware import HardwareProfile
from autoplan.plan import MemoryBreakdown, TimeBreakdown
from autoplan.strategy import Mesh, Strategy
from autoplan.units import Bytes, Seconds
from autoplan.workload import OPTIMIZER_STATES, Workload


@dataclass(frozen=True)
class LayerStep:
    """One layer's share of a step. All but `moment` adds up over the layers of a stage; of `moment` the largest counts."""

    slot: TimeBreakdown
    """Seconds of every micro-batch."""
    once: TimeBreakdown
    """Seconds once a step."""
    forward: Seconds
    """What of `slot` is the forward pass, with the gather that it does not hide."""
    hidden: tuple[Seconds, Seconds]
    """Communication under computation, of every micro-batch and once a step."""
    states: MemoryBreakdown
    """Bytes whatever the number of micro-batches in flight."""
    kept: Bytes
    """Bytes saved for the backward pass of one micro-batch."""
    moment: MemoryBreakdown
    """Bytes while its backward pass runs."""

    @cached_property
    def slot_seconds(self) -> Seconds:
        return self.slot.total

    @cached_property
    def once_seconds(self) -> Seconds:
        return self.once.total

    @cached_property
    def state_bytes(self) -> Bytes:
        return self.states.total

    @cached_property
    def peak(self) -> Bytes:
        return self.moment.total

    def seconds(self, slots: float) -> Seconds:
        """Seconds of one slot of a step of `slots` slots (`schedule.slots`): what happens once is spread over them."""
        return self.slot_seconds + self.once_seconds / slots

    def bytes(self, in_flight: int) -> Bytes:
        return self.state_bytes + in_flight * self.kept


def layer_step(
    cost: LayerCost, strategy: Strategy, mesh: Mesh, micro_batches: int, hardware: HardwareProfile, load: Workload, *, outer: bool
) -> LayerStep:
    """Price of a layer's share of a step of `micro_batches` micro-batches; `outer`: nothing hides its communication."""
    zero = strategy.zero if mesh.dp_shard > 1 else 3
    again = strategy.recompute == "full"
    gather, reduce, final = dp_collectives(cost, mesh, hardware, load)
    forward = cost.forward + cost.tp_forward
    rerun = forward if again else 0.0
    backward = cost.backward + cost.tp_backward + rerun
    adding = _adding_up(cost, mesh, zero, hardware, load) if micro_batches > 1 else 0.0
    under_f, under_b = (0.0, 0.0) if outer else (forward, backward)
    sent = reduce + (gather if zero == 3 else 0.0)  # in the backward pass
    f, f_hidden = _beside(under_f, gather, hardware)
    b, b_hidden = _beside(under_b, sent, hardware)
    last, last_hidden = _beside(under_b, sent + final, hardware)
    if zero == 1:
        every, every_hidden = (0.0, 0.0), (0.0, 0.0)
        once, once_hidden = f + last, f_hidden + last_hidden
    else:
        every, every_hidden = (f, b), (f_hidden, b_hidden)
        once, once_hidden = last - b, last_hidden - b_hidden
    slot = TimeBreakdown(
        forward=cost.forward,
        backward=cost.backward + adding,
        recompute=rerun,
        tp_communication=cost.tp_forward + cost.tp_backward,
        dp_communication=sum(every),
    )
    step = TimeBreakdown(dp_communication=once, optimizer=_optimizer(cost, mesh, hardware, load))
    states, kept, moment = _memory(cost, again, zero, mesh, load, outer=outer)
    return LayerStep(slot, step, forward + every[0], (sum(every_hidden), once_hidden), states, kept, moment)


def _beside(cover: Seconds, sent: Seconds, hardware: HardwareProfile) -> tuple[Seconds, Seconds]:
    """e(c, q), and what is hidden."""
    hidden = min(cover, sent)
    return sent - hidden + hardware.overlap * hidden, hidden


def dp_collectives(cost: LayerCost, mesh: Mesh, hardware: HardwareProfile, load: Workload) -> tuple[Seconds, Seconds, Seconds]:
    """Seconds of (gathering parameters, reducing gradients over dp_shard, all-reducing their shards over dp_replicate)."""
    whole = sum(p.numel(1) for p in cost.parameters)
    trainable = sum(p.numel(1) for p in cost.parameters if p.trainable)
    reduced = trainable * DTYPE_BYTES[load.reduce_dtype]
    gather = collective_time("all_gather", whole * DTYPE_BYTES[load.compute_dtype], mesh.dp_shard, mesh.tp, hardware)
    reduce = collective_time("reduce_scatter", reduced, mesh.dp_shard, mesh.tp, hardware)
    final = collective_time("all_reduce", reduced / mesh.dp_shard, mesh.dp_replicate, mesh.tp * mesh.dp_shard, hardware)
    return gather, reduce, final


def _adding_up(cost: LayerCost, mesh: Mesh, zero: int, hardware: HardwareProfile, load: Workload) -> Seconds:
    """Seconds of adding one micro-batch's gradients to those of the others: both are read, the sum is written."""
    held = sum(p.numel(1 if zero == 1 else mesh.dp_shard) for p in cost.parameters if p.trainable)
    return memory_time(3 * held * DTYPE_BYTES[load.reduce_dtype], hardware.device)


def _optimizer(cost: LayerCost, mesh: Mesh, hardware: HardwareProfile, load: Workload) -> Seconds:
    numel = sum(p.numel(mesh.dp_shard) for p in cost.parameters if p.trainable)
    return optimizer_time(numel * DTYPE_BYTES[load.param_dtype], OPTIMIZER_STATES[load.optimizer], hardware.device)


def _memory(
    cost: LayerCost, again: bool, zero: int, mesh: Mesh, load: Workload, *, outer: bool
) -> tuple[MemoryBreakdown, Bytes, MemoryBreakdown]:
    numel = sum(p.numel(mesh.dp_shard) for p in cost.parameters)
    trainable = sum(p.numel(mesh.dp_shard) for p in cost.parameters if p.trainable)
    size, compute, reduce = (DTYPE_BYTES[t] for t in (load.param_dtype, load.compute_dtype, load.reduce_dtype))
    gathered = sum(p.numel(1) for p in cost.parameters) * compute
    whole = sum(p.numel(1) for p in cost.parameters if p.trainable)
    stays = zero < 3 or outer  # FSDP's root stays gathered for the whole backward pass
    states = MemoryBreakdown(
        parameters=numel * size,
        gradients=trainable * size,
        optimizer=trainable * size * OPTIMIZER_STATES[load.optimizer],
        buffers=cost.buffers,
        unsharded=(gathered if stays else 0.0) + (whole * reduce if zero == 1 else 0.0),
    )
    moment = MemoryBreakdown(
        unsharded=whole * (compute + reduce) + (0.0 if stays else 2 * gathered),
        recompute=cost.saved if again else 0.0,
        temporary=cost.temporary,
    )
    return states, cost.inputs if again else cost.saved, moment
