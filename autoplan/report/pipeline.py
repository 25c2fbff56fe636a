"""The plan's pipeline as data: what every rank holds and costs, and a film of the step that is short enough to draw.

The film is the timeline of the schedule (`autoplan.schedule.timeline`) with the plan's own stage times. A long step is cut:
once warm a schedule repeats itself every `pp` micro-batches, so a whole number of such turns is left out where every rank is
in the middle of its work (`Fold`), and what comes after it is numbered and timed as if it were there. gpipe is cut twice,
in its forward passes and in its backward passes; under gpipe nothing keeps a fast rank from running ahead, so that behind its
folds only the order is true and no seconds are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from autoplan.errors import UsageError
from autoplan.plan import Pipeline, Plan, StagePrediction
from autoplan.report import words
from autoplan.report.charts import ticks
from autoplan.report.facts import Part, parts
from autoplan.schedule import Task, Timeline, pipeline_seconds, timeline
from autoplan.units import Seconds

TURNS = 3
"""Multiples of `pp` micro-batches that a film shows: one to fill (two if interleaved), one in the middle, one to drain."""

SHORTEST = 8
"""Micro-batches that are always shown, if there are so many."""

MAX_SLOTS = 2400
"""Slots that a picture may have; a longer film shows fewer ranks."""

MAX_RANKS = 16

GAP = 0.06
"""Width of a fold, of the whole picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRow:
    """One pipeline rank; times are of one micro-batch, over all its chunks."""

    rank: int
    layers: str
    number: int
    forward: str
    backward: str
    later: str
    """Of the backward pass, gradients of weights under zero-bubble; "" where there are none apart."""
    idle: str
    memory: str
    free: str
    fullest: bool
    parts: tuple[Part, ...]
    """Its memory by category."""


