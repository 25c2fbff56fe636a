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

With `x_gs` layers of group `g` that use strategy `s`, `sum_s x_gs = N_g`,

    minimise    sum_g sum_s t_gs x_gs
    subject to  sum_g sum_s b_gs x_gs + max(max p, max w + largest need inside)  <=  M             (`memory`)
                sum_g sum_s l_gs x_gs + max e                                    <=  M

as `search.program` writes it for the solver.

To the objective comes a small `epsilon` for every strategy that is used: of two plans that are equal within the gap, the one with
fewer different strategies is the better one. The bound that is reported is one on the seconds alone.

Equal layers are interchangeable, so counting them loses nothing: the program has as many columns for 126 layers as for 2.
Shardings are the unbeaten ones of `search.shardings`; an option beaten by another in all of this is left out before
(`search.options`). Where every layer's fastest option fits, no program is needed (`_without_limit`), and where a stage has a
layer or two, all choices are tried (`_by_trying`): exactly, within a mebibyte less than there is, so that what is within it is
within the program's limit too. The solver's tolerance is 1e-6 of a row in MiB, far less than the quarter kept back, and the
chosen plan's bytes are summed again exactly before it is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement
from math import comb, inf, prod

import numpy as np

from autoplan.cost.model import OUTER
from autoplan.errors import SolverError
from autoplan.search.dominance import Ints
from autoplan.search.options import Column, Group, Option, precedence
from autoplan.search.program import Program
from autoplan.units import Bytes, Seconds

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
                freed, after = freed + option.goes * number, max(after, option.buffer)
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
    program = Program(groups, limit, _paired(groups))
    answer = program.minimise(epsilon, gap / 2, time_limit)
    if answer.status == "infeasible":
        return None
    if answer.status == "unknown":
        raise UnsolvedError
    chosen = program.chosen()
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
            goes = costs[1] - costs[3]
            inside = inside - (goes[:, ::-1].cumsum(axis=1)[:, ::-1] - goes)
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
