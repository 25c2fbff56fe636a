"""What one layer adds to a step: seconds of every micro-batch, seconds once a step, bytes.

For a layer (cost.layer) with forward `F = forward + tp_forward`, recomputed forward `R = rerun` if the layer is recomputed in
full (F without what comes after the last operation that saves something) or less if selectively (cost.selective), backward
`B = backward + tp_backward + R`, and

    g  all_gather of its parameters over dp_shard (and cp), in the compute dtype
    r  reduce_scatter of its gradients over dp_shard, in the reduce dtype
       (those of experts that are dealt over ep: over efsdp)
    a  all_reduce of its gradient shards over dp_replicate, once a step
    u  FSDP's copies of gathered parameters to where they belong, read and written in the compute dtype; on one rank alone it
       casts them first (`wait_for_unshard`)
    p  ... of gradients into what is reduced, read in the compute dtype, written in the reduce dtype; on one rank alone it copies
       what it would reduce once more (`foreach_reduce`)
    e(c, q) = max(0, q - c) + overlap min(c, q)        what communication of q seconds beside c seconds of computation costs

the seconds are (`layer_step`), with F' = F + u and B' = B + p, or B + u + p under level 3, and e' = e(F', g),

    zero   every micro-batch                      once a step, besides
    3      F' + e' + B' + e(B', g + r)            e(B', g + r + a) - e(B', g + r)
    2      F' + e' + B' + e(B', r)                e(B', r + a) - e(B', r)
    1      F + B                                  u + e' + p + e(B', r + a)

Copies run between the layers' own kernels, where computation would (torch.distributed.fsdp, `foreach_all_gather_copy_out` and
`foreach_reduce_scatter_copy_in`). The gather of the next layer runs under this one's computation, whatever is longer counts,
and hidden communication slows computation down by the profile's `overlap`. Nothing hides the gather of the outer layer
(embeddings and head), with which a step begins, nor the reduction of its gradients, with which it ends: there `c = 0`. For
equal layers the sum is what the event simulation (cost.events) takes, or less by at most one layer's communication in each
pass. To the backward pass comes the adding up of gradients, if there are several micro-batches; once a step comes the
optimizer.

Bytes: states (parameters, gradients, optimizer) are cut by tp and by dp_shard; activations, `kept`, stay for every micro-batch
in flight, the model's inputs for the whole step. A layer's backward pass holds at most `peak` (cost.peak) of its own, with what
it recomputes, where those of its activations that were kept are counted already; its parameters, gathered, and those of its
neighbour (`window`); and FSDP's buffer, in which the gradients of the layer after it are being reduced, as far as that is more
than what that layer no longer keeps (`reducing`), or whole, where what that layer kept is counted as gone (`buffer`). At its end
its own gradients are there, and the buffer into which they are copied, but nothing is kept of it any more. Under level 1 the
gradients are added up in whole, and the buffer takes their place. Of these moments only the largest of a rank counts: the largest
`inside` of any layer with what is reduced beside it, less what later layers no longer keep (cost.rank), beside the largest
`window` of any, since neighbours may differ.

A rank's own gradients always count. In a step of one micro-batch they come when activations go (`come`), and under level 1 when
whole ones go, but FSDP reduces on a stream of its own (`foreach_reduce`), and what was reserved for one stream PyTorch's
allocator gives to no other. (Of torchtitan's 8B a device of 8 takes 15.4 GiB more than one of 128; 16 bytes of every parameter
are 14.0, 12 are 10.5.) Tensors hold less at once, by those gradients that are counted too `early` for the peak (cost.rank).

The outer layer's own moment is `alone`, with a layer's parameters gathered ahead. While layers run, it holds no more than
`beneath` of the micro-batch. Its gradients stay unreduced until the backward pass has ended; when they are reduced (`ending`),
nothing is left of that micro-batch's activations. In a pipeline passes of other micro-batches come between: FSDP keeps the last
buffer that it reduced until a layer's backward pass has ended, while as much is kept of all layers as before.

All arithmetic in `data_parallel` and `layer_step` is elementwise: the numbers of a cost may be numpy arrays with an entry for
every sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from autoplan.cost.collectives import collective_time
from autoplan.cost.compute import memory_time, optimizer_time
from autoplan.cost.layer import LayerCost
from autoplan.cost.parameters import Sizes
from autoplan.graph import DTYPE_BYTES
from autoplan.hardware import HardwareProfile
from autoplan.plan import MemoryBreakdown, TimeBreakdown, needs_fsdp
from autoplan.strategy import Mesh, Recompute, Zero
from autoplan.units import Bytes, Seconds
from autoplan.workload import OPTIMIZER_STATES, Workload


class LayerStep(NamedTuple):
    """One layer's share of a step. All but the moments add up over the layers of a stage; of the moments the largest counts.

    A tuple of numbers rather than breakdowns: the search makes tens of thousands of them.
    """

    forward: Seconds
    """Of every micro-batch, as all up to `dp`."""
    backward: Seconds
    recompute: Seconds
    tp: Seconds
    dp: Seconds
    dp_once: Seconds
    """Once a step, as the optimizer."""
    optimizer_seconds: Seconds
    forward_slot: Seconds
    """What of every micro-batch's seconds is the forward pass, with what FSDP copies and the gather that it does not hide."""
    copies: tuple[Seconds, Seconds]
    """What FSDP copies in (the forward, the backward) pass of every micro-batch; under level 1 it does so once a step."""
    copies_once: tuple[Seconds, Seconds]
    hidden: tuple[Seconds, Seconds]
    """Communication under computation, of every micro-batch and once a step."""
    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes
    buffers: Bytes
    unsharded: Bytes
    kept: Bytes
    """Bytes saved for the backward pass of one micro-batch."""
    less: Bytes
    """What is not there, of what the outer layer keeps of the last micro-batch, while the layers' backward passes run."""
    rebuilt: Bytes
    """While its backward pass runs there are, if so much is held by itself: of the outer layer, what is `less`; what is
    recomputed; parameters or gradients that are whole; the rest is temporary."""
    whole: Bytes
    ending: Bytes
    """After the backward pass of a micro-batch, when nothing of it is kept any more."""
    slot_seconds: Seconds
    once_seconds: Seconds
    state_bytes: Bytes
    """Whatever the number of micro-batches in flight."""
    left_bytes: Bytes
    """Of these, what is there when its backward pass has run: not the parameters that were gathered for both passes."""
    alone: Bytes
    """Besides, in the outer layer's own moment; a layer has none, but the two below."""
    inside: Bytes
    """While its backward pass runs, by itself."""
    window: Bytes
    """Then, by what FSDP gathers of it and of its neighbour, whose window may be larger."""
    reducing: Bytes
    """Then, by FSDP's buffer with the gradients of the layer after it, if that is one like it: less what it no longer keeps."""
    buffer: Bytes
    """... when that is another, and what it no longer keeps is counted by itself (`cost.rank`)."""
    waiting: Bytes = 0.0
    """What passes of other micro-batches have left for later (cost.late), as `late_seconds` of every backward pass."""
    late_seconds: Seconds = 0.0
    early: Bytes = 0.0
    """Of `gradients`, what is counted before its backward pass has made it; `come`: what of that is there after it."""
    come: Bytes = 0.0

    @property
    def goes(self) -> Bytes:
        """What is gone when its backward pass of a micro-batch has run."""
        return self.kept + self.state_bytes - self.left_bytes

    def seconds(self, slots: float) -> Seconds:
        """Seconds of one slot of a step of `slots` slots (`schedule.slots`): what happens once is spread over them."""
        return self.slot_seconds + self.once_seconds / slots

    def bytes(self, in_flight: int) -> Bytes:
        """Bytes that stay, with so many micro-batches in flight."""
        return self.state_bytes + in_flight * self.kept

    def time(self, slots: float, once: float) -> TimeBreakdown:
        """Where the seconds go, of `slots` micro-batches and `once` times what happens once."""
        return TimeBreakdown(
            forward=slots * (self.forward + self.copies[0]) + once * self.copies_once[0],
            backward=slots * (self.backward + self.copies[1]) + once * self.copies_once[1],
            recompute=slots * self.recompute,
            tp_communication=slots * self.tp,
            dp_communication=slots * self.dp + once * self.dp_once,
            optimizer=once * self.optimizer_seconds,
        )

    def memory(self, in_flight: int) -> MemoryBreakdown:
        """What the bytes are that add up."""
        return MemoryBreakdown(
            parameters=self.parameters,
            gradients=self.gradients,
            optimizer=self.optimizer,
            buffers=self.buffers,
            unsharded=self.unsharded,
            activations=in_flight * self.kept - self.less + self.waiting,
        )

    @property
    def moment(self) -> MemoryBreakdown:
        """What the bytes are that it holds by itself while its backward pass runs."""
        left = self.alone + self.inside
        activations = min(left, self.less)
        recompute = min(left - activations, self.rebuilt)
        unsharded = min(left - activations - recompute, self.whole)
        temporary = left - activations - recompute - unsharded
        return MemoryBreakdown(activations=activations, recompute=recompute, unsharded=unsharded, temporary=temporary)

    @property
    def end(self) -> MemoryBreakdown:
        """What they are after it."""
        return MemoryBreakdown(activations=self.less, unsharded=self.ending - self.less)


