"""What a plan costs: seconds of one optimizer step, and bytes of every pipeline rank.

Stage `s` of `p` holds layers `l` with their shares of a step (cost.step: `t_l` seconds of every micro-batch, `d_l` once) and
its part of the outer body (cost.outer). With `m` micro-batches and `v` chunks of layers a rank, a step has `M = m + (p - 1) q`
slots (`schedule.slots`; `q` is 1/v, under zero-bubble another share of a micro-batch, and less of it where ranks share a device:
`CostModel.share`), and

    u_s  = sum_l t_l + d_l / M
    step = (m - q) max_s u_s + q sum_s u_s + hops h          h: passing one micro-batch's activations on (`CostModel.hop`)

(`schedule.additive_seconds`): without a pipeline `m sum_l t_l + sum_l d_l`. `Prediction.scheduled` is the same work on the
exact timeline of the schedule; `cost.simulated` runs it event by event. The breakdown is that of the slowest stage; the bubble
is what it waits for the others.

    bytes_s = receive + max of  sum_l (states_l + q_l kept_l) + max(max_l alone_l, max_l inside_l + max_l window_l)
                                sum_l (states_l + (q_l - 1) kept_l) + max_l ending_l

(`cost.rank.memory`), with `q_l` micro-batches in flight in the layer's chunk. Everything is a sum over layers but for the
largest moments, as the integer program needs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby, pairwise

from autoplan.cost.collectives import collective_time
from autoplan.cost.compute import memory_time
from autoplan.cost.context import Context, Gather
from autoplan.cost.data_parallel import DataParallel, copied, data_parallel
from autoplan.cost.experts import Mixtures
from autoplan.cost.fusion import fused
from autoplan.cost.late import Late, late, split_step
from autoplan.cost.layer import LayerCost, layer_cost
from autoplan.cost.outer import OuterParts
from autoplan.cost.prices import LayerModel
from autoplan.cost.rank import Held, Rank, breakdown, held_layers, memory, scheduled, stage_predictions
from autoplan.cost.rank import seconds as rank_seconds
from autoplan.cost.step import LayerStep, layer_step
from autoplan.errors import UsageError
from autoplan.graph import DTYPE_BYTES, Graph, Value
from autoplan.hardware import HardwareProfile
from autoplan.plan import Plan, Prediction, needs_fsdp, zero_level
from autoplan.schedule import ScheduleKind, additive_seconds, exposed_hops, filling, in_flight_by_chunk, shared, slots
from autoplan.strategy import REPLICATE, CpKind, Layout, Mesh, Sharding, Strategy
from autoplan.units import Bytes, Seconds
from autoplan.workload import Workload

OUTER = -1
"""Index of the outer body among the bodies."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A schedule and where the layers are cut: `starts` are the first layers of the virtual stages but the first."""

    schedule: ScheduleKind = "1f1b"
    chunks: int = 1
    starts: tuple[int, ...] = ()

    def runs(self, layers: int) -> list[tuple[int, int]]:
        """(first, last + 1) of every virtual stage's layers."""
        return list(pairwise((0, *self.starts, layers)))


