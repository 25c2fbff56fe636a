"""One device as its streams: a small discrete-event loop in which what runs at the same time slows each other down.

A stream runs what was queued on it, one after another. A piece of work begins when its stream has come to it, everything that
it comes `after` has ended and what it comes `behind` has begun. At any moment `n` streams communicate, and the
compute stream works or does not. With the profile's `overlap` o, in a second

    computation gets done    1 / (1 + o)  beside communication    1  alone
    a communication gets     1 / (1 + o) / n    beside computation    1 / n  alone

(`Device._rates`): streams that communicate share the network. So `c` seconds of computation and `q` of communication that
begin together take max(c, q) + o min(c, q), which is what `cost.step` says, and several communications as long as their sum.
Rates change when anything begins or ends; in between the loop leaps.

Devices know of each other only through messages: a piece of work may wait for one, and one leaves when a piece of work ends.
`Device.run` goes as far as it can, so that several devices are run by turns until all have ended (`cost.events`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from autoplan.units import Seconds

COMPUTE, GATHER, REDUCE, ALL_REDUCE = range(4)
"""The streams of a device that interfere with each other; messages between stages have streams of their own."""

EVEN = 1e-12
"""What is left of a piece of work, of its own length, and counts as nothing: rounding."""


class Message(NamedTuple):
    """What passes between virtual stages: to which, of which micro-batch, an activation or its gradient."""

    stage: int
    micro_batch: int
    backward: bool


class Work:
    """So many seconds on a stream, when nothing disturbs it."""

    __slots__ = ("after", "behind", "end", "left", "micro_batch", "name", "seconds", "sends", "start", "waits")

    def __init__(
        self, name: str, seconds: Seconds, micro_batch: int = -1, after: tuple[Work, ...] = (), behind: Work | None = None
    ) -> None:
        self.name, self.seconds, self.micro_batch = name, seconds, micro_batch
        self.after, self.behind = after, behind
        self.waits: Message | None = None
        self.sends: Message | None = None
        self.left = seconds
        self.start: Seconds | None = None
        self.end: Seconds | None = None

    def released(self) -> bool:
        """Whether all that it waits for on its own device has happened."""
        if self.behind is not None and self.behind.start is None:
            return False
        return None not in [work.end for work in self.after]


class Device:
    """The streams of one device. Work is queued in an order in which it may run; `send` is told what leaves, and when."""

    def __init__(self, overlap: float, send: Callable[[Message, Seconds], None]) -> None:
        self.now: Seconds = 0.0
        self.queues: list[list[Work]] = [[], [], [], []]
        self._places = [0, 0, 0, 0]
        self._running: list[Work | None] = [None, None, None, None]
        self._slow, self._send = 1.0 / (1.0 + overlap), send

    @property
    def ended(self) -> bool:
        return all(place == len(queue) for place, queue in zip(self._places, self.queues, strict=True)) and not any(self._running)

    def run(self, arrivals: Mapping[Message, Seconds]) -> bool:
        """Go on until everything has ended, or the compute stream waits for a message of which nothing is known yet, or for
        ever. Whether anything happened."""
        happened = False
        while True:
            begun, until, blocked = self._begin(arrivals)
            happened = happened or begun
            if blocked or not self._leap(until):
                return happened
            happened = True

    def _begin(self, arrivals: Mapping[Message, Seconds]) -> tuple[bool, Seconds | None, bool]:
        """Begin all that can. Whether any did; when the message comes that the compute stream waits for; whether it waits for
        one of which nothing is known."""
        begun, again, until = False, True, None
        running, places = self._running, self._places
        while again:
            again = False
            for stream, queue in enumerate(self.queues):
                while running[stream] is None and places[stream] < len(queue):
                    work = queue[places[stream]]
                    if not work.released():
                        break
                    if work.waits is not None:
                        if work.waits not in arrivals:
                            return begun, None, True
                        if arrivals[work.waits] > self.now:
                            until = arrivals[work.waits]
                            break
                    self._start(stream, work)
                    begun = again = True
        return begun, until, False

    def _start(self, stream: int, work: Work) -> None:
        self._places[stream] += 1
        work.start = self.now
        if work.seconds > 0:
            self._running[stream] = work
        else:
            self._end(work)

    def _end(self, work: Work) -> None:
        work.end, work.left = self.now, 0.0
        if work.sends is not None:
            self._send(work.sends, self.now)

    def _rates(self) -> list[tuple[int, Work, float]]:
        """Streams that do something, with what, and how much of it gets done in a second."""
        running = [(stream, work) for stream, work in enumerate(self._running) if work is not None]
        sending = len(running) - (self._running[COMPUTE] is not None)
        if not sending or sending == len(running):
            return [(stream, work, 1.0 / len(running)) for stream, work in running]
        return [(stream, work, self._slow / sending if stream else self._slow) for stream, work in running]

    def _leap(self, until: Seconds | None) -> bool:
        """To when the next piece of work ends, or a message comes at `until`; False when there is nothing to wait for."""
        running = self._rates()
        if not running:
            if until is not None:
                self.now = until
            return until is not None
        step = min([work.left / rate for _, work, rate in running])
        if until is not None and until - self.now < step:
            step, self.now = until - self.now, until
        else:
            self.now += step
        for stream, work, rate in running:
            work.left -= rate * step
            if work.left <= EVEN * work.seconds:
                self._running[stream] = None
                self._end(work)
        return True
