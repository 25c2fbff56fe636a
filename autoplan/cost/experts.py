"""Which modules of a layer hold experts that can be dealt over `ep`, and what passes their borders.

They are found by what they compute: a grouped matrix product, rows of tokens each with one of several weights, whose weights are
a parameter `[experts, ...]`. The module that owns it is dealt whole, so all its parameters must be of that form, and it must be
called in one of the two ways that `strategy.Experts` knows (`_entry`). Everything between its borders then works on the rows of
other devices' tokens: on the fullest of them on `imbalance` times as many as on the average.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from autoplan.graph import Body, Graph, Op
from autoplan.strategy import Experts


@dataclass(frozen=True)
class Dealt:
    """One module of experts in a body."""

    experts: Experts
    rows: int
    """The value outside that brings the rows."""
    chosen: int
    """Experts of each row: 1 where the caller has sorted them."""
    weights: int | None
    """The value outside that says how much each of them counts."""
    first: int
    """The first operation inside that is no border, and the `last`."""
    last: int
    doors: frozenset[int]
    """The borders of the module itself (indices of operations)."""
    inside: frozenset[int]
    """The values inside."""


def owners(body: Body) -> dict[str, set[str]]:
    """By module: its parameters that are weights of grouped matrix products."""
    made = {i: op for op in body.ops for i in op.outputs}
    found: dict[str, set[str]] = {}
    for op in body.ops:
        if op.name.endswith("grouped_mm") and len(op.inputs) > 1:
            i = op.inputs[1]
            while i in made and made[i].kind in ("dims", "view", "pointwise", "enter") and len(made[i].inputs) == 1:
                i = made[i].inputs[0]
            name = body.values[i].parameter
            if name is not None:
                found.setdefault(name.rpartition(".")[0], set()).add(name)
    return found


class Mixtures:
    """What is known of a model's experts, whatever the size of ep."""

    def __init__(self, graph: Graph) -> None:
        self.dealt: dict[int, tuple[Dealt, ...]] = {}
        """By body."""
        self.reason = "the model has no experts: no grouped matrix product was found"
        for number, body in enumerate(graph.bodies):
            entries = [_entry(body, module) for module in owners(body)]
            self.dealt[number] = tuple(entry for entry in entries if isinstance(entry, Dealt))
            self.reason = next((entry for entry in entries if isinstance(entry, str)), self.reason)
        self.numbers = sorted({each.experts.number for some in self.dealt.values() for each in some})

    def refusal(self, ep: int) -> str:
        """Why experts can't be dealt over `ep` devices; "" when they can."""
        if ep == 1:
            return ""
        if not self.numbers:
            return self.reason
        return next((f"{number} experts do not divide over ep {ep}" for number in self.numbers if number % ep), "")


def _entry(body: Body, module: str) -> Dealt | str:
    """The module as it can be dealt, or why it can't."""
    own = [p for p in body.parameters if p.name.startswith(f"{module}.") and not p.buffer]
    number = own[0].shape[0] if own and own[0].shape else 0
    if number < 2 or any(not p.shape or p.shape[0] != number for p in own):
        return f"the parameters of '{module}' do not all begin with one dim of experts"
    inside = [i for i, op in enumerate(body.ops) if _within(op, module)]
    doors = [i for i in inside if body.ops[i].module == module and body.ops[i].kind in ("enter", "exit")]
    entering = [body.ops[i] for i in doors if body.ops[i].kind == "enter"]
    leaving = [body.ops[i] for i in doors if body.ops[i].kind == "exit"]
    form = _form(body, entering, leaving, number)
    work = [i for i in inside if body.ops[i].kind not in ("enter", "exit")]
    if form is None or not work:
        return f"'{module}' is called in a way that is not known (see autoplan.strategy.Experts)"
    left = {i for op in leaving for i in op.outputs}
    values = frozenset(i for index in inside for i in body.ops[index].outputs) - left
    rows, *others = (op.inputs[0] for op in entering)
    chosen = body.values[others[0]].shape[1] if form == "chosen" else 1
    weights = others[1] if form == "chosen" else None
    return Dealt(Experts(module, form, number), rows, chosen, weights, work[0], work[-1], frozenset(doors), values)


def _within(op: Op, module: str) -> bool:
    return op.module == module or op.module.startswith(f"{module}.")


def _form(body: Body, entering: list[Op], leaving: list[Op], number: int) -> Literal["chosen", "sorted"] | None:
    shapes = [body.values[op.inputs[0]] for op in entering]
    results = [body.values[op.outputs[0]] for op in leaving]
    if len(results) != 1 or not shapes or len(shapes[0].shape) != 2 or results[0].shape != shapes[0].shape:
        return None
    rows, *rest = shapes
    if rows.batch_dim != 0 or not rows.requires_grad or (rest and rest[0].requires_grad):
        return None
    if len(rest) == 2 and all(len(v.shape) == 2 and v.shape[0] == rows.shape[0] for v in rest) and rest[0].shape == rest[1].shape:
        return "chosen"
    return "sorted" if len(rest) == 1 and rest[0].shape == (number,) else None


def whole_rows(rows: float, tp: int) -> float:
    """How many times as many rows there are when every rank of a tp group has as many as the fullest: `torch.chunk` cuts so."""
    return ceil(rows / tp - 1e-9) * tp / rows
