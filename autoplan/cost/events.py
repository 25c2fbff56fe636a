"""The step as events on the streams of every device: what PyTorch queues where, and what waits for what.

Of each pipeline rank one device is simulated: its data-parallel, context- and tensor-parallel neighbours do the same. It has the
streams of FSDP2 (`cost.streams`): `compute`, with the collectives of tp on it, which nothing hides; `gather`, the all_gathers of
parameters; `reduce`, the reduce_scatters of gradients; `all_reduce`, of gradient shards over dp_replicate. Two more carry what
passes to the next stage and back to the one before. Everything is queued as if the CPU were always ahead of the device:

    forward    The gather of the first unit waits for all that has been computed, as FSDP's root does; the k-th for the one
               before it and until unit k - 2 begins, whose buffer it takes. A unit's computation waits for its gather.
    copies     A unit's pass begins with the copying of what was gathered for it, if anything was, and ends with that of gradients
               into what is reduced.
    backward   A unit's recomputation and backward pass wait for its gather; when they begin, that of the layer before it is
               queued: one ahead. When they end its gradients are reduced, and computation goes on when the reduction before
               that one has ended, which had the same buffer.
    ZeRO       Under 3 parameters are freed after every pass, under 2 after the backward pass, under 1 after the last backward
               pass of the step, in which alone gradients are reduced then. Freed ones are gathered when they are needed.
    outside    What stands outside the layers of a stage is a unit of its own. It is gathered when the stage begins a pass, and
               its gradients are reduced when the backward pass has ended.
    split      Under zero-bubble the gradients of weights are a pass of their own; a layer's reduction follows its.
    ends       Without a pipeline each backward pass ends when its reductions have ended, with one the last alone. all_reduces
               are of the last micro-batch. Then the optimizer runs.
    stages     A rank's passes are in the order of `schedule.order`. A message takes `hop` seconds after those before it in its
               direction; it neither slows anything down nor keeps its sender from computing.

So the first gather of a step is hidden by nothing, the next ones by what runs then, and what `cost.step` adds up layer by layer
(a layer beside its own gather and reduction) is here beside its neighbours'. A step is never shorter than the work of any
stream; without communication of dp it is `schedule.timeline`'s (a message not longer than a pass).

Many micro-batches repeat themselves (`seconds`). Without a pipeline all but the first and the last take equally long. With one,
as many are run as `WORKS` allows, and continued with the slope that is there, or that of the slowest rank alone if it is more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from autoplan.cost.streams import ALL_REDUCE, COMPUTE, GATHER, REDUCE, Device, Message, Work
from autoplan.errors import UsageError
from autoplan.plan import UnitPrediction
from autoplan.schedule import ScheduleKind, Task, order
from autoplan.strategy import Zero
from autoplan.units import Seconds

STREAMS = ("compute", "gather", "reduce", "all_reduce", "send", "send back")
"""Of a device, as `Event.stream` names them."""

WORKS = 40_000
"""What is queued in at most so many pieces is run as it is: a fraction of a second."""

WARM = 4
"""Multiples of the number of stages that are run in any case, before a pipeline is taken to repeat itself."""


@dataclass(frozen=True, slots=True)
class Event:
    """What a stream of a rank does from when to when."""

    stream: str
    rank: int
    name: str
    start: Seconds
    end: Seconds
    micro_batch: int = -1
    """-1: of the whole step."""


class Piece(NamedTuple):
    """A layer of a virtual stage, or a part of what stands outside the layers."""

    name: str
    outside: bool
    zero: Zero
    unit: UnitPrediction


@dataclass(frozen=True)
class Step:
    """What is simulated: every virtual stage's pieces in the order of the forward pass."""

    stages: tuple[tuple[Piece, ...], ...]
    micro_batches: int
    schedule: ScheduleKind = "1f1b"
    chunks: int = 1
    hop: Seconds = 0.0
    overlap: float = 0.0

    @property
    def ranks(self) -> int:
        return len(self.stages) // self.chunks


