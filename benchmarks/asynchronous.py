"""Asynchronous tp as PyTorch does it (symmetric memory, the compiler's micro-pipeline pass): pair by pair.

A collective runs beside the products next to it, and beside nothing else: a gather beside those that multiply what it gathers, a
reduce-scatter beside the one whose results it sums up. Over n ranks each such product is cut by rows into n pieces, which reach
less of the peak. Where products take P seconds whole and P' in pieces, a collective of S seconds adds

    P' - P + max(0, S - P') + overlap min(S, P')

In the backward pass the gradient of what was reduced and scattered is gathered, beside the product for the input's gradient, half
of the backward pass's. The gradient of what was gathered is reduced and scattered once those of all readers are summed up: beside
nothing, unless there is one reader.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

from autoplan.cost.walk import Step, walk
from autoplan.strategy import PARTIAL
from autoplan.units import Seconds
from benchmarks.habits import product

if TYPE_CHECKING:
    from benchmarks.arrangement import Arranged, Arrangement

Pair = tuple[Seconds, Seconds]
"""(forward, backward)"""


class Product(NamedTuple):
    """A linear, whole and in pieces; whether it runs in the forward pass that is asked for."""

    whole: Pair
    pieces: Pair
    runs: bool


class Collective(NamedTuple):
    """What the forward pass gathers, or reduces and scatters, with the products beside it."""

    sent: Pair
    gathers: bool
    runs: bool
    beside: list[Product]

    def adds(self, beside: Callable[[Seconds, Seconds], Seconds]) -> Pair:
        """Seconds to the two passes; `beside`: what communication costs beside computation."""
        running = [each for each in self.beside if each.runs]
        whole, pieces = sum(each.whole[0] for each in running), sum(each.pieces[0] for each in running)
        forward = pieces - whole + beside(pieces, self.sent[0]) if self.runs else 0.0
        if self.gathers and len(self.beside) != 1:
            return forward, self.sent[1]
        whole, pieces = sum(each.whole[1] for each in self.beside) / 2, sum(each.pieces[1] for each in self.beside) / 2
        return forward, pieces - whole + beside(pieces, self.sent[1])


def fused(arranged: Arranged, at: Arrangement, only: Callable[[Step], bool], narrow: float) -> Pair:
    """Seconds (forward, backward) that the tp collectives of a layer, the forward pass of `only` some of its steps, add to its
    products; what is gathered is `narrow` times as large as in the compute dtype."""
    collectives = pairs(arranged, at, only, narrow)
    added = [each.adds(arranged.beside) for each in collectives]
    return sum(forward for forward, _ in added), sum(backward for _, backward in added)


def pairs(arranged: Arranged, at: Arrangement, only: Callable[[Step], bool], narrow: float) -> list[Collective]:
    """The tp collectives of a layer, see `fused`."""
    model = arranged.costs.layer_model(0, at.tp, at.samples, ep=at.ep)
    small = arranged.costs.layer_model(0, at.tp, cast(int, at.micro_batch / at.tp), ep=at.ep)
    collectives: list[Collective] = []
    gathers: dict[int, Collective] = {}
    products: dict[int, Product] = {}
    same: dict[int, int] = {}
    for step in walk(model, at.block):
        op, (before, *_), (after, *_) = step.op, step.outcome.inputs, step.outcome.outputs
        source = same.get(op.inputs[0], op.inputs[0])
        if op.kind == "linear":
            forward, backward = product(arranged, small, step, at)
            pieces = at.tp * forward, at.tp * backward
            products[op.outputs[0]] = Product(product(arranged, model, step, at), pieces, only(step))
            if source in gathers:
                gathers[source].beside.append(products[op.outputs[0]])
        elif op.kind in ("enter", "exit"):
            forward, backward = model.border(model.body.values[op.inputs[0]], before, after)
            if before.sharded and not after.sharded:
                gathers[op.outputs[0]] = Collective((narrow * forward, backward), True, only(step), [])
                collectives.append(gathers[op.outputs[0]])
            elif before == PARTIAL and after.sharded:
                beside = [products[source]] if source in products else []
                collectives.append(Collective((forward, narrow * backward), False, only(step), beside))
            else:
                same[op.outputs[0]] = source
    return collectives
