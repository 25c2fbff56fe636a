"""What one operation, one border and one parameter of a layer cost on one device: the table that everything is added up from.

For an operation `o` of `micro_batch / cp` samples (a cp group shares the positions of each) on `n` devices of the `tp` axis,

    seconds = kernel_time(flops_o / s_o, bytes_o * q_o)      s_o = n if the operation is sharded, else 1; a causal kernel
                                                             skips half of the products
                                                             q_o = local / global bytes of its operands

and over tp or cp `spread_time` of that, times what ranks wait for each other (`LayerModel.op`, `.unevenness`); for attention an
all_to_all over cp of every operand, forward and backward, or what a ring costs (cost.ring); a border costs the collectives of
`autoplan.strategy`'s table (`.border`), a GATHERED parameter one all_reduce of its gradient (`.parameter_sync`).

Inside a module of experts that are dealt over ep (cost.experts) a device works on 1/tp of the rows, the fullest one on
`imbalance` times that, with 1/ep of the weights; rows arrive and leave by an all_to_all over ep each, forward and backward, and
those of a tp group are gathered when they have left (`.dealing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import NamedTuple

from autoplan.cost.collectives import collective_time, waiting
from autoplan.cost.compute import kernel_time, memory_time, spread_time
from autoplan.cost.context import Gather, tokens_dim
from autoplan.cost.experts import Dealt, whole_rows
from autoplan.cost.parameters import LocalParameter
from autoplan.cost.ring import Ring, widened
from autoplan.cost.rules import BORDER_COLLECTIVES, Outcome, packings
from autoplan.cost.temporary import temporary
from autoplan.graph import DTYPE_BYTES, Body, Op, Parameter, Value
from autoplan.hardware import HardwareProfile
from autoplan.strategy import GATHERED, CpKind, Layout, key_copies
from autoplan.units import Bytes, Seconds


@dataclass(frozen=True, slots=True)
class OpCost:
    """One operation on one device: seconds forward and backward (its own collectives apart), bytes kept and held for a moment."""

    forward: Seconds
    backward: Seconds
    tp_forward: Seconds
    tp_backward: Seconds
    saved_extra: Bytes
    temporary: Bytes


Sending = tuple[str, Bytes, int]
"""A collective of neighbours: its kind, size (as in cost.collectives) and number of devices."""


class Dealing(NamedTuple):
    """What is sent and held where the rows of experts change hands."""

    forward: tuple[Sending, ...]
    backward: tuple[Sending, ...]
    held: Bytes


_MEETINGS = 4
"""So often the ranks of an axis that shares a layer's work meet in its forward and backward pass: Megatron-LM's two pairs of
collectives, one around attention and one around the MLP."""


class LayerModel:
    """The prices of one body at one tp degree and micro-batch."""

    def __init__(
        self,
        body: Body,
        bodies: tuple[Body, ...],
        blocks: tuple[tuple[str, int], ...],
        *,
        tp: int,
        micro_batch: int,
        hardware: HardwareProfile,
        dtype: str,
        cp: int = 1,
        gathered: Mapping[int, Sequence[Gather]] | None = None,
        ep: int = 1,
        dealt: Sequence[Dealt] = (),
        imbalance: float = 1.0,
        plain: LayerModel | None = None,
        cp_kind: CpKind = "ulysses",
        copies: bool = True,
    ) -> None:
        """`copies`: tp's reduce-scatters are DTensor's, see `border`."""
        self.body, self.bodies, self.blocks = body, bodies, blocks
        self.tp, self.cp, self.cp_kind, self.hardware, self.dtype = tp, cp, cp_kind, hardware, dtype
        self.copies = copies
        self.gathered = gathered or {}
        """What operations (by index) bring together over cp."""
        self.spread = (tp > 1) + (cp > 1) if hardware.device.dispatch else 0
        """The axes of its DTensors, if these cost time."""
        self.samples = micro_batch / cp
        """Samples' worth of work: a device of a cp group has a part of the sequence of each."""
        self.ep, self.dealt, self.imbalance = ep, tuple(dealt) if ep > 1 else (), imbalance
        self.doors = frozenset(index for each in self.dealt for index in each.doors)
        """Borders (by index) at which rows of experts change hands."""
        self._inside = frozenset(i for each in self.dealt for i in each.inside)
        self._plain = plain if self.dealt else None
        """The same where nothing is dealt: it has the prices of what has nothing to do with experts."""
        self._op_costs: dict[tuple[int, tuple[Layout, ...], tuple[Layout, ...]], OpCost] = {}
        self._border_costs: dict[tuple[int, Layout, Layout], tuple[Seconds, Seconds]] = {}

    @cached_property
    def unevenness(self) -> float:
        """How many times as long the work takes as on the average rank, because ranks wait for the last one where they meet."""
        meetings = _MEETINGS * sum((self.tp > 1, self.cp > 1, bool(self.dealt)))
        if not meetings or not self.hardware.jitter:
            return 1.0
        work = 0.0
        for op in self.body.ops:
            forward = op.forward_flops, op.forward_bytes, op.forward_kernels, 1
            backward = op.backward_flops, op.backward_bytes, op.backward_kernels, 2
            for flops, moved, kernels, products in (forward, backward):
                share, part = flops.at(self.samples) / self.tp, moved.at(self.samples) / self.tp
                work += self._seconds(op, share, part, kernels, products)
        ranks = max(self.tp * self.cp, self.ep if self.dealt else 1)
        return 1.0 + (waiting(work, meetings, ranks, self.hardware) / work if work else 0.0)

    @cached_property
    def outer(self) -> bool:
        """Whether this is the body around the blocks: what leaves it is the loss."""
        return all(self.body is not body for body in self.bodies)

    @cached_property
    def buffers(self) -> Bytes:
        return float(sum(p.numel * DTYPE_BYTES[p.dtype] for p in self.body.parameters if p.buffer))

    @cached_property
    def batch(self) -> Bytes:
        """Of the outer body: the model's inputs of one micro-batch, whole on every device of a cp group."""
        given = [self.body.values[i] for i in self.body.inputs] if self.outer else []
        return sum(self.whole_bytes(value) for value in given)

    @cached_property
    def fixed_borders(self) -> frozenset[int]:
        """Borders (by index) that may not redistribute: a module that is called several times has one hook for all calls."""
        seen: dict[tuple[str, str, str], list[int]] = {}
        for index, op in enumerate(self.body.ops):
            if op.kind in ("enter", "exit"):
                seen.setdefault((op.kind, op.module, op.leaf), []).append(index)
        return frozenset(index for calls in seen.values() if len(calls) > 1 for index in calls)

    @cached_property
    def packings(self) -> dict[int, tuple[int, ...]]:
        return packings(self.body)

    def share(self, value: Value, layout: Layout) -> float:
        """What part of a tensor is on this device, of the samples that it works on."""
        whole = 1.0 / self.tp if layout.sharded else 1.0
        if not self.dealt:
            return whole
        if value.batch_dim is not None:
            return whole * (self._rows if value.id in self._inside else 1.0)
        weight = self.body.values[value.storage].parameter  # itself, or one of which it is a view
        return whole / (self.ep if weight is not None and self.holder(weight) else 1)

    @property
    def _rows(self) -> float:
        """Rows inside a module of experts, for every row of its caller."""
        return self.imbalance / self.tp

    def holder(self, parameter: str) -> Dealt | None:
        """The module of experts that a parameter belongs to, where these are dealt."""
        return next((each for each in self.dealt if each.experts.holds(parameter)), None)

    def local_bytes(self, value: Value, layout: Layout) -> Bytes:
        return value.bytes_at(self.samples) * self.share(value, layout)

    def whole_bytes(self, value: Value) -> Bytes:
        """Of the whole sequence."""
        return value.bytes_at(self.samples * self.cp)

    def op(self, index: int, outcome: Outcome) -> OpCost:
        """Price of running operation `index` as `outcome` says."""
        if self._plain is not None and index not in self._touched:
            return self._plain.op(index, outcome)
        key = (index, outcome.inputs, outcome.outputs)
        if key not in self._op_costs:
            self._op_costs[key] = self._price(index, outcome)
        return self._op_costs[key]

    @cached_property
    def _touched(self) -> frozenset[int]:
        """Operations that work on rows or weights of experts which are dealt, and those at which rows change hands."""
        values, ends = self.body.values, {index for each in self.dealt for index in (each.first, each.last)}

        def dealt(i: int) -> bool:
            weight = values[values[i].storage].parameter
            return i in self._inside or (weight is not None and self.holder(weight) is not None)

        return frozenset(n for n, op in enumerate(self.body.ops) if n in ends or any(map(dealt, op.inputs + op.outputs)))

    def _price(self, index: int, outcome: Outcome) -> OpCost:
        op = self.body.ops[index]
        batch = self.samples
        share = float(self.tp if outcome.sharded else 1) * (2 if op.causal else 1)  # a causal kernel skips half of the products
        if self._inside.intersection(op.outputs):
            share /= self._rows
        operands = [
            (self.body.values[i], layout)
            for i, layout in zip(op.inputs + op.outputs, outcome.inputs + outcome.outputs, strict=True)
        ]
        whole = sum(value.bytes_at(batch) for value, _ in operands)
        local = sum(self.local_bytes(value, layout) for value, layout in operands)
        fraction = local / whole if whole else 1.0
        ring = self.ring(op, outcome)
        rounds = ring.cp if ring else 1

        def seconds(flops: float, moved: float, kernels: int, products: int) -> Seconds:
            alone = self._seconds(op, flops / share, moved * fraction * rounds, kernels * rounds, products)
            return alone * self.unevenness

        forward = seconds(op.forward_flops.at(batch), op.forward_bytes.at(batch), op.forward_kernels, 1)
        backward = seconds(op.backward_flops.at(batch), op.backward_bytes.at(batch), op.backward_kernels, 2)
        tp_forward = 0.0
        if op.kind == "cross_entropy" and outcome.sharded:
            rows = self.body.values[op.inputs[0]].shape[0] * batch
            statistic = rows * DTYPE_BYTES["float32"]
            tp_forward = self._collective("all_reduce", statistic) + self._collective("all_reduce", 2 * statistic)
        sent_forward = sent_backward = sum(self._exchange(size) for size in self.exchanged(op, outcome))
        if ring:
            forward, backward, *apart = ring.seconds(forward, backward, self.hardware.device, partial(self._over_cp, "send_recv"))
            sent_forward, sent_backward = sent_forward + apart[0], sent_backward + apart[1]
        gathered = [sum(self._over_cp("all_gather", size) for size in self.gathers(index, outcome, b)) for b in (False, True)]
        dealing = self.dealing(index)
        return OpCost(
            forward,
            backward,
            tp_forward + sent_forward + gathered[False] + sum(self._sent(*each) for each in dealing.forward),
            sent_backward + gathered[True] + sum(self._sent(*each) for each in dealing.backward),
            op.saved_extra.at(batch) / share * (2 if op.causal else 1) + self.copied(index, outcome),
            max(temporary(self, op, outcome), dealing.held, ring.held if ring else 0.0),
        )

    def _seconds(self, op: Op, flops: float, moved: Bytes, kernels: int, products: int) -> Seconds:
        """What is computed of an operation on one device, one direction of it."""
        kernel = kernel_time(op.kind, flops, moved, kernels, self.dtype, self.hardware.device)
        return spread_time(kernel, op.kind, kernels, products, self.spread, self.hardware) if self.spread else kernel

    def copied(self, index: int, outcome: Outcome) -> Bytes:
        """What cp has kept for the backward pass beyond a part of every tensor: copies of inputs, of heads of keys and values
        where these are fewer than devices, and what a ring copies."""
        op = self.body.ops[index]
        ring = self.ring(op, outcome)
        more = ring.kept if ring else sum(part * (copies - 1) for part, copies in self._parts(op, outcome))
        return self._cut_inputs.get(index, 0.0) + more

    @cached_property
    def _cut_inputs(self) -> dict[int, Bytes]:
        """Bytes of the model's inputs that cp cuts, by the operation that is the first to use them: each device makes a copy of
        its part, which the backward pass needs too."""
        found: dict[int, Bytes] = {}
        cut = {i for i in self.body.inputs if self.outer and self.cp > 1 and tokens_dim(self.body.values[i]) is not None}
        for index, op in enumerate(self.body.ops):
            if op.kind not in ("enter", "exit", "call"):
                used = cut & {self.body.values[i].storage for i in op.inputs}
                cut -= used
                found[index] = sum(self.body.values[i].bytes_at(self.samples) for i in used)
        return found

    def dealing(self, index: int) -> Dealing:
        """What is sent where rows of experts change hands: with the first operation inside they have come, with the last they
        leave. The rows of a tp group, each of which dealt its share, are gathered afterwards, forward and backward."""
        forward: list[Sending] = []
        backward: list[Sending] = []
        held = 0.0
        for each in self.dealt:
            if index not in (each.first, each.last):
                continue
            value = self.body.values[each.rows]
            filled = whole_rows(value.shape[0] * self.samples, self.tp)
            whole = value.bytes_at(self.samples) * filled
            rows = whole * each.chosen * self._rows
            if index == each.first:
                counts = float(each.experts.number * DTYPE_BYTES["int64"] * self.ep)
                forward += [("all_to_all", counts, self.ep), ("all_to_all", rows * self.ep, self.ep)]
                backward += [("all_to_all", rows * self.ep, self.ep), ("all_gather", whole, self.tp)]
                if each.weights is not None and self.body.values[each.weights].requires_grad:
                    backward.append(("all_gather", self.body.values[each.weights].bytes_at(self.samples) * filled, self.tp))
            if index == each.last:
                forward += [("all_to_all", rows * self.ep, self.ep), ("all_gather", whole, self.tp)]
                backward.append(("all_to_all", rows * self.ep, self.ep))
            held = 2 * rows
        return Dealing(tuple(forward), tuple(backward), held)

    def _sent(self, kind: str, size: Bytes, group: int) -> Seconds:
        return collective_time(kind, size, group, 1, self.hardware)

    def exchanged(self, op: Op, outcome: Outcome) -> tuple[Bytes, ...]:
        """What a device sends of each operand of attention, to exchange the sequence for heads over cp, and of the result, to
        exchange them back; as much again of their gradients (`apply.context_parallel`). Of a ring what is dealt out."""
        ring = self.ring(op, outcome)
        return ring.dealt if ring else tuple(part * copies for part, copies in self._parts(op, outcome))

    def ring(self, op: Op, outcome: Outcome) -> Ring | None:
        """How attention is run, if it is a ring."""
        if op.kind != "attention" or self.cp_kind != "ring" or self.cp == 1:
            return None
        query, key, value, out = (part for part, _ in self._parts(op, outcome))
        return Ring(query, key + value, out, self.cp, op.causal, widened(self.body.values[op.inputs[0]].dtype))

    def _exchange(self, size: Bytes) -> Seconds:
        """Over cp, of what one device has: by Ulysses with everyone, in a ring with one or two others."""
        return self._over_cp("send_recv", size) if self.cp_kind == "ring" else self._over_cp("all_to_all", size * self.cp)

    def _parts(self, op: Op, outcome: Outcome) -> Iterator[tuple[Bytes, int]]:
        """A device's part of every tensor that is exchanged, and in how many copies it is sent."""
        if op.kind != "attention" or self.cp == 1:
            return
        for position, (i, layout) in enumerate(zip(op.inputs + op.outputs, outcome.inputs + outcome.outputs, strict=True)):
            value = self.body.values[i]
            if value.requires_grad:
                heads = value.shape[1] // (self.tp if layout.sharded else 1)
                yield self.local_bytes(value, layout), key_copies(heads, self.cp) if position in (1, 2) else 1

    def _over_cp(self, kind: str, size: Bytes) -> Seconds:
        return collective_time(kind, size, self.cp, self.tp, self.hardware)

    def gathers(self, index: int, outcome: Outcome, backward: bool) -> Iterator[Bytes]:
        """Of every value that is brought together over cp for the operation, or whose gradient is: what a device then has."""
        layouts = dict(zip(self.body.ops[index].inputs, outcome.inputs, strict=True))
        for each in self.gathered.get(index, ()):
            if each.backward == backward:
                yield self.whole_bytes(self.body.values[each.value]) / (self.tp if layouts[each.value].sharded else 1)

    def reorders(self, source: Layout, target: Layout) -> bool:
        """Whether DTensor brings what it scatters or gathers at a border into the order of the ranks: not along the first dim."""
        return self.copies and max(source.dim, target.dim) > 0

    def border(self, value: Value, source: Layout, target: Layout) -> tuple[Seconds, Seconds]:
        """Seconds (forward, backward) of redistributing `value` at a border. What is scattered along another dim than the first
        is copied into the order of the ranks before (torch.distributed._functional_collectives). So is what is gathered after, of
        several samples: that is left out, for none may be dearer in a larger micro-batch."""
        if source == target:
            return 0.0, 0.0
        key = (value.id, source, target)
        if key not in self._border_costs:
            size = value.bytes_at(self.samples)
            extra = {"reduce_scatter": memory_time(2 * size, self.hardware.device)} if self.reorders(source, target) else {}
            pair = BORDER_COLLECTIVES[source.kind, target.kind]
            forward, backward = (self._collective(kind, size) + extra.get(kind, 0.0) if kind else 0.0 for kind in pair)
            self._border_costs[key] = forward, backward
        return self._border_costs[key]

    def parameter_sync(self, value: Value, layout: Layout) -> Seconds:
        """Seconds of all-reducing the gradient of a GATHERED parameter, once a micro-batch."""
        return self._collective("all_reduce", prod(value.shape) * DTYPE_BYTES[self.dtype]) if layout == GATHERED else 0.0

    def _collective(self, kind: str, size: Bytes) -> Seconds:
        return collective_time(kind, size, self.tp, 1, self.hardware)

    def local_parameter(self, parameter: Parameter, layout: Layout) -> LocalParameter:
        shape = list(parameter.shape)
        if self.holder(parameter.name):
            return LocalParameter(parameter.name, (shape[0] // self.ep, *shape[1:]), 0, parameter.trainable, dealt=True)
        if layout.sharded:
            shape[layout.dim] //= self.tp
        # FSDP cuts dim 0, but a packed parameter's dim 0 is strided already: it cuts dim 1 there
        return LocalParameter(parameter.name, tuple(shape), 1 if layout.blocks > 1 else 0, parameter.trainable)
