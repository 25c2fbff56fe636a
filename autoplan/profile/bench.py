"""The one thing that measuring needs of a machine: the times of an operation. No torch in here.

`profile.torch_bench` is a real machine; the tests have one with known curves and injected noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from autoplan.measurement import Operation
from autoplan.units import Bytes, Seconds


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Who is measured."""

    device: str
    """Name of the device model."""
    accelerator: bool
    """False: a CPU, of which each rank is one thread."""
    memory: Bytes
    """Of one rank."""
    reserved: Bytes
    backend: str
    hosts: tuple[str, ...]
    """The host of every rank, in the order of ranks."""
    about: str
    """Versions, clocks, power: what belongs into the source of a number."""
    sharing: float = 1.0
    """Ranks of a core, where these are more."""
    memory_source: str = ""
    reserved_source: str = ""

    @property
    def ranks(self) -> int:
        return len(self.hosts)

    @property
    def per_node(self) -> int:
        """Ranks on one host; 1 when hosts have different numbers, or ranks of a host are no neighbours."""
        first = next((i for i, host in enumerate(self.hosts) if host != self.hosts[0]), self.ranks)
        blocks = [set(self.hosts[i : i + first]) for i in range(0, self.ranks, first)]
        even = self.ranks % first == 0 and all(len(block) == 1 for block in blocks)
        return first if even and len(set().union(*blocks)) == len(blocks) else 1


class Bench(Protocol):
    """A machine that can be timed. Every rank has one; all of them ask for the same operations in the same order."""

    @property
    def machine(self) -> Machine: ...

    def times(self, operation: Operation, seconds: Seconds) -> Sequence[Seconds]:
        """Seconds of one operation, several times in about `seconds`, after a warm-up; the same on every rank.

        All ranks compute at once; a collective takes as long as on its slowest rank.
        """
        ...

    def clock(self) -> Seconds:
        """What time it is on the first rank, so that all decide alike."""
        ...
