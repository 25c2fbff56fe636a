"""What a published run should take: the layers' own prices on a schedule's timeline, with its framework's habits.

`L` layers are dealt to `p v` virtual stages as evenly as they go (the first ones take one more); the first also embeds,
the last has the final norm, the head and the loss. With a layer's `F`, `B` (recomputation in it) and e(c, q) of
`cost.step`, virtual stage k takes per micro-batch

    f_k = n_k (F + e(F, g)) + [first] F_embed + [last] F_head          b_k likewise with g' + r

(plus, without FSDP, the reading and writing of the gradients that a micro-batch's are added to), and these run on the
timeline of the schedule (`autoplan.schedule`), with send_recv of one micro-batch's activations between the stages. After
it come, of the slowest stage, the reductions that the last backward pass does not hide, and the optimizer. With one stage
and FSDP this is `CostModel.predict` up to the outer layer's reduction in the first of several micro-batches (a test).

Context parallelism cuts the sequence: a rank has 1/cp of the tokens and of attention's products (balanced under a causal
mask), which costs what 1/cp of a sample does; besides, keys and values go round the cp ranks beside attention. Parameters
are those of dp x cp ranks. Asynchronous tp sends beside the products instead of between them.

Experts over ep: their rows are sent between the products, as tp's collectives are; their gradients are reduced, and their states
cut, over the dp x tp / ep ranks that hold the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil
from typing import cast

from autoplan.cost.collectives import collective_time
from autoplan.cost.compute import memory_time, optimizer_time
from autoplan.cost.data_parallel import DataParallel, data_parallel
from autoplan.cost.layer import LayerCost, layer_cost
from autoplan.cost.model import OUTER, CostModel
from autoplan.cost.walk import Step, walk
from autoplan.errors import UsageError
from autoplan.graph import DTYPE_BYTES
from autoplan.schedule import ScheduleKind, pipeline_seconds
from autoplan.strategy import UNSHARDED, Mesh, Sharding
from autoplan.units import Bytes, Seconds
from autoplan.workload import OPTIMIZER_STATES
from benchmarks.asynchronous import fused
from benchmarks.habits import casts, laid, loss, matrix_products, ring, sums
from benchmarks.memory import experts, memory, numel
from benchmarks.software import NEUTRAL, Software

Recomputed = Callable[[Step], bool]
"""Which operations of a layer run again in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """How a run was laid out. `zero` 0 and 1 reduce gradients once a step, 3 gathers and reduces every micro-batch."""

    tp: int
    dp: int
    """All ranks that share a parameter: those of cp too."""
    pp: int
    micro_batch: float
    """Samples of one rank: a fraction of one where cp cuts them."""
    zero: int
    cp: int = 1
    ep: int = 1
    schedule: ScheduleKind = "1f1b"
    chunks: int = 1
    block: Sharding
    outer: Sharding
    layers: int
    counts: tuple[int, ...] = ()
    """Layers of every virtual stage, where they are not dealt evenly."""
    plain: int = 0
    """The first layers that have no experts, in a model whose others have some."""
    again: float = 1.0
    """Fraction of the layers whose forward runs again, where any does."""
    stays: bool = False
    """Gathered parameters stay until the backward pass has used them (ZeRO-2 of FSDP)."""
    policy: bool = False
    """What is not recomputed is kept whether or not somebody needs it (torchtitan's choice by operation)."""
    asynchronous: bool = False
    """Collectives of tp run beside the products."""
    float8: bool = False
    """The blocks' linears multiply in fp8."""

    @property
    def samples(self) -> int:
        """`micro_batch` for the cost model, whose prices are affine in it: a fraction does not harm them."""
        return cast(int, self.micro_batch)

    @property
    def dealt(self) -> tuple[int, ...]:
        """Layers of every virtual stage. Raises `UsageError` when there are fewer layers than stages."""
        virtual = self.pp * self.chunks
        if not self.counts and self.layers < virtual:
            raise UsageError(f"{self.layers} layers do not fill {virtual} stages.")
        return self.counts or tuple(self.layers // virtual + (k < self.layers % virtual) for k in range(virtual))

    @property
    def plains(self) -> tuple[int, ...]:
        """Of these, those without experts."""
        before = accumulate(self.dealt, initial=0)
        return tuple(min(n, max(0, self.plain - first)) for n, first in zip(self.dealt, before, strict=False))

    @property
    def without_experts(self) -> Arrangement:
        return replace(self, block=UNSHARDED, ep=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrangedStep:
    """Seconds of a step with their parts."""

    step_time: Seconds
    pipeline: Seconds
    exposed: Seconds
    optimizer: Seconds


class Arranged:
    """Prices arrangements of one model with the tables of a `CostModel`."""

    def __init__(
        self,
        costs: CostModel,
        software: Software = NEUTRAL,
        recomputed: Recomputed | None = None,
        plain: Arranged | None = None,
    ) -> None:
        """`plain` prices the layers without experts."""
        self.costs, self.software, self.recomputed, self.plain = costs, software, recomputed, plain
        self._parts: dict[tuple[object, ...], LayerCost] = {}
        self._temporaries: dict[tuple[object, ...], tuple[Bytes, Bytes, Bytes]] = {}

    def price(self, at: Arrangement) -> ArrangedStep:
        """Raises `UsageError` where a sharding or a schedule does not fit the model."""
        m = self.micro_batches(at)
        block, embed, head = (self._scaled(cost, place) for cost, place in zip(self.parts(at), (at, None, None), strict=True))
        sent = ring(self, block, at)
        again = at.again * self._again(at, sent[0])
        virtual = at.pp * at.chunks
        counts = at.dealt
        beside = sent, self._copies(block, at), *(each(self, at, _every) for each in (laid, casts))
        forward, backward = (sum(parts) for parts in zip(_seconds(block), *beside, strict=True))
        forward += sums(self, at, _every)
        host = self._host(at)
        forward, backward = max(forward, host / 3), max(backward + again, host * 2 / 3)
        gather = reduce = regather = 0.0
        if at.zero == 3:
            gather, reduce = self._collectives(block, at)
            regather = 0.0 if at.stays else gather
        paid_forward = forward + self._paid(forward, gather)
        paid_backward = backward + self._paid(backward, regather + reduce)
        outside = 0.0
        if at.zero == 3:
            for part in (embed, head) if at.pp > 1 else (self._scaled(self._outer(at)),):
                outside += sum(self._collectives(part, at)) + sum(self._copies(part, replace(at, stays=True)))  # FSDP's root
        first_forward, first_backward = self._first(at) if at.plain else (0.0, 0.0)
        f = [(n - k) * paid_forward + k * first_forward for n, k in zip(counts, at.plains, strict=True)]
        b = [(n - k) * paid_backward + k * first_backward for n, k in zip(counts, at.plains, strict=True)]
        for k, part in ((0, embed), (virtual - 1, head)):
            more = _seconds(part) if part is embed else loss(self, at, _seconds(part))
            f[k], b[k] = f[k] + more[0], b[k] + more[1]
        f[0] += outside
        if at.zero < 3:
            b = [t + self._accumulation(part) for t, part in zip(b, self._parameters(at), strict=True)]
        hop = self._hop(at)
        waits = [self.software.hop_exposed * hop if at.pp > 1 else 0.0] * (virtual - 1)
        f = [t + w for t, w in zip(f, (0.0, *waits), strict=True)]
        b = [t + w for t, w in zip(b, (*waits, 0.0), strict=True)]
        hop *= 1 - self.software.hop_exposed
        seconds = pipeline_seconds(at.schedule, tuple(f), tuple(b), m, hop, at.chunks)
        tail = optimizer = 0.0
        for s in range(at.pp):
            own = [k for k in range(virtual) if k % at.pp == s]
            layers, plain = sum(counts[k] for k in own), sum(at.plains[k] for k in own)
            held = self.held(at, layers, embed if 0 in own else None, head if virtual - 1 in own else None, plain)
            dealt = (layers - plain) * experts(block)
            groups = [(held - dealt, at.dp, at.tp), *([(dealt, at.dp * at.tp // at.ep, at.ep)] if dealt else [])]
            optimizer = max(optimizer, self.software.optimizer * sum(self._optimizer(n, dp, at) for n, dp, _ in groups))
            if at.zero < 3:
                tail = max(tail, self._reduction(groups, at, sum(b[k] for k in own) / len(own)))
        if at.zero == 1:
            tail += self.software.zero_rank * (at.dp - 1)
        total = seconds + tail + optimizer + self.software.step
        return ArrangedStep(
            step_time=total,
            pipeline=seconds,
            exposed=tail,
            optimizer=optimizer,
        )

    def _first(self, at: Arrangement) -> tuple[Seconds, Seconds]:
        """Forward and backward seconds of a layer without experts."""
        assert self.plain is not None
        place = at.without_experts
        forward, backward = _seconds(self.plain._scaled(self.plain.parts(place)[0], place))
        return forward, backward + at.again * self.plain._again(place, 0.0)

    def micro_batches(self, at: Arrangement) -> int:
        return int(self.costs.micro_batches(Mesh(dp_replicate=at.dp, tp=at.tp), at.samples))

    def parts(self, at: Arrangement) -> tuple[LayerCost, LayerCost, LayerCost]:
        block = self.costs.layer_cost(0, at.block, at.tp, at.samples, ep=at.ep)
        first = next(i for i, op in enumerate(self.costs.graph.outer.ops) if op.kind == "call")
        embed = self._part(OUTER, at.outer, at, "embed", lambda step: step.index <= first)
        head = self._part(OUTER, at.outer, at, "head", lambda step: step.index > first)
        return block, embed, head

    def temporaries(self, at: Arrangement) -> tuple[Bytes, Bytes, Bytes]:
        """The largest temporary of any operation of `parts`."""
        key = (at.block, at.outer, at.tp, at.micro_batch, at.ep)
        if key not in self._temporaries:
            first = next(i for i, op in enumerate(self.costs.graph.outer.ops) if op.kind == "call")
            block, outer = self._each(0, at.block, at), self._each(OUTER, at.outer, at)
            embed, head = ([t for i, t in outer.items() if (i < first) == before] for before in (True, False))
            self._temporaries[key] = max(block.values()), max(embed, default=0.0), max(head, default=0.0)
        return self._temporaries[key]

    def _each(self, body: int, sharding: Sharding, at: Arrangement) -> dict[int, Bytes]:
        """The temporary of every operation (by index)."""
        model = self.costs.layer_model(body, at.tp, at.samples, ep=at.ep)
        steps = (step for step in walk(model, sharding) if step.op.kind not in ("enter", "exit", "call"))
        return {step.index: model.op(step.index, step.outcome).temporary for step in steps}

    def _outer(self, at: Arrangement) -> LayerCost:
        return self.costs.layer_cost(OUTER, at.outer, at.tp, at.samples)

    def _part(self, body: int, sharding: Sharding, at: Arrangement, name: str, only: Recomputed) -> LayerCost:
        key = (body, sharding, at.tp, at.micro_batch, at.ep, name)
        if key not in self._parts:
            self._parts[key] = layer_cost(self.costs.layer_model(body, at.tp, at.samples, ep=at.ep), sharding, only)
        return self._parts[key]

    def _scaled(self, cost: LayerCost, at: Arrangement | None = None, only: Recomputed | None = None) -> LayerCost:
        """As the framework runs it; `at`: of a block, whose products and tp collectives may be special; `only`: of its parts."""
        own = self.software
        if own == NEUTRAL and not (at and (at.float8 or at.asynchronous)):
            return cost
        load = self.costs.workload
        times = zip(cost.products, cost.attention, (cost.forward, cost.backward), strict=True)
        norms = self._norms(at) if at and own.norm != 1.0 else (0.0, 0.0)
        rests = [
            own.compute * (own.attention * a + own.elementwise * (t - p - a) + (own.norm - own.elementwise) * n)
            for (p, a, t), n in zip(times, norms, strict=True)
        ]
        narrow = at is not None and at.float8
        gathered = 1 / DTYPE_BYTES[load.compute_dtype] if own.casts and narrow else 1.0  # of its size; half of all is
        sent = [own.tp_exposed * (1 + gathered) / 2 * t for t in (cost.tp_forward, cost.tp_backward)]
        products = list(matrix_products(self, at, only or _every)) if at and narrow else [own.compute * p for p in cost.products]
        if at and at.asynchronous and own.pieces:
            sent = list(fused(self, at, only or _every, gathered))
        elif at and at.asynchronous:
            sent = [self.beside(part, each) for part, each in zip(products, sent, strict=True)]
        (f, b), (tp_f, tp_b) = (p + r for p, r in zip(products, rests, strict=True)), sent
        return replace(
            cost,
            forward=f,
            backward=b,
            tp_forward=tp_f,
            tp_backward=tp_b,
            attention=(own.compute * own.attention * cost.attention[0], own.compute * own.attention * cost.attention[1]),
        )

    def _norms(self, at: Arrangement) -> tuple[Seconds, Seconds]:
        """What of a block's forward and backward seconds are norms."""
        cost = self._part(0, at.block, at, "norms", lambda step: step.op.kind == "norm")
        return cost.forward, cost.backward

    def _again(self, at: Arrangement, sent: Seconds) -> Seconds:
        """Seconds of running a layer's forward again, as far as it is recomputed; attention with what cp sends for it."""
        if self.recomputed is None:
            return 0.0
        part = self._part(0, at.block, at, "again", self.recomputed)
        cost = self._scaled(part, at, self.recomputed)  # no policy keeps a norm
        beside = sums(self, at, self.recomputed) + sum(each(self, at, self.recomputed)[0] for each in (laid, casts))
        return cost.forward + cost.tp_forward + (sent if cost.attention[0] else 0.0) + beside

    def _host(self, at: Arrangement) -> Seconds:
        """Least seconds of a layer and micro-batch, forward and backward."""
        own = self.software
        if at.tp == 1:
            return own.layer
        apart = at.pp > 1 and at.tp * at.dp * at.pp > self.costs.hardware.links[0].span > 0
        return max(own.layer + own.layer_tp, own.layer_hop + own.layer_hop_tp * at.tp if apart else 0.0)

    def pace(self, at: Arrangement) -> tuple[Seconds, Seconds]:
        """Seconds of a layer on the device, and the least that it takes."""
        return sum(_seconds(self._scaled(self.parts(at)[0], at))), self._host(at)

    def _paid(self, cover: Seconds, sent: Seconds) -> Seconds:
        """e(c, q): what communication beside `cover` seconds of computation costs."""
        hidden = min(cover, sent) * (1 - self.software.dp_exposed)
        return sent - hidden + self.costs.hardware.overlap * hidden

    def beside(self, cover: Seconds, sent: Seconds) -> Seconds:
        """e(c, q) of cost.step: of communication that the framework always hides as far as it goes."""
        return max(0.0, sent - cover) + self.costs.hardware.overlap * min(cover, sent)

    def slower(self, span: int) -> float:
        return self.software.network if span > self.costs.hardware.links[0].span > 0 else 1.0

    def _sharded(self, cost: LayerCost, at: Arrangement) -> DataParallel:
        return data_parallel(cost, Mesh(dp_shard=at.dp, tp=at.tp, ep=at.ep), self.costs.hardware, self.costs.workload)

    def _collectives(self, cost: LayerCost, at: Arrangement) -> tuple[Seconds, Seconds]:
        """Seconds of gathering a part's parameters, and of reducing its gradients, under FSDP."""
        dp, slower = self._sharded(cost, at), self.slower(at.dp * at.tp)
        return slower * dp.gather, slower * dp.reduce

    def _copies(self, cost: LayerCost, at: Arrangement) -> tuple[Seconds, Seconds]:
        """Seconds (forward, backward) of FSDP's copies, if the framework's makes them."""
        if not (self.software.copies and at.zero == 3):
            return 0.0, 0.0
        dp = self._sharded(cost, at)
        return dp.unpack, dp.pack + (0.0 if at.stays else dp.unpack)

    def passed(self, at: Arrangement) -> Bytes:
        """What a rank passes on of one micro-batch: under tp its share."""
        body = self.costs.graph.bodies[0]
        return sum(body.values[i].bytes_at(at.micro_batch) for i in body.inputs if body.values[i].requires_grad) / at.tp

    def _hop(self, at: Arrangement) -> Seconds:
        """Seconds of passing one micro-batch's activations on."""
        if at.pp == 1:
            return 0.0
        stride = at.tp * at.dp
        return self.slower(2 * stride) * collective_time("send_recv", self.passed(at), 2, stride, self.costs.hardware)

    def held(self, at: Arrangement, layers: int, embed: LayerCost | None, head: LayerCost | None, plain: int = 0) -> float:
        """Parameters on one rank of a stage, cut by tp; `plain` of its layers have no experts."""
        outer = [self._outer(at)] if embed and head else [part for part in (embed, head) if part]
        return self._layers(at, layers, plain) + sum(map(numel, outer))

    def _layers(self, at: Arrangement, layers: int, plain: int) -> float:
        each = numel(self.costs.layer_cost(0, at.block, at.tp, at.samples, ep=at.ep))
        first = numel(self.plain.parts(at.without_experts)[0]) if self.plain and plain else 0.0
        return (layers - plain) * each + plain * first

    def _parameters(self, at: Arrangement) -> list[float]:
        """Parameters of every virtual stage on one rank, cut by tp."""
        _, embed, head = self.parts(at)
        held = [self._layers(at, n, k) for n, k in zip(at.dealt, at.plains, strict=True)]
        if len(held) == 1:
            return [held[0] + numel(self._outer(at))]
        return [held[0] + numel(embed), *held[1:-1], held[-1] + numel(head)]

    def _accumulation(self, numel: float) -> Seconds:
        """Seconds of adding one micro-batch's gradients to those in the reduce dtype: these are read and written."""
        return memory_time(2 * numel * self.gradient(), self.costs.hardware.device)

    def gradient(self) -> Bytes:
        """Of a parameter."""
        return self.software.gradients or DTYPE_BYTES[self.costs.workload.reduce_dtype]

    def _optimizer(self, numel: float, dp: int, at: Arrangement) -> Seconds:
        load = self.costs.workload
        share = dp if at.zero else 1
        size = numel / share * DTYPE_BYTES[load.param_dtype]
        return optimizer_time(size, OPTIMIZER_STATES[load.optimizer], self.costs.hardware.device)

    def _reduction(self, groups: list[tuple[float, int, int]], at: Arrangement, last: Seconds) -> Seconds:
        """Seconds of reducing a stage's gradients (and, with ZeRO, gathering its parameters) that `last` does not hide: of
        (parameters, ranks that share them, how far apart these are)."""
        return self._paid(last, sum(self._reduced(numel, at, dp, stride) for numel, dp, stride in groups))

    def _reduced(self, numel: float, at: Arrangement, dp: int, stride: int) -> Seconds:
        load, hardware = self.costs.workload, self.costs.hardware
        size, span = numel * self.gradient(), hardware.links[0].span
        slower = self.slower(dp * stride)
        if self.software.one_adapter and 1 < stride < span < dp * stride:
            slower, dp, stride = slower * self.software.one_adapter, ceil(dp * stride / span), span
        if at.zero == 0:
            slower *= self.software.piped_reduction if at.pp > 1 and dp * stride > span > 0 else 1.0
            return slower * collective_time("all_reduce", size, dp, stride, hardware)
        gather = numel * DTYPE_BYTES[load.compute_dtype]
        reduce = collective_time("reduce_scatter", size, dp, stride, hardware)
        return slower * (reduce + collective_time("all_gather", gather, dp, stride, hardware))

    def memory(self, at: Arrangement) -> Bytes:
        """Bytes of the fullest rank (benchmarks.memory). Raises `UsageError` like `price`."""
        return memory(self, at)

    def gathered(self, at: Arrangement) -> Bytes:
        """What a layer keeps of gathered activations beyond the shards that they were gathered from."""
        model = self.costs.layer_model(0, at.tp, at.samples, ep=at.ep)
        arriving = (
            (model.body.values[step.op.inputs[0]], step.outcome)
            for step in walk(model, at.block)
            if step.op.kind == "enter" and step.outcome.inputs[0].sharded and not step.outcome.outputs[0].sharded
        )
        return sum(value.bytes_at(at.micro_batch) - model.local_bytes(value, outcome.inputs[0]) for value, outcome in arriving)


def _every(step: Step) -> bool:
    return True


def _seconds(cost: LayerCost) -> tuple[Seconds, Seconds]:
    return cost.forward + cost.tp_forward, cost.backward + cost.tp_backward
