"""What rank 0 of nanotron has reserved after two steps: its allocations, one by one, as PyTorch's allocator serves them.

The sweep publishes `max_memory_reserved` of rank 0. Runs of one micro-batch without tp show that the sizes and lifetimes below,
read from nanotron's source, are all there is: they come out within 1 %. Of a layer's forward pass

    kept      x, its norm, q k v (one memory of 3), keys and values again (2, rotated in place), attention's result, the residual
              after it, its norm: 10 times the stream; gate and up (one memory), SiLU, their product: 4 times the inner size
    until the layer ends   the fused product of q k v, and what attention's projection returned

The loss holds the logits in float32 and their shifted exponentials (4 + 4 bytes, 2 more while they are made), then the latter.
A parameter has 2 bytes, 4 of its gradient's sum, 12 of the optimizer (cut by ZeRO-1), with ZeRO-0 over several ranks 2 in DDP's
buckets; bfloat16 gradients stay until a backward pass is over; ZeRO-1 gathers parameters through two copies of them all.

Two things were seen in the measurements, their cause is a guess. From its second micro-batch on, a run without pipeline holds the
exponentials of the one before. And under tp, memory of whole tensors that NCCL has read is not used again before the host has
waited for the device, once a micro-batch: a fitted fraction of them, none in two stages where the host is the slower of both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from autoplan.units import Bytes
from benchmarks.allocator import Allocator, Block
from benchmarks.runs import Run
from benchmarks.software import Software

STEPS, MORE = 2, 2
"""Steps and, beyond what fills the pipeline, micro-batches after which nothing changes."""
COPIES = 64
"""Ranks to which one buffer each is given; more ranks share the last one's."""


@dataclass(slots=True)
class Saved:
    """What one micro-batch keeps: of every layer in the order of the backward pass, and of the loss."""

    layers: list[dict[str, Block]] = field(default_factory=list)
    loss: dict[str, Block] = field(default_factory=dict)


class Rank:
    """The first pipeline rank's allocations."""

    def __init__(self, run: Run, layers: int, limit: Bytes, pending: float, late: bool) -> None:
        """Of the tensors that NCCL read the fraction `pending` comes back a micro-batch later, two if `late`."""
        shape, self.run, self.layers, self.pending, self.late = run.shape, run, layers, pending, late
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
        self.delayed: list[list[Block]] = [[]]
        self.released, self.holds = 0.0, False

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
        return self.memory.peak

    def _gather_parameters(self, size: int) -> None:
        dp, take = self.run.dp, self.memory.take
        copies = [take(size / dp) for _ in range(min(dp, COPIES))]
        copies += [take(size / dp * (dp - COPIES))] if dp > COPIES else []
        self.memory.give(*copies, take(size / dp), take(size))

    def _step(self) -> None:
        run = self.run
        micro_batches = min(run.global_batch // (run.dp * run.micro_batch), run.pp + MORE)
        self.holds = micro_batches > 1
        flight = [self._forward() for _ in range(min(run.pp - 1, micro_batches))]
        for _ in range(micro_batches - len(flight)):
            flight.append(self._forward())
            self._backward(flight.pop(0))
        while flight:
            self._backward(flight.pop(0))
        self.memory.give(*self.held, *(block for each in self.delayed for block in each))
        self.held, self.delayed = [], [[]]

    def _settle(self) -> None:
        """The host has waited for the device."""
        self.delayed.append([])
        while len(self.delayed) > 1 + self.late:
            self.memory.give(*self.delayed.pop(0))

    def _sent(self, block: Block) -> None:
        """Frees what NCCL has read: some of it comes back only when the host waits."""
        self.released += self.pending
        if self.released >= 1:
            self.released -= 1
            self.delayed[-1].append(block)
        else:
            self.memory.give(block)

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
        self._sent(whole)
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
            copied = [take(self.stream)] if self.run.micro_batch > 1 else []  # the batch is not the first dim there
            attended = self._scattered()
            give(*copied, fused)
            kept |= {"y": take(self.stream), "y1": take(self.stream), "r2": take(self.norm)}
            kept |= {"gate up": take(2 * self.inner), "silu": take(self.inner), "product": take(self.inner)}
            result = self._scattered()
            x = take(self.stream)
            give(result, attended)
            saved.layers.append(kept)
        if not self.last:
            self._sent(x)
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
        self._settle()
        g = self._loss(saved.loss, gradients) if self.last else take(self.stream)
        while saved.layers:
            g = self._layer(saved.layers.pop(), g, gradients)
        table = take(2 * self.table)
        if self.last and self.run.shape.tied:
            both = take(2 * self.table)
            give(table)
            table = both
        give(g, table, *gradients)
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
        give(logits, kept["x1"])
        g = take(self.stream)
        give(before, kept["x"], kept["r"])
        return g

    def _product(self, weight: int, gradients: list[Block]) -> Block:
        """The gradients of a column parallel product's input and weight."""
        before = self.memory.take(self.whole)
        if self.run.tp == 1:
            gradients.append(self.memory.take(2 * weight))
            return before
        result = self.memory.take(self.stream)
        gradients.append(self.memory.take(2 * weight))
        self._sent(before)
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
        return self._normed(self._product(self.qkv, gradients), (turned, kept["x1"]), (kept["x"], kept["r1"]), g)

    def _normed(self, before: Block, used: tuple[Block, ...], kept: tuple[Block, ...], g: Block) -> Block:
        """A norm's backward pass, and the sum with the gradient of the residual."""
        take, give = self.memory.take, self.memory.give
        give(*used)
        of_norm = take(self.stream)
        give(before, *kept)
        total = take(self.stream)
        give(of_norm, g)
        return total


def reserved(run: Run, layers: int, limit: Bytes, software: Software, ahead: bool) -> Bytes:
    """Bytes that rank 0, with the embedding and so many layers, has reserved on a device that has `limit` for PyTorch; `ahead`:
    the device takes longer for a layer than the host."""
    pending = software.pending if run.pp == 1 else software.pending_pipeline if run.pp > 2 or ahead else 0.0
    return Rank(run, layers, limit, pending, late=ahead and run.pp > 1).reserved()
