"""What a step of a plan should send, rank by rank, from the plan and the graph alone.

With `m` micro-batches, for every virtual stage of a pipeline rank:

    tp            each border costs what `strategy`'s table says, forward and backward; a vocabulary-parallel loss
                  two small all_reduces; a layer that is recomputed in full repeats the forward collectives inside it
                  up to the last tensor that it saves (PyTorch stops there), one that is selectively none        m times
                  a GATHERED parameter one all_reduce of its gradient            m times, with dp_shard and zero 1: once
                  under zero-bubble m - s times on stage s                                                     (cost.late)
    cp            attention: an all_to_all of every operand forward, of every gradient backward, repeated when the layer is
                  recomputed in full; the loss two small all_reduces                                                     m times
                  ring: instead of these, messages of keys and values, and backward of their gradients too, and what a causal
                  one deals out and back (cost.ring); each is an all_to_all in which one or two others get something     m times
    ep            where experts are dealt an all_to_all of their numbers, of the rows and of the results forward, two backward,
                  repeated when the layer is recomputed in full                                                  m times
    dp_shard, cp  zero 3: two gathers and one reduction of each FSDP unit, zero 2: one and one                   m times
                  zero 1: one and one                                                                            once
    dp_replicate  one all_reduce of each unit's gradient shards                                                  once
    pp            each tensor that crosses a cut is sent, and its gradient sent back                             m times
                  gradients of parameters that several stages use                                                once

and the loss is added up over the axes, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil, prod

from autoplan.cost.model import OUTER, CostModel
from autoplan.cost.parameters import LocalParameter
from autoplan.cost.prices import LayerModel
from autoplan.cost.walk import Step, walk
from autoplan.graph import DTYPE_BYTES, Value
from autoplan.plan import Plan, zero_level
from autoplan.strategy import REPLICATE, Layout, Strategy
from autoplan.verify.borders import Collective, context_parallel, expert_parallel, parameter_gradients, tensor_parallel
from autoplan.verify.traffic import Amount, Key, Traffic, axis_of, total

Parts = Iterator[tuple[Key, Amount]]
Axis = Callable[[LayerModel, Strategy, Callable[[Step], bool]], Iterator[Collective]]
"""What an axis sends for one micro-batch of a layer."""


def expected_traffic(plan: Plan, costs: CostModel, rank: int = 0) -> Traffic:
    """What the ranks at coordinate `rank` of the pp axis send and receive in one step; `costs` is a model of the plan's graph.

    Raises `UsageError`, naming the place, when a sharding of the plan breaks a rule.
    """
    return total(_parts(plan, costs, rank))


def _parts(plan: Plan, costs: CostModel, rank: int) -> Parts:
    stages = [Stage(plan, costs, number) for number in range(rank, len(plan.stages), plan.mesh.pp)]
    for stage in stages:
        if plan.mesh.tp > 1:
            for kind, size in stage.across(tensor_parallel):
                yield ("tp", kind), Amount(1, size).times(plan.micro_batches)
            for strategy, elements in stage.gathered():
                yield ("tp", "all_reduce"), _synchronised(plan, strategy, elements, rank)
        if plan.mesh.cp > 1:
            for kind, size in stage.across(context_parallel):
                yield ("cp", kind), Amount(1, size).times(plan.micro_batches)
        if plan.mesh.ep > 1:
            for kind, size in stage.across(expert_parallel):
                yield (axis_of(range(plan.mesh.ep), plan.mesh), kind), Amount(1, size).times(plan.micro_batches)
        yield from stage.passed()
    for parameters, strategy in units(plan, costs, stages):
        yield from _unit(plan, parameters, strategy.zero)
    if plan.mesh.pp > 1:
        yield from _shared(plan, costs, rank)
    yield from _loss(plan, costs)


class Stage:
    """One virtual stage: its layers, and what stands outside the layers there."""

    def __init__(self, plan: Plan, costs: CostModel, number: int) -> None:
        self.plan, self.costs = plan, costs
        names = plan.stages[number]
        first = sum(map(len, plan.stages[:number]))
        self.regions = range(first, first + len(names) + (number == len(plan.stages) - 1))
        bodies = {block.name: block.body for block in costs.graph.blocks}
        by_name = dict(plan.layers())
        self.layers = [(bodies[name], by_name[name]) for name in names]
        """(body, strategy)"""

    def model(self, body: int) -> LayerModel:
        mesh = self.plan.mesh
        return self.costs.layer_model(body, mesh.tp, self.plan.micro_batch, mesh.cp, mesh.ep, mesh.cp_kind)

    def mine(self, step: Step) -> bool:
        """Does this stage run a step of the outer body?"""
        return self.costs.outer.regions[step.index] in self.regions

    def across(self, axis: Axis) -> Iterator[Collective]:
        """Of one micro-batch, over the axis that `axis` knows: `tensor_parallel`, `context_parallel` or `expert_parallel`."""
        found: dict[tuple[int, Strategy], list[Collective]] = {}
        for body, strategy in self.layers:
            if (body, strategy) not in found:
                found[body, strategy] = list(axis(self.model(body), strategy, lambda step: True))
            yield from found[body, strategy]
        yield from axis(self.model(OUTER), self.plan.outer_strategy, self.mine)

    def gathered(self) -> Iterator[tuple[Strategy, int]]:
        """Elements of every GATHERED parameter, and the strategy that has it."""
        for body, strategy in self.layers:
            for elements in parameter_gradients(self.model(body), strategy.sharding, lambda step: True):
                yield strategy, elements
        outer = self.plan.outer_strategy
        for elements in parameter_gradients(self.model(OUTER), outer.sharding, self.mine):
            yield outer, elements

    def used(self) -> set[str]:
        """Names of the outer parameters that this stage uses."""
        outer = self.costs.graph.outer
        ops = [op for op, region in zip(outer.ops, self.costs.outer.regions, strict=True) if region in self.regions]
        return {name for op in ops for i in op.inputs if (name := outer.values[i].parameter) is not None}

    def parameters(self, body: int, strategy: Strategy, names: set[str] | None = None) -> list[LocalParameter]:
        """A body's parameters, or those of them called `names`, as one tp rank has them."""
        model, sharding = self.model(body), strategy.sharding
        own = [p for p in model.body.parameters if not p.buffer and (names is None or p.name in names)]
        return [model.local_parameter(p, sharding.layout(p.name) if p.trainable else REPLICATE) for p in own]

    def passed(self) -> Parts:
        """What goes over the cuts before this stage and after it."""
        first, last = self.regions[0], self.regions[0] + len(self.layers)
        if self.plan.mesh.pp > 1 and first > 0:
            yield from self._crossing(first, "recv", "send")
        if self.plan.mesh.pp > 1 and last < len(self.costs.outer.order):
            yield from self._crossing(last, "send", "recv")

    def _crossing(self, cut: int, forward: str, backward: str) -> Parts:
        for value in self.costs.outer.crossing[cut - 1]:
            amount = Amount(1, self._size(value)).times(self.plan.micro_batches)
            yield ("pp", forward), amount
            if value.requires_grad:
                yield ("pp", backward), amount

    def _size(self, value: Value) -> float:
        layout = outer_layouts(self.plan, self.model(OUTER)).get(value.id, REPLICATE)
        return value.bytes_at(self.plan.micro_batch / self.plan.mesh.cp) / (self.plan.mesh.tp if layout.sharded else 1)