NOTHING = LayerStep._make((0.0, 0.0) if name in ("hidden", "copies", "copies_once") else 0.0 for name in LayerStep._fields)
"""What takes nothing: of bounds."""


class DataParallel(NamedTuple):
    """What a layer's parameters cost on the dp axes of a mesh, whatever the strategy."""

    gather: Seconds
    reduce: Seconds
    final: Seconds
    unpack: Seconds
    """FSDP's copies of what it gathered; `pack`: into what it reduces."""
    pack: Seconds
    optimizer: Seconds
    numel: float
    """On one rank, cut by tp and dp_shard; `trainable` ones among them."""
    trainable: float
    whole: float
    """Cut by tp alone, where FSDP makes them so; `whole_trainable` ones among them."""
    whole_trainable: float


class HasParameters(Protocol):
    """What has parameters: a layer's cost."""

    def sizes(self, dealt: bool, shards: int) -> Sizes:
        """`cost.parameters.sizes` of them."""


def data_parallel(cost: HasParameters, mesh: Mesh, hardware: HardwareProfile, load: Workload) -> DataParallel:
    """Seconds of gathering parameters and reducing gradients over dp_shard, of all-reducing their shards over dp_replicate,
    and of the optimizer."""
    size, compute, reduce = (DTYPE_BYTES[t] for t in (load.param_dtype, load.compute_dtype, load.reduce_dtype))
    gather = reduction = final = unpacked = packed = 0.0
    numel = trainable = whole = whole_trainable = 0.0
    for dealt, shards, stride in ((False, mesh.shards, mesh.tp), (True, mesh.efsdp, mesh.ep)):
        local = cost.sizes(dealt, shards)
        if not np.any(local.numel):
            continue
        gathered, trained = local.numel * shards, local.trainable * shards  # with what FSDP fills up the last shards
        numel, trainable = numel + local.numel, trainable + local.trainable
        whole, whole_trainable = whole + gathered, whole_trainable + trained
        of_one, of_gradient = copied(load, alone=shards == 1)
        unpacked, packed = unpacked + gathered * of_one, packed + trained * of_gradient

        def seconds(kind: str, sent: Bytes, group: int, apart: int) -> Seconds:
            return _of_each(lambda one: collective_time(kind, one, group, apart, hardware), sent)

        gather = gather + seconds("all_gather", gathered * compute, shards, stride)
        reduction = reduction + seconds("reduce_scatter", trained * reduce, shards, stride)
        final = final + seconds("all_reduce", trained * reduce / shards, mesh.dp_replicate, shards * stride)
    if not needs_fsdp(mesh, load):  # gradients are made in their place
        whole = whole_trainable = unpacked = packed = 0.0 * numel
    states = OPTIMIZER_STATES[load.optimizer]
    optimizer = _of_each(lambda one: optimizer_time(one, states, hardware.device), trainable * size)
    unpack, pack = (memory_time(each, hardware.device) for each in (unpacked, packed))
    return DataParallel(gather, reduction, final, unpack, pack, optimizer, numel, trainable, whole, whole_trainable)


