"""What a finished search tells: what became of every mesh and micro-batch, and what came near when nothing fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf

from autoplan.plan import Candidate
from autoplan.search.candidates import best_of_each, out_of_memory, rank, slower, told, too_big
from autoplan.search.givenup import GivenUp
from autoplan.search.nodes import Depth, Family, Several, Shape, staging_of
from autoplan.search.stages import Staging
from autoplan.search.tree import Tree
from autoplan.strategy import Mesh, Within
from autoplan.units import Bytes, Seconds

LISTED = 64
"""Candidates that a plan lists, the best first; the proof covers all of them."""
REFUSED = 24
"""Of these, candidates at most that are out of memory or illegal, of these one for every reason."""
NEAR = 4
"""Sizes of tp and cp among which the nearest miss is sought when there is room on none."""


def candidates(tree: Tree) -> tuple[list[Candidate], int]:
    """What became of the (meshes, micro-batches), the best first, with its reason, and how many there are in all."""
    assert tree.best is not None
    staging, solution = tree.best
    best, chosen = solution.seconds, (staging.priced.mesh, staging.priced.micro_batch)
    given_up = GivenUp(tree.covered, best, tree.limit)
    found = best_of_each(tree.verdicts, _unopened(tree))
    found[chosen] = replace(slower(staging, best, bound=False), status="chosen", reason="the fastest")
    dropped, pruned = ({(p.priced.mesh, p.priced.micro_batch): p for p in some} for some in (tree.dropped, tree.pruned))
    refused = {(c.mesh, c.micro_batch): c for c in [*(_crowded(tree, *key) for key in sorted(tree.crowded)), *tree.refused]}
    covered = tree.covered.keys() | dropped.keys() | found.keys() | refused.keys() | tree.meshes.beaten
    listed = [_no_later(given_up, c) for c in sorted(found.values(), key=lambda c: (*rank(c), c.mesh, c.micro_batch))[:LISTED]]
    further = [*sorted(pruned), *sorted(dropped.keys() - pruned.keys())]  # the first came further
    left = [key for key in further if key not in found][:LISTED]
    listed += [given_up.verdict(pruned.get(key) or dropped[key]) for key in left]
    listed += [c for key, c in refused.items() if key not in found and key not in pruned and key not in dropped]
    listed.sort(key=lambda c: (*rank(c), c.mesh, c.micro_batch))
    slower_ones = [c for c in listed if c.step_time is not None]
    others = _of_every_reason([c for c in listed if c.step_time is None])[:REFUSED]
    return [*slower_ones[: LISTED - len(others)], *others], len(covered)


def _of_every_reason(refused: list[Candidate]) -> list[Candidate]:
    """What does not fit, and of what is illegal the first for every reason."""
    reasons = {c.reason: c for c in reversed(refused) if c.status == "illegal"}
    return [c for c in refused if c.status != "illegal" or reasons[c.reason] is c]


def misses(tree: Tree) -> list[Staging]:
    """When nothing fits: what came near, or at least the mesh with the smallest states."""
    missed = [each for staging in tree.stagings for each in staging.settled] or tree.dropped
    if missed or not tree.crowded:
        return missed
    nearest: dict[Within, tuple[Mesh, int]] = {}
    for mesh, micro_batch in sorted(tree.crowded, key=lambda key: (_needed(tree, *key), key[1], key[0])):
        nearest.setdefault(mesh.within, (mesh, micro_batch))
    found = []
    near = [*list(nearest)[: NEAR // 2], *sorted(nearest, key=lambda within: within.size)[:NEAR]]
    for mesh, micro_batch in (nearest[within] for within in dict.fromkeys(near)):
        for stream in tree.tables.streams(mesh.tp):
            priced = tree.tables.priced(mesh, micro_batch, stream)
            if priced is not None:
                found.append(Staging(tree.tables, priced, next(iter(priced.outers), None), "1f1b", 1, tree.limit))
    return found


def refusals(tree: Tree) -> list[Candidate]:
    """When nothing is legal: why, of what came furthest first."""
    before = tree.meshes.refused
    return [*tree.refused[len(before) :], *tree.meshes.ruled_out(), *before]


def _needed(tree: Tree, mesh: Mesh, micro_batch: int) -> Bytes:
    """A rank holds at least so much."""
    return max(tree.tables.least_states(mesh), tree.tables.least_moment(mesh.within, micro_batch))


def _crowded(tree: Tree, mesh: Mesh, micro_batch: int) -> Candidate:
    return out_of_memory(mesh, micro_batch, "", _needed(tree, mesh, micro_batch), tree.limit)


def _no_later(given_up: GivenUp, candidate: Candidate) -> Candidate:
    """With its reason; a bound, if something else of this mesh and micro-batch was given up by a lower one, by that."""
    if not candidate.bound or candidate.step_time is None:
        return told(candidate, given_up.best)
    least = min(candidate.step_time, given_up.least(candidate.mesh, candidate.micro_batch))
    return told(replace(candidate, step_time=least), given_up.best)


def _unopened(tree: Tree) -> Iterator[Candidate]:
    for bound, _, node in (*tree.open, *tree.waiting):
        if not isinstance(node, Several):
            yield slower(staging_of(node), bound, bound=True) if bound < inf else too_big(staging_of(node), tree.limit)
            continue
        for (within, pp), some in tree.meshes.by_depth.items():
            if within != node.within or (pp != node.pp if isinstance(node, Depth | Shape) else (pp > 1) != node.piped):
                continue
            sizes = tree.meshes.sizes(within, pp)
            for size in sizes if isinstance(node, Family) else [node.micro_batch]:
                if size in sizes:
                    yield from (_unpriced(tree, mesh, size, bound) for mesh in some)


def _unpriced(tree: Tree, mesh: Mesh, micro_batch: int, bound: Seconds) -> Candidate:
    if bound == inf:
        return _crowded(tree, mesh, micro_batch)
    return Candidate(mesh=mesh, micro_batch=micro_batch, status="slower", reason="", step_time=bound, bound=True)