def seconds(step: Step) -> Seconds:
    """How long the step takes. Raises `UsageError` where the schedule is not defined."""

    def run(micro_batches: int) -> Seconds:
        return _Run(replace(step, micro_batches=micro_batches), parts=False).seconds

    m, pp, piped = step.micro_batches, step.ranks, len(step.stages) > 1
    period = 2 * pp if piped else 1
    each = 5 * sum(map(len, step.stages)) + 4 * len(step.stages)
    most = max(WARM * pp, WORKS // each) if piped else 3  # the first, the last, and one between them
    if m <= most:
        return run(m)
    warm = most - (most - m) % period
    late = run(warm)
    pace = (late - run(warm - period)) / period
    if piped:
        alone = [_alone(step, rank, 2 * pp) - _alone(step, rank, pp) for rank in range(pp)]
        pace = max(pace, max(alone) / pp)  # until ranks that differ a little have found their pace, they wait less
    return late + (m - warm) * pace


def _alone(step: Step, rank: int, micro_batches: int) -> Seconds:
    """How long a rank takes for which everything has arrived."""
    device = Device(step.overlap, lambda message, now: None)
    _Rank(replace(step, micro_batches=micro_batches), rank, False, device)
    device.run({work.waits: 0.0 for work in device.queues[COMPUTE] if work.waits is not None})
    return device.now


def events(step: Step) -> tuple[Event, ...]:
    """Everything that happens, a layer's pass in its parts; of all micro-batches. Raises `UsageError` as `seconds`."""
    return _Run(step, parts=True).events()


def count(step: Step) -> int:
    """At most so many events there are."""
    units = [piece.unit for stage in step.stages for piece in stage]
    passes = sum(len([took for _, took in unit.seconds() if took]) + (unit.gather > 0) for unit in units)
    return step.micro_batches * (passes + 2 * (len(step.stages) - 1) * (step.hop > 0))


class _Run:
    """All ranks, until everything has ended; `parts`: a layer's computation and tp collectives are told apart."""

    def __init__(self, step: Step, parts: bool) -> None:
        self.step = step
        self._arrivals: dict[Message, Seconds] = {}
        self._sent: list[Event] = []
        self._free: dict[tuple[int, bool], Seconds] = {}
        self._ranks = [_Rank(step, rank, parts, Device(step.overlap, partial(self._send, rank))) for rank in range(step.ranks)]
        self._run()

    def _run(self) -> None:
        devices = [rank.device for rank in self._ranks]
        while not all(device.ended for device in devices):
            happened = [device.run(self._arrivals) for device in devices]
            if not any(happened):
                raise UsageError(f"the order of {self.step.schedule} waits for itself with {len(devices)} stages.")

    def _send(self, rank: int, message: Message, now: Seconds) -> None:
        """A message leaves; one after another in each direction."""
        way = rank, message.backward
        start = max(now, self._free.get(way, 0.0))
        self._free[way] = self._arrivals[message] = end = start + (self.step.hop if self.step.ranks > 1 else 0.0)
        if end > start:
            what = "gradient" if message.backward else "activation"
            self._sent.append(Event(STREAMS[4 + message.backward], rank, what, start, end, message.micro_batch))

    @property
    def seconds(self) -> Seconds:
        return max(rank.device.now for rank in self._ranks)

    def events(self) -> tuple[Event, ...]:
        found = [
            Event(STREAMS[stream], number, work.name, work.start, work.end, work.micro_batch)
            for number, rank in enumerate(self._ranks)
            for stream, queue in enumerate(rank.device.queues)
            for work in queue
            if work.seconds > 0 and work.start is not None and work.end is not None
        ]
        return tuple(sorted((*found, *self._sent), key=lambda e: (e.rank, STREAMS.index(e.stream), e.start)))


class _Arrived(NamedTuple):
    """What a pass has of parameters that were not there: what it waits for, and seconds of putting them in place."""

    works: tuple[Work, ...] = ()
    unpack: Seconds = 0.0


class _Rank:
    """Queues the whole step of one pipeline rank on its device."""

    def __init__(self, step: Step, rank: int, parts: bool, device: Device) -> None:
        self.step, self.parts, self.device = step, parts, device
        self._last, self._split = len(step.stages) - 1, step.schedule == "zero-bubble"
        self._gathered: set[tuple[int, int]] = set()
        """(virtual stage, place in it) of the layers whose parameters are there; place -1: of what stands outside them."""
        self._taken: list[Work] = []
        """What was the first to use each gather: then the buffer of the one before it is free."""
        self._due: tuple[Work, ...] = ()
        """What computation waits for before it goes on."""
        tasks = order(step.schedule, rank, step.ranks, step.micro_batches, step.chunks)
        for number, task in enumerate(tasks):
            stage = task.chunk * step.ranks + rank
            ends = step.ranks == 1 or number == len(tasks) - 1
            if task.weights:
                self._weights(stage, task, ends)
            elif task.backward:
                self._backward(stage, task, ends)
            else:
                self._forward(stage, task)
        optimizer = sum(piece.unit.optimizer for stage in step.stages[rank :: step.ranks] for piece in stage)
        self._compute("optimizer", optimizer, -1)

    def _forward(self, stage: int, task: Task) -> None:
        i = task.micro_batch
        begin = self._begin(stage, task)
        first = len(self._taken)

        def gather(piece: Piece, place: int) -> _Arrived:
            behind = self._taken[-2] if len(self._taken) - first >= 2 else None
            return self._gather(piece, (stage, place), i, after=(begin,), behind=behind)

        outer = _outer(self.step.stages[stage])
        self._take(gather(outer, -1), outer.name, i)
        for place, piece in enumerate(self.step.stages[stage]):
            waits, unpack = _Arrived() if piece.outside else gather(piece, place)
            parts = (("unpack", unpack), ("forward", piece.unit.forward), ("forward tp", piece.unit.tp_forward))
            works = self._pass(piece, i, parts, waits)
            if waits:
                self._taken.append(works[0])
            if piece.zero == 3 and not piece.outside:
                self._gathered.discard((stage, place))
        if outer.zero == 3:
            self._gathered.discard((stage, -1))
        self._finish(Message(stage + 1, i, False) if stage < self._last else None)

    def _backward(self, stage: int, task: Task, ends: bool) -> None:
        i, pieces = task.micro_batch, self.step.stages[stage]
        self._begin(stage, task)
        last = i == self.step.micro_batches - 1
        outer = _outer(pieces)

        def gather(piece: Piece, place: int) -> _Arrived:
            return self._gather(piece, (stage, place), i, after=(), behind=self._taken[-1] if self._taken else None)

        self._take(gather(outer, -1), outer.name, i)
        layers = [place for place, piece in enumerate(pieces) if not piece.outside]
        ahead = dict(zip(layers[1:], layers, strict=False))
        arrived = dict.fromkeys(layers, _Arrived())
        if layers:
            arrived[layers[-1]] = gather(pieces[layers[-1]], layers[-1])
        for place in reversed(range(len(pieces))):
            piece, unit = pieces[place], pieces[place].unit
            inputs = ("backward inputs", unit.backward - unit.weights) if self._split else ("backward", unit.backward)
            waits, unpack = arrived.get(place, _Arrived())
            pack = 0.0 if piece.outside or self._split else _pack(piece, last)
            parts = (("recompute", unit.recompute), inputs, ("backward tp", unit.tp_backward))
            works = self._pass(piece, i, (("unpack", unpack), *parts, ("pack", pack)), waits)
            if piece.outside:
                continue
            if waits:
                self._taken.append(works[0])
            if place in ahead:
                arrived[ahead[place]] = gather(pieces[ahead[place]], ahead[place])
            if not self._split:
                self._reduce(piece, i, last, works[-1])
            if piece.zero != 1 or last:
                self._gathered.discard((stage, place))
        if outer.zero != 1 or last:
            self._gathered.discard((stage, -1))
        if not self._split:
            self._end(outer, i, last, ends)
        self._finish(Message(stage - 1, i, True) if stage > 0 else None)

    def _weights(self, stage: int, task: Task, ends: bool) -> None:
        """The part of a backward pass that comes later; gradients are reduced when theirs are there."""
        i, pieces = task.micro_batch, self.step.stages[stage]
        last = i == self.step.micro_batches - 1
        for piece in reversed(pieces):
            pack = 0.0 if piece.outside else _pack(piece, last)
            works = self._pass(piece, i, (("backward weights", piece.unit.weights), ("pack", pack)), ())
            if not piece.outside:
                self._reduce(piece, i, last, works[-1])
        self._end(_outer(pieces), i, last, ends)
        self._finish(None)

    def _end(self, outer: Piece, i: int, last: bool, ends: bool) -> None:
        """What stands outside is reduced last; `ends`: nothing goes on before all reductions have ended."""
        self._compute(f"{outer.name} pack", _pack(outer, last), i)
        self._reduce(outer, i, last, self.device.queues[COMPUTE][-1])
        if ends:
            self._due = tuple(queue[-1] for queue in self.device.queues[REDUCE:] if queue)

    def _begin(self, stage: int, task: Task) -> Work:
        """What the pass has to wait for: of the stage before it, or behind it."""
        begin = self._compute("", 0.0, task.micro_batch)
        if stage < self._last if task.backward else stage > 0:
            begin.waits = Message(stage, task.micro_batch, task.backward)
        return begin

    def _finish(self, sends: Message | None) -> None:
        self._compute("", 0.0, -1).sends = sends

    def _compute(self, name: str, seconds: Seconds, micro_batch: int, after: tuple[Work, ...] = ()) -> Work:
        work = Work(name, seconds, micro_batch, after=(*self._due, *after))
        self._due = ()
        self.device.queues[COMPUTE].append(work)
        return work

    def _pass(self, piece: Piece, i: int, parts: tuple[tuple[str, Seconds], ...], waits: tuple[Work, ...]) -> list[Work]:
        """A piece's computation, in parts or in one; the first work waits."""
        if not self.parts:
            return [self._compute("", sum(took for _, took in parts), i, waits)]
        first, *others = [part for part in parts if part[1]] or parts[:1]
        works = [self._compute(f"{piece.name} {first[0]}", first[1], i, waits)]
        return works + [self._compute(f"{piece.name} {what}", took, i) for what, took in others]

    def _take(self, arrived: _Arrived, name: str, i: int) -> None:
        """What stands outside the layers is there before anything of the stage begins."""
        work = self._compute(f"{name} unpack", arrived.unpack, i, arrived.works)
        if arrived.works:
            self._taken.append(work)

    def _gather(self, piece: Piece, key: tuple[int, int], i: int, after: tuple[Work, ...], behind: Work | None) -> _Arrived:
        """What waits for parameters waits for this; nothing if they are there."""
        if key in self._gathered:
            return _Arrived()
        self._gathered.add(key)
        if piece.unit.gather <= 0:  # whole on every device
            return _Arrived((), piece.unit.unpack)
        work = Work(f"{piece.name} gather", piece.unit.gather, i, after, behind)
        self.device.queues[GATHER].append(work)
        return _Arrived((work,), piece.unit.unpack)

    def _reduce(self, piece: Piece, i: int, last: bool, made: Work) -> None:
        """Gradients that `made` has made; computation then waits for the reduction before this one."""
        if piece.zero == 1 and not last:
            return
        name, unit = piece.name, piece.unit
        reduce, everywhere = self.device.queues[REDUCE], self.device.queues[ALL_REDUCE]
        if unit.reduce > 0:
            self._due = tuple(reduce[-1:])
            reduce.append(Work(f"{name} reduce", unit.reduce, i, after=(made,)))
            made = reduce[-1]
        if last and unit.all_reduce > 0:
            everywhere.append(Work(f"{name} all_reduce", unit.all_reduce, i, after=(made,)))


def _pack(piece: Piece, last: bool) -> Seconds:
    """What is copied for its reduction, if this micro-batch has one."""
    return 0.0 if piece.zero == 1 and not last else piece.unit.pack


def _outer(pieces: tuple[Piece, ...]) -> Piece:
    """What stands outside the layers of a stage, with what is sent of all of it."""
    parts = [piece for piece in pieces if piece.outside] or [Piece("", True, 3, UnitPrediction(layers=()))]
    whole = ("gather", "unpack", "pack", "reduce", "all_reduce")
    sums = {name: sum(getattr(piece.unit, name) for piece in parts) for name in whole}
    return parts[0]._replace(unit=UnitPrediction(layers=(), **sums))
