"""What a plan costs: seconds of one optimizer step and bytes of the fullest rank.

With `m` micro-batches a step, and for every layer `l` (cost.layer) forward `F = forward + tp_forward`, recomputed forward
`R = F` if the layer is recomputed, backward `B = backward + tp_backward + R`,

    g_l  all_gather of its parameters over dp_shard, in the compute dtype
    r_l  reduce_scatter of its gradients over dp_shard, in the reduce dtype, every micro-batch
    a_l  all_reduce of its gradient shards over dp_replicate, in the last micro-batch only

    forward   m (F + e(F, g))                                          e(c, q) = max(0, q - c) + overlap * min(c, q)
    backward  (m - 1) (B + e(B, g' + r)) + B + e(B, g' + r + a)        g' = g if resharded after forward, else 0

(`CostModel.layer_step`): the gather of the next layer runs under this one's computation, whatever is longer counts, and
hidden communication slows computation down by the profile's `overlap`. Nothing hides the gather of the outer layer
(embeddings and head), with which a step begins, nor the reduction of its gradients, with which it ends. The sum over
layers is exact for equal layers and for unequal ones differs from an event simulation by at most one layer's
communication. The optimizer's step comes last.

Bytes: states (parameters, gradients, optimizer) are cut by tp and by dp_shard; saved activations are summed over layers.
While one layer's backward pass runs, it needs besides what it recomputes, its gathered parameters and those of its
neighbour, its unreduced gradients and its largest temporary: of these moments only the largest counts. So all is additive
over layers but for one maximum, which is what the search's integer program needs (`LayerStep.memory`, `.moment`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

from autoplan.cost.collectives import collective_time
from autoplan.cost.compute import optimizer_time
from autoplan.cost.layer import LayerCost, layer_cost
from autoplan.cost.prices import LayerModel
from autoplan.errors import UsageError
from autoplan.graph import DTYPE_BYTES, Graph
from autoplan.hardware import HardwareProfile
from autoplan.plan import MemoryBreakdown, Plan, Prediction, TimeBreakdown
from autoplan.strategy import Mesh, Sharding, Strategy
from autoplan.units import Bytes, Seconds
from autoplan.workload import OPTIMIZER_STATES, Workload

OUTER = -1
"""Index of the outer body among the bodies."""


@dataclass(frozen=True)
class LayerStep:
    """One layer's share of a step. `time` and `memory` add up over layers; `moment` is what the layer needs besides while
    its backward pass runs, and only the largest of those counts."""

    time: TimeBreakdown
    hidden: Seconds
    memory: MemoryBreakdown
    moment: MemoryBreakdown

    @cached_property
    def seconds(self) -> Seconds:
        return self.time.total

    @cached_property
    def bytes(self) -> Bytes:
        """The part of memory that adds up over layers."""
        return self.memory.total

    @cached_property
    def peak(self) -> Bytes:
        """The part of which only the largest over all layers counts."""
        return self.moment.total


class CostModel:
    """Prices layers and whole plans of one model on one machine. Tables are filled as they are asked for."""

    def __init__(self, graph: Graph, hardware: HardwareProfile, workload: Workload) -> None:
        self.graph, self.hardware, self.workload = graph, hardware, workload
        hardware.device.peak_of(workload.compute_dtype)  # a profile without this dtype is the user's error, told early
        self._models: dict[tuple[int, int, int], LayerModel] = {}
        self._costs: dict[tuple[int, int, int, Sharding], LayerCost] = {}

    def with_batch(self, global_batch: int) -> CostModel:
        """The same model at another global batch; what layers cost for one micro-batch is shared."""
        other = copy(self)
        other.workload = replace(self.workload, global_batch=global_batch)
        return other

    def layer_model(self, body: int, tp: int, micro_batch: int) -> LayerModel:
        """The table of prices of a body (an index, or OUTER)."""
        key = (body, tp, micro_batch)
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
            )
        return self._models[key]

    def layer_cost(self, body: int, sharding: Sharding, tp: int, micro_batch: int) -> LayerCost:
        """Cost of one layer for one micro-batch. Raises `UsageError` when the sharding is not legal for it."""
        key = (body, tp, micro_batch, sharding)
        if key not in self._costs:
            self._costs[key] = layer_cost(self.layer_model(body, tp, micro_batch), sharding)
        return self._costs[key]

    def micro_batches(self, mesh: Mesh, micro_batch: int) -> int:
        """Micro-batches a step. Raises `UsageError` when the global batch does not divide."""
        batch = self.workload.global_batch
        if batch % (mesh.dp * micro_batch):
            raise UsageError(
                f"a global batch of {batch} does not divide into {mesh.dp} data-parallel groups x micro-batches of {micro_batch}."
            )
        return batch // (mesh.dp * micro_batch)

    def layer_step(self, body: int, strategy: Strategy, mesh: Mesh, micro_batch: int) -> LayerStep:
        """One layer's share of the seconds and bytes of a step (the mathematics: see the module)."""
        cost = self.layer_cost(body, strategy.sharding, mesh.tp, micro_batch)
        time, hidden = self._time(cost, strategy, mesh, self.micro_batches(mesh, micro_batch), outer=body == OUTER)
        return LayerStep(time, hidden, *self._memory(cost, strategy, mesh))

    def _time(self, cost: LayerCost, strategy: Strategy, mesh: Mesh, m: int, *, outer: bool) -> tuple[TimeBreakdown, Seconds]:
        gather, reduce, final = self.dp_collectives(cost, mesh)
        again = strategy.recompute == "full"
        forward = cost.forward + cost.tp_forward
        backward = cost.backward + cost.tp_backward + (forward if again else 0.0)
        regather = gather if strategy.zero == 3 and not outer else 0.0
        cover_forward, cover_backward = (0.0, 0.0) if outer else (forward, backward)
        exposed = hidden = 0.0
        for times, cover, sent in (
            (m, cover_forward, gather),
            (m - 1, cover_backward, regather + reduce),
            (1, cover_backward, regather + reduce + final),
        ):
            exposed += times * max(0.0, sent - cover)
            hidden += times * min(cover, sent)
        time = TimeBreakdown(
            forward=m * cost.forward,
            backward=m * cost.backward,
            recompute=m * forward if again else 0.0,
            tp_communication=m * (cost.tp_forward + cost.tp_backward),
            dp_communication=exposed + self.hardware.overlap * hidden,
            optimizer=self._optimizer(cost, mesh),
        )
        return time, hidden

    def dp_collectives(self, cost: LayerCost, mesh: Mesh) -> tuple[Seconds, Seconds, Seconds]:
        """Seconds of (gathering parameters, reducing gradients over dp_shard, all-reducing their shards over dp_replicate)."""
        whole = sum(p.numel(1) for p in cost.parameters)
        trainable = sum(p.numel(1) for p in cost.parameters if p.trainable)
        reduced = trainable * DTYPE_BYTES[self.workload.reduce_dtype]
        gather = collective_time(
            "all_gather", whole * DTYPE_BYTES[self.workload.compute_dtype], mesh.dp_shard, mesh.tp, self.hardware
        )
        reduce = collective_time("reduce_scatter", reduced, mesh.dp_shard, mesh.tp, self.hardware)
        final = collective_time("all_reduce", reduced / mesh.dp_shard, mesh.dp_replicate, mesh.tp * mesh.dp_shard, self.hardware)
        return gather, reduce, final

    def _optimizer(self, cost: LayerCost, mesh: Mesh) -> Seconds:
        numel = sum(p.numel(mesh.dp_shard) for p in cost.parameters if p.trainable)
        size = numel * DTYPE_BYTES[self.workload.param_dtype]
        return optimizer_time(size, OPTIMIZER_STATES[self.workload.optimizer], self.hardware.device)

    def _memory(self, cost: LayerCost, strategy: Strategy, mesh: Mesh) -> tuple[MemoryBreakdown, MemoryBreakdown]:
        load = self.workload
        numel = sum(p.numel(mesh.dp_shard) for p in cost.parameters)
        trainable = sum(p.numel(mesh.dp_shard) for p in cost.parameters if p.trainable)
        size, compute, reduce = (DTYPE_BYTES[t] for t in (load.param_dtype, load.compute_dtype, load.reduce_dtype))
        whole = sum(p.numel(1) for p in cost.parameters)
        whole_trainable = sum(p.numel(1) for p in cost.parameters if p.trainable)
        gathered = whole * compute
        unreduced = whole_trainable * (compute + reduce)
        stays = strategy.zero < 3
        memory = MemoryBreakdown(
            parameters=numel * size,
            gradients=trainable * size,
            optimizer=trainable * size * OPTIMIZER_STATES[load.optimizer],
            buffers=cost.buffers,
            activations=cost.inputs if strategy.recompute == "full" else cost.saved,
            unsharded=gathered if stays else 0.0,
        )
        moment = MemoryBreakdown(
            unsharded=unreduced + (0.0 if stays else 2 * gathered),
            recompute=cost.saved if strategy.recompute == "full" else 0.0,
            temporary=cost.temporary,
        )
        return memory, moment

    def predict(self, mesh: Mesh, micro_batch: int, outer: Strategy, layers: Sequence[tuple[int, Strategy]]) -> Prediction:
        """Price a whole plan: `layers` are (body index, strategy) of every block. Raises `UsageError` when it is not legal."""
        counts: dict[tuple[int, Strategy], int] = {}
        for body, strategy in [(OUTER, outer), *layers]:
            counts[body, strategy] = counts.get((body, strategy), 0) + 1
        steps = [(self.layer_step(body, strategy, mesh, micro_batch), n) for (body, strategy), n in counts.items()]
        time = TimeBreakdown(**_weighted((step.time.items(), n) for step, n in steps))
        parts = _weighted((step.memory.items(), n) for step, n in steps)
        fullest = max((step for step, _ in steps), key=lambda step: step.peak)
        parts = _weighted([(parts.items(), 1), (fullest.moment.items(), 1)])
        seconds = time.total
        batch, device = self.workload.global_batch, self.hardware.device
        flops = (self.graph.forward_flops + self.graph.backward_flops) * batch
        return Prediction(
            step_time=seconds,
            time=time,
            memory=MemoryBreakdown(**parts),
            hidden_communication=sum(step.hidden * n for step, n in steps),
            tokens_per_second=self.graph.tokens * batch / seconds,
            mfu=flops / (seconds * mesh.size * device.peak_of(self.workload.compute_dtype)),
        )

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
        return self.predict(plan.mesh, plan.micro_batch, plan.outer_strategy, layers)

    def memory_limit(self, headroom: float) -> Bytes:
        """Bytes that a plan may use of one device, `headroom` (a fraction) kept free."""
        device = self.hardware.device
        return (device.memory - device.reserved) * (1.0 - headroom)


def _weighted(parts: Iterable[tuple[Iterable[tuple[str, float]], int]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for items, count in parts:
        for name, amount in items:
            totals[name] = totals.get(name, 0.0) + amount * count
    return totals
