"""What is known of one mesh and micro-batch: the strategies of every class of layers, priced.

Layers of one body form a class; everything outside the layers is one more, OUTER. Shardings depend on the tp degree, the
micro-batch and the layout of activations between layers alone, so they are made once for all meshes that share these. Which
layer may do what on a stage then follows from sums (`search.options`), so columns are priced once for all schedules.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, get_args

from autoplan.cost.model import OUTER, CostModel
from autoplan.cost.step import LayerStep, best_of
from autoplan.graph import DTYPE_BYTES
from autoplan.search.options import Column, Options, unbeaten_columns
from autoplan.search.shardings import fastest_seconds, pareto_shardings, streams
from autoplan.strategy import REPLICATE, Layout, Mesh, Recompute, Sharding, Strategy, Within, Zero
from autoplan.units import Bytes, Seconds
from autoplan.workload import OPTIMIZER_STATES

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
    columns: dict[int, list[Column]]
    """By body; without a pipeline OUTER is one of them."""
    outers: tuple[Outer, ...] = ()
    """With a pipeline: the outer strategies, of which all stages take the same."""

    def options(self, body: int, slots: float, in_flight: int) -> Options:
        """A body's columns as a stage with so many micro-batches in flight sees them in a step of `slots`."""
        key = (body, slots, in_flight)
        if key not in self._options:
            self._options[key] = Options.of(self.columns[body], slots, in_flight)
        return self._options[key]

    @cached_property
    def _options(self) -> dict[tuple[int, float, int], Options]:
        return {}