def copied(load: Workload, *, alone: bool) -> tuple[Bytes, Bytes]:
    """u and p of the module: bytes read and written for a parameter and for a gradient; `alone`: of what one rank has whole."""
    size, compute, reduce = (DTYPE_BYTES[t] for t in (load.param_dtype, load.compute_dtype, load.reduce_dtype))
    cast = size + compute if alone and load.param_dtype != load.compute_dtype else 0.0
    return 2 * compute + cast, compute + reduce + (2 * reduce if alone else 0.0)


def _of_each(price: Callable[[Bytes], Seconds], sizes: Bytes) -> Seconds:
    """`price` of a size, or of every size of an array: most of them are alike."""
    if not isinstance(sizes, np.ndarray):
        return price(sizes)
    different, which = np.unique(sizes, return_inverse=True)
    found: Seconds = np.array([price(size) for size in different.tolist()])[which]
    return found


def layer_step(
    cost: LayerCost, dp: DataParallel, zero: Zero, again: Recompute, micro_batches: int, hardware: HardwareProfile,
    load: Workload, *, outer: bool, pipelined: bool, ahead: Bytes = 0.0,
) -> LayerStep:  # fmt: skip
    """Price of a layer's share of a step of `micro_batches` micro-batches; `again`: what of its forward is recomputed; `outer`:
    nothing hides its communication, and `ahead` bytes of a layer's parameters are gathered under it; `pipelined`: there are
    several stages."""
    if micro_batches == 1 and zero == 1:
        zero = 2  # the first is the last
    forward = cost.forward + cost.tp_forward
    rerun, kept, rebuilt, more = _recomputed(cost, again)
    backward = cost.backward + cost.tp_backward + rerun
    copies = dp.pack + (dp.unpack if zero == 3 else 0.0)  # in the backward pass
    under_f, under_b = (0.0, 0.0) if outer else (forward + dp.unpack, backward + copies)
    sent = dp.reduce + (dp.gather if zero == 3 else 0.0)  # in the backward pass
    f, f_hidden = beside(under_f, dp.gather, hardware)
    b, b_hidden = beside(under_b, sent, hardware)
    last, last_hidden = beside(under_b, sent + dp.final, hardware)
    every_time, one_time = ((0.0, 0.0), (dp.unpack, copies)) if zero == 1 else ((dp.unpack, copies), (0.0, 0.0))
    every, every_hidden = (0.0, 0.0) if zero == 1 else (f + b, f_hidden + b_hidden)
    once, once_hidden = (f + last, f_hidden + last_hidden) if zero == 1 else (last - b, last_hidden - b_hidden)
    size, compute, reduce = (DTYPE_BYTES[t] for t in (load.param_dtype, load.compute_dtype, load.reduce_dtype))
    gathered = dp.whole * compute
    stays = zero < 3 or outer  # FSDP's root stays gathered for the whole backward pass
    adding = 0.0
    if micro_batches > 1:  # a micro-batch's gradients and those of the others are read, the sum is written
        held = dp.whole_trainable if zero == 1 else dp.trainable
        adding = memory_time(3 * held * reduce, hardware.device)
    gradients = dp.trainable * size
    states = {
        "parameters": dp.numel * size,
        "gradients": gradients,
        "optimizer": gradients * OPTIMIZER_STATES[load.optimizer],
        "buffers": cost.buffers + micro_batches * cost.batch,
    }
    raw, buffer, output = dp.whole_trainable * compute, dp.whole_trainable * reduce, dp.trainable * reduce
    unsharded = (gathered if stays else 0.0) + (buffer if zero == 1 else 0.0)
    between = pipelined and micro_batches > 1 and zero != 1
    early = gradients if micro_batches == 1 or zero == 1 else 0.0 * gradients
    come = gradients if micro_batches == 1 else 0.0 * gradients  # under level 1 whole ones go
    reduced = 0.0 if outer and between else _larger(buffer - (gathered if stays else 0.0), 0.0)  # parameters go before
    if micro_batches == 1:
        output = 0.0 * output  # they are the gradients
    turned = _larger(raw, reduced) if zero == 1 else _larger(raw, output) + reduced
    if outer:
        stay, moments = _of_outer(cost, kept, raw, turned, buffer if between else 0.0, ahead)
        unsharded = unsharded + stay
        early = early * (raw > 0)  # without FSDP they are there from the head's moment on
        come = _larger(come - raw, 0.0) * (raw > 0)  # as soon as those that are `ending` have been copied from
    else:
        moments = _of_layer(cost.peak + more, kept, gathered, raw, turned, buffer, between, zero)
    return LayerStep(
        forward=cost.forward,
        backward=cost.backward + adding,
        recompute=rerun,
        tp=cost.tp_forward + cost.tp_backward,
        dp=every,
        dp_once=once,
        optimizer_seconds=dp.optimizer,
        forward_slot=forward + every_time[0] + (0.0 if zero == 1 else f),
        copies=every_time,
        copies_once=one_time,
        hidden=(every_hidden, once_hidden),
        **states,
        unsharded=unsharded,
        kept=kept,
        rebuilt=rebuilt,
        slot_seconds=forward + backward + adding + sum(every_time) + every,
        once_seconds=once + sum(one_time) + dp.optimizer,
        state_bytes=sum(states.values()) + unsharded - moments.less,
        left_bytes=sum(states.values()) + unsharded - moments.less - (gathered if zero == 2 and not outer else 0.0),
        less=moments.less,
        whole=moments.whole,
        ending=moments.ending,
        alone=moments.alone,
        inside=moments.inside,
        window=moments.window,
        reducing=moments.reducing,
        buffer=moments.buffer,
        early=early,
        come=come,
    )


