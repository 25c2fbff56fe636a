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
than what is gone of that layer (`reducing`), or whole, where what is gone is counted by itself (`buffer`). At its end its own
gradients are there, and the buffer into which they are copied (cost.moments), but nothing is kept of it any more, and under
level 2 its parameters are no longer gathered (`goes`). Under level 1 the gradients are added up in whole, and the buffer takes
their place. Of these moments only the largest of a rank counts: the largest `inside` of any layer with what is reduced beside it,
less what is gone of later layers (cost.rank), beside the largest `window` of any, since neighbours may differ.

A rank's own gradients always count. In a step of one micro-batch they come when activations go (`come`), and under level 1 when
whole ones go, but FSDP reduces on a stream of its own (`foreach_reduce`), and what was reserved for one stream PyTorch's
allocator gives to no other. (Of torchtitan's 8B a device of 8 takes 15.4 GiB more than one of 128; 16 bytes of every parameter
are 14.0, 12 are 10.5.) Tensors hold less at once, by those gradients that are counted too `early` for the peak (cost.rank).

The outer layer's own moment is `alone`, with a layer's parameters gathered ahead. While layers run, it holds no more than
`beneath` of the micro-batch. Its gradients stay unreduced until the backward pass has ended; when they are reduced (`ending`),
nothing is left of that micro-batch's activations, nor are its parameters gathered. In a pipeline passes of other micro-batches
come between: FSDP keeps the last buffer that it reduced until a layer's backward pass has ended, while as much is kept of all
layers as before.

All arithmetic here, in cost.data_parallel and in cost.moments is elementwise: numbers may be numpy arrays with an entry for
every sharding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autoplan.cost.compute import memory_time
from autoplan.cost.data_parallel import DataParallel
from autoplan.cost.layer import LayerCost
from autoplan.cost.moments import fsdp_bytes, larger, of_layer, of_outer
from autoplan.graph import DTYPE_BYTES
from autoplan.hardware import HardwareProfile
from autoplan.plan import MemoryBreakdown, TimeBreakdown
from autoplan.strategy import Recompute, Zero
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
    resharded: Bytes
    """Of `unsharded`, parameters gathered for both passes, which go with its backward pass."""
    early: Bytes
    """Of `gradients`, what is counted before its backward pass has made it; `come`: what of that is there after it."""
    come: Bytes
    waiting: Bytes = 0.0
    """What passes of other micro-batches have left for later (cost.late), as `late_seconds` of every backward pass."""
    late_seconds: Seconds = 0.0

    @property
    def goes(self) -> Bytes:
        """What is gone when its backward pass of a micro-batch has run."""
        return self.kept + self.resharded

    @property
    def left_bytes(self) -> Bytes:
        """Of `state_bytes`, what is there then."""
        return self.state_bytes - self.resharded

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
    size, reduce = (DTYPE_BYTES[t] for t in (load.param_dtype, load.reduce_dtype))
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
    fsdp = fsdp_bytes(dp, zero, micro_batches, load, outer=outer, pipelined=pipelined)
    moments = of_outer(cost, kept, fsdp, ahead) if outer else of_layer(cost.peak + more, kept, fsdp)
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
        kept=kept,
        rebuilt=rebuilt,
        slot_seconds=forward + backward + adding + sum(every_time) + every,
        once_seconds=once + sum(one_time) + dp.optimizer,
        state_bytes=sum(states.values()) + moments.unsharded - moments.less,
        **moments._asdict(),
    )


def _recomputed(cost: LayerCost, again: Recompute) -> tuple[Seconds, Bytes, Bytes, Bytes]:
    """Seconds of what runs again; bytes that are kept until then, and that are made then; how many more than these kept ones
    there are with `cost.peak`."""
    if again == "none":
        return 0.0, cost.saved, 0.0, -cost.saved
    if again == "full":
        return cost.rerun, cost.inputs, cost.saved, 0.0
    results, spare, seconds = cost.kept
    return seconds, cost.inputs + results, larger(cost.saved - results + spare, 0.0), spare - results


def best_of(steps: Sequence[LayerStep]) -> LayerStep:
    """No one of these is better in any respect."""
    return LayerStep._make(min(values) for values in zip(*steps, strict=True))


def beside(cover: Seconds, sent: Seconds, hardware: HardwareProfile) -> tuple[Seconds, Seconds]:
    """e(c, q) of the module, and what is hidden."""
    hidden = min(cover, sent) if isinstance(cover, float) and isinstance(sent, float) else np.minimum(cover, sent)
    return sent - hidden + hardware.overlap * hidden, hidden
