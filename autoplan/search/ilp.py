"""The integer program: which sharding, recomputation and ZeRO level every layer of a stage gets, under one device's memory.

For one stage of one mesh and micro-batch; without a pipeline there is one stage. Its layers fall into groups `g` of `N_g`
equal layers: of one body, in chunks with as many micro-batches in flight; what stands outside the layers is a group of one.
Every group has options `s` in `S_g`: a strategy with its seconds `t_gs` and bytes `b_gs`, which add up over layers, and bytes
that it needs only while its backward pass runs, so that the largest of them counts: of what stands outside `p_gs`, of a layer
`i_gs` by itself, `w_gs` for its neighbours, and `r_gs` for a layer after it that is like it, or `h_gs'` for one that uses another
option `s'`. After it `l_gs` of the bytes are left, and `e_gs` are needed for its end.

The layers' backward passes run from the last layer to the first, each frees `k_gs = b_gs - l_gs`, and those before it need no
room for that. The options of a group run in the order of falling `i_gs + r_gs`, in steps of a quarter of a mebibyte, and in a
step of falling `i_gs` (`_in_order`), as a plan's layers do (`search.naming`). No order needs less by more than a buffer and a
step: of two neighbours a before b with `i_a + r_a < i_b + r_b`, changing places turns the larger of `i_a + max(r_a, h_b) - k_b`
and `i_b + r_b` into the larger of `i_b + max(r_b, h_a) - k_a` and `i_a + r_a`, which is no more for `r_a <= r_b`, since
`h_a - k_a <= r_a`, and else by `r_a - r_b` at most. Where a group is in several chunks, `k_gs = 0` and `h_gs = 0`; there, and
where there are several groups of layers, any `r` may come after any layer, and they run in the order of falling `i_gs`: none
needs less.

What counts as the largest is known by levels: for every size `v` that any `q_gs` has, is a strategy used that has as much?

    sum_{s: q_gs >= v} x_gs <= N_g z_qv,   z_qv >= z_qu for v < u,   z_qv in {0, 1}                (`_levels`)
    max q = sum_v (v - v') z_qv,           v' the level before v                                   (`_up_to`)

    minimise    sum_g sum_s t_gs x_gs
    subject to  sum_s x_gs = N_g              for every group g                                    (`_counts`)
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
around it, as long as others of the level are used: with a decision for every strategy alone the same programs, of 57 to 173
strategies, take ten times as long. Levels are in steps of a quarter of a mebibyte, rounded up (`options.level`), which is three
quarters together at most.

To the objective comes `epsilon sum y_gs` with a small `epsilon` and `x_gs <= N_g y_gs`, `y_gs` in {0, 1} (`_counts`): of two
plans that are equal within the gap, the one with fewer different strategies is the better one. The bound that is reported is one
on the seconds alone.

Equal layers are interchangeable, so counting them loses nothing: the program has as many columns for 126 layers as for 2.
Shardings are the unbeaten ones of `search.shardings`; an option beaten by another in all of this is left out before
(`search.options`). Where every layer's fastest option fits, no program is needed (`_without_limit`), and where a stage has a
layer or two, all choices are tried (`_by_trying`): exactly, within a mebibyte less than there is, so that what is within it is
within the program's limit too. The solver's tolerance is 1e-6 of a row in MiB, far less than the quarter kept back, and the
chosen plan's bytes are summed again exactly before it is accepted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement, pairwise
from math import comb, inf, prod
from typing import Any

import numpy as np
import pulp

from autoplan.cost.model import OUTER
from autoplan.errors import SolverError
from autoplan.search.dominance import Ints
from autoplan.search.options import STEP, Column, Group, Option, level, precedence
from autoplan.search.solver import solve
from autoplan.units import Bytes, Seconds

Terms = list[tuple[Any, float]]
"""Of a sum: variables with what they are multiplied by."""
Sizes = dict[tuple[int, int], Bytes]
"""Of options, by group and option."""
Levels = list[tuple[Bytes, Any]]
"""Rising sizes, with variables that are 1 where they are reached."""

_MIB = 2.0**20
_FEW = 5000
"""So many choices are tried sooner than a program is built."""


@dataclass(frozen=True)
class Choice:
    """A solution: for every group, how many layers use which column."""

    counts: tuple[tuple[Group, tuple[tuple[Option, int], ...]], ...]
    seconds: Seconds
    bound: Seconds

    def columns(self, body: int, chunk: int) -> list[tuple[Column, int]]:
        """The columns of the layers of a body in a chunk, with their numbers."""
        return [(o.column, n) for group, used in self.counts if (group.body, group.chunk) == (body, chunk) for o, n in used]


class UnsolvedError(Exception):
    """The time limit passed before the solver found a solution or proved that there is none."""


def memory(counts: Sequence[tuple[Group, Sequence[tuple[Option, int]]]]) -> Bytes:
    """Exact bytes of a choice."""
    used = [(option, n) for _, options in counts for option, n in options if n]
    anywhere = None if _paired([group for group, _ in counts]) else max(o.reducing for o, _ in used)
    inside = max(_most_inside(group, options, anywhere) for group, options in counts)
    largest = max(max(o.alone for o, _ in used), inside + max(o.window for o, _ in used))
    at_once = sum(o.bytes * n for o, n in used) + largest
    afterwards = sum(o.left * n for o, n in used) + max(o.ending for o, _ in used)
    return max(at_once, afterwards)


def _most_inside(group: Group, options: Sequence[tuple[Option, int]], anywhere: Bytes | None) -> Bytes:
    """The largest `inside` of a group's layers with what is reduced beside it, less what is freed before."""
    most, freed, after = -inf, 0.0, 0.0
    for option, number in sorted(options, key=lambda used: precedence(used[0], anywhere is None)):  # as the backward pass
        if number:
            beside = option.reducing if anywhere is None else anywhere
            most = max(most, option.inside + max(beside, after) - freed)
            if group.frees:
                freed, after = freed + option.kept * number, max(after, option.buffer)
    return most


