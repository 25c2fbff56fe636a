"""Why nothing fits, what came nearest, and what would help."""

from __future__ import annotations

from collections.abc import Sequence

from autoplan.errors import NothingFits
from autoplan.plan import Candidate
from autoplan.search.columns import Entry, Tables
from autoplan.search.ilp import Column
from autoplan.strategy import Mesh
from autoplan.units import BYTE, Bytes, show

_MOST_GPUS = 65536


def nothing_fits(tables: Tables, entries: Sequence[Entry], refused: Sequence[Candidate], limit: Bytes, gpus: int) -> NothingFits:
    """The error to raise: the nearest miss with its bytes by category, and hints."""
    device = tables.costs.hardware.device
    where = f"{gpus} x {device.name} ({show(limit, BYTE)} usable each)"
    if not entries:
        reason = refused[0].reason if refused else "there is no mesh"
        return NothingFits(
            f"No plan is legal on {where}: {reason}.", "Change --global-batch so that it divides by the number of GPUs."
        )
    nearest = min(entries, key=lambda e: e.least_memory)
    message = (
        f"No plan fits {where}: the nearest miss ({nearest.mesh}, micro-batch {nearest.micro_batch}) needs at least "
        f"{show(nearest.least_memory, BYTE)} ({_categories(nearest)})."
    )
    return NothingFits(message, " ".join(_hints(tables, limit, gpus, nearest)))


def _leanest(columns: Sequence[Column]) -> Column:
    return min(columns, key=lambda c: (c.step.bytes + c.step.peak, c.step.seconds))


def _categories(entry: Entry) -> str:
    leanest = [(_leanest(entry.columns[g]).step, number) for g, number in entry.classes.items()]
    fullest = max((step for step, _ in leanest), key=lambda step: step.peak)
    totals = dict(fullest.moment.items())
    for step, number in leanest:
        for name, size in step.memory.items():
            totals[name] += size * number
    shown = sorted((size, name) for name, size in totals.items() if size > 0.005 * entry.least_memory)
    return ", ".join(f"{name} {show(size, BYTE)}" for size, name in reversed(shown))


def _hints(tables: Tables, limit: Bytes, gpus: int, nearest: Entry) -> list[str]:
    hints = []
    enough = _enough_gpus(tables, limit, gpus)
    if enough is not None:
        hints.append(f"It fits from {enough} GPUs on (--gpus {enough}).")
    states = sum(
        number * (step.memory.parameters + step.memory.gradients + step.memory.optimizer)
        for g, number in nearest.classes.items()
        for step in [_leanest(nearest.columns[g]).step]
    )
    if states > limit:
        hints.append(f"Parameters, gradients and optimizer states alone take {show(states, BYTE)} a GPU.")
    else:
        hints.append("A shorter sequence, a smaller micro-batch or a GPU with more memory would help.")
    return hints


def _enough_gpus(tables: Tables, limit: Bytes, gpus: int) -> int | None:
    """The smallest power-of-two multiple of `gpus` on which the leanest strategies fit, at one sample a group."""
    number = gpus * 2
    while number <= _MOST_GPUS:
        for tp in (1, 2, 4, 8):
            if number % tp:
                continue
            mesh = Mesh(dp_shard=number // tp, tp=tp)
            if any(entry.least_memory <= limit for entry in tables.with_batch(mesh.dp).entries(mesh, 1, ("full",))):
                return number
        number *= 2
    return None
