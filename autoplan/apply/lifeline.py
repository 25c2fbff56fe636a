"""When one rank ends in the middle of a step, all end, and say which: a collective would wait for it, for minutes or for ever.

Every process beats once a second: it counts up in the store through which the launch was joined, that of `MASTER_ADDR` and
`MASTER_PORT`. Rank 0 watches the others and they watch rank 0; who finds one silent, or fails itself, writes that down for
all. This is looked at while a step, a save or a load is under way, and nowhere else: a program may end its ranks one by one.
Then a rank whose own collective failed raises `RankLost`, and one that still waits in a collective, where Python can't reach
it, is ended by its watchdog after a moment of grace.

Without these variables (a process group made from a file, or of one) nothing is watched.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from autoplan.apply._torch import PrefixStore, TCPStore
from autoplan.errors import AutoplanError

PERIOD = 1.0
"""Seconds between two beats."""
SILENCE = 10.0
"""Seconds without a beat after which a rank is lost."""
GRACE = 3.0
"""Seconds that a waiting rank has to notice by itself."""

_LOST = "lost"
_BROKEN = ("connection", "peer", "broken pipe", "nccl", "remote process", "socket")
"""Words of errors that come from another rank's end."""


class RankLost(AutoplanError):
    """Another rank of the launch has ended or failed: exit code 3."""


class Lifeline:
    """This process's thread that beats and watches."""

    def __init__(self, host: str, port: int, rank: int, world: int) -> None:
        self._server = host, port
        self._rank = rank
        self._watched = list(range(1, world)) if rank == 0 else [0]
        client = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SILENCE))
        self._store = PrefixStore(f"autoplan/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client)
        self._beats: dict[int, tuple[bytes, float]] = {}
        """What a rank's count was, and when it changed."""
        self._count = 0
        self._doing = ""
        self._under_way: tuple[str, torch.Event] | None = None
        """What an accelerator may not have finished."""
        self._news: tuple[str, float] | None = None
        """What happened, and when this was heard."""
        self._own = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, name="autoplan lifeline", daemon=True)
        self._beat()
        self._thread.start()
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop beating, before the interpreter goes away under the thread."""
        self._stop.set()
        self._thread.join()

    @property
    def doing(self) -> str:
        """What is under way; "" is nothing."""
        late = self._under_way
        return self._doing or (late[0] if late is not None and not late[1].query() else "")

    @contextmanager
    def watch(self, doing: str, device: torch.device) -> Iterator[None]:
        """While `doing` something that needs all ranks. Raises `RankLost` when it fails because of another rank."""
        if self._own:  # this rank failed, and goes on after all
            self._store.delete_key(_LOST)
            self._own, self._news = False, None
        self._doing = doing
        try:
            yield
        except AutoplanError:
            raise
        except Exception as error:
            if _from_elsewhere(error):
                news = self._wait_for_news()
                if news is not None:
                    self._linger()
                    raise RankLost(f"{news} Rank {self._rank} stops in the middle of {doing}.") from error
            self._tell(f"rank {self._rank} failed in {doing}: {type(error).__name__}: {_first_line(error)}.")
            self._own = True
            self._linger()
            raise
        finally:
            if device.type != "cpu":
                self._under_way = doing, torch.Event(device)
                self._under_way[1].record()
            self._doing = ""

    def _wait_for_news(self) -> str | None:
        end = time.monotonic() + SILENCE + 3 * PERIOD
        while self._news is None and self.alive and time.monotonic() < end:
            time.sleep(PERIOD / 10)
        return self._news[0] if self._news else None

    def _linger(self) -> None:
        """Without torchrun rank 0 keeps the store: until the others have heard, it stays."""
        if self._rank == 0:
            time.sleep(3 * PERIOD)

    def _live(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(PERIOD):
            now = time.monotonic()
            if now - before > SILENCE / 2:  # this process slept itself: the others are not to blame
                self._beats.clear()
            before = now
            if self._news is None and not self._hear(now):
                return
            if self._news is not None and self.doing and now - self._news[1] > GRACE:
                print(
                    f"error: {self._news[0]} Rank {self._rank} stops in the middle of {self.doing}.", file=sys.stderr, flush=True
                )
                os._exit(3)

    def _hear(self, now: float) -> bool:
        """Beat and look; False when the store is gone, as it is when the launch ends."""
        try:
            socket.create_connection(self._server, SILENCE).close()  # asks in silence: the store's own client complains aloud
            self._beat()
            if self._store.check([_LOST]):
                self._news = self._store.get(_LOST).decode(), now
            else:
                self._look(now)
        except (OSError, RuntimeError):
            if not self.doing:
                return False
            self._news = "the process that keeps the launch's store, rank 0 or the launcher, has ended.", now
        return True

    def _beat(self) -> None:
        self._count += 1
        self._store.set(_key(self._rank), str(self._count))

    def _look(self, now: float) -> None:
        keys = [_key(rank) for rank in self._watched]
        if not self._store.check(keys):
            return  # some have not begun
        for rank, beat in zip(self._watched, self._store.multi_get(keys), strict=True):
            if rank not in self._beats or self._beats[rank][0] != beat:
                self._beats[rank] = beat, now
            elif now - self._beats[rank][1] > SILENCE:
                self._tell(f"rank {rank} has ended, or its machine is gone: it was silent for {SILENCE:.0f} s.")

    def _tell(self, news: str) -> None:
        """Write down what happened, unless something has before."""
        try:
            self._store.compare_set(_LOST, "", news)
        except RuntimeError:
            return  # the store is gone: the others will notice that


def lifeline() -> Lifeline | None:
    """That of this process, if its launch can have one; made when there is none."""
    global _current
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if dist.get_world_size() == 1 or dist.get_backend() == "fake" or not address or not port.isdigit():
        return None
    if _current is None or not _current.alive:
        try:
            _current = Lifeline(address, int(port), dist.get_rank(), dist.get_world_size())
        except RuntimeError:
            return None  # the process group was joined in another way
    return _current


_current: Lifeline | None = None


def _from_elsewhere(error: BaseException) -> bool:
    """Is it, or what it came from, an error of talking with another rank?"""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if any(word in str(cause).lower() for word in _BROKEN):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
