"""Why nothing fits, what came nearest, and what would help."""

from __future__ import annotations

from collections.abc import Sequence

from autoplan.cost.model import OUTER
from autoplan.cost.rank import Held, memory
from autoplan.errors import NothingFits
from autoplan.plan import Candidate
from autoplan.search.columns import Tables
from autoplan.search.options import Group, Option
from autoplan.search.space import of_each_kind
from autoplan.search.stages import Staging
from autoplan.strategy import Mesh
from autoplan.units import BYTE, Bytes, show

_MOST_GPUS = 65536


def nothing_fits(
    tables: Tables,
    stagings: Sequence[Staging],
    refused: Sequence[Candidate],
    limit: Bytes,
    gpus: int,
    *,
    constrained: bool = False,
) -> NothingFits:
    """The error to raise: the nearest miss with its bytes by category, and hints."""
    device = tables.costs.hardware.device
    where = f"{gpus} x {device.name} ({show(limit, BYTE)} usable each)"
    if not stagings:
        reason = refused[0].reason if refused else "what is asked for leaves no mesh"
        hint = "Ask for less in --constraints." if constrained else _other_batch_or_axes(reason)
        return NothingFits(f"No plan is legal on {where}: {reason}.", hint)
    nearest = min(stagings, key=lambda staging: staging.least_memory)
    over = nearest.least_memory - limit
    missing = f", {show(over, BYTE)} too much" if over > 0 else ""
    message = (
        f"No plan fits {where}: the nearest miss ({nearest.priced.mesh}, micro-batch {nearest.priced.micro_batch}) needs at "
        f"least {show(nearest.least_memory, BYTE)}{missing} ({_categories(nearest)})."
    )
    return NothingFits(message, " ".join(_hints(tables, limit, gpus, nearest)))


def _other_batch_or_axes(reason: str) -> str:
    if "global batch" in reason:
        return "Change --global-batch so that it divides by the number of GPUs."
    return "Leave the size of that axis to the planner, or ask for another one."


def _leanest(groups: Sequence[Group]) -> list[tuple[Group, Option]]:
    return [(group, min(group.options, key=lambda o: (group.number * o.bytes + o.peak, o.seconds))) for group in groups]


def _categories(staging: Staging) -> str:
    s, groups = staging.fullest
    rank = [
        Held(option.column.step, group.number, group.chunk, body=None if group.body == OUTER else group.body)
        for group, option in _leanest(groups)
    ]
    parts = memory(rank, staging.flight(s), staging.passing[s])
    shown = sorted((size, name) for name, size in parts.items() if size > 0.005 * staging.least_memory)
    return ", ".join(f"{name} {show(size, BYTE)}" for size, name in reversed(shown))


def _hints(tables: Tables, limit: Bytes, gpus: int, nearest: Staging) -> list[str]:
    hints = []
    enough = _enough_gpus(tables, limit, gpus)
    if enough is not None:
        hints.append(f"It fits from {enough} GPUs on (--gpus {enough}).")
    states = sum(
        group.number * (step.parameters + step.gradients + step.optimizer)
        for group, option in _leanest(nearest.fullest[1])
        for step in [option.column.step]
    )
    if states > limit:
        hints.append(f"Parameters, gradients and optimizer states alone take {show(states, BYTE)} a GPU.")
    elif (gathered := _gathered(nearest)) > limit / 2:
        hints.append(
            f"One layer's own parameters, gathered, and their gradients take {show(gathered, BYTE)}: only smaller layers or a "
            "GPU with more memory help."
        )
    else:
        hints.append("A shorter sequence, a smaller micro-batch or a GPU with more memory would help.")
    return hints


def _gathered(staging: Staging) -> Bytes:
    steps = [option.column.step for _, option in _leanest(staging.fullest[1])]
    return max(step.whole + step.window + step.reducing for step in steps)


def _enough_gpus(tables: Tables, limit: Bytes, gpus: int) -> int | None:
    """The smallest power-of-two multiple of `gpus` on which the leanest strategies fit, at one sample a group."""
    context = tables.costs.context
    shared = [(1, tp) for tp in (1, 2, 4, 8)] + [(cp, 1) for cp in (2, 4, 8, 16, 32) if context.kinds(cp, 1)]
    number = gpus * 2
    while number <= _MOST_GPUS:
        for cp, tp in shared:
            if number % (cp * tp) == 0:
                mesh = Mesh(dp_shard=number // (cp * tp), cp=cp, tp=tp)
                if any(_fits(tables, each, limit) for each in of_each_kind(mesh, context)):
                    return number
        number *= 2
    return None


def _fits(tables: Tables, mesh: Mesh, limit: Bytes) -> bool:
    scaled = tables.with_batch(mesh.dp)
    for stream in scaled.streams(mesh.tp):
        priced = scaled.priced(mesh, 1, stream)
        if priced is not None and Staging(scaled, priced, None, "1f1b", 1, limit).fits:
            return True
    return False