def _paired(groups: Sequence[Group]) -> bool:
    """Whether the layer after another is of its group, and so like it or of an option that is known."""
    layers = [group for group in groups if group.body != OUTER]
    return len(layers) == 1 and layers[0].frees


def _in_order(group: Group, paired: bool) -> list[int]:
    """The indices of a group's options in the order in which their layers run forward."""
    return sorted(range(len(group.options)), key=lambda s: precedence(group.options[s], paired), reverse=True)


def choose(groups: Sequence[Group], limit: Bytes, *, gap: float, time_limit: float = 60.0) -> Choice | None:
    """The fastest choice that fits into `limit` bytes, within a relative `gap`, or None when there is none.

    Raises `UnsolvedError` when time runs out first.
    """
    free = _without_limit(groups)
    if memory(free.counts) <= limit - _MIB:
        return free
    most = sum(min(group.number, len(group.options)) for group in groups)
    epsilon = free.seconds * gap / 2 / max(most, 1)
    if prod(comb(len(group.options) + group.number - 1, group.number) for group in groups) <= _FEW:
        return _by_trying(groups, limit, epsilon)
    problem = pulp.LpProblem("stage", pulp.LpMinimize)
    counts, used = _counts(problem, groups)
    alone, window, ending = (
        _largest(problem, name, _sizes(name, groups), groups, counts) for name in ("alone", "window", "ending")
    )
    inside = _inside(problem, groups, counts)
    peak = problem.add_variable("peak", 0, None)
    problem += _sum([(inside, 1.0), *window, (peak, -1.0)]) <= 0
    problem += _sum([*alone, (peak, -1.0)]) <= 0
    _within(problem, groups, counts, limit, lambda option: option.bytes, [(peak, 1.0)])
    if ending:
        _within(problem, groups, counts, limit, lambda option: option.left, ending)
    seconds = [(counts[g, s], option.seconds) for g, group in enumerate(groups) for s, option in enumerate(group.options)]
    problem.setObjective(_sum(seconds) + _sum([(indicator, epsilon) for indicator in used.values()]))
    answer = solve(problem, gap=gap / 2, time_limit=time_limit)
    if answer.status == "infeasible":
        return None
    if answer.status == "unknown":
        raise UnsolvedError
    chosen = tuple(
        (group, tuple((o, n) for s, o in enumerate(group.options) if (n := round(counts[g, s].value() or 0.0)) > 0))
        for g, group in enumerate(groups)
    )
    if any(sum(n for _, n in options) != group.number for group, options in chosen) or memory(chosen) > limit:
        raise SolverError(
            "the solver's answer does not meet the constraints it was given.", "Please report this with your model."
        )
    total = sum(option.seconds * n for _, options in chosen for option, n in options)
    least = answer.bound - epsilon * most if answer.bound is not None else 0.0
    return Choice(chosen, total, min(total, max(least, free.seconds)))


