"""What one pipeline rank costs: the sums over the layers that it holds.

A rank is a sequence of `Held`: so many equal layers, or a part of the outer body, in one of its chunks. See cost.model for the
formulas: `seconds` is u_s, `memory` is bytes_s, `breakdown` tells where the slowest rank's seconds go.

The backward pass runs from the last layer to the first, and what a layer has kept of the micro-batch is freed when it has run:
beside a layer's own moment there is no more of what later ones kept, or had gathered for both passes. Of these only layers of
the same body are counted, in the same chunk, and where there are several chunks none:

    bytes_s = sum of what stays + max(alone, max_l (inside_l + beside_l - sum of what goes of layers after l) + max window)

`beside_l` is the buffer in which the gradients of the layer after l are reduced: `reducing` of one like l, but at least the whole
`buffer` of any later layer that differs, since what that kept is counted as freed. Where a rank has layers of several bodies, or
in several chunks, the largest `reducing` of any may be beside any.

Gradients that come late count in this sum all the same. Those that have not come at the fullest moment of tensors are `awaited`
(`_early`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from autoplan.cost.step import LayerStep
from autoplan.plan import MemoryBreakdown, StagePrediction, TimeBreakdown
from autoplan.schedule import ScheduleKind, pipeline_seconds
from autoplan.units import Bytes, Seconds


class Held(NamedTuple):
    """`number` equal layers in a chunk of a rank; the outer body's part counts once."""

    step: LayerStep
    number: int
    chunk: int = 0
    freed: Bytes = 0.0
    """What layers after the last of these no longer keep when it runs; `resharded`: of parameters they had gathered."""
    resharded: Bytes = 0.0
    risen: Bytes = 0.0
    """The most that gradients of later layers, those that have come and those that are reduced, are more than what these kept
    when any of these runs; may be negative."""
    after: Bytes = 0.0
    """The largest `buffer` of a layer after these that is of the same body, and differs."""
    body: int | None = None
    """None of the outer body."""

    def inside(self, anywhere: Bytes | None) -> Bytes:
        """The most beside what all layers keep, with what is reduced then; `anywhere`: what may be, beside any layer."""
        return self.step.inside - self.freed - self.resharded + self.beside(anywhere)

    def beside(self, anywhere: Bytes | None) -> Bytes:
        """What is reduced beside it at most."""
        return max(self.step.reducing if anywhere is None else anywhere, self.after)


Rank = Sequence[Held]


class _Passed(NamedTuple):
    """Of layers of one body whose backward pass has run: what they kept, the parameters that they had gathered, their gradients
    that have come, and the buffer in which those of the last are reduced."""

    kept: Bytes = 0.0
    gathered: Bytes = 0.0
    come: Bytes = 0.0
    buffer: Bytes = 0.0

    def followed(self, step: LayerStep, number: int) -> _Passed:
        """When so many more have run."""
        kept, gathered = self.kept + number * step.kept, self.gathered + number * step.resharded
        return _Passed(kept, gathered, self.come + number * step.come, step.buffer)

    @property
    def risen(self) -> Bytes:
        return self.come + self.buffer - self.kept - self.gathered


def held_layers(runs: Sequence[tuple[int, LayerStep, int]], chunk: int, chunks: int) -> list[Held]:
    """The layers of one of a rank's `chunks`, from runs (body, step, number) in the order in which they run forward."""
    found: dict[tuple[int, LayerStep], Held] = {}
    passed: dict[int, _Passed] = {}
    for body, step, number in reversed(runs):
        before = passed.get(body, _Passed()) if chunks == 1 else _Passed()
        passed[body] = before.followed(step, number)
        # between the second that runs and the last it rises or falls evenly
        places = [before, *(before.followed(step, n) for n in (1, number - 1) if n < number)]
        risen = max(place.risen for place in places)
        later = [held.step.buffer for (of, other), held in found.items() if of == body and other != step and chunks == 1]
        last = found.setdefault((body, step), Held(step, 0, chunk, before.kept, before.gathered, risen, body=body))
        found[body, step] = last._replace(
            number=last.number + number, risen=max(last.risen, risen), after=max([last.after, *later])
        )
    return list(reversed(found.values()))


def seconds(rank: Rank, slots: float) -> Seconds:
    """Seconds of one of the step's `slots`, all chunks, both passes."""
    return sum(held.step.seconds(slots) * held.number for held in rank)


def memory(rank: Rank, in_flight: Sequence[int], passing: Bytes) -> MemoryBreakdown:
    """Peak bytes; `in_flight`: micro-batches whose activations each chunk holds at once. The peak is in the backward pass of the
    last of them, or after it, when one fewer is kept and the outer layer's gradients are reduced."""
    steps = [held.step for held in rank]
    alone, last = max(steps, key=lambda s: s.alone), max(steps, key=lambda s: s.ending)
    anywhere = None if _paired(rank) else max(step.reducing for step in steps)
    held, window = max(rank, key=lambda held: held.inside(anywhere)), max(step.window for step in steps)
    inside, ending = held.inside(anywhere) + window, last.ending - sum(each.number * each.step.goes for each in rank)
    early = _early(rank, max(alone.alone, inside, ending), alone.alone, window, ending)
    if ending > max(alone.alone, inside):
        resharded = sum(each.number * each.step.resharded for each in rank)
        moment = replace(last.end, unsharded=last.end.unsharded - resharded)
        return _together(rank, [number - 1 for number in in_flight], passing, moment, early)
    if alone.alone > inside:
        return _together(rank, in_flight, passing, alone.moment, early)
    own = held.step.moment
    unsharded = own.unsharded + window + held.beside(anywhere) - held.resharded
    moment = replace(own, activations=own.activations - held.freed, unsharded=unsharded)
    return _together(rank, in_flight, passing, moment, early)


