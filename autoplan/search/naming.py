"""From counts of columns to named strategies and runs of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoplan.cost.model import OUTER
from autoplan.graph import Graph
from autoplan.plan import LayerRun
from autoplan.search.ilp import Column
from autoplan.strategy import REPLICATE, Mesh, Strategy

Counts = Mapping[int, Sequence[tuple[Column, int]]]


def named(graph: Graph, counts: Counts, mesh: Mesh) -> tuple[tuple[tuple[str, Strategy], ...], str, tuple[LayerRun, ...]]:
    """(strategies by name, the outer one's name, runs). Of equal layers the first ones take the recomputed strategies."""
    strategies: dict[str, Strategy] = {}
    queues: dict[int, list[str]] = {}
    several = len(graph.bodies) > 1
    for g, columns in counts.items():
        ordered = sorted(columns, key=lambda item: (item[0].strategy.recompute != "full", item[0].costs))
        queues[g] = []
        for column, number in ordered:
            name = _name(graph, g, column.strategy, mesh, several, strategies)
            strategies[name] = column.strategy
            queues[g] += [name] * number
    outer = queues.pop(OUTER)[0]
    runs: list[LayerRun] = []
    for block in graph.blocks:
        strategy = queues[block.body].pop(0)
        if runs and runs[-1].strategy == strategy and _container(runs[-1].layers[-1]) == _container(block.name):
            runs[-1] = LayerRun(layers=(*runs[-1].layers, block.name), strategy=strategy)
        else:
            runs.append(LayerRun(layers=(block.name,), strategy=strategy))
    return tuple(strategies.items()), outer, tuple(runs)


def _container(name: str) -> str:
    return name.rpartition(".")[0]


def _name(graph: Graph, g: int, strategy: Strategy, mesh: Mesh, several: bool, taken: Mapping[str, Strategy]) -> str:
    parts = []
    if g == OUTER:
        parts.append("outer")
    elif several:
        parts.append(_container(next(block.name for block in graph.blocks if block.body == g)).replace(".", "-") or "layers")
    else:
        parts.append("layers")
    if mesh.tp > 1:
        parts.append(f"tp{mesh.tp}" + ("-sp" if strategy.sharding.stream != REPLICATE else ""))
    if strategy.recompute == "full":
        parts.append("recompute")
    if g != OUTER and mesh.dp_shard > 1 and strategy.zero < 3:
        parts.append(f"zero{strategy.zero}")
    base = name = "-".join(parts)
    number = 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name
