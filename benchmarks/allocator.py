"""What PyTorch's CUDA allocator has reserved after a sequence of allocations: a run's published peak, where it is that.

The rules are those of the caching allocator without options (`c10/cuda/CUDACachingAllocator.cpp`):

    a request is rounded up to 512 bytes and takes the smallest free block of its pool that is large enough; what remains of
    it is a block of its own (in the pool of large blocks if more than 1 MiB remains)
    without such a block a segment is reserved: 2 MiB for requests up to 1 MiB, 20 MiB for those under 10 MiB, else the
    request in whole 2 MiB; a freed block joins its free neighbours of the same segment
    where the device has no room for a segment, segments that are wholly free are given back first
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

MIB = 2**20
SMALL, LARGE = 1 * MIB, 10 * MIB


@dataclass(slots=True, eq=False)
class Block:
    """A part of a segment; `before` and `after` are its neighbours there."""

    address: int
    size: int
    small: bool
    free: bool = False
    before: Block | None = None
    after: Block | None = None


class Allocator:
    """Counts bytes: `reserved` now and, since `peak` was last set, at most."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit = limit
        self.reserved = self.peak = 0
        self._addresses = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}

    def take(self, size: float) -> Block:
        rounded = max(512, -int(-size // 512) * 512)
        small = rounded <= SMALL
        free = self._free[small]
        place = bisect_left(free, (rounded,))
        block = free.pop(place)[2] if place < len(free) else self._segment(rounded, small)
        block.free = False
        rest = block.size - rounded
        if rest >= 512 if small else rest > SMALL:
            tail = Block(block.address + rounded, rest, small, before=block, after=block.after)
            if block.after:
                block.after.before = tail
            block.size, block.after = rounded, tail
            self._keep(tail)
        return block

    def give(self, *blocks: Block) -> None:
        for block in blocks:
            if block.after and block.after.free:
                self._join(block, block.after)
            if block.before and block.before.free:
                block = self._join(block.before, block)
            self._keep(block)

    def _segment(self, rounded: int, small: bool) -> Block:
        size = 2 * MIB if small else 20 * MIB if rounded < LARGE else -(-rounded // (2 * MIB)) * 2 * MIB
        if self.reserved + size > self.limit:
            self._return()
        self._addresses += size
        self.reserved += size
        self.peak = max(self.peak, self.reserved)
        return Block(self._addresses - size, size, small)

    def _keep(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.address, block))

    def _drop(self, block: Block) -> None:
        free = self._free[block.small]
        del free[bisect_left(free, (block.size, block.address))]
        block.free = False

    def _join(self, block: Block, after: Block) -> Block:
        """`block` with its neighbour `after`; which of both is free leaves the list."""
        for each in (block, after):
            if each.free:
                self._drop(each)
        block.size, block.after = block.size + after.size, after.after
        if after.after:
            after.after.before = block
        return block

    def _return(self) -> None:
        """Gives back the segments that are wholly free."""
        for small, free in self._free.items():
            parts = [each for each in free if each[2].before or each[2].after]
            self.reserved -= sum(each[0] for each in free) - sum(each[0] for each in parts)
            self._free[small] = parts
