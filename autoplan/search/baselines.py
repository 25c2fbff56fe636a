"""The plans that people write by hand, priced by the same model: what autoplan's plan is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from autoplan.plan import Baseline
from autoplan.search.columns import ALL_RECOMPUTES, Outer, Priced, Tables
from autoplan.search.options import Column, Columns
from autoplan.search.space import divisors, micro_batches, unstageable
from autoplan.search.stages import Solution, Staging
from autoplan.strategy import Layout, Mesh, Recompute, Zero
from autoplan.units import BYTE, Bytes, Seconds, show


@dataclass(frozen=True, slots=True)
class Recipe:
    """A baseline: every layer gets the same strategy, all recomputed or none, at the best micro-batch, of several meshes on
    the best."""

    name: str
    meshes: tuple[Mesh, ...]
    zero: Zero = 3


def recipes(gpus: int, node: int) -> Iterator[Recipe]:
    """The usual hand-made meshes for `gpus` devices in nodes of `node`."""
    yield Recipe("DDP", (Mesh(dp_replicate=gpus),), 1)  # which casts and reduces no more often than that
    if gpus > 1:
        yield Recipe("FSDP2 (ZeRO-3)", (Mesh(dp_shard=gpus),))
        yield Recipe("FSDP2 (ZeRO-2)", (Mesh(dp_shard=gpus),), 2)
    if gpus > node > 1 and gpus % node == 0:
        yield Recipe("HSDP", (Mesh(dp_replicate=gpus // node, dp_shard=node),))
    within = min(node, gpus)
    if within > 1 and gpus % within == 0:
        outside = gpus // within
        yield Recipe(f"tp {within} x FSDP2", (Mesh(dp_shard=outside, tp=within),))
        stages = [pp for pp in divisors(outside) if 1 < pp <= 16]
        if stages:
            yield Recipe(
                f"Megatron 3D: tp {within}, pp, ZeRO-1", tuple(Mesh(pp=pp, dp_shard=outside // pp, tp=within) for pp in stages), 1
            )


def baselines(tables: Tables, gpus: int, limit: Bytes) -> list[Baseline]:
    """Price of every recipe."""
    spans = [link.span for link in tables.costs.hardware.links if link.span > 0]
    return [_price(tables, recipe, limit) for recipe in recipes(gpus, spans[0] if spans else 1)]


def _price(tables: Tables, recipe: Recipe, limit: Bytes) -> Baseline:
    best, needs = _best(tables, recipe, limit)
    if best is not None:
        return best
    least = min((need() for need in needs), default=None)
    if least is None:
        note = "illegal: the batch or the layers do not divide"
    else:
        note = f"needs at least {show(least, BYTE)} of {show(limit, BYTE)}"
    return Baseline(
        name=recipe.name, mesh=recipe.meshes[-1], micro_batch=1, recompute="full", step_time=None, memory=least, note=note
    )


def _best(tables: Tables, recipe: Recipe, limit: Bytes) -> tuple[Baseline | None, list[Callable[[], Bytes]]]:
    """The fastest way that fits, and what those need that do not; to be asked when none does. What can't be faster than what is
    known is not priced; nor is, but for the smallest micro-batch, what can't fit."""
    best: Baseline | None = None
    known = inf
    possible, needs = _possible(tables, recipe, limit)
    crowded: set[Mesh] = set()
    for bound, micro_batch, mesh in sorted(possible):
        if best is not None and bound >= known:
            break
        if bound == inf:
            if mesh in crowded:
                continue
            crowded.add(mesh)
        for recompute, staging in _stagings(tables, mesh, micro_batch, recipe.zero, limit):
            found = staging.solve(1e-4, known) if best is None or staging.can_beat(known) else None
            if isinstance(found, Solution) and found.seconds < known:
                known = found.seconds
                best = Baseline(
                    name=recipe.name,
                    mesh=mesh,
                    micro_batch=micro_batch,
                    recompute=recompute,
                    step_time=known,
                    memory=found.memory,
                    note="",
                )
            elif found is None:
                needs.append(partial(getattr, staging, "least_memory"))
    return best, needs


def _possible(tables: Tables, recipe: Recipe, limit: Bytes) -> tuple[list[tuple[Seconds, int, Mesh]], list[Callable[[], Bytes]]]:
    """A bound on the step of every micro-batch of every mesh, and what those need that have no room for their parameters or for a
    layer."""
    found: list[tuple[Seconds, int, Mesh]] = []
    needs: list[Callable[[], Bytes]] = []
    sizes = {mesh: micro_batches(mesh, tables.costs.workload) for mesh in recipe.meshes}
    largest = max((size for some in sizes.values() for size in some), default=1)
    for mesh in recipe.meshes:
        if unstageable(mesh, tables.graph, tables.costs.outer.order):
            continue
        if tables.least_states(mesh) > limit:
            needs.append(partial(tables.least_states, mesh))
            continue
        for micro_batch in sizes[mesh]:
            if tables.least_moment(mesh.within, micro_batch) > limit:
                needs.append(partial(tables.least_moment, mesh.within, micro_batch))
                break
            alike = [other for other in recipe.meshes if _alike(other, mesh) and micro_batch in sizes[other]]
            bounds = (_no_sooner(tables, mesh, alike, micro_batch, stream, largest, limit) for stream in tables.streams(mesh.tp))
            found.append((min(bounds), micro_batch, mesh))
    return found, needs


def _alike(one: Mesh, other: Mesh) -> bool:
    """Whether what is roughly known of one is known of the other (`Tables.rough`)."""
    return one.within == other.within and (one.pp > 1) == (other.pp > 1)


def _no_sooner(
    tables: Tables, mesh: Mesh, alike: Sequence[Mesh], micro_batch: int, stream: Layout, largest: int, limit: Bytes
) -> Seconds:
    """No strategies of the mesh are faster, by what is known of the `largest` micro-batch."""
    rough = tables.rough([mesh], lambda: alike, micro_batch, stream, largest)
    return Staging(tables, rough, rough.best_outer, "1f1b", 1, limit).early_bound if rough else inf


def _stagings(tables: Tables, mesh: Mesh, micro_batch: int, zero: Zero, limit: Bytes) -> Iterator[tuple[Recompute, Staging]]:
    for stream in tables.streams(mesh.tp):
        priced = tables.priced(mesh, micro_batch, stream)
        if priced is None:
            continue
        for recompute in ALL_RECOMPUTES:
            one, outer = uniform(priced, zero, recompute)
            yield recompute, Staging(tables, one, outer, "1f1b", 1, limit)


def uniform(priced: Priced, zero: Zero, recompute: Recompute) -> tuple[Priced, Outer | None]:
    """Every class of layers at its fastest strategy of a ZeRO level, all recomputed or none, or the nearest there is."""

    def fastest(columns: Sequence[Column]) -> Column:
        def distance(column: Column) -> tuple[bool, int]:
            return column.recompute != recompute, abs(column.zero - zero)

        nearest = min(map(distance, columns))
        usual = [column for column in columns if distance(column) == nearest]
        return min(usual, key=lambda c: (c.costs.slot_seconds + c.costs.once_seconds, c.costs))

    columns = {g: Columns.of((fastest(found),)) for g, found in priced.columns.items()}
    outers = [(o, Column.of(o.strategy, next(iter(o.parts.values())))) for o in priced.outers]
    chosen = fastest([column for _, column in outers]) if outers else None
    return replace(priced, columns=columns), next((o for o, column in outers if column is chosen), None)
