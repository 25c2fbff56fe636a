"""What ring attention (`apply.ring`) sends and holds, and how long it takes, on one of its `cp` devices.

With q, kv, o the bytes of a device's part of queries, of keys and values together, of the result, and `w` how much wider sums are
(in float32 at least), the kernel runs in cp rounds, each on 1/cp of the products. A causal one first deals out early and late
parts of the sequence, so that every device has as much to do in every round as every other:

    dealt                   q, kv, o forward, their gradients backward, one message each; nothing hides them
    forward    cp - 1 times kv                          while a round of the kernel runs
    backward   cp - 1 times kv, and its gradients w kv  while a round of the kernel runs; then the gradients once more

    seconds = round + (cp - 1) max(round, messages)     + w kv backward, which nothing hides

(`Ring.seconds`). A round ends with adding up: (1 + 2 w) o forward, (1 + 2 w) q + (1 + 6 w) kv backward are read or written.
No sample is dearer in a larger micro-batch, as the search needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from autoplan.cost.compute import kernel_time
from autoplan.graph import DTYPE_BYTES
from autoplan.hardware import Device
from autoplan.units import Bytes, Seconds


class Ring(NamedTuple):
    """One attention of one device."""

    query: Bytes
    pairs: Bytes
    """Of keys and values."""
    out: Bytes
    cp: int
    causal: bool
    wide: float
    """Bytes of a number in sums, for each byte of one in the tensors."""

    @property
    def dealt(self) -> tuple[Bytes, ...]:
        """What is exchanged before and after, forward; as much backward."""
        return (self.query, self.pairs, self.out) if self.causal else ()

    @property
    def forward(self) -> tuple[Bytes, ...]:
        """The messages of the rounds."""
        return (self.pairs,) * (self.cp - 1)

    @property
    def backward(self) -> tuple[Bytes, ...]:
        return (self.pairs,) * (self.cp - 1) + (self.wide * self.pairs,) * self.cp

    @property
    def kept(self) -> Bytes:
        """For the backward pass, beyond what is kept of attention in one piece: the result as it was made, and keys and values
        side by side where they are no copies already."""
        return self.out + (0.0 if self.causal else self.pairs)

    @property
    def held(self) -> Bytes:
        """In the backward pass: the result's gradient as it comes and as it is dealt; the queries' gradients, of this round and
        their sum; keys and values that are here and those that come, their gradients of this round, and three sums of these: one
        that has left, one that comes, a new one."""
        return 2 * self.out + (1 + self.wide) * self.query + 3 * (1 + self.wide) * self.pairs

    def seconds(
        self, forward: Seconds, backward: Seconds, device: Device, sending: Callable[[Bytes], Seconds]
    ) -> tuple[Seconds, Seconds, Seconds, Seconds]:
        """Of the kernel's `forward` and `backward`: these with what they end with, and what of the messages neither hides."""
        added = self._adding(device)
        forward, backward = forward + added[0], backward + added[1]
        pairs, gradients = sending(self.pairs), sending(self.wide * self.pairs)
        unhidden = self._unhidden(backward, pairs + gradients) + gradients
        return forward, backward, self._unhidden(forward, pairs), unhidden

    def _adding(self, device: Device) -> tuple[Seconds, Seconds]:
        """Adding up in all rounds, forward and backward."""
        forward = (1 + 2 * self.wide) * self.out
        backward = (1 + 2 * self.wide) * self.query + (1 + 6 * self.wide) * self.pairs
        one, other = (self.cp * kernel_time("pointwise", 0.0, size, 3, "", device) for size in (forward, backward))
        return one, other

    def _unhidden(self, kernel: Seconds, messages: Seconds) -> Seconds:
        """What of the messages of one round is not hidden by the kernel, in all rounds."""
        return (self.cp - 1) * max(0.0, messages - kernel / self.cp)


def widened(dtype: str) -> float:
    """See `Ring.wide`."""
    return max(DTYPE_BYTES[dtype], DTYPE_BYTES["float32"]) / DTYPE_BYTES[dtype]