def _paired(rank: Rank) -> bool:
    """Are its layers all of one body and in one chunk, so that it is known which runs after which?"""
    return len({(held.body, held.chunk) for held in rank if held.body is not None}) == 1


def _early(rank: Rank, peak: Bytes, alone: Bytes, window: Bytes, ending: Bytes) -> Bytes:
    """Of the gradients that count at the `peak`, those that no tensor holds: all that come late, but for what the fullest moment
    rises to where those that have come by then count. They come in steps of one micro-batch, in which there is one chunk. In a
    pipeline the last buffer of other micro-batches' passes may be beside layers of another level."""
    late = sum(held.number * held.step.early for held in rank)
    if not any(held.step.come for held in rank):
        stays = max((held.step.reducing for held in rank if held.step.reducing == held.step.buffer), default=0.0)
        return max(0.0, late - max(0.0, max(alone + stays, *(held.inside(stays) + window for held in rank)) - peak))
    layers = [held for held in rank if held.body is not None]

    def at(held: Held) -> Bytes:
        others = [other for other in layers if other.body != held.body]  # they may run after it, or before
        more = sum(other.number * max(0.0, other.step.come - other.step.goes) for other in others)
        return held.step.inside + held.risen + window + more + max((other.step.buffer for other in others), default=0.0)

    through = sum(held.number * (held.step.come - held.step.goes) for held in layers)
    through += max((held.step.buffer for held in layers), default=0.0)
    end = ending + sum(held.number * held.step.come for held in rank)
    return max(0.0, late - (max(alone, end, through, *map(at, layers)) - peak))


def _together(rank: Rank, in_flight: Sequence[int], passing: Bytes, moment: MemoryBreakdown, early: Bytes) -> MemoryBreakdown:
    parts = _weighted((held.step.memory(in_flight[held.chunk]).items(), held.number) for held in rank)
    parts["pipeline"] += passing
    parts["gradients"] -= early
    parts["awaited"] += early
    return MemoryBreakdown(**_weighted([(parts.items(), 1), (moment.items(), 1)]))


def breakdown(rank: Rank, micro_batches: int, slots: float, step: Seconds, passing: Seconds) -> TimeBreakdown:
    """Where the `step` seconds of the slowest rank go: its own work, `passing` activations on, and the bubble."""
    spread = micro_batches / slots  # the rest of what happens once falls into the bubble's slots
    parts = _weighted((held.step.time(micro_batches, spread).items(), held.number) for held in rank)
    parts["pp_communication"] = passing
    parts["bubble"] = max(0.0, step - sum(parts.values())) if slots > micro_batches else 0.0
    return TimeBreakdown(**parts)


def chunk_seconds(rank: Rank, chunks: int) -> tuple[tuple[Seconds, ...], tuple[Seconds, ...]]:
    """Seconds of (the forward, the backward pass) of one micro-batch in every chunk."""
    forward, both = [0.0] * chunks, [0.0] * chunks
    for held in rank:
        forward[held.chunk] += held.step.forward_slot * held.number
        both[held.chunk] += held.step.slot_seconds * held.number
    return tuple(forward), tuple(b - f for b, f in zip(both, forward, strict=True))


def late_seconds(rank: Rank, chunks: int) -> tuple[Seconds, ...]:
    """What of a backward pass comes later, in every chunk; empty where nothing does."""
    late = [sum(held.step.late_seconds * held.number for held in rank if held.chunk == chunk) for chunk in range(chunks)]
    return tuple(late) if any(late) else ()


def stage_predictions(ranks: Sequence[Rank], memories: Sequence[MemoryBreakdown], chunks: int) -> tuple[StagePrediction, ...]:
    """What the plan's file and the report say of every rank."""
    times = [(*chunk_seconds(rank, chunks), late_seconds(rank, chunks)) for rank in ranks]
    return tuple(
        StagePrediction(forward=f, backward=b, weights=w, memory=m) for (f, b, w), m in zip(times, memories, strict=True)
    )


def scheduled(
    schedule: ScheduleKind, ranks: Sequence[Rank], micro_batches: int, hop: Seconds, chunks: int, sharing: float = 1.0
) -> Seconds:
    """The step on the schedule's exact timeline; what happens once a step comes after it, on the rank where it takes longest.
    Ranks that share a device leave it to others while they wait: it takes as long as the work of the busiest one, or as the whole
    timeline at the speed that one rank has alone."""
    times = [chunk_seconds(rank, chunks) for rank in ranks]
    forward, backward = (tuple(t[way][c] for c in range(chunks) for t in times) for way in (0, 1))
    late = [late_seconds(rank, chunks) or (0.0,) * chunks for rank in ranks]
    weights = tuple(each[c] for c in range(chunks) for each in late)
    once = max(sum(held.step.once_seconds * held.number for held in rank) for rank in ranks)
    whole = pipeline_seconds(schedule, forward, backward, micro_batches, hop, chunks, weights)
    busy = micro_batches * max(sum(f) + sum(b) for f, b in times)
    return max(busy, whole / sharing) + once if sharing > 1 else whole + once


def _weighted(parts: Iterable[tuple[Iterable[tuple[str, float]], float]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for items, count in parts:
        for name, amount in items:
            totals[name] = totals.get(name, 0.0) + amount * count
    return totals
