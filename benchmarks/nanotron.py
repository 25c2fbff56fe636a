"""What rank 0 of nanotron has reserved after two steps: its allocations, one by one, as PyTorch's allocator serves them.

The sweep publishes `max_memory_reserved` of rank 0. Runs of one micro-batch without tp show that the sizes and lifetimes below,
read from nanotron's source, are all there is: they come out within 1 %. Of a layer's forward pass

    kept      x, its norm, q k v (one memory of 3), keys and values again (2, rotated in place), attention's result, the residual
              after it, its norm: 10 times the stream; gate and up (one memory), SiLU, their product: 4 times the inner size
    until the layer ends   the fused product of q k v, and what attention's projection returned

The loss holds the logits in float32 and their shifted exponentials (4 + 4 bytes, 2 more while they are made), then the latter.
A parameter has 2 bytes, 4 of its gradient's sum, 12 of the optimizer (cut by ZeRO-1), with ZeRO-0 over several ranks 2 in DDP's
buckets; bfloat16 gradients stay until a backward pass is over; ZeRO-1 gathers parameters through two copies of them all, one in
a block a rank, without waiting for the device: what NCCL still uses is not free for them.

From its second micro-batch on, a run without pipeline holds the exponentials of the one before (seen, the cause is a guess).

A block that NCCL has read or written (what tp gathers and scatters, and what comes of it) is used again, once it is freed, when
the device is through with NCCL's last operation until then, and the host runs ahead. With `h` and `d` seconds of a layer on the
host and the device, part by part (`_pass`),

    issued += h      done = max(done, issued) + d      issued >= done of what was issued `ahead` layers before

and a block freed when the device's clock would show `done` for NCCL comes back at the first allocation with issued >= done. CUDA
takes 1,024 launches before the host waits; `ahead` is fitted. `h` is the host time that the step times show. Runs of two stages
are apart, for a reason unknown: there the whole least time of a layer under tp, times a fitted `two_stages`, is the host's, which
gets further ahead (`two_ahead`); with more stages that time is the device's.

With three stages or more, runs under ZeRO-1 over few ranks, where the pieces of the gather are the largest blocks there are,
reserve the room of the whole gather once more, as though two blocks of the stream's size (`LEFT`) that were taken when the
pipeline had filled were still in use when parameters are gathered (seen on the fit half, the cause is unknown).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from autoplan.units import Bytes, Seconds
from benchmarks.allocator import Allocator, Block
from benchmarks.runs import Run
from benchmarks.software import Software

STEPS, MORE = 2, 6
"""Steps and, beyond what fills the pipeline, micro-batches after which little changes."""
LEFT = 2
"""Blocks of the stream's size that are in use from when the pipeline is full until the next step is over."""


@dataclass(slots=True)
class Saved:
    """What one micro-batch keeps: of every layer in the order of the backward pass, and of the loss."""

    layers: list[dict[str, Block]] = field(default_factory=list)
    loss: dict[str, Block] = field(default_factory=dict)