class Moments(NamedTuple):
    """See `LayerStep`."""

    less: Bytes
    whole: Bytes
    ending: Bytes
    alone: Bytes
    inside: Bytes
    window: Bytes
    reducing: Bytes
    buffer: Bytes


def _of_outer(cost: LayerCost, kept: Bytes, raw: Bytes, turned: Bytes, last: Bytes, ahead: Bytes) -> tuple[Bytes, Moments]:
    """What of the outer layer's gradients is there while layers run, beside the `last` buffer of others' passes; and its moments.
    While the `raw` gradients are reduced there are `turned` bytes."""
    gradients = _smaller(cost.beneath, raw)  # nearly all that is beneath are gradients
    ending, less = kept + turned - cost.beneath, kept - (cost.beneath - gradients)
    return gradients + last, Moments(less, ahead, ending, cost.peak + ahead - cost.beneath, 0.0, 0.0, 0.0, 0.0)


def _of_layer(
    most: Bytes, kept: Bytes, gathered: Bytes, raw: Bytes, turned: Bytes, buffer: Bytes, between: bool, zero: Zero
) -> Moments:
    """The moments of a layer that holds at most so much besides what is `kept`; `gathered`: for a pass under level 3, for both
    under level 2, else for the whole step."""
    passing, going = (gathered if zero == level else 0.0 for level in (3, 2))
    passed_on = 0.0 if zero == 1 else buffer
    reducing = passed_on if between else _larger(passed_on - kept - going, 0.0)
    window = 2 * passing
    inside = _larger(most, turned + passing - kept - window - reducing)
    return Moments(0.0, raw, 0.0, 0.0, inside, window, reducing, passed_on)


