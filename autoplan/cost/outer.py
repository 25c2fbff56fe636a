"""What stands outside the layers, cut along with them: embeddings, the encoder's norm, the head, and what passes a cut.

The outer body calls `L` blocks one after another. Region `r` is what runs between the calls of block `r - 1` and block `r`,
the call of block `r` included; region `L` is what follows the last one. A stage that has the blocks `i ... j - 1` runs the
regions `i ... j - 1`, and the last stage region `L` as well (`OuterParts.costs`).

A tensor crosses the cut before block `i` when a region below `i` makes it and a region from `i` on uses it (`crossing`): the
stream of activations, an encoder's output that every decoder layer reads. It is sent from stage to stage. What is computed
from the batch alone (masks, positions) is computed on every stage and crosses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from autoplan.cost.layer import LayerCost, layer_costs
from autoplan.cost.prices import LayerModel
from autoplan.cost.walk import Step
from autoplan.graph import Graph, Value
from autoplan.strategy import Sharding


class OuterParts:
    """The regions of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @cached_property
    def regions(self) -> tuple[int, ...]:
        """The region of every operation of the outer body."""
        found, region = [], 0
        for op in self.graph.outer.ops:
            found.append(region)
            region += op.kind == "call"
        return tuple(found)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The blocks (indices into `Graph.blocks`) in the order in which they are called."""
        return tuple(op.block for op in self.graph.outer.ops if op.kind == "call")

    @cached_property
    def busy(self) -> tuple[int, ...]:
        """Regions with more in them than a call and its borders."""
        ops = zip(self.regions, self.graph.outer.ops, strict=True)
        return tuple(sorted({region for region, op in ops if op.kind not in ("call", "enter", "exit")}))

    def within(self, first: int, last: int) -> tuple[int, ...]:
        """The busy regions of a stage that has the blocks `first ... last - 1`."""
        end = last + (last == len(self.order))
        return tuple(region for region in self.busy if first <= region < end)

    @cached_property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Every set of busy regions that one stage may have; the first is all of them."""
        busy = self.busy
        found = [busy[i:j] for i in range(len(busy)) for j in range(i + 1, len(busy) + 1)]
        return tuple(sorted(found, key=len, reverse=True))

    def costs(self, model: LayerModel, sharding: Sharding) -> dict[tuple[int, ...], LayerCost]:
        """One micro-batch of every one of the `parts` under a sharding of the outer body. Raises `UsageError` where it is not
        legal."""

        def within(regions: frozenset[int]) -> Callable[[Step], bool]:
            return lambda step: self.regions[step.index] in regions

        found = layer_costs(model, sharding, [None, *(within(frozenset(part)) for part in self.parts[1:])])
        return dict(zip(self.parts or ((),), found, strict=True))

    @cached_property
    def crossing(self) -> tuple[tuple[Value, ...], ...]:
        """The tensors that cross the cut before block 1, 2, ..., L - 1, each memory once."""
        body, cuts = self.graph.outer, len(self.order)
        made: dict[int, int] = {}
        passes: list[dict[int, Value]] = [{} for _ in range(cuts)]
        for region, op in zip(self.regions, body.ops, strict=True):
            for i in op.inputs:
                for cut in range(made.get(i, cuts) + 1, min(region, cuts - 1) + 1):
                    passes[cut].setdefault(body.values[i].storage, body.values[i])
            if op.kind == "call" or any(i in made or self._is_parameter(body.values[i]) for i in op.inputs):
                made.update(dict.fromkeys(op.outputs, region))
        return tuple(tuple(passing.values()) for passing in passes[1:])

    @cached_property
    def from_blocks(self) -> frozenset[int]:
        """Values that blocks return: only these pass between layers in the stream's layout for certain."""
        return frozenset(i for op in self.graph.outer.ops if op.kind == "call" for i in op.outputs)

    def _is_parameter(self, value: Value) -> bool:
        return value.parameter is not None and not self.graph.outer.parameter(value.parameter).buffer
