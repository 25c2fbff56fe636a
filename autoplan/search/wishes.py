"""What the user wants of layers and parameters, by body: layers of one body with different wishes become two bodies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from autoplan.constraints import Constraints, LayerWish
from autoplan.cost.model import OUTER
from autoplan.errors import UsageError
from autoplan.graph import Block, Body, Graph
from autoplan.strategy import Layout, Recompute, Zero, parse_layout


@dataclass(frozen=True)
class Wish:
    """Of one body."""

    recompute: Recompute | None = None
    zero: Zero | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """By name of the parameter in the body."""


FREE = Wish()


def divided(graph: Graph, constraints: Constraints) -> tuple[Graph, dict[int, Wish]]:
    """The graph with a body for every set of equal layers that are to do the same, and the wishes by body.

    Raises `UsageError` when a pattern matches nothing, or a layout has no place in the parameter.
    """
    if not constraints.placing:
        return graph, {}
    _check(constraints.layers, [block.name for block in graph.blocks], "layer")
    names = [f"{prefix}{p.name}" for prefix, body in graph.members() for p in body.parameters]
    _check(constraints.parameters, names, "parameter")
    found = {OUTER: Wish(layouts=_layouts(constraints, "", graph.outer))}
    bodies: list[Body] = []
    numbers: dict[tuple[object, ...], int] = {}
    blocks = []
    for block in graph.blocks:
        body = graph.bodies[block.body]
        wish = _wish(constraints, block, body)
        key = (block.body, wish.recompute, wish.zero, tuple(wish.layouts.items()))
        if key not in numbers:
            numbers[key] = len(bodies)
            found[len(bodies)] = wish
            bodies.append(replace(body))  # a body of its own, so that nobody takes it for the other
        blocks.append(Block(block.name, numbers[key]))
    return replace(graph, bodies=tuple(bodies), blocks=tuple(blocks)), found


def _wish(constraints: Constraints, block: Block, body: Body) -> Wish:
    recompute: Recompute | None = None
    zero: Zero | None = None
    for pattern, wish in constraints.layers.items():
        if fnmatchcase(block.name, pattern):
            recompute, zero = wish.recompute or recompute, wish.zero or zero
    return Wish(recompute, zero, _layouts(constraints, f"{block.name}.", body))


def _layouts(constraints: Constraints, prefix: str, body: Body) -> dict[str, Layout]:
    found = {}
    for p in body.parameters:
        for pattern, text in constraints.parameters.items():
            if fnmatchcase(f"{prefix}{p.name}", pattern):
                layout = parse_layout(text)
                if layout.sharded and layout.dim >= len(p.shape):
                    raise UsageError(f"parameter '{prefix}{p.name}' of shape {p.shape} has no dim {layout.dim} for {text}.")
                found[p.name] = layout
    return found


def _check(patterns: Mapping[str, LayerWish] | Mapping[str, str], names: Iterable[str], what: str) -> None:
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            close = get_close_matches(pattern, known, n=1, cutoff=0.0)
            raise UsageError(f"no {what} is called '{pattern}'.", f"There is '{close[0]}'." if close else None)
