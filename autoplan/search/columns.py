"""Every strategy of every class of layers, priced for one mesh, micro-batch and stream layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

from autoplan.cost.model import OUTER, CostModel
from autoplan.search.ilp import Column, unbeaten_columns
from autoplan.search.shardings import fastest_seconds, pareto_shardings, streams
from autoplan.strategy import REPLICATE, Layout, Mesh, Recompute, Sharding, Strategy
from autoplan.units import Bytes, Seconds


@dataclass(frozen=True)
class Entry:
    """One mesh, micro-batch and stream layout, with what can be said of it before anything is solved."""

    mesh: Mesh
    micro_batch: int
    stream: Layout
    classes: dict[int, int]
    columns: dict[int, list[Column]]

    @cached_property
    def bound(self) -> Seconds:
        """No choice of strategies is faster: every layer takes its fastest one."""
        return sum(n * min(c.step.seconds for c in self.columns[g]) for g, n in self.classes.items())

    @cached_property
    def least_memory(self) -> Bytes:
        """No choice of strategies needs less."""
        additive = sum(n * min(c.step.bytes for c in self.columns[g]) for g, n in self.classes.items())
        return additive + max(min(c.step.peak for c in self.columns[g]) for g in self.classes)


class Tables:
    """The shardings of every layer by (tp, micro-batch, stream), made when they are first asked for."""

    def __init__(self, costs: CostModel) -> None:
        self.costs, self.graph = costs, costs.graph
        self.classes = {OUTER: 1}
        for block in self.graph.blocks:
            self.classes[block.body] = self.classes.get(block.body, 0) + 1
        self._shardings: dict[tuple[int, int, int, Layout], list[Sharding]] = {}
        self._fastest: dict[tuple[int, int, int, Layout], Seconds | None] = {}

    def with_batch(self, global_batch: int) -> Tables:
        """The same tables for another global batch: shardings and layer costs do not depend on it."""
        other = copy(self)
        other.costs = self.costs.with_batch(global_batch)
        return other

    def streams(self, tp: int) -> list[Layout]:
        """The layouts in which activations may pass between all layers."""
        inputs = [
            (body.values[i].shape, body.values[i].batch_dim)
            for body in self.graph.bodies
            for i in (*body.inputs, *body.outputs)
            if body.values[i].requires_grad
        ]
        return streams(inputs, tp) if tp > 1 else [REPLICATE]

    def shardings(self, g: int, tp: int, micro_batch: int, stream: Layout) -> list[Sharding]:
        key = (g, tp, micro_batch, stream)
        if key not in self._shardings:
            self._shardings[key] = pareto_shardings(self.costs.layer_model(g, tp, micro_batch), stream)
        return self._shardings[key]

    def fastest(self, g: int, tp: int, micro_batch: int, stream: Layout) -> Seconds | None:
        """Seconds of one layer and micro-batch at its fastest sharding; None when there is no legal one."""
        key = (g, tp, micro_batch, stream)
        if key not in self._fastest:
            self._fastest[key] = fastest_seconds(self.costs.layer_model(g, tp, micro_batch), stream)
        return self._fastest[key]

    def entries(self, mesh: Mesh, micro_batch: int, recompute: Sequence[Recompute] = ("none", "full")) -> Iterator[Entry]:
        """One entry for every stream layout under which all layers can run."""
        for stream in self.streams(mesh.tp):
            entry = self.entry(mesh, micro_batch, stream, recompute)
            if entry is not None:
                yield entry

    def entry(
        self, mesh: Mesh, micro_batch: int, stream: Layout, recompute: Sequence[Recompute] = ("none", "full")
    ) -> Entry | None:
        """Every strategy of every class of layers, priced; None when some layer has none."""
        columns = {g: self._columns(g, mesh, micro_batch, stream, recompute) for g in self.classes}
        return Entry(mesh, micro_batch, stream, self.classes, columns) if all(columns.values()) else None

    def _columns(self, g: int, mesh: Mesh, micro_batch: int, stream: Layout, recompute: Sequence[Recompute]) -> list[Column]:
        found = []
        for sharding in self.shardings(g, mesh.tp, micro_batch, stream):
            cost = self.costs.layer_cost(g, sharding, mesh.tp, micro_batch)
            if any(p.fsdp_dim and p.shape[p.fsdp_dim] % mesh.dp_shard for p in cost.parameters):
                continue  # FSDP cuts a packed parameter along dim 1, and only evenly
            for strategy in _strategies(sharding, mesh, recompute, outer=g == OUTER):
                found.append(Column(strategy, self.costs.layer_step(g, strategy, mesh, micro_batch)))
        return unbeaten_columns(found)


def _strategies(sharding: Sharding, mesh: Mesh, recompute: Sequence[Recompute], *, outer: bool) -> Iterator[Strategy]:
    if outer:  # embeddings and head frame the step: they are not recomputed, and stay gathered
        yield Strategy(sharding, "none", zero=2)
        return
    for again in recompute:
        for zero in (3, 2) if mesh.dp_shard > 1 else (3,):
            yield Strategy(sharding, again, zero)