class CostModel:
    """Prices layers and whole plans of one model on one machine. Tables are filled as they are asked for."""

    def __init__(self, graph: Graph, hardware: HardwareProfile, workload: Workload, *, copies: bool = True) -> None:
        """`copies`: tp's reduce-scatters copy, as DTensor's do (`LayerModel.border`)."""
        self.given, self.hardware, self.workload, self.copies = graph, hardware, workload, copies
        self.graph = fused(graph) if workload.compile else graph
        hardware.device.peak_of(workload.compute_dtype)  # a profile without this dtype is the user's error, told early
        self._models: dict[tuple[int, int, int, int, int, CpKind], LayerModel] = {}
        self._costs: dict[tuple[int, int, int, int, int, CpKind, Sharding], LayerCost] = {}
        self._parts: dict[tuple[int, int, int, int, CpKind, Sharding], dict[tuple[int, ...], LayerCost]] = {}
        self._dp: dict[Hashable, DataParallel] = {}
        self._ahead: dict[tuple[int, int], Bytes] = {}
        self._passed: dict[tuple[int, float], Bytes] = {}
        self._late: dict[Hashable, Late] = {}
        self._thirds: dict[Hashable, list[tuple[Seconds, Seconds, Seconds]]] = {}
        self.outer = OuterParts(self.graph)

    def with_batch(self, global_batch: int) -> CostModel:
        """The same model at another global batch; what layers cost for one micro-batch is shared."""
        other = copy(self)
        other.workload = replace(self.workload, global_batch=global_batch)
        return other

    def layer_model(
        self, body: int, tp: int, micro_batch: int, cp: int = 1, ep: int = 1, cp_kind: CpKind = "ulysses"
    ) -> LayerModel:
        """The table of prices of a body (an index, or OUTER)."""
        dealt = self.mixtures.dealt.get(body, ()) if ep > 1 else ()
        key = (body, tp, micro_batch, cp, ep if dealt else 1, cp_kind)
        if key not in self._models:
            graph = self.graph
            blocks = tuple((block.name, block.body) for block in graph.blocks)
            self._models[key] = LayerModel(
                graph.outer if body == OUTER else graph.bodies[body],
                graph.bodies,
                blocks,
                tp=tp,
                micro_batch=micro_batch,
                hardware=self.hardware,
                dtype=self.workload.compute_dtype,
                cp=cp,
                gathered=self._gathered(body) if cp > 1 else None,
                ep=ep,
                dealt=dealt,
                imbalance=self.workload.expert_imbalance,
                plain=self.layer_model(body, tp, micro_batch, cp, 1, cp_kind) if dealt else None,
                cp_kind=cp_kind,
                copies=self.copies,
            )
        return self._models[key]

    @cached_property
    def context(self) -> Context:
        """Where the model's sequences run."""
        return Context(self.graph)

    @cached_property
    def mixtures(self) -> Mixtures:
        """Where the model's experts are."""
        return Mixtures(self.graph)

    def _gathered(self, body: int) -> dict[int, tuple[Gather, ...]]:
        return {index: found for (of, index), found in self.context.gathered.items() if of == body}

    def layer_cost(
        self, body: int, sharding: Sharding, tp: int, micro_batch: int, cp: int = 1, ep: int = 1, cp_kind: CpKind = "ulysses"
    ) -> LayerCost:
        """Cost of one layer for one micro-batch. Raises `UsageError` when the sharding is not legal for it."""
        key = (body, tp, micro_batch, cp, ep if self.mixtures.dealt.get(body) else 1, cp_kind, sharding)
        if key not in self._costs:
            model = self.layer_model(body, tp, micro_batch, cp, ep, cp_kind)
            if body == OUTER:
                self._parts[key[1:]] = self.outer.costs(model, sharding)
                self._costs[key] = next(iter(self._parts[key[1:]].values()))
            else:
                self._costs[key] = layer_cost(model, sharding)
        return self._costs[key]

    def micro_batches(self, mesh: Mesh, micro_batch: int) -> int:
        """Micro-batches a step. Raises `UsageError` when the global batch does not divide."""
        batch = self.workload.global_batch
        if batch % (mesh.dp * micro_batch):
            raise UsageError(
                f"a global batch of {batch} does not divide into {mesh.dp} data-parallel groups x micro-batches of {micro_batch}."
            )
        return batch // (mesh.dp * micro_batch)

    def layer_step(self, body: int, strategy: Strategy, mesh: Mesh, micro_batch: int, *, split: bool = False) -> LayerStep:
        """One layer's share of a step; OUTER: all that stands outside the layers. `split`: under zero-bubble (cost.late)."""
        key = (body, mesh.within, micro_batch, strategy.sharding)
        cost = self.layer_cost(body, strategy.sharding, mesh.tp, micro_batch, mesh.cp, mesh.ep, mesh.cp_kind)
        step = self._step(key, cost, strategy, mesh, micro_batch, outer=body == OUTER)
        return self._split(key, step, body, strategy, mesh, micro_batch) if split else step

    def outer_step(
        self, regions: tuple[int, ...], strategy: Strategy, mesh: Mesh, micro_batch: int, *, split: bool = False
    ) -> LayerStep:
        """The share of some regions of the outer body, see cost.outer."""
        if len(regions) == len(self.outer.busy):
            return self.layer_step(OUTER, strategy, mesh, micro_batch, split=split)
        key = (regions, mesh.tp, micro_batch, mesh.cp, mesh.cp_kind, strategy.sharding)
        cost = self._part(regions, strategy.sharding, mesh, micro_batch)
        step = self._step(key, cost, strategy, mesh, micro_batch, outer=True)
        return self._split(key, step, OUTER, strategy, mesh, micro_batch, frozenset(regions)) if split else step

    def _split(
        self, key: Hashable, step: LayerStep, body: int, strategy: Strategy, mesh: Mesh, micro_batch: int,
        regions: frozenset[int] | None = None,
    ) -> LayerStep:  # fmt: skip
        if key not in self._late:
            model = self.layer_model(body, mesh.tp, micro_batch, mesh.cp, mesh.ep, mesh.cp_kind)
            self._late[key] = late(model, strategy.sharding, regions, self.outer.regions)
        trained = self._dp[key, mesh.dp_replicate, mesh.dp_shard, mesh.pp > 1].whole_trainable
        reduced = zero_level(strategy.zero, mesh, self.workload) != 1
        return split_step(step, self._late[key], trained, mesh.pp, reduced, self.workload, outer=body == OUTER)

    def share(self, schedule: ScheduleKind, chunks: int, mesh: Mesh, micro_batch: int, *, again: bool = False) -> float:
        """What another stage adds to a step, of its own seconds for a micro-batch (`schedule.slots`): under zero-bubble that of
        the layer of which it is most. `again`: layers may be recomputed."""
        m, sharing = self.micro_batches(mesh, micro_batch), self.hardware.sharing
        if schedule != "zero-bubble":
            return shared(1 / chunks, m, mesh.pp, sharing)
        again_too = [(f, i + (f if again else 0.0), w) for f, i, w in self._in_thirds(mesh, micro_batch)]
        return shared(max((filling(*each, m >= mesh.pp) for each in again_too), default=1.0), m, mesh.pp, sharing)

    def hops(self, schedule: ScheduleKind, chunks: int, mesh: Mesh, micro_batch: int, stream: Layout) -> Seconds:
        """What passing activations and gradients on adds to a step (`schedule.exposed_hops`)."""
        if mesh.pp == 1:
            return 0.0
        hop, m = self.hop(mesh, micro_batch, stream), self.micro_batches(mesh, micro_batch)
        least = min((w for _, _, w in self._in_thirds(mesh, micro_batch)), default=0.0) if schedule == "zero-bubble" else 0.0
        return hop * exposed_hops(schedule, mesh.pp, m, chunks, 2 * hop <= least * (len(self.graph.blocks) // mesh.pp))

    def _in_thirds(self, mesh: Mesh, micro_batch: int) -> list[tuple[Seconds, Seconds, Seconds]]:
        """Of every body the forward pass, the backward pass of its inputs and that of its weights, as Megatron runs it: cut by cp
        and tp, with two all_reduces over tp in either pass; with FSDP's copies (cost.step)."""
        key = (mesh.tp, micro_batch, mesh.cp, mesh.ep, mesh.shards == 1)
        if key not in self._thirds:
            size = self.passed(mesh, micro_batch, REPLICATE)
            sent = 2 * collective_time("all_reduce", size, mesh.tp, 1, self.hardware) if mesh.tp > 1 else 0.0
            of_one, of_gradient = copied(self.workload, alone=mesh.shards == 1)
            self._thirds[key] = []
            for body in range(len(self.graph.bodies)):
                cost, cut = self.layer_cost(body, Sharding(), 1, micro_batch), mesh.tp * mesh.cp
                w = late(self.layer_model(body, 1, micro_batch), Sharding()).seconds
                numel = self._gathered_bytes(body, mesh.tp, mesh.ep) / DTYPE_BYTES[self.workload.compute_dtype]
                u, p = (memory_time(each * numel, self.hardware.device) for each in (of_one, of_gradient))
                f, i = (t / cut + sent + u for t in (cost.forward, cost.backward - w))
                self._thirds[key].append((f, i + p, w / cut))
        return self._thirds[key]

    def _part(self, regions: tuple[int, ...], sharding: Sharding, mesh: Mesh, micro_batch: int) -> LayerCost:
        self.layer_cost(OUTER, sharding, mesh.tp, micro_batch, mesh.cp, 1, mesh.cp_kind)
        return self._parts[mesh.tp, micro_batch, mesh.cp, 1, mesh.cp_kind, sharding][regions]

    def _step(
        self, key: Hashable, cost: LayerCost, strategy: Strategy, mesh: Mesh, micro_batch: int, *, outer: bool
    ) -> LayerStep:
        of = (key, mesh.dp_replicate, mesh.dp_shard, mesh.pp > 1)  # the other axes are in the key
        if of not in self._dp:
            self._dp[of] = data_parallel(cost, mesh, self.hardware, self.workload)
        zero = zero_level(strategy.zero, mesh, self.workload)
        again = strategy.recompute
        m = self.micro_batches(mesh, micro_batch)
        dp, pipelined, ahead = self._dp[of], mesh.pp > 1, self.ahead(mesh)
        return layer_step(cost, dp, zero, again, m, self.hardware, self.workload, outer=outer, pipelined=pipelined, ahead=ahead)

    def parts(
        self,
        body: int,
        strategy: Strategy,
        mesh: Mesh,
        micro_batch: int,
        regions: tuple[int, ...] = (),
        *,
        split: bool = False,
    ) -> tuple[LayerStep, LayerCost, DataParallel]:
        """`layer_step`, or `outer_step` of some regions, and what it is made of."""
        if body == OUTER:
            step = self.outer_step(regions, strategy, mesh, micro_batch, split=split)
            cost = self._part(regions, strategy.sharding, mesh, micro_batch)
        else:
            step = self.layer_step(body, strategy, mesh, micro_batch, split=split)
            cost = self.layer_cost(body, strategy.sharding, mesh.tp, micro_batch, mesh.cp, mesh.ep, mesh.cp_kind)
        return step, cost, data_parallel(cost, mesh, self.hardware, self.workload)

    def ahead(self, mesh: Mesh) -> Bytes:
        """What is gathered of the last layer's parameters while the head's backward pass runs: of the largest layer, cut by tp
        and ep. Nothing without FSDP."""
        if not needs_fsdp(mesh, self.workload):
            return 0.0
        key = mesh.tp, mesh.ep
        if key not in self._ahead:
            self._ahead[key] = max((self._gathered_bytes(g, *key) for g in range(len(self.graph.bodies))), default=0.0)
        return self._ahead[key]

    def _gathered_bytes(self, g: int, tp: int, ep: int) -> Bytes:
        dealt = self.mixtures.dealt.get(g, ()) if ep > 1 else ()
        numel = 0.0
        for p in self.graph.bodies[g].parameters:
            if not p.buffer:
                numel += p.numel / (ep if any(each.experts.holds(p.name) for each in dealt) else tp)
        return numel * DTYPE_BYTES[self.workload.compute_dtype]

    def passed(self, mesh: Mesh, micro_batch: int, stream: Layout) -> Bytes:
        """Most bytes that a rank passes on to the next stage for one micro-batch, at any cut."""
        if mesh.pp == 1:
            return 0.0
        key = (mesh.tp if stream.sharded else 1, micro_batch / mesh.cp)
        if key not in self._passed:
            self._passed[key] = max((self._size(values, *key) for values in self.outer.crossing), default=0.0)
        return self._passed[key]

    def _size(self, values: Sequence[Value], cut: int, samples: float) -> Bytes:
        streams = self.outer.from_blocks
        return sum(v.bytes_at(samples) / (cut if v.requires_grad and v.id in streams else 1) for v in values)

    def hop(self, mesh: Mesh, micro_batch: int, stream: Layout) -> Seconds:
        """Seconds of passing one micro-batch's activations, or their gradients, to the neighbouring stage."""
        size = self.passed(mesh, micro_batch, stream)
        return collective_time("send_recv", size, 2, mesh.dp * mesh.cp * mesh.tp, self.hardware) if mesh.pp > 1 else 0.0

    def passing(self, mesh: Mesh, micro_batch: int, stream: Layout, cut: Cut) -> tuple[Bytes, ...]:
        """Bytes for what passes between stages, by pipeline rank: of every virtual stage but the last what it has sent, until
        its backward pass; and one buffer each for what comes next from either side (`apply._torch.LeanStage`)."""
        size, m = self.passed(mesh, micro_batch, stream), self.micro_batches(mesh, micro_batch)
        return tuple(size * number for number in _passing(cut.schedule, mesh.pp, m, cut.chunks))

    def predict(
        self, mesh: Mesh, micro_batch: int, outer: Strategy, layers: Sequence[tuple[int, Strategy]], cut: Cut = Cut()
    ) -> Prediction:
        """Price a whole plan: `layers` are (body index, strategy) of every block, in the order in which they are called.

        Raises `UsageError` when it is not legal.
        """
        m, stream, chunks = self.micro_batches(mesh, micro_batch), outer.sharding.stream, cut.chunks
        ranks = self._ranks(mesh, micro_batch, outer, layers, cut)
        again = any(strategy.recompute != "none" for _, strategy in layers)
        share = self.share(cut.schedule, chunks, mesh, micro_batch, again=again)
        count, hop = slots(m, mesh.pp, share), self.hop(mesh, micro_batch, stream)
        seconds = [rank_seconds(rank, count) for rank in ranks]
        hops = self.hops(cut.schedule, chunks, mesh, micro_batch, stream)
        total = additive_seconds(cut.schedule, seconds, m, chunks=chunks, share=share) + hops
        slowest = ranks[seconds.index(max(seconds))]
        passing = self.passing(mesh, micro_batch, stream, cut)
        memories = [
            memory(rank, in_flight_by_chunk(cut.schedule, s, mesh.pp, m, chunks), passing[s]) for s, rank in enumerate(ranks)
        ]
        batch, device = self.workload.global_batch, self.hardware.device
        flops = (self.graph.forward_flops + self.graph.backward_flops) * batch
        piped = mesh.pp > 1
        return Prediction(
            step_time=total,
            time=breakdown(slowest, m, count, total, hops),
            memory=max(memories, key=lambda parts: parts.total),
            hidden_communication=sum(n * (m * step.hidden[0] + step.hidden[1]) for step, n, *_ in slowest),
            tokens_per_second=self.graph.tokens * batch / total,
            hop=hop,
            stages=stage_predictions(ranks, memories, chunks) if piped else (),
            scheduled=scheduled(cut.schedule, ranks, m, hop, chunks, self.hardware.sharing) if piped else None,
            mfu=flops / (total * mesh.size * device.peak_of(self.workload.compute_dtype)),
        )

    def _ranks(
        self, mesh: Mesh, micro_batch: int, outer: Strategy, layers: Sequence[tuple[int, Strategy]], cut: Cut
    ) -> Sequence[Rank]:
        """What every pipeline rank holds: its layers, equal ones counted, and its parts of the outer body."""
        ranks: list[list[Held]] = [[] for _ in range(mesh.pp)]
        split = cut.schedule == "zero-bubble"
        for k, (first, last) in enumerate(cut.runs(len(layers))):
            rank, chunk = ranks[k % mesh.pp], k // mesh.pp
            runs = [(layer, len(list(equal))) for layer, equal in groupby(layers[first:last])]
            priced = [(body, self.layer_step(body, strategy, mesh, micro_batch, split=split), n) for (body, strategy), n in runs]
            rank += held_layers(priced, chunk, cut.chunks)
            regions = self.outer.within(first, last)
            if regions:
                rank.append(Held(self.outer_step(regions, outer, mesh, micro_batch, split=split), 1, chunk))
        return ranks

    def predict_plan(self, plan: Plan) -> Prediction:
        """Price a written plan anew. Raises `UsageError` when it is not one of this model."""
        bodies = {block.name: block.body for block in self.graph.blocks}
        layers = []
        for name, strategy in plan.layers():
            if name not in bodies:
                raise UsageError(f"the plan places a layer '{name}', which the model does not have.")
            layers.append((bodies[name], strategy))
        missing = set(bodies) - {name for name, _ in plan.layers()}
        if missing:
            raise UsageError(f"the plan says nothing of the layer '{min(missing)}'.")
        return self.predict(plan.mesh, plan.micro_batch, plan.outer_strategy, layers, _cut(plan))

    def memory_limit(self, headroom: float) -> Bytes:
        """Bytes that a plan may use of one device, `headroom` (a fraction) kept free."""
        device = self.hardware.device
        return (device.memory - device.reserved) * (1.0 - headroom)


def _cut(plan: Plan) -> Cut:
    if plan.pipeline is None:
        return Cut()
    places = {name: i for i, (name, _) in enumerate(plan.layers())}
    starts = tuple(places[name] for name in plan.pipeline.split_before)
    return Cut(plan.pipeline.schedule, plan.pipeline.chunks, starts)


@lru_cache(maxsize=65536)
def _passing(schedule: ScheduleKind, pp: int, micro_batches: int, chunks: int) -> tuple[int, ...]:
    """How many buffers `CostModel.passing` counts on every pipeline rank."""
    last = pp * chunks - 1
    held = [0] * pp
    for rank in range(pp if pp > 1 else 0):
        for chunk, flight in enumerate(in_flight_by_chunk(schedule, rank, pp, micro_batches, chunks)):
            stage = chunk * pp + rank
            held[rank] += (stage > 0) + (flight + 1) * (stage < last)
    return tuple(held)
