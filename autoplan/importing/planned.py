"""A configuration on a model and a machine -> a plan, priced: every layer alike, as people write them by hand.

A layer's sharding over tp is looked up among the unbeaten ones that the search finds: column-then-row (`export.exported`), with
as much of it cut as can be, the fastest of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from math import inf

from autoplan.cost.model import OUTER, CostModel, Cut
from autoplan.errors import UsageError
from autoplan.export.exported import by_the_book, sequence_parallel
from autoplan.graph import Graph, Parameter
from autoplan.hardware import HardwareProfile
from autoplan.importing.configuration import Configuration
from autoplan.plan import Plan, Solve, zero_level
from autoplan.search.columns import Priced, Tables
from autoplan.search.options import Column
from autoplan.search.planner import written
from autoplan.search.space import check_parameters, meshes, uncut, undealt, unstageable
from autoplan.search.stages import Assignment, Solution
from autoplan.strategy import DEGREES, REPLICATE, Layout, Mesh, Sharding, Strategy
from autoplan.workload import Workload

_GIVEN = Solve(status="given", gap=0.0, bound=0.0, solver="none", candidates=1)


def planned(
    told: Configuration, graph: Graph, hardware: HardwareProfile, load: Workload, mesh: Mesh, micro_batch: int | None = None
) -> tuple[Plan, tuple[str, ...]]:
    """The plan, and in sentences what it leaves out of the file. `micro_batch` counts before the file's; where neither says one,
    nothing is accumulated.

    Raises `UsageError`, naming the file, where model and configuration do not go together. A plan that needs more memory than
    there is is none of these: it is priced.
    """
    samples = micro_batch or told.micro_batch or max(1, load.global_batch // mesh.dp)
    try:
        check_parameters(graph)
        costs = CostModel(graph, hardware, load)
        _check(told, costs, mesh, samples)
        return _Builder(told, costs, mesh, samples).plan()
    except UsageError as error:
        message = error.message if str(told.path) in error.message else f"{told.path}: {error.message}"
        raise UsageError(message, error.hint) from None


def _check(told: Configuration, costs: CostModel, mesh: Mesh, micro_batch: int) -> None:
    """Whether the model can be run so at all."""
    graph, batch = costs.graph, costs.workload.global_batch
    if told.layers not in (None, len(graph.blocks)):
        raise UsageError(
            f"it is of a model with {told.layers} layers, and {graph.model} has {len(graph.blocks)}.",
            "Give --model the model of that configuration, with --set where it has sizes.",
        )
    if batch % (mesh.dp * micro_batch):
        raise UsageError(
            f"a global batch of {batch} does not divide into {mesh.dp} data-parallel groups x micro-batches of {micro_batch}.",
            "Change its batch sizes, or give --global-batch and --micro-batch.",
        )
    fixed = {axis: getattr(mesh, axis) for axis in DEGREES}
    refused = [
        *uncut(mesh.size, fixed, costs.context)[1],
        *undealt(mesh.size, fixed, costs.mixtures)[1],
        *([found] if (found := unstageable(mesh, graph, costs.outer.order)) else []),
    ]
    reason = refused[0].reason if refused else costs.context.refusal(mesh.cp, mesh.tp, mesh.cp_kind)
    if reason:
        raise UsageError(f"{reason}.", "Change that degree, or the model.")
    next(meshes(mesh.size, fixed, (mesh.cp,), (mesh.ep,)))  # raises for axes that do not go together


class _Builder:
    def __init__(self, told: Configuration, costs: CostModel, mesh: Mesh, micro_batch: int) -> None:
        self.told, self.costs, self.mesh, self.micro_batch = told, costs, mesh, micro_batch
        self.graph, self.tables = costs.graph, Tables(costs)
        self.lost = list(told.lost)

    def plan(self) -> tuple[Plan, tuple[str, ...]]:
        told, costs, mesh, graph = self.told, self.costs, self.mesh, self.graph
        cut, stream = self._cut(), self._stream()
        zero = told.zero if mesh.shards > 1 else zero_level(1, mesh, costs.workload)  # replicas keep what they compute with
        shardings = {g: self._sharding(g, stream) for g in self.tables.classes}
        outer = Strategy(shardings[OUTER], "none", 2 if zero == 3 and mesh.shards > 1 and mesh.pp == 1 else zero)
        stages = []
        layers: list[tuple[int, Strategy]] = []
        for first, last in cut.runs(len(graph.blocks)):
            again = set(self._again(first, last))
            each = [
                (graph.blocks[i].body, Strategy(shardings[graph.blocks[i].body], told.recompute if i in again else "none", zero))
                for i in range(first, last)
            ]
            stages.append(self._assigned(each))
            layers += each
        price = costs.predict(mesh, self.micro_batch, outer, layers, cut)
        solution = Solution(outer, cut, tuple(stages), price.step_time, price.step_time, price.memory.total)
        priced = Priced(mesh, self.micro_batch, stream, {})
        if told.tokens not in (None, graph.tokens):
            self.lost.append(f"sequences of {told.tokens} tokens: a sample of {graph.model} has {graph.tokens}, which are priced")
        if mesh.pp > 1 and told.local_batch and costs.workload.global_batch > told.local_batch * mesh.dp:
            self.lost.append("the pipeline fills and drains several times a step there: one run of all micro-batches is priced")
        plan = written(costs, priced, solution, replace(_GIVEN, bound=price.step_time), [], [], inf)
        lost = tuple(self.lost)
        warnings = (*plan.warnings, *(f"not in this plan: {sentence}" for sentence in lost))
        return replace(plan, memory_limit=costs.memory_limit(0.0), warnings=warnings), lost

    def _again(self, first: int, last: int) -> Iterator[int]:
        """Layers of a virtual stage that are recomputed."""
        told = self.told
        if told.recompute_first is not None:
            yield from range(first, min(last, first + told.recompute_first))
        elif told.recompute_every:
            yield from (i for i in range(first, last) if (i + 1) % told.recompute_every == 0)

    def _assigned(self, layers: Sequence[tuple[int, Strategy]]) -> Assignment:
        """How many layers of a stage have which strategy."""
        found: Assignment = {}
        for g, strategy in dict.fromkeys(layers):
            step = self.costs.layer_step(g, strategy, self.mesh, self.micro_batch)
            found.setdefault(g, []).append((Column.of(strategy, step), list(layers).count((g, strategy))))
        return found

    def _stream(self) -> Layout:
        streams = self.tables.streams(self.mesh.tp)
        if not self.told.sequence_parallel:
            return REPLICATE
        found = next((stream for stream in streams if stream.sharded), None)
        if found is None:
            self.lost.append(
                f"activations split along the sequence: tp {self.mesh.tp} does not divide it, and they are whole here"
            )
        return found or REPLICATE

    def _sharding(self, g: int, stream: Layout) -> Sharding:
        """Of a body: see the module."""
        mesh, costs = self.mesh, self.costs
        found = self.tables.ways(g, mesh.within, self.micro_batch, stream).unbeaten
        legal = found.cut_by(mesh.shards)
        sizes = {p.name: p.numel for p in self._parameters(g)}

        def rank(sharding: Sharding) -> tuple[bool, int, float]:
            cost = costs.layer_cost(g, sharding, mesh.tp, self.micro_batch, mesh.cp, mesh.ep, mesh.cp_kind)
            cut = sum(sizes.get(name, 0) for name, layout in sharding.parameters if layout.sharded)
            odd = g != OUTER and not (by_the_book(sharding) and sequence_parallel(sharding) == stream.sharded)
            return odd, -cut, cost.forward + cost.tp_forward + cost.backward + cost.tp_backward

        ways = {i: rank(sharding) for i in range(found.number) if legal[i] for sharding in [found.sharding(i)]}
        what = next((block.name for block in self.graph.blocks if block.body == g), "what stands outside the layers")
        if not ways:
            raise UsageError(f"there is no way to split {what} over {mesh}.", "Change its degrees.")
        best = min(ways, key=lambda i: ways[i])
        if mesh.tp > 1 and g != OUTER:
            self._tell_split(g, what, found.sharding(best), odd=ways[best][0])
        return found.sharding(best)

    def _tell_split(self, g: int, what: str, sharding: Sharding, *, odd: bool) -> None:
        matrices = [p.name for p in self._parameters(g) if len(p.shape) > 1]
        whole = [
            name for name in matrices if not sharding.layout(name).sharded and not any(e.holds(name) for e in sharding.experts)
        ]
        if len(whole) == len(matrices) > 0:
            raise UsageError(f"tp {self.mesh.tp} divides no matrix of {what}.", "Change its degree of tensor parallelism.")
        if odd:
            self.lost.append(f"the column-then-row split of {what}: the fastest other one is priced")
        if whole:
            self.lost.append(f"a split of {', '.join(whole[:4])} of {what}: it is whole on every device here")

    def _parameters(self, g: int) -> Iterator[Parameter]:
        body = self.graph.outer if g == OUTER else self.graph.bodies[g]
        return (p for p in body.parameters if not p.buffer)

    def _cut(self) -> Cut:
        told, pp, layers = self.told, self.mesh.pp, len(self.graph.blocks)
        if pp == 1:
            return Cut()
        sizes = told.stage_sizes or self._dealt()
        if sum(sizes) != layers or min(sizes) < 1:
            raise UsageError(
                f"its {len(sizes)} stages have {', '.join(map(str, sizes[:20]))} layers, and {self.graph.model} has {layers}.",
                "Give --model the model of that configuration, or change its stages.",
            )
        chunks = len(sizes) // pp
        schedule = told.schedule if chunks > 1 or told.schedule != "interleaved-1f1b" else "1f1b"
        return Cut(schedule, chunks, tuple(accumulate(sizes[:-1])))

    def _dealt(self) -> tuple[int, ...]:
        """Layers of every virtual stage, evenly with embedding and head counted; the first ones take what is left."""
        first, last = self.told.weights
        layers, pp, chunks = len(self.graph.blocks) + first + last, self.mesh.pp, self.told.chunks
        stages = pp * chunks if chunks is not None else -(-layers // self.told.layers_per_stage)
        if stages % pp or stages > layers:
            raise UsageError(
                f"{layers} layers (embedding and head counted) do not make stages for {pp} ranks.", "Change its layers per stage."
            )
        sizes = [layers // stages + (k < layers % stages) for k in range(stages)]
        sizes[0] -= first
        sizes[-1] -= last
        return tuple(sizes)