def _recomputed(cost: LayerCost, again: Recompute) -> tuple[Seconds, Bytes, Bytes, Bytes]:
    """Seconds of what runs again; bytes that are kept until then, and that are made then; how many more than these kept ones
    there are with `cost.peak`."""
    if again == "none":
        return 0.0, cost.saved, 0.0, -cost.saved
    if again == "full":
        return cost.rerun, cost.inputs, cost.saved, 0.0
    results, spare, seconds = cost.kept
    return seconds, cost.inputs + results, _larger(cost.saved - results + spare, 0.0), spare - results


def best_of(steps: Sequence[LayerStep]) -> LayerStep:
    """No one of these is better in any respect."""
    return LayerStep._make(min(values) for values in zip(*steps, strict=True))


def _larger(one: Bytes, other: Bytes) -> Bytes:
    return np.maximum(one, other) if isinstance(one, np.ndarray) or isinstance(other, np.ndarray) else max(one, other)


def _smaller(one: Bytes, other: Bytes) -> Bytes:
    return np.minimum(one, other) if isinstance(one, np.ndarray) or isinstance(other, np.ndarray) else min(one, other)


def beside(cover: Seconds, sent: Seconds, hardware: HardwareProfile) -> tuple[Seconds, Seconds]:
    """e(c, q) of the module, and what is hidden."""
    hidden = min(cover, sent) if isinstance(cover, float) and isinstance(sent, float) else np.minimum(cover, sent)
    return sent - hidden + hardware.overlap * hidden, hidden