def outer_layouts(plan: Plan, model: LayerModel) -> dict[int, Layout]:
    """The layout of every value of the outer body, before any border that its readers have."""
    found: dict[int, Layout] = {}
    for step in walk(model, plan.outer_strategy.sharding):
        found.update(zip(step.op.outputs, step.outcome.outputs, strict=True))
    return found


def units(plan: Plan, costs: CostModel, stages: list[Stage]) -> Iterator[tuple[list[LocalParameter], Strategy]]:
    """The parameters of every FSDP unit of a rank: each layer, apart from it its experts where they are dealt, and what stands
    outside the layers: in a pipeline what each stage uses alone, and what several of the rank's stages share."""
    for stage in stages:
        for body, strategy in stage.layers:
            own = stage.parameters(body, strategy)
            for dealt in (False, True):  # experts are units of their own
                if some := [p for p in own if p.dealt == dealt]:
                    yield some, strategy
    outer = plan.outer_strategy
    if plan.mesh.pp == 1:
        yield stages[0].parameters(OUTER, outer), outer
        return
    uses = [stage.used() for stage in stages]
    shared = {name for used in uses for name in used if sum(name in other for other in uses) > 1}
    for stage, used in zip(stages, uses, strict=True):
        yield stage.parameters(OUTER, outer, used - shared), outer
    yield stages[0].parameters(OUTER, outer, shared), outer