@dataclass(frozen=True, slots=True)
class Shot:
    """A stretch of one rank's work. `start` and `end` are places in the picture, from 0 to 1."""

    chunk: int
    micro_batch: int
    backward: bool
    start: float
    end: float
    when: tuple[Seconds, Seconds] | None
    """From when to when; None where only the order is known."""
    weights: bool = False
    """Of a backward pass that is split: gradients of weights."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Where micro-batches are left out: its place in the picture."""

    start: float
    end: float
    skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """What every drawn rank does when."""

    ranks: tuple[int, ...]
    """Which ranks are drawn."""
    shots: tuple[tuple[Shot, ...], ...]
    folds: tuple[Fold, ...]
    ticks: tuple[tuple[float, Seconds], ...]
    """(place, seconds) along the picture."""
    seconds: Seconds
    """From the first start to the last end, with what is left out."""
    chunks: int
    split: bool
    """Whether backward passes are drawn in two parts."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """A moment of the short timeline after which so many micro-batches, and so many seconds, are left out."""

    at: Seconds
    seconds: Seconds


def ranks(plan: Plan) -> tuple[RankRow, ...]:
    """Every pipeline rank; empty without a pipeline, or where the plan does not say what its stages cost."""
    if plan.pipeline is None or not _priced(plan):
        return ()
    idle = _idle(plan, plan.pipeline)
    fullest = max(range(plan.mesh.pp), key=lambda s: plan.prediction.stages[s].memory.total)
    return tuple(_rank(plan, s, stage, idle[s] if idle else None, s == fullest) for s, stage in enumerate(plan.prediction.stages))


def _rank(plan: Plan, s: int, stage: StagePrediction, idle: float | None, fullest: bool) -> RankRow:
    memory = stage.memory.total
    left = plan.memory_limit - memory
    held = plan.stages[s :: plan.mesh.pp]
    return RankRow(
        rank=s,
        layers=", ".join(words.fold(names) for names in held),
        number=sum(map(len, held)),
        forward=words.seconds(sum(stage.forward)),
        backward=words.seconds(sum(stage.backward)),
        later=words.seconds(sum(stage.weights)) if stage.weights else "",
        idle="-" if idle is None else words.percent(idle),
        memory=words.size(memory),
        free=words.size(left) if left >= 0 else f"-{words.size(-left)}",
        fullest=fullest,
        parts=parts(stage.memory.items(), words.MEMORY_WORDS, words.size),
    )


def _priced(plan: Plan) -> bool:
    """Whether the prediction has the times of every chunk of every rank: a plan that was edited may not."""
    pipeline, stages = plan.pipeline, plan.prediction.stages
    return (
        pipeline is not None
        and len(stages) == plan.mesh.pp
        and all(len(stage.forward) == len(stage.backward) == pipeline.chunks for stage in stages)
        and all(len(stage.weights) in (0, pipeline.chunks) for stage in stages)
    )


Times = tuple[Seconds, ...]


def virtual(plan: Plan, pipeline: Pipeline) -> tuple[Times, Times, Times]:
    """Seconds (forward, backward, of these for weights) of every virtual stage: `k = chunk pp + rank`."""
    stages, chunks = plan.prediction.stages, range(pipeline.chunks)
    forward, backward = (tuple(getattr(s, way)[c] for c in chunks for s in stages) for way in ("forward", "backward"))
    return forward, backward, tuple(s.weights[c] if s.weights else 0.0 for c in chunks for s in stages)


def _whole(plan: Plan, pipeline: Pipeline) -> Seconds:
    """Seconds of the whole schedule, nothing left out."""
    forward, backward, weights = virtual(plan, pipeline)
    hop = plan.prediction.hop
    return pipeline_seconds(pipeline.schedule, forward, backward, plan.micro_batches, hop, pipeline.chunks, weights)


def _idle(plan: Plan, pipeline: Pipeline) -> list[float]:
    """The share of the schedule in which each rank waits."""
    try:
        whole = _whole(plan, pipeline)
    except UsageError:
        return []
    busy = [plan.micro_batches * (sum(s.forward) + sum(s.backward)) for s in plan.prediction.stages]
    return [max(0.0, 1 - seconds / whole) if whole else 0.0 for seconds in busy]


def stages_line(plan: Plan) -> str:
    """ "pp 4: layers.0-19 | 20-39 | 40-59 | 60-79, 1f1b, 2.2 % bubble"; nothing without a pipeline."""
    if plan.pipeline is None:
        return ""
    said = [words.fold(names) for names in plan.stages]
    if len(said) > 16:
        sizes = sorted({len(names) for names in plan.stages})
        cut = f"{len(said)} stages of {' or '.join(map(str, sizes))} layers"
    else:
        prefix = said[0].rstrip("0123456789-")
        cut = " | ".join([said[0], *(text.removeprefix(prefix) for text in said[1:])])
    step = plan.prediction.step_time
    bubble = plan.prediction.time.bubble / step if step else 0.0
    return f"pp {plan.mesh.pp}: {cut}, {schedule_words(plan.pipeline)}, {words.percent(bubble)} bubble"


def schedule_words(pipeline: Pipeline) -> str:
    """ "1f1b", "interleaved-1f1b with 2 chunks a rank"."""
    return pipeline.schedule + (f" with {pipeline.chunks} chunks a rank" if pipeline.chunks > 1 else "")


def film(plan: Plan) -> Film | None:
    """The step as a picture shows it; None where there is no pipeline, or none that could be drawn."""
    pipeline = plan.pipeline
    if pipeline is None or not _priced(plan):
        return None
    shown = _shown(pipeline, plan.mesh.pp, plan.micro_batches)
    split = pipeline.schedule == "zero-bubble"
    each = (3 if split else 2) * shown * pipeline.chunks
    if each > MAX_SLOTS // 2:
        return None
    forward, backward, weights = virtual(plan, pipeline)
    try:
        short = timeline(pipeline.schedule, forward, backward, shown, plan.prediction.hop, pipeline.chunks, weights)
        whole = _whole(plan, pipeline)
    except UsageError:
        return None
    if not short.seconds:
        return None
    skipped = plan.micro_batches - shown
    apart = pipeline.schedule == "gpipe"
    cuts = _cuts(pipeline, short, shown, skipped, max(forward), whole - short.seconds) if skipped else []
    drawn = _spread(plan.mesh.pp, min(MAX_RANKS, MAX_SLOTS // each))
    width = short.seconds / (1 - GAP * len(cuts))
    return Film(
        ranks=drawn,
        shots=tuple(tuple(_shots(short, s, cuts, skipped, apart, width)) for s in drawn),
        folds=tuple(
            Fold(cut.at / width + GAP * n, cut.at / width + GAP * (n + 1), skipped) for n, cut in enumerate(cuts)
        ),
        ticks=tuple(_ticks(short.seconds, cuts, apart, width)),
        seconds=whole,
        chunks=pipeline.chunks,
        split=split,
    )  # fmt: skip


def _shown(pipeline: Pipeline, pp: int, micro_batches: int) -> int:
    """Micro-batches that are drawn: all, less a multiple of `pp`."""
    turns = TURNS + 1 if pipeline.schedule == "interleaved-1f1b" else 2 if pp > 8 else TURNS
    turns = max(turns, -(-SHORTEST // pp))
    return min(micro_batches, turns * pp + micro_batches % pp)


def _spread(number: int, most: int) -> tuple[int, ...]:
    """At most so many of `range(number)`, the first and the last among them."""
    if number <= most:
        return tuple(range(number))
    return tuple(sorted({round(i * (number - 1) / (most - 1)) for i in range(most)}))


def _cuts(
    pipeline: Pipeline, short: Timeline, shown: int, skipped: int, longest: Seconds, lost: Seconds
) -> list[_Cut]:  # fmt: skip
    """Where the film is cut: when a rank starts the micro-batch in the middle, forward (and, under gpipe, backward)."""
    pp = len(short.stages)
    middle = shown // 2
    if pipeline.schedule == "interleaved-1f1b":  # its ranks take `pp` micro-batches at a time through a chunk
        middle = middle // pp * pp
    first = next(slot.start for slot in short.stages[0] if slot.task == Task(0, middle, False))
    if pipeline.schedule != "gpipe":
        return [_Cut(first, lost)]
    second = next(slot.start for slot in short.stages[-1] if slot.task == Task(0, middle, True))
    ahead = min(lost, skipped * longest)
    return [_Cut(first, ahead), _Cut(second, lost - ahead)]


def _shots(short: Timeline, s: int, cuts: Sequence[_Cut], skipped: int, apart: bool, width: Seconds) -> Iterator[Shot]:
    """One rank's slots; one that runs across a cut is seen on both sides of it."""
    edges = [0.0, *(cut.at for cut in cuts), short.seconds]
    for slot in short.stages[s]:
        for n, (low, high) in enumerate(pairwise(edges)):
            start, end = max(slot.start, low), min(slot.end, high)
            if end - start <= short.seconds * 1e-9:
                continue
            late = n >= (2 if apart and slot.task.backward else 1)
            lost = sum(cut.seconds for cut in cuts[:n])
            yield Shot(
                slot.task.chunk,
                slot.task.micro_batch + (skipped if late else 0),
                slot.task.backward,
                start / width + GAP * n,
                end / width + GAP * n,
                None if apart and n else (slot.start + lost, slot.end + lost),
                slot.task.weights,
            )


def _ticks(seconds: Seconds, cuts: Sequence[_Cut], apart: bool, width: Seconds) -> Iterator[tuple[float, Seconds]]:
    """Round seconds along the picture, those that the folds leave out skipped."""
    edges = [0.0, *(cut.at for cut in cuts), seconds]
    if apart:
        edges = edges[:2]
    step = [*ticks(0.0, seconds, 8), seconds][1] or seconds
    for n, (low, high) in enumerate(pairwise(edges)):
        lost = sum(cut.seconds for cut in cuts[:n])
        first = -(-(low + lost) // step)
        number = int(max(0.0, (high + lost) / step - first)) + 1
        for i in range(min(number, 100)):
            at = (first + i) * step
            if low + lost <= at <= high + lost:
                yield (at - lost) / width + GAP * n, at