def _by_trying(groups: Sequence[Group], limit: Bytes, epsilon: Seconds) -> Choice | None:
    """`choose` without a solver: every choice there is."""
    seconds, size, left, kinds = np.zeros((4, 1))
    largest = np.zeros((6, 1))
    picked = np.zeros((1, 0), dtype=np.int64)
    paired = _paired(groups)
    for group in groups:
        order = _in_order(group, paired)
        ways = np.array(order)[_multisets(len(group.options), group.number)]
        costs = np.array([option[:9] for option in group.options]).T[:, ways]  # [9, multisets, number]
        inside, reducing = costs[5], costs[7]
        after = np.zeros_like(inside)
        if group.frees:
            kept = costs[1] - costs[3]
            inside = inside - (kept[:, ::-1].cumsum(axis=1)[:, ::-1] - kept)
            after[:, :-1] = np.maximum.accumulate(costs[8][:, ::-1], axis=1)[:, ::-1][:, 1:]
        # a layer's own option among those after it demands no more than the last of this option does
        moments = costs[2], costs[4], costs[6], inside + (reducing if paired else 0.0), inside + after, reducing
        different = 1 + (np.diff(ways, axis=1) != 0).sum(axis=1)
        old, new = (each.ravel() for each in np.indices((len(seconds), len(ways))))
        sums, most = costs.sum(axis=2), np.stack([moment.max(axis=1) for moment in moments])
        seconds, size, left = seconds[old] + sums[0][new], size[old] + sums[1][new], left[old] + sums[3][new]
        largest = np.maximum(largest[:, old], most[:, new])
        kinds = kinds[old] + different[new]
        picked = np.concatenate((picked[old], ways[new]), axis=1)
    alone, ending, window, inside, beside, reducing = largest
    inside = np.maximum(inside + (0.0 if paired else reducing), beside)
    fits = np.flatnonzero(np.maximum(size + np.maximum(alone, inside + window), left + ending) <= limit - _MIB)
    if not len(fits):
        return None
    best = fits[np.argmin(seconds[fits] + epsilon * kinds[fits])]
    rest, counts = picked[best].tolist(), []
    for group in groups:
        mine, rest = rest[: group.number], rest[group.number :]
        counts.append((group, tuple((group.options[s], mine.count(s)) for s in sorted(set(mine)))))
    return Choice(tuple(counts), float(seconds[best]), float(seconds[fits].min()))


@lru_cache(maxsize=256)
def _multisets(options: int, number: int) -> Ints:
    """[multisets, number]: every way in which `number` equal layers can use so many options."""
    return np.array(list(combinations_with_replacement(range(options), number)), dtype=np.int64)


def _without_limit(groups: Sequence[Group]) -> Choice:
    counts = tuple((group, ((group.fastest, group.number),)) for group in groups)
    seconds = sum(group.fastest.seconds * group.number for group in groups)
    return Choice(counts, seconds, seconds)