class Tables:
    """The shardings of every layer by (tp, micro-batch, stream), made when they are first asked for."""

    def __init__(self, costs: CostModel) -> None:
        self.costs, self.graph = costs, costs.graph
        self.classes = {OUTER: 1}
        """Body -> number of layers."""
        for block in self.graph.blocks:
            self.classes[block.body] = self.classes.get(block.body, 0) + 1
        self._shardings: dict[tuple[int, Within, int, Layout], list[Sharding]] = {}
        self._priced: dict[tuple[Mesh, int, Layout], Priced | None] = {}
        self._ideal: dict[tuple[Mesh, int, Layout], Priced | None] = {}
        self._fastest: dict[tuple[int, Within, int, Layout], Seconds | None] = {}

    def with_batch(self, global_batch: int) -> Tables:
        """The same tables for another global batch: shardings and layer costs do not depend on it."""
        other = copy(self)
        other.costs, other._priced, other._ideal = self.costs.with_batch(global_batch), {}, {}
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
        """No way to run a layer needs less while its backward pass runs: all that it saves, cut by tp and cp."""
        return max((body.saved.at(micro_batch / within.cp) for body in self.graph.bodies), default=0.0) / within.tp

    def streams(self, tp: int) -> list[Layout]:
        """The layouts in which activations may pass between all layers."""
        inputs = [
            (body.values[i].shape, body.values[i].batch_dim)
            for body in self.graph.bodies
            for i in (*body.inputs, *body.outputs)
            if body.values[i].requires_grad
        ]
        return streams(inputs, tp) if tp > 1 else [REPLICATE]

    def shardings(self, g: int, within: Within, micro_batch: int, stream: Layout) -> list[Sharding]:
        key = (g, within, micro_batch, stream)
        if key not in self._shardings:
            self._shardings[key] = pareto_shardings(self.costs.layer_model(g, within.tp, micro_batch, within.cp), stream)
        return self._shardings[key]

    def fastest(self, g: int, within: Within, micro_batch: int, stream: Layout) -> Seconds | None:
        """Seconds of one layer and micro-batch at its fastest sharding; None when there is no legal one."""
        key = (g, within, micro_batch, stream)
        if key not in self._fastest:
            self._fastest[key] = fastest_seconds(self.costs.layer_model(g, within.tp, micro_batch, within.cp), stream)
        return self._fastest[key]

    def priced(self, mesh: Mesh, micro_batch: int, stream: Layout) -> Priced | None:
        """Every strategy of every class of layers, priced; None when some layer has none."""
        key = (mesh, micro_batch, stream)
        if key not in self._priced:
            self._priced[key] = self._price(mesh, micro_batch, stream)
        return self._priced[key]

    def ideal(self, mesh: Mesh, micro_batch: int, stream: Layout) -> Priced | None:
        """Better than any mesh of the same tp and pp: communication over dp takes no time, and cuts all states.

        Its strategies are no strategies; only bounds come of it. The outer one is the best in every respect at once.
        """
        mesh = Mesh(pp=mesh.pp, dp_shard=mesh.dp, cp=mesh.cp, tp=mesh.tp)
        key = (mesh, micro_batch, stream)
        if key not in self._ideal:
            self._ideal[key] = self._price_ideal(mesh, micro_batch, stream)
        return self._ideal[key]

    def _price_ideal(self, mesh: Mesh, micro_batch: int, stream: Layout) -> Priced | None:
        wanted = [g for g in self.classes if g != OUTER or mesh.pp == 1]
        columns = {
            g: unbeaten_columns(
                [
                    Column(strategy, self.costs.ideal_step(g, strategy, mesh, micro_batch))
                    for sharding in self.shardings(g, mesh.within, micro_batch, stream)
                    for strategy in (Strategy(sharding, again) for again in (("none",) if g == OUTER else ALL_RECOMPUTES))
                ]
            )
            for g in wanted
        }
        if not all(columns.values()):
            return None
        outers = self.shardings(OUTER, mesh.within, micro_batch, stream) if mesh.pp > 1 else []
        if mesh.pp > 1 and not outers:
            return None
        parts = {
            regions: best_of([self.costs.ideal_step(OUTER, Strategy(o), mesh, micro_batch, regions) for o in outers])
            for regions in (self.parts if outers else ())
        }
        return Priced(mesh, micro_batch, stream, columns, (Outer(Strategy(outers[0]), parts),) if outers else ())

    def _price(self, mesh: Mesh, micro_batch: int, stream: Layout) -> Priced | None:
        wanted = [g for g in self.classes if g != OUTER or mesh.pp == 1]
        columns = {g: self._columns(g, mesh, micro_batch, stream) for g in wanted}
        outers = self._outers(mesh, micro_batch, stream) if mesh.pp > 1 else ()
        if not all(columns.values()) or (mesh.pp > 1 and not outers):
            return None
        return Priced(mesh, micro_batch, stream, columns, outers)

    def _columns(self, g: int, mesh: Mesh, micro_batch: int, stream: Layout) -> list[Column]:
        return unbeaten_columns(
            [
                Column(strategy, self.costs.layer_step(g, strategy, mesh, micro_batch))
                for sharding in self._placeable(g, mesh, micro_batch, stream)
                for strategy in self._strategies(sharding, mesh, micro_batch, outer=g == OUTER)
            ]
        )

    def _placeable(self, g: int, mesh: Mesh, micro_batch: int, stream: Layout) -> Iterator[Sharding]:
        """FSDP cuts a packed parameter along dim 1, and only evenly."""
        for sharding in self.shardings(g, mesh.within, micro_batch, stream):
            cost = self.costs.layer_cost(g, sharding, mesh.tp, micro_batch, mesh.cp)
            if not any(p.fsdp_dim and p.shape[p.fsdp_dim] % mesh.shards for p in cost.parameters):
                yield sharding

    def _strategies(self, sharding: Sharding, mesh: Mesh, micro_batch: int, *, outer: bool) -> Iterator[Strategy]:
        for zero in _zeros(mesh, self.costs.micro_batches(mesh, micro_batch), outer=outer):
            for again in ("none",) if outer else ALL_RECOMPUTES:  # embeddings and head frame the step: they are not recomputed
                yield Strategy(sharding, again, zero)

    def _outers(self, mesh: Mesh, micro_batch: int, stream: Layout) -> tuple[Outer, ...]:
        """Outer strategies that no other equals or beats in every part."""
        found: list[Outer] = []
        kept: list[tuple[float, ...]] = []
        priced = [
            self._outer(strategy, mesh, micro_batch)
            for sharding in self._placeable(OUTER, mesh, micro_batch, stream)
            for strategy in self._strategies(sharding, mesh, micro_batch, outer=True)
        ]
        for outer in sorted(priced, key=_all_costs):
            costs = _all_costs(outer)
            if not any(all(a <= b for a, b in zip(other, costs, strict=True)) for other in kept):
                found.append(outer)
                kept.append(costs)
        return tuple(found)

    def _outer(self, strategy: Strategy, mesh: Mesh, micro_batch: int) -> Outer:
        parts = {regions: self.costs.outer_step(regions, strategy, mesh, micro_batch) for regions in self.parts}
        return Outer(strategy, parts)

    @cached_property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Every set of busy regions of the outer body that one stage may have."""
        busy = self.costs.outer.busy
        return tuple(busy[i:j] for i in range(len(busy)) for j in range(i + 1, len(busy) + 1))


def _zeros(mesh: Mesh, micro_batches: int, *, outer: bool) -> tuple[Zero, ...]:
    """The ZeRO levels that are searched. With a pipeline level 2 is not: between the passes of one micro-batch others run,
    whose backward passes free what it would keep."""
    if mesh.shards == 1:
        return (3,)
    if mesh.pp > 1:
        return (3, 1)
    several: tuple[Zero, ...] = (2, 1) if micro_batches > 1 else (2,)
    return several if outer else (3, *several)


def _all_costs(outer: Outer) -> tuple[float, ...]:
    return tuple(cost for step in outer.parts.values() for cost in Column(outer.strategy, step).costs)
