"""The integer program of one stage, as the solver has it. What its numbers mean, and the order of layers: `search.ilp`.

What counts as the largest is known by levels: for every size `v` that any `q_gs` has, is a strategy used that has as much?

    sum_{s: q_gs >= v} x_gs <= N_g z_qv,   z_qv >= z_qu for v < u,   z_qv in {0, 1}                (`_levels`)
    max q = sum_v (v - v') z_qv,           v' the level before v                                   (`_up_to`)

    minimise    sum_g sum_s t_gs x_gs + epsilon sum_g sum_s y_gs                                   (`minimise`)
    subject to  sum_s x_gs = N_g,  x_gs <= N_g y_gs,  y_gs in {0, 1}                               (`_counts`)
                P >= max p,  W >= max w,  R >= max r                                               (`_largest`)
                I >= v z_iv + R - F_v,        F_v = sum_{s: i_gs < v} k_gs x_gs   for every v      (`_inside`)
                I >= i_e u_e + max h_e - F_e  for every set e of strategies that are alike in i and r: is one used (u_e), and
                                              the largest h of those after them                    (`_beside_buffers`)
                P >= I + W
                sum_g sum_s b_gs x_gs + P <= M - 1/4 MiB                                           (`_within`)
                the same of l_gs and max e                                                         (`_within`)
                x_gs in {0..N_g},  u_e in {0, 1},  P, I, W >= 0

Where there is one group of layers, `i + r` stands for `i`, without `R`. No `I` demands anything of a strategy that is not used: a
level that is reached no more than the used one above it, which has the same freed before it; the one that runs its backward pass
first demands `R`, the one with the largest `h` no less than `max h_e`, for `r >= h - k`.

A level is one decision for all strategies that reach it, and a strategy that is used for a fraction of a layer does not get
around it, as long as others of the level are used: with a decision for every strategy alone, programs of many strategies take
many times as long (the GPT cases of `benchmarks.planning_speed`). Levels are in steps of a quarter of a mebibyte, rounded up
(`options.level`), which is three quarters together at most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any

import pulp

from autoplan.cost.model import OUTER
from autoplan.search.options import STEP, Group, Option, level, precedence
from autoplan.search.solver import Answer, solve
from autoplan.units import Bytes, Seconds

Place = tuple[int, int]
"""Of an option: its group, and where it stands there."""
Terms = list[tuple[Any, float]]
"""Of a sum: variables with what they are multiplied by."""
Levels = list[tuple[Bytes, Any]]
"""Rising sizes, with variables that are 1 where they are reached."""

_MIB = 2.0**20


class Program:
    """How many layers of every group use which option, within `limit` bytes. `paired`: the layer after another is known."""

    def __init__(self, groups: Sequence[Group], limit: Bytes, paired: bool) -> None:
        self._groups, self._paired = groups, paired
        self._problem = pulp.LpProblem("stage", pulp.LpMinimize)
        self._options: dict[Place, Option] = {(g, s): o for g, group in enumerate(groups) for s, o in enumerate(group.options)}
        self._layers: dict[Place, Any] = {}
        self._is_used: dict[Place, Any] = {}
        self._counts()
        alone, window, ending = (self._largest(name, self._sizes(name)) for name in ("alone", "window", "ending"))
        peak = self._problem.add_variable("peak", 0, None)
        self._at_most([(self._inside(), 1.0), *window, (peak, -1.0)])
        self._at_most([*alone, (peak, -1.0)])
        self._within(limit, lambda option: option.bytes, [(peak, 1.0)])
        if ending:
            self._within(limit, lambda option: option.left, ending)

    def minimise(self, epsilon: Seconds, gap: float, time_limit: float) -> Answer:
        """The seconds, with `epsilon` more for every option that is used."""
        seconds = _sum([(x, self._options[at].seconds) for at, x in self._layers.items()])
        self._problem.setObjective(seconds + _sum([(used, epsilon) for used in self._is_used.values()]))
        return solve(self._problem, gap=gap, time_limit=time_limit)

    def chosen(self) -> tuple[tuple[Group, tuple[tuple[Option, int], ...]], ...]:
        """What the solver has found: of every group the options that are used, with the numbers of their layers."""
        numbers = {at: round(x.value() or 0.0) for at, x in self._layers.items()}
        return tuple(
            (group, tuple((o, n) for s, o in enumerate(group.options) if (n := numbers[g, s]) > 0))
            for g, group in enumerate(self._groups)
        )

    def _counts(self) -> None:
        for g, group in enumerate(self._groups):
            mine = [(g, s) for s in range(len(group.options))]
            for _, s in mine:
                layers = self._layers[g, s] = self._problem.add_variable(f"x_{g}_{s}", 0, group.number, "Integer")
                self._is_used[g, s] = layers if group.number == 1 else self._any(f"y_{g}_{s}", [(g, s)])
            self._problem += _sum([(self._layers[at], 1.0) for at in mine]) == group.number

    def _sizes(self, name: str) -> dict[Place, Bytes]:
        return {at: level(getattr(option, name)) for at, option in self._options.items()}

    def _largest(self, name: str, sizes: dict[Place, Bytes]) -> Terms:
        """At least the size of every option that is used; empty where all of them are nothing."""
        if not any(sizes.values()):
            return []
        most = self._problem.add_variable(name, 0, None)
        several = dict(sizes)
        for g in {g for g, _ in sizes if self._groups[g].number == 1}:
            only = {at: several.pop(at) for at in sizes if at[0] == g}
            self._at_most([*((self._layers[at], size / _MIB) for at, size in only.items()), (most, -1.0)])
        self._at_most([*_up_to(self._levels(name, several)), (most, -1.0)])
        return [(most, 1.0)]

    def _levels(self, name: str, sizes: dict[Place, Bytes]) -> Levels:
        """For every size, the least first: does an option that is used have as much, or more?"""
        found: Levels = []
        for size in sorted(set(sizes.values()) - {0.0}):
            reached = self._any(f"{name}_{len(found)}", [at for at, own in sizes.items() if own >= size])
            if found:
                self._at_most([(reached, 1.0), (found[-1][1], -1.0)])
            found.append((size, reached))
        return found

    def _any(self, name: str, options: Iterable[Place]) -> Any:
        """Whether any of these options is used."""
        found = self._problem.add_variable(name, 0, 1, "Integer")
        for g, mine in groupby(options, key=lambda at: at[0]):
            self._at_most([*((self._layers[at], 1.0) for at in mine), (found, -float(self._groups[g].number))])
        return found

    def _inside(self) -> Any:
        """A variable that is at least every used option's `inside` with what is reduced beside it, less what is freed before."""
        most = self._problem.add_variable("inside", 0, None)
        beside = [] if self._paired else self._largest("reducing", self._sizes("reducing"))
        first: dict[Place, Bytes] = {}  # before these nothing is freed
        for g, group in enumerate(self._groups):
            if group.body == OUTER:
                continue
            own = {(g, s): precedence(option, self._paired)[0] for s, option in enumerate(group.options)}
            if group.number == 1 or not group.frees:
                first |= own
                continue
            for size, reached in self._levels(f"inside_{g}", own):
                freed = self._freed(at for at, less in own.items() if less < size)
                self._at_most([(reached, size / _MIB), (most, -1.0), *beside, *freed])
            self._beside_buffers(g, most)
        self._at_most([*self._largest("first", first), *beside, (most, -1.0)])
        return most

    def _beside_buffers(self, g: int, most: Any) -> None:
        """The same with the largest `buffer` of the layers after a layer beside it; for options at once that are else alike."""
        buffers = {(g, s): level(option.buffer) for s, option in enumerate(self._groups[g].options)}
        kinds: dict[tuple[Bytes, Bytes], list[Place]] = defaultdict(list)
        for at in buffers:
            kinds[precedence(self._options[at], self._paired)[:2]].append(at)
        before: list[Place] = []
        after: dict[Bytes, Any] = {}  # by size: does an option that is used before have as large a buffer, or a larger one?
        for n, ((own, inside), alike) in enumerate(sorted(kinds.items())):
            larger = [(size, reached) for size, reached in sorted(after.items()) if inside + size > own]
            if larger:
                used = self._any(f"used_{g}_{n}", alike)
                self._at_most([(used, inside / _MIB), (most, -1.0), *_up_to(larger), *self._freed(before)])
            for size in sorted(set(buffers.values()) - {0.0}):
                having = [at for at in alike if buffers[at] >= size]
                if having:
                    reached = self._any(f"after_{g}_{n}_{size:.0f}", having)
                    if size in after:
                        self._at_most([(after[size], 1.0), (reached, -1.0)])
                    after[size] = reached
            before += alike

    def _freed(self, before: Iterable[Place]) -> Terms:
        return [(self._layers[at], -self._options[at].goes / _MIB) for at in before]

    def _within(self, limit: Bytes, size: Callable[[Option], Bytes], largest: Terms) -> None:
        """What adds up and the largest of what doesn't, within the limit."""
        sizes = [(x, size(self._options[at]) / _MIB) for at, x in self._layers.items()]
        self._at_most([*sizes, *largest], (limit - STEP) / _MIB)

    def _at_most(self, terms: Terms, limit: float = 0.0) -> None:
        self._problem += _sum(terms) <= limit


def _up_to(levels: Levels) -> Terms:
    """The largest size that is reached."""
    return [(reached, (size - less) / _MIB) for (less, _), (size, reached) in pairwise([(0.0, None), *levels])]


def _sum(terms: Terms) -> Any:
    """Of different variables: of one that comes twice PuLP would take the last factor."""
    expression = pulp.LpAffineExpression
    return expression.from_list(list(terms)) if hasattr(expression, "from_list") else expression(list(terms))
