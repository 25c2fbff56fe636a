"""From counts of columns to named strategies and runs of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoplan.cost.model import OUTER
from autoplan.graph import Graph
from autoplan.plan import LayerRun
from autoplan.search.options import Column, Costs, precedence
from autoplan.search.stages import Solution
from autoplan.strategy import REPLICATE, Mesh, Strategy
from autoplan.units import Bytes


def named(graph: Graph, solution: Solution, mesh: Mesh) -> tuple[tuple[tuple[str, Strategy], ...], str, tuple[LayerRun, ...]]:
    """(strategies by name, the outer one's name, runs). Of equal layers in a stage those come first that hold most while their
    backward pass runs, with what is reduced beside it, which mostly are the recomputed ones: see `search.ilp`."""
    strategies: dict[str, Strategy] = {}
    several = len(graph.bodies) > 1

    def name_of(g: int, strategy: Strategy) -> str:
        known = [name for name, each in strategies.items() if each == strategy and places[name] == g]
        name = known[0] if known else _name(graph, g, strategy, mesh, several, strategies)
        strategies[name], places[name] = strategy, g
        return name

    places: dict[str, int] = {}
    outer = name_of(OUTER, solution.outer)
    runs: list[LayerRun] = []
    for (first, last), stage in zip(solution.cut.runs(len(graph.blocks)), solution.stages, strict=True):
        paired = solution.cut.chunks == 1 and len(stage.keys() - {OUTER}) == 1
        queues = {g: _queue([(name_of(g, c.strategy), c, n) for c, n in columns], paired) for g, columns in stage.items()}
        for block in graph.blocks[first:last]:
            strategy = queues[block.body].pop(0)
            if runs and runs[-1].strategy == strategy and _container(runs[-1].layers[-1]) == _container(block.name):
                runs[-1] = LayerRun(layers=(*runs[-1].layers, block.name), strategy=strategy)
            else:
                runs.append(LayerRun(layers=(block.name,), strategy=strategy))
    return tuple(strategies.items()), outer, tuple(runs)


_ORDER = ("full", "selective", "none")


def _queue(columns: Sequence[tuple[str, Column, int]], paired: bool) -> list[str]:
    def place(item: tuple[str, Column, int]) -> tuple[tuple[Bytes, ...], int, Costs]:
        costs = item[1].costs
        return tuple(-size for size in precedence(costs, paired)), _ORDER.index(item[1].recompute), costs

    ordered = sorted(columns, key=place)
    return [name for name, _, number in ordered for _ in range(number)]


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
    if strategy.recompute != "none":
        parts.append({"selective": "selective", "full": "recompute"}[strategy.recompute])
    if g != OUTER and strategy.zero < 3:
        parts.append(f"zero{strategy.zero}")
    base = name = "-".join(parts)
    number = 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name
