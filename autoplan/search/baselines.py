"""The plans that people write by hand, priced by the same model: what autoplan's plan is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from autoplan.cost.model import OUTER
from autoplan.plan import Baseline
from autoplan.search.columns import Entry, Tables
from autoplan.search.ilp import Choice, Column, memory
from autoplan.search.space import micro_batches
from autoplan.strategy import Mesh, Recompute
from autoplan.units import BYTE, Bytes, show


@dataclass(frozen=True, slots=True)
class Recipe:
    """A baseline: its mesh; every layer gets the same strategy, all recomputed or none, at the best micro-batch."""

    name: str
    mesh: Mesh


def recipes(gpus: int, node: int) -> Iterator[Recipe]:
    """The usual hand-made meshes for `gpus` devices in nodes of `node`."""
    yield Recipe("DDP", Mesh(dp_replicate=gpus))
    if gpus > 1:
        yield Recipe("FSDP2", Mesh(dp_shard=gpus))
    if gpus > node > 1 and gpus % node == 0:
        yield Recipe("HSDP", Mesh(dp_replicate=gpus // node, dp_shard=node))
    within = min(node, gpus)
    if within > 1 and gpus % within == 0:
        yield Recipe(f"tp {within} in the node", Mesh(dp_shard=gpus // within, tp=within))


def baselines(tables: Tables, gpus: int, limit: Bytes) -> list[Baseline]:
    """Price of every recipe."""
    spans = [link.span for link in tables.costs.hardware.links if link.span > 0]
    return [_price(tables, recipe, limit) for recipe in recipes(gpus, spans[0] if spans else 1)]


def _price(tables: Tables, recipe: Recipe, limit: Bytes) -> Baseline:
    best: tuple[float, float, int, Recompute] | None = None
    least: float | None = None
    for micro_batch in micro_batches(recipe.mesh, tables.costs.workload):
        for recompute in get_args(Recompute):
            for entry in tables.entries(recipe.mesh, micro_batch, (recompute,)):
                choice = uniform(entry)
                size = memory(choice.counts)
                least = size if least is None else min(least, size)
                if size <= limit and (best is None or choice.seconds < best[0]):
                    best = choice.seconds, size, micro_batch, recompute
    if best is not None:
        seconds, size, micro_batch, recompute = best
        return Baseline(
            name=recipe.name,
            mesh=recipe.mesh,
            micro_batch=micro_batch,
            recompute=recompute,
            step_time=seconds,
            memory=size,
            note="",
        )
    note = (
        "illegal: the batch or the layers do not divide"
        if least is None
        else f"needs at least {show(least, BYTE)} of {show(limit, BYTE)}"
    )
    return Baseline(name=recipe.name, mesh=recipe.mesh, micro_batch=1, recompute="full", step_time=None, memory=least, note=note)


def uniform(entry: Entry) -> Choice:
    """Every class of layers at its fastest strategy that frees gathered parameters (plain FSDP)."""
    counts: dict[int, tuple[tuple[Column, int], ...]] = {}
    for g, columns in entry.columns.items():
        usual = [c for c in columns if g == OUTER or entry.mesh.dp_shard == 1 or c.strategy.zero == 3]
        counts[g] = ((min(usual or columns, key=lambda c: c.step.seconds), entry.classes[g]),)
    seconds = sum(c.step.seconds * n for pairs in counts.values() for c, n in pairs)
    return Choice(counts, seconds, seconds, True)