class Rank:
    """The first pipeline rank's allocations."""

    def __init__(self, run: Run, layers: int, limit: Bytes, host: Seconds, device: Seconds, ahead: float) -> None:
        """`host` and `device` take so long for a layer, forward and backward; `ahead` in layers."""
        shape, self.run, self.layers = run.shape, run, layers
        self.host, self.device, self.ahead = host, device, ahead
        self.passed = self.issued = self.done = self.nccl = 0.0
        self.queue: deque[tuple[float, Seconds]] = deque()
        self.sent: deque[tuple[Seconds, Block]] = deque()
        rows = shape.seq_len * run.micro_batch
        self.whole = 2 * rows * shape.hidden
        self.stream, self.inner = self.whole // run.tp, 2 * rows * shape.ffn // run.tp
        self.heads = 4 * rows * shape.heads // run.tp
        self.norm, self.logits = 4 * rows // run.tp, rows * shape.vocab // run.tp
        self.last = run.pp == 1
        square = shape.hidden**2 // run.tp
        self.qkv, self.out = square + 2 * square * shape.kv_heads // shape.heads, square
        self.up, self.down = 2 * shape.ffn * shape.hidden // run.tp, shape.ffn * shape.hidden // run.tp
        self.table = shape.vocab * shape.hidden // run.tp
        self.memory = Allocator(limit)
        self.buffers: dict[str, Block] = {}
        self.held: list[Block] = []
        self.left: list[Block] = []
        self.holds = False

    def reserved(self) -> Bytes:
        run, take = self.run, self.memory.take
        sizes = [self.table, *[self.qkv, self.out, self.up, self.down] * self.layers]
        sizes += [self.table] if self.last and not run.shape.tied else []
        total, ranks = sum(sizes), run.dp if run.zero else 1
        for size in sizes:
            take(2 * size)
        if run.dp > 1 and not run.zero:
            for size in reversed(sizes):
                take(2 * size)
        take(4 * total)
        take(4 * total / ranks)
        for step in range(STEPS):
            self.memory.peak = self.memory.reserved
            self._step()
            for size in sizes if step == 0 else ():
                take(4 * size / ranks)
                take(4 * size / ranks)
            if run.zero and run.dp > 1:
                self._gather_parameters(2 * total)
            self.issued = self.done  # the host waits before it logs the step
            self._give_sent()
        return self.memory.peak

    def _gather_parameters(self, size: int) -> None:
        dp, take = self.run.dp, self.memory.take
        self.memory.give(*[take(size / dp) for _ in range(dp + 1)], take(size))

    def _step(self) -> None:
        run = self.run
        micro_batches = min(run.global_batch // (run.dp * run.micro_batch), run.pp + MORE)
        self.holds = micro_batches > 1
        flight = [self._forward() for _ in range(min(run.pp - 1, micro_batches))]
        left: list[Block] = []
        for _ in range(micro_batches - len(flight)):
            flight.append(self._forward())
            if run.pp > 2 and not left:
                left = [self.memory.take(self.stream) for _ in range(LEFT)]
            self._backward(flight.pop(0))
        while flight:
            self._backward(flight.pop(0))
        self.memory.give(*self.left)
        self.left = left
        self.memory.give(*self.held)
        self.held = []

    def _pass(self, part: float) -> None:
        """Such a part of a layer goes by, on the host and on the device."""
        self.passed += part
        self.issued += part * self.host
        self.done = max(self.done, self.issued) + part * self.device
        self.queue.append((self.passed, self.done))
        while self.passed - self.queue[0][0] > self.ahead:
            self.issued = max(self.issued, self.queue.popleft()[1])
        self._give_sent()

    def _send(self, block: Block) -> None:
        """NCCL reads it, and nobody else."""
        self.nccl = self.done
        self.sent.append((self.nccl, block))
        self._give_sent()

    def _give_after(self, *blocks: Block) -> None:
        """Frees what tp has sent or received: NCCL's last operation until now has to be over."""
        if self.run.tp == 1:
            self.memory.give(*blocks)
            return
        self.sent.extend((self.nccl, block) for block in blocks)
        self._give_sent()

    def _give_sent(self) -> None:
        while self.sent and self.sent[0][0] <= self.issued:
            self.memory.give(self.sent.popleft()[1])

    def _buffer(self, name: str) -> None:
        """nanotron gathers into one memory for all layers."""
        if self.run.tp > 1 and name not in self.buffers:
            self.buffers[name] = self.memory.take(self.whole)

    def _scattered(self) -> Block:
        """A product that tp adds up and scatters."""
        if self.run.tp == 1:
            return self.memory.take(self.stream)
        whole = self.memory.take(self.whole)
        result = self.memory.take(self.stream)
        self._send(whole)
        return result

    def _forward(self) -> Saved:
        saved, take, give = Saved(), self.memory.take, self.memory.give
        x = self._scattered()
        for _ in range(self.layers):
            kept = {"x": x, "x1": take(self.stream), "r1": take(self.norm)}
            self._buffer("forward")
            fused = take(3 * self.stream)
            kept["qkv"] = take(3 * self.stream)
            joined = take(2 * self.stream)
            kept["kv"] = take(2 * self.stream)
            give(joined)
            kept |= {"a": take(self.stream), "lse": take(self.heads)}
            self._pass(1 / 6)
            copied = [take(self.stream)] if self.run.micro_batch > 1 else []  # the batch is not the first dim there
            attended = self._scattered()
            give(*copied, fused)
            kept |= {"y": take(self.stream), "y1": take(self.stream), "r2": take(self.norm)}
            kept |= {"gate up": take(2 * self.inner), "silu": take(self.inner), "product": take(self.inner)}
            self._pass(1 / 6)
            result = self._scattered()
            x = take(self.stream)
            self._give_after(result, attended)
            saved.layers.append(kept)
        if not self.last:
            self._send(x)
            return saved
        saved.loss = {"x": x, "x1": take(self.stream), "r": take(self.norm)}
        narrow, logits = take(2 * self.logits), take(4 * self.logits)
        give(narrow)
        saved.loss["exponentials"] = take(4 * self.logits)
        give(logits)
        return saved

    def _backward(self, saved: Saved) -> None:
        take, give = self.memory.take, self.memory.give
        gradients: list[Block] = []
        g = self._loss(saved.loss, gradients) if self.last else take(self.stream)
        while saved.layers:
            g = self._layer(saved.layers.pop(), g, gradients)
        table = take(2 * self.table)
        if self.last and self.run.shape.tied:
            both = take(2 * self.table)
            give(table)
            table = both
        self._give_after(g)
        give(table, *gradients)
        if len(self.held) > 1:
            give(self.held.pop(0))

    def _loss(self, kept: dict[str, Block], gradients: list[Block]) -> Block:
        take, give = self.memory.take, self.memory.give
        logits = take(2 * self.logits)
        self.held.append(kept["exponentials"])
        if not self.holds:
            give(self.held.pop())
        self._buffer("forward")
        before = self._product(self.table, gradients)
        give(logits)
        self._give_after(kept["x1"])
        g = take(self.stream)
        self._give_after(before)
        give(kept["x"], kept["r"])
        return g

    def _product(self, weight: int, gradients: list[Block]) -> Block:
        """The gradients of a column parallel product's input and weight."""
        before = self.memory.take(self.whole)
        if self.run.tp == 1:
            gradients.append(self.memory.take(2 * weight))
            return before
        result = self.memory.take(self.stream)
        gradients.append(self.memory.take(2 * weight))
        self._send(before)
        return result

    def _layer(self, kept: dict[str, Block], g: Block, gradients: list[Block]) -> Block:
        take, give = self.memory.take, self.memory.give
        self._buffer("backward")
        product = take(self.inner)
        gradients.append(take(2 * self.down))
        give(kept["product"])
        silu, up = take(self.inner), take(self.inner)
        give(product, kept["silu"])
        gate = take(self.inner)
        give(silu)
        both = take(2 * self.inner)
        give(gate, up, kept["gate up"])
        self._pass(1 / 3)
        g = self._normed(self._product(self.up, gradients), (both, kept["y1"]), (kept["y"], kept["r2"]), g)
        attended = take(self.stream)
        gradients.append(take(2 * self.out))
        q, k, v = (take(self.stream) for _ in range(3))
        give(take(2 * self.stream))  # of q, in float32
        give(attended, kept["qkv"], kept["kv"], kept["a"], kept["lse"])
        joined = take(2 * self.stream)
        give(k, v)
        stacked = take(3 * self.stream)
        give(q, joined)
        turned = take(3 * self.stream)
        give(stacked)
        self._pass(1 / 3)
        return self._normed(self._product(self.qkv, gradients), (turned, kept["x1"]), (kept["x"], kept["r1"]), g)

    def _normed(self, before: Block, used: tuple[Block, Block], kept: tuple[Block, Block], g: Block) -> Block:
        """A norm's backward pass, and the sum with the gradient of the residual. Of `used` tp gathered the second."""
        take, give = self.memory.take, self.memory.give
        give(used[0])
        self._give_after(used[1])
        of_norm = take(self.stream)
        self._give_after(before)
        give(*kept)
        total = take(self.stream)
        give(of_norm)
        self._give_after(g)
        return total


def reserved(run: Run, layers: int, limit: Bytes, software: Software, device: Seconds, least: Seconds) -> Bytes:
    """Bytes that rank 0, with the embedding and so many layers, has reserved on a device that has `limit` for PyTorch and takes
    `device` seconds for a layer that takes at `least` so many."""
    if run.pp == 2:
        return Rank(run, layers, limit, software.two_stages * least, device, software.two_ahead).reserved()
    return Rank(run, layers, limit, software.layer, max(device, least), software.ahead).reserved()
