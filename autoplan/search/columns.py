"""What is known of one mesh and micro-batch: the strategies of every class of layers, priced.

Layers of one body form a class; everything outside the layers is one more, OUTER. Shardings depend on the tp degree, the
micro-batch and the layout of activations between layers alone, so they are made once for all meshes that share these. Which
layer may do what on a stage then follows from sums (`search.options`), so columns are priced once for all schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar, get_args

import numpy as np

from autoplan.cost.data_parallel import DataParallel, data_parallel
from autoplan.cost.layer import LayerCost
from autoplan.cost.model import OUTER, CostModel
from autoplan.cost.rules import divided
from autoplan.cost.step import NOTHING, LayerStep, best_of, layer_step
from autoplan.graph import DTYPE_BYTES
from autoplan.plan import needs_fsdp
from autoplan.search.corner import Corner
from autoplan.search.dominance import Bools, unbeaten
from autoplan.search.ilp import Choice
from autoplan.search.lattice import Lattice
from autoplan.search.options import Column, Columns, Costs
from autoplan.search.rough import Rough, share_of
from autoplan.search.shardings import Unbeaten, Ways, streams
from autoplan.search.wishes import FREE, Wish
from autoplan.strategy import REPLICATE, Layout, Mesh, Recompute, Sharding, Strategy, Within, Zero
from autoplan.units import Bytes, Seconds
from autoplan.workload import OPTIMIZER_STATES

T = TypeVar("T")
Make = Callable[[int, Mesh, int, Layout], T]
"""Something of a class of layers, on a mesh, for a micro-batch and a stream layout."""
ALL_RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)


class Outer(NamedTuple):
    """One strategy of what stands outside the layers, with the price of every part that some stage may have of it."""

    strategy: Strategy
    parts: dict[tuple[int, ...], LayerStep]


@dataclass(frozen=True)
class Priced:
    """A mesh, micro-batch and stream layout with every strategy of every body, and of what stands outside."""

    mesh: Mesh
    micro_batch: int
    stream: Layout
    columns: Mapping[int, Columns]
    """By body; without a pipeline OUTER is one of them."""
    outers: tuple[Outer, ...] = ()
    """With a pipeline: the outer strategies, of which all stages take the same."""
    solved: dict[Hashable, dict[Hashable, Choice | None]] = field(default_factory=dict, init=False, compare=False)
    """By schedule and limit what `search.stages` has found for stages that have nothing of the outer body."""

    @cached_property
    def best_outer(self) -> Outer | None:
        """The outer strategy, if there are several the best of all in every part, of which only bounds come."""
        if len(self.outers) < 2:
            return next(iter(self.outers), None)
        regions = self.outers[0].parts
        return Outer(self.outers[0].strategy, {part: best_of([outer.parts[part] for outer in self.outers]) for part in regions})


class Tables:
    """The shardings of every layer by (tp, micro-batch, stream), made when they are first asked for."""

    def __init__(self, costs: CostModel, wishes: Mapping[int, Wish] | None = None) -> None:
        self.costs, self.graph, self.wishes = costs, costs.graph, wishes or {}
        self.classes = {OUTER: 1}
        """Body -> number of layers."""
        for block in self.graph.blocks:
            self.classes[block.body] = self.classes.get(block.body, 0) + 1
        self._stretches: dict[tuple[int, int], int] = {}
        self._kinds: dict[tuple[int, ...], int] = {}
        self._lattices: dict[Hashable, Lattice] = {}
        self._pieces: dict[tuple[int, int], frozenset[tuple[int, int]]] = {}
        self._wholes: dict[tuple[int, int, int], tuple[float, float]] = {}
        self._ways: dict[tuple[int, Within, int, Layout], Ways] = {}
        self._priced: dict[Hashable, Priced | None] = {}
        self._made: dict[Hashable, Any] = {}
        self._dp: dict[Hashable, DataParallel] = {}

    @cached_property
    def counts(self) -> dict[int, list[int]]:
        """For every body, how many of the first i layers are of it."""
        order = [block.body for block in self.graph.blocks]
        return {g: [0, *accumulate(int(body == g) for body in order)] for g in self.classes if g != OUTER}

    def stretch(self, i: int, j: int) -> int:
        """The layers i ... j - 1 as a number: equal for what holds the same bodies and regions of the outer body."""
        if (i, j) not in self._stretches:
            held = (*(counts[j] - counts[i] for counts in self.counts.values()), *self.costs.outer.within(i, j))
            self._stretches[i, j] = self._kinds.setdefault(held, len(self._kinds))
        return self._stretches[i, j]

    def with_batch(self, global_batch: int) -> Tables:
        """The same tables for another global batch: shardings and layer costs do not depend on it."""
        other = copy(self)
        other.costs, other._priced, other._made = self.costs.with_batch(global_batch), {}, {}
        return other

    def least_states(self, mesh: Mesh) -> Bytes:
        """No rank of the fullest stage holds less: parameters, gradients and optimizer states, all of them cut by tp."""
        return self._states / (mesh.pp * mesh.tp * mesh.shards)

    @cached_property
    def _states(self) -> Bytes:
        load = self.costs.workload
        trained = 2 + OPTIMIZER_STATES[load.optimizer]
        own = [p for _, body in self.graph.members() for p in body.parameters if not p.buffer]
        return DTYPE_BYTES[load.param_dtype] * sum(p.numel * (trained if p.trainable else 1) for p in own)

    def least_moment(self, within: Within, micro_batch: int) -> Bytes:
        """No way to run a layer needs less while its backward pass runs: its parameters as they are gathered, and all that it
        saves, cut by tp and cp, or at the end its gradients and the buffer in which they are reduced."""
        return max((self._least_moment(g, within, micro_batch) for g in range(len(self.graph.bodies))), default=0.0)

    def _least_moment(self, g: int, within: Within, micro_batch: int) -> Bytes:
        load = self.costs.workload
        numel, trainable = self._whole(g, within.tp, within.ep)
        saved = self.graph.bodies[g].saved.at(micro_batch / within.cp) / within.tp
        if not needs_fsdp(Mesh(tp=within.tp), load):  # on one of the meshes nothing is gathered or reduced
            return saved
        compute, reduce = DTYPE_BYTES[load.compute_dtype], DTYPE_BYTES[load.reduce_dtype]
        return numel * compute + max(saved, trainable * (compute + reduce))

    def _whole(self, g: int, tp: int, ep: int) -> tuple[float, float]:
        """A layer's parameters, and those that are trained, cut by tp or ep where they can be."""
        dealt = self.costs.mixtures.dealt[g] if ep > 1 else ()
        if (g, tp, ep) not in self._wholes:
            lattices = [self.lattice(g, tp, stream) for stream in self.streams(tp)]
            numel = trainable = 0.0
            for p in self.graph.bodies[g].parameters:
                if not p.buffer:
                    whole = tp == 1 or all(lattice.whole(p.name) for lattice in lattices)
                    own = p.numel / (ep if any(each.experts.holds(p.name) for each in dealt) else 1 if whole else tp)
                    numel, trainable = numel + own, trainable + own * p.trainable
            self._wholes[g, tp, ep] = numel, trainable
        return self._wholes[g, tp, ep]

    def streams(self, tp: int) -> list[Layout]:
        """The layouts in which activations may pass between all layers."""
        inputs = [
            (body.values[i].shape, body.values[i].batch_dim)
            for body in self.graph.bodies
            for i in (*body.inputs, *body.outputs)
            if body.values[i].requires_grad
        ]
        return streams(inputs, tp) if tp > 1 else [REPLICATE]

    def _wish(self, g: int) -> Wish:
        return self.wishes.get(g, FREE)

    def unmet(self, mesh: Mesh) -> str:
        """Why no layer can do on a mesh what is asked of it; "" when it can."""
        asked = mesh.pp > 1 and any(wish.zero == 2 for wish in self.wishes.values())
        return "ZeRO-2 is not searched with a pipeline: what it would keep is freed by other micro-batches" if asked else ""

    def _levels(self, g: int, zeros: Sequence[Zero]) -> Sequence[Zero]:
        """Those of the ZeRO levels that are asked for; where there is one micro-batch level 1 is, though 2 costs the same."""
        asked = self._wish(g).zero
        if asked is None or len(zeros) == 1:
            return zeros
        return [asked] if asked in (1, *zeros) else []

    def _zeros(self, mesh: Mesh, micro_batch: int, *, outer: bool) -> tuple[Zero, ...]:
        """The ZeRO levels that are searched; where nothing is sharded they say how often parameters are cast and copied. With a
        pipeline level 2 is not: between the passes of one micro-batch others run, whose backward passes free what it would keep.
        """
        if not needs_fsdp(mesh, self.costs.workload):
            return (3,)
        if mesh.pp > 1:
            return (3, 1)
        several: tuple[Zero, ...] = (2, 1) if self.costs.micro_batches(mesh, micro_batch) > 1 else (2,)
        return several if outer else (3, *several)

    def _ways_to_run(self, g: int, zeros: Sequence[Zero]) -> list[tuple[Recompute, Zero]]:
        """Recomputations and ZeRO levels to choose from; embeddings and head frame the step: they are not recomputed."""
        wish = self._wish(g)
        recomputes: tuple[Recompute, ...] = ("none",) if g == OUTER else ALL_RECOMPUTES
        return [(again, zero) for zero in zeros for again in recomputes if wish.recompute in (None, again)]

    def lattice(self, g: int, tp: int, stream: Layout, ep: int = 1, cp: int = 1) -> Lattice:
        """Whatever ep and cp are, where they are above 1: their sizes change prices alone. So do those of tp that divide the same
        sizes, unless experts are dealt."""
        gathers = cp > 1 and tp > 1 and any(of == g for of, _ in self.costs.context.gathered)
        dealt = ep > 1 and self._has_experts(g)
        key = (g, tp if dealt or tp == 1 else self._divided(g, tp), stream, dealt, gathers)
        if key not in self._lattices:
            model = self.costs.layer_model(g, tp, 1, cp if gathers else 1, ep)
            self._lattices[key] = Lattice(model, stream, self._wish(g).layouts if tp > 1 else None)
        return self._lattices[key]

    def _divided(self, g: int, tp: int) -> frozenset[tuple[int, int]]:
        if (g, tp) not in self._pieces:
            self._pieces[g, tp] = divided(self.graph.outer if g == OUTER else self.graph.bodies[g], tp)
        return self._pieces[g, tp]

    def ways(self, g: int, within: Within, micro_batch: int, stream: Layout) -> Ways:
        """A body's lattice at the prices of a micro-batch."""
        within = within if self._has_experts(g) else within._replace(ep=1)
        key = (g, within, micro_batch, stream)
        if key not in self._ways:
            model = self.costs.layer_model(g, within.tp, micro_batch, within.cp, within.ep, within.cp_kind)
            self._ways[key] = Ways(model, self.lattice(g, within.tp, stream, within.ep, within.cp))
        return self._ways[key]

    def fastest(self, g: int, within: Within, micro_batch: int, stream: Layout) -> Seconds | None:
        """Seconds of one layer and micro-batch at its fastest sharding; None when there is no legal one."""
        return self.ways(g, within, micro_batch, stream).fastest_seconds

    def least(self, g: int, within: Within, micro_batch: int, stream: Layout) -> Seconds | None:
        """A bound on `fastest` that is quickly found."""
        return self.ways(g, within, micro_batch, stream).least_seconds

    def shardings(self, g: int, within: Within, micro_batch: int, stream: Layout) -> list[Sharding]:
        """Every unbeaten sharding of a body."""
        found = self.ways(g, within, micro_batch, stream).unbeaten
        return [found.sharding(i) for i in range(found.number)]

    def priced(self, mesh: Mesh, micro_batch: int, stream: Layout) -> Priced | None:
        """Every strategy of every class of layers, priced; None when some layer has none."""
        return self._of_mesh(self._columns, self._outers, mesh, micro_batch, stream)

    def plain(self, priced: Priced) -> Priced | None:
        """The strategies of a mesh without recomputation, which zero-bubble does without; None when some layer has none."""
        columns = {g: Columns.of([c for c in known if c.recompute == "none"]) for g, known in priced.columns.items()}
        return replace(priced, columns=columns) if all(columns.values()) else None

    def split(self, plain: Priced) -> Priced:
        """The same at their prices under zero-bubble (cost.late). Of shardings those are known that others don't beat under other
        schedules."""
        mesh, micro_batch, costs = plain.mesh, plain.micro_batch, self.costs
        columns = {}
        for g, known in plain.columns.items():
            price = partial(_split_price, costs, g, mesh, micro_batch)
            columns[g] = Columns.of([replace(c, costs=Costs.of(price(c.strategy)), price=price) for c in known])
        outers = tuple(
            Outer(o.strategy, {r: costs.outer_step(r, o.strategy, mesh, micro_batch, split=True) for r in o.parts})
            for o in plain.outers
        )
        return replace(plain, columns=columns, outers=outers)

    def rough(
        self, meshes: Sequence[Mesh], alike: Callable[[], Sequence[Mesh]], micro_batch: int, stream: Layout, largest: int
    ) -> Priced | None:
        """Better than any of some meshes that differ in their dp axes alone, and quickly made (`search.rough`): at once for all
        that are `alike`, of what the `largest` micro-batch costs. What stands outside the layers of a pipeline is free.

        Its strategies are no strategies; only bounds come of it. It is called by the first of the meshes, which shards most.
        """
        mesh, parts = meshes[0], self.costs.outer.parts
        key = (self.rough, mesh.within, mesh.pp > 1, micro_batch, stream, largest)
        found, numbers = self._made.get(key, ({}, {}))  # plans by hand ask for their own meshes alone
        if not numbers.keys() >= {*meshes}:
            those, wanted = alike(), [g for g in self.classes if g != OUTER or mesh.pp == 1]
            found = {g: self._rough(g, those, micro_batch, stream, largest) for g in wanted}
            numbers = {each: number for number, each in enumerate(those)}
            self._made[key] = found, numbers
        if not all(found.values()):
            return None
        columns = {g: rough.columns([numbers[each] for each in meshes]) for g, rough in found.items()}
        outers = (Outer(Strategy(Sharding(stream=stream)), dict.fromkeys(parts, NOTHING)),) if mesh.pp > 1 else ()
        return Priced(mesh, micro_batch, stream, columns, outers)

    def _of_mesh(
        self, columns_of: Make[Columns], outers_of: Make[tuple[Outer, ...]], mesh: Mesh, micro_batch: int, stream: Layout
    ) -> Priced | None:
        key = (columns_of, mesh, micro_batch, stream)
        if key not in self._priced:
            wanted = [g for g in self.classes if g != OUTER or mesh.pp == 1]
            columns = {g: self._of_class(columns_of, g, mesh, micro_batch, stream) for g in wanted}
            outers = self._of_class(outers_of, OUTER, mesh, micro_batch, stream) if mesh.pp > 1 else ()
            complete = all(columns.values()) and (mesh.pp == 1 or outers)
            self._priced[key] = Priced(mesh, micro_batch, stream, columns, outers) if complete else None
        return self._priced[key]

    def _of_class(self, make: Make[T], g: int, mesh: Mesh, micro_batch: int, stream: Layout) -> T:
        """Made once for all sizes of ep where the class has no experts."""
        key = (make, g, mesh if self._has_experts(g) else replace(mesh, ep=1), micro_batch, stream)
        if key not in self._made:
            self._made[key] = make(*key[1:])
        found: T = self._made[key]
        return found

    def _has_experts(self, g: int) -> bool:
        return bool(self.costs.mixtures.dealt.get(g))

    def _rough(self, g: int, meshes: Sequence[Mesh], micro_batch: int, stream: Layout, largest: int) -> Rough | None:
        corner = self.ways(g, meshes[0].within, largest, stream).corner
        if corner.seconds is None:
            return None
        m = min(self.costs.micro_batches(mesh, micro_batch) for mesh in meshes)
        zeros = sorted({zero for mesh in meshes for zero in self._zeros(mesh, micro_batch, outer=g == OUTER)})
        sent = [self._sent(g, corner, mesh, stream) for mesh in meshes]
        levels = self._levels(g, zeros) or [2]  # where none is legal (`unmet`), the columns themselves are empty
        cost, ways = share_of(corner.cost, micro_batch / largest), self._ways_to_run(g, levels)
        return Rough(cost, stream, sent, m, ways, self.costs, outer=g == OUTER, pipelined=meshes[0].pp > 1)

    def _sent(self, g: int, corner: Corner, mesh: Mesh, stream: Layout) -> DataParallel:
        """What a layer's parameters cost at least on the dp axes of a mesh: they are the same for every micro-batch."""
        key = (g, mesh.within, mesh.dp_replicate, mesh.dp_shard, mesh.pp > 1, stream)
        if key not in self._dp:
            self._dp[key] = data_parallel(corner, mesh, self.costs.hardware, self.costs.workload)
        return self._dp[key]

    def _step(
        self, g: int, cost: LayerCost, dp: DataParallel, micro_batches: int, *, pipelined: bool, ahead: Bytes = 0.0
    ) -> Callable[[Zero, Recompute], LayerStep]:
        """`layer_step` of a ZeRO level and a recomputation."""
        hardware, load = self.costs.hardware, self.costs.workload
        return partial(
            layer_step, cost, dp, micro_batches=micro_batches, hardware=hardware, load=load, outer=g == OUTER,
            pipelined=pipelined, ahead=ahead,
        )  # fmt: skip

    def _columns(self, g: int, mesh: Mesh, micro_batch: int, stream: Layout) -> Columns:
        found, costs = self.ways(g, mesh.within, micro_batch, stream).unbeaten, self.costs
        dp = data_parallel(found, mesh, costs.hardware, costs.workload)
        m = costs.micro_batches(mesh, micro_batch)
        step = self._step(g, found.cost, dp, m, pipelined=mesh.pp > 1, ahead=costs.ahead(mesh))
        price = partial(_price, costs, g, mesh, micro_batch)
        ways = self._ways_to_run(g, self._levels(g, self._zeros(mesh, micro_batch, outer=g == OUTER)))
        return self._unbeaten(found, ways, step, price, found.cut_by(mesh.shards))

    def _unbeaten(
        self,
        found: Unbeaten,
        ways: Sequence[tuple[Recompute, Zero]],
        step: Callable[[Zero, Recompute], LayerStep],
        price: Callable[[Strategy], LayerStep],
        legal: Bools,
    ) -> Columns:
        """Of all shardings, each with these recomputations and ZeRO levels, those that no other equals or beats."""
        if not ways:
            return Columns.of(())
        blocks = []
        for again, zero in ways:
            blocks.append(Costs.of(step(zero, again)).columns(found.number))
        every = np.concatenate(blocks, axis=1)
        candidates = np.flatnonzero(np.tile(legal, len(ways)))
        kept = candidates[unbeaten(every[:, candidates])]

        def column(number: int) -> Column:
            i = int(kept[number])
            again, zero = ways[i // found.number]
            return Column(Costs._make(every[:, i].tolist()), again, zero, partial(found.sharding, i % found.number), price)

        return Columns(every[:, kept], column)

    def _placeable(self, g: int, mesh: Mesh, micro_batch: int, stream: Layout) -> Iterator[Sharding]:
        """What FSDP can cut."""
        found = self.ways(g, mesh.within, micro_batch, stream).unbeaten
        for i in np.flatnonzero(found.cut_by(mesh.shards)).tolist():
            yield found.sharding(i)

    def _outers(self, g: int, mesh: Mesh, micro_batch: int, stream: Layout) -> tuple[Outer, ...]:
        """Outer strategies that no other equals or beats in every part."""
        found: list[Outer] = []
        kept: list[tuple[float, ...]] = []
        priced = [
            self._outer(Strategy(sharding, "none", zero), mesh, micro_batch)
            for sharding in self._placeable(g, mesh, micro_batch, stream)
            for zero in self._zeros(mesh, micro_batch, outer=True)
        ]
        for outer in sorted(priced, key=_all_costs):
            costs = _all_costs(outer)
            if not any(all(a <= b for a, b in zip(other, costs, strict=True)) for other in kept):
                found.append(outer)
                kept.append(costs)
        return tuple(found)

    def _outer(self, strategy: Strategy, mesh: Mesh, micro_batch: int) -> Outer:
        parts = {regions: self.costs.outer_step(regions, strategy, mesh, micro_batch) for regions in self.costs.outer.parts}
        return Outer(strategy, parts)


def _all_costs(outer: Outer) -> tuple[float, ...]:
    return tuple(cost for step in outer.parts.values() for cost in Column.of(outer.strategy, step).costs)


def _price(costs: CostModel, g: int, mesh: Mesh, micro_batch: int, strategy: Strategy) -> LayerStep:
    return costs.layer_step(g, strategy, mesh, micro_batch)


def _split_price(costs: CostModel, g: int, mesh: Mesh, micro_batch: int, strategy: Strategy) -> LayerStep:
    return costs.layer_step(g, strategy, mesh, micro_batch, split=True)