def _synchronised(plan: Plan, strategy: Strategy, elements: int, rank: int) -> Amount:
    """The all_reduces of a GATHERED parameter's gradient over tp: when FSDP reduces it, and before that over dp_shard."""
    load, m = plan.workload, plan.micro_batches
    split = plan.pipeline is not None and plan.pipeline.schedule == "zero-bubble"
    once = zero_level(strategy.zero, plan.mesh, load) == 1
    accumulated = once and (m > 1 or split)  # FSDP adds micro-batches up in the format in which it reduces
    if split:  # of several micro-batches together, when weights of the first get their gradients: no product has such a weight
        m = max(1, m - rank)
    size = elements * DTYPE_BYTES[load.reduce_dtype if accumulated else load.compute_dtype]
    return Amount(1, size).times(1 if once else m)


def _unit(plan: Plan, parameters: list[LocalParameter], zero: int) -> Parts:
    """Gathers and reductions of one FSDP unit in a step."""
    mesh, load, m = plan.mesh, plan.workload, plan.micro_batches
    dealt = any(p.dealt for p in parameters)
    shards = mesh.efsdp if dealt else mesh.shards
    whole = sum(_padded(p, shards) for p in parameters)
    trainable = sum(_padded(p, shards) for p in parameters if p.trainable)
    reduced = trainable * DTYPE_BYTES[load.reduce_dtype]
    if shards > 1 and whole:
        axis = axis_of(range(0, shards * mesh.ep, mesh.ep) if dealt else range(0, shards * mesh.tp, mesh.tp), mesh)
        gathers, reductions = {3: (2 * m, m), 2: (m, m), 1: (1, 1)}[zero]
        yield (axis, "all_gather"), Amount(1, whole * DTYPE_BYTES[load.compute_dtype]).times(gathers)
        if trainable:
            yield (axis, "reduce_scatter"), Amount(1, reduced).times(reductions)
    if mesh.dp_replicate > 1 and trainable:
        yield ("dp_replicate", "all_reduce"), Amount(1, reduced / shards)


def _padded(parameter: LocalParameter, shards: int) -> int:
    """Elements, the dim that FSDP cuts made divisible."""
    if not parameter.shape:
        return 1
    length = parameter.shape[parameter.cut(shards)]
    return prod(parameter.shape) // max(length, 1) * ceil(length / shards) * shards


def _shared(plan: Plan, costs: CostModel, rank: int) -> Parts:
    """Gradients of the outer parameters that several pipeline ranks have (tied embeddings): each of them has this rank too."""
    stages = [Stage(plan, costs, number) for number in range(len(plan.stages))]
    holders: dict[str, set[int]] = {}
    for number, stage in enumerate(stages):
        for name in stage.used():
            holders.setdefault(name, set()).add(number % plan.mesh.pp)
    names = {name for name, ranks in holders.items() if len(ranks) > 1 and rank in ranks}
    for parameter in stages[0].parameters(OUTER, plan.outer_strategy, names):
        if parameter.trainable:
            size = parameter.numel(plan.mesh.shards) * DTYPE_BYTES[plan.workload.param_dtype]
            yield ("pp", "all_reduce"), Amount(1, size)


def _loss(plan: Plan, costs: CostModel) -> Parts:
    """Every rank is told the mean loss of all."""
    outer = costs.graph.outer
    size = DTYPE_BYTES[outer.values[outer.outputs[0]].dtype] if outer.outputs else 4
    if plan.mesh.pp > 1:
        yield ("pp", "all_reduce"), Amount(1, size)
    for axis in ("dp_replicate", "dp_shard"):
        if getattr(plan.mesh, axis) > 1:
            yield (axis, "all_reduce"), Amount(1, size)