def _counts(problem: Any, groups: Sequence[Group]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    counts, used = {}, {}
    for g, group in enumerate(groups):
        number = group.number
        for s in range(len(group.options)):
            counts[g, s] = problem.add_variable(f"x_{g}_{s}", 0, number, "Integer")
            used[g, s] = counts[g, s] if number == 1 else problem.add_variable(f"y_{g}_{s}", 0, 1, "Integer")
            if number > 1:
                problem += _sum([(counts[g, s], 1.0), (used[g, s], -float(number))]) <= 0
        problem += _sum([(counts[g, s], 1.0) for s in range(len(group.options))]) == number
    return counts, used


def _sizes(name: str, groups: Sequence[Group]) -> Sizes:
    return {(g, s): level(getattr(o, name)) for g, group in enumerate(groups) for s, o in enumerate(group.options)}


def _largest(problem: Any, name: str, sizes: Sizes, groups: Sequence[Group], counts: dict[Any, Any]) -> Terms:
    """At least the size of every option that is used; empty where all of them are nothing."""
    if not any(sizes.values()):
        return []
    most = problem.add_variable(name, 0, None)
    several = dict(sizes)
    for g in {g for g, _ in sizes if groups[g].number == 1}:
        only = {at: several.pop(at) for at in sizes if at[0] == g}
        problem += _sum([*((counts[at], size / _MIB) for at, size in only.items()), (most, -1.0)]) <= 0
    problem += _sum([*_up_to(_levels(problem, name, several, groups, counts)), (most, -1.0)]) <= 0
    return [(most, 1.0)]


def _levels(problem: Any, name: str, sizes: Sizes, groups: Sequence[Group], counts: dict[Any, Any]) -> Levels:
    """For every size, the least first: does an option that is used have as much, or more?"""
    found: Levels = []
    for size in sorted(set(sizes.values()) - {0.0}):
        reached = problem.add_variable(f"{name}_{len(found)}", 0, 1, "Integer")
        for g, group in enumerate(groups):
            having = [(counts[at], 1.0) for at, own in sizes.items() if at[0] == g and own >= size]
            if having:
                problem += _sum([*having, (reached, -float(group.number))]) <= 0
        if found:
            problem += _sum([(reached, 1.0), (found[-1][1], -1.0)]) <= 0
        found.append((size, reached))
    return found


def _up_to(levels: Levels) -> Terms:
    """The largest size that is reached."""
    return [(reached, (size - less) / _MIB) for (less, _), (size, reached) in pairwise([(0.0, None), *levels])]


def _inside(problem: Any, groups: Sequence[Group], counts: dict[Any, Any]) -> Any:
    """A variable that is at least every used option's `inside` with what is reduced beside it, less what is freed before."""
    most, paired = problem.add_variable("inside", 0, None), _paired(groups)
    beside = [] if paired else _largest(problem, "reducing", _sizes("reducing", groups), groups, counts)
    first: Sizes = {}  # before these nothing is freed
    for g, group in enumerate(groups):
        if group.body == OUTER:
            continue
        own = {(g, s): precedence(option, paired)[0] for s, option in enumerate(group.options)}
        if group.number == 1 or not group.frees:
            first |= own
            continue
        for size, reached in _levels(problem, f"inside_{g}", own, groups, counts):
            before = [s for (_, s), less in own.items() if less < size]
            problem += _sum([(reached, size / _MIB), (most, -1.0), *beside, *_freed(g, group, before, counts)]) <= 0
        _beside_buffers(problem, g, group, paired, most, counts)
    problem += _sum([*_largest(problem, "first", first, groups, counts), *beside, (most, -1.0)]) <= 0
    return most


def _freed(g: int, group: Group, before: Sequence[int], counts: dict[Any, Any]) -> Terms:
    return [(counts[g, s], -group.options[s].kept / _MIB) for s in before]


def _beside_buffers(problem: Any, g: int, group: Group, paired: bool, most: Any, counts: dict[Any, Any]) -> None:
    """The same with the largest `buffer` of the layers after a layer beside it; for options at once that are else alike."""
    kinds: dict[tuple[Bytes, Bytes], list[int]] = defaultdict(list)
    for s, option in enumerate(group.options):
        kinds[precedence(option, paired)[:2]].append(s)
    buffers = sorted({level(option.buffer) for option in group.options} - {0.0})
    before: list[int] = []
    after: dict[Bytes, Any] = {}  # by size: does an option that is used before have as large a buffer, or a larger one?
    for n, ((own, inside), alike) in enumerate(sorted(kinds.items())):
        larger = [(size, after[size]) for size in buffers if size in after and inside + size > own]
        if larger:
            used = _used(problem, f"used_{g}_{n}", g, group, alike, counts)
            terms = [(used, inside / _MIB), (most, -1.0), *_up_to(larger), *_freed(g, group, before, counts)]
            problem += _sum(terms) <= 0
        for size in buffers:
            having = [s for s in alike if level(group.options[s].buffer) >= size]
            if having:
                reached = _used(problem, f"after_{g}_{n}_{size:.0f}", g, group, having, counts)
                if size in after:
                    problem += _sum([(after[size], 1.0), (reached, -1.0)]) <= 0
                after[size] = reached
        before += alike


def _used(problem: Any, name: str, g: int, group: Group, options: Sequence[int], counts: dict[Any, Any]) -> Any:
    """Whether any of these options is used."""
    found = problem.add_variable(name, 0, 1, "Integer")
    problem += _sum([*((counts[g, s], 1.0) for s in options), (found, -float(group.number))]) <= 0
    return found


def _within(
    problem: Any, groups: Sequence[Group], counts: dict[Any, Any], limit: Bytes, size: Callable[[Option], Bytes], largest: Terms
) -> None:
    """What adds up and the largest of what doesn't, within the limit."""
    terms = [(counts[g, s], size(option) / _MIB) for g, group in enumerate(groups) for s, option in enumerate(group.options)]
    problem += _sum([*terms, *largest]) <= (limit - STEP) / _MIB


def _sum(terms: Sequence[tuple[Any, float]]) -> Any:
    expression = pulp.LpAffineExpression
    return expression.from_list(list(terms)) if hasattr(expression, "from_list") else expression(list(terms))
