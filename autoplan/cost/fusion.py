"""What `torch.compile` makes of a layer: chains of pointwise operations and norms become one kernel, forward and backward.

An operation is *fusible* when its kernel works on rows: pointwise ones, norms, softmax, means over the last dim, joins; views
and borders go with either side. Fusible ones that are joined by a tensor make a *chain*, unless something else has to run in
between: the level of an operation is the most other operations on any path to it, and a chain has one level (`chains`). So it
never waits for itself, as Inductor's own rule wants it. Of a chain

    forward   reads what it is given and writes what others read or the backward pass needs, each once
    backward  reads the gradients of what others read, one for each reader, and what was kept; writes those of what it is given

in one kernel each, and one more for the weights of every norm (`_Chain`). What stays between lives in registers. Gradients of a
tensor with several readers are added up where they are read, no more by a kernel for each reader but one (`_additions`). A
pointwise result that only pointwise operations keep is not kept: it is made again (`made_again`; PyTorch's min-cut partitioner
does at least that). Nothing gets dearer than it is alone: chains take the lesser of both.

All of a chain's cost stands with its first operation. FLOPs stay: beside bytes they cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property

from autoplan.graph import Body, Cost, Graph, Op, Value

_BORDERS = ("enter", "exit")
_FREE = ("view", "split", *_BORDERS)
_PRODUCTS = {"linear": 2, "matmul": 2}
"""Kernels of the backward pass of a product, but for its bias."""


def fused(graph: Graph) -> Graph:
    """The graph with its layers compiled; what is outside them stays as it is. Its fingerprint is another."""
    return replace(graph, bodies=tuple(Fusion(body).body() for body in graph.bodies))


def fusible(op: Op, body: Body) -> bool:
    """Whether the compiler joins an operation with its neighbours."""
    if op.kind in ("pointwise", "norm", "cat", *_FREE):
        return True
    rank = len(body.values[op.inputs[0]].shape) if op.inputs else 0
    if op.kind == "along":
        return "softmax" in op.name and op.dims == (rank - 1,)
    return op.kind == "dims" and set(range(rank - 1)) <= set(op.dim_map)


class Fusion:
    """One body: who makes and who reads every tensor, and its chains."""

    def __init__(self, body: Body) -> None:
        self.given = body
        self.maker = {i: index for index, op in enumerate(body.ops) for i in op.outputs}
        self.readers: dict[int, list[int]] = {}
        """By `source`: operations that read it, borders left out."""
        for index, op in enumerate(body.ops):
            if op.kind not in _BORDERS:
                for source in dict.fromkeys(map(self.source, op.inputs)):
                    self.readers.setdefault(source, []).append(index)
        self.leaves = frozenset(map(self.source, body.outputs))

    def source(self, i: int) -> int:
        """The tensor before the borders that it has passed."""
        while i in self.maker and self.given.ops[self.maker[i]].kind in _BORDERS:
            i = self.given.ops[self.maker[i]].inputs[0]
        return i

    @cached_property
    def made_again(self) -> frozenset[int]:
        """Memories that are not kept: see the module."""
        body, keepers = self.given, dict[int, list[Op]]()
        for op in body.ops:
            for i in op.saved:
                keepers.setdefault(body.values[i].storage, []).append(op)
        return frozenset(
            root
            for root, ops in keepers.items()
            if root in self.maker and body.ops[self.maker[root]].kind == "pointwise" and all(op.kind == "pointwise" for op in ops)
        )

    @cached_property
    def kept(self) -> frozenset[int]:
        """Memories that are."""
        return frozenset(self.given.values[i].storage for op in self.given.ops for i in op.saved) - self.made_again

    def chains(self) -> Iterator[list[int]]:
        """Operations that become one kernel, by their numbers."""
        ops, level, chain = self.given.ops, dict[int, int](), list(range(len(self.given.ops)))
        joins = [fusible(op, self.given) for op in ops]
        for index, op in enumerate(ops):
            before = [self.maker[i] for i in op.inputs if i in self.maker]
            level[index] = max((level[b] + (not joins[b]) for b in before), default=0)
            for b in before:
                if joins[index] and joins[b] and level[b] == level[index]:
                    old, new = chain[index], chain[b]
                    chain = [new if each == old else each for each in chain]
        members: dict[int, list[int]] = {}
        for index in range(len(ops)):
            if joins[index]:
                members.setdefault(chain[index], []).append(index)
        yield from members.values()

    def body(self) -> Body:
        """With the costs of its chains."""
        ops = list(self.given.ops)
        for index, op in enumerate(ops):
            ops[index] = replace(op, saved=tuple(i for i in op.saved if self.given.values[i].storage in self.kept))
        for members in self.chains():
            chain = _Chain(self, members)
            if not chain.alone:
                for index, op in chain.fused(ops):
                    ops[index] = op
        return replace(self.given, ops=tuple(ops))


class _Chain:
    """Operations that become one kernel."""

    def __init__(self, fusion: Fusion, members: list[int]) -> None:
        self.fusion, self.body, self.members = fusion, fusion.given, frozenset(members)
        ops = fusion.given.ops
        self.working = [i for i in members if ops[i].forward_kernels or ops[i].backward_kernels]
        self.alone = all(ops[i].kind in _FREE for i in self.working)
        """Nothing but views, and copies of them in the backward pass."""
        made = {i for index in members for i in ops[index].outputs if self._makes(self._value(i).storage)}
        reading = [ops[index] for index in self.working if ops[index].kind not in _FREE]
        read = dict.fromkeys(fusion.source(i) for op in reading for i in op.inputs)
        self.inputs = [value for value in map(self._value, read) if not self._makes(value.storage)]
        self.outputs = [self._value(i) for i in dict.fromkeys(map(fusion.source, made)) if i in made and self._leaves(i)]

    def _value(self, i: int) -> Value:
        return self.body.values[i]

    def _makes(self, storage: int) -> bool:
        return self.fusion.maker.get(storage) in self.members

    def _leaves(self, i: int) -> bool:
        """Whether others read a tensor."""
        return i in self.fusion.leaves or bool(self._outside(i))

    def _outside(self, i: int) -> list[int]:
        return [reader for reader in self.fusion.readers.get(i, ()) if reader not in self.members]

    def fused(self, ops: list[Op]) -> Iterator[tuple[int, Op]]:
        """The operations with other costs, these and the products behind them."""
        mine, added = [ops[index] for index in self.working], list(self._additions(ops))
        for index, size in added:  # two are read, one is written
            less = ops[index].backward_bytes + _times(size, -3)
            ops[index] = replace(ops[index], backward_bytes=less, backward_kernels=ops[index].backward_kernels - 1)
            yield index, ops[index]
        first, *others = self.working
        for index in others:
            yield index, _priced(ops[index], (Cost(), 0), (Cost(), 0))
        norms = sum(op.kind == "norm" and len(op.inputs) > 1 for op in mine)
        forward = _lesser(_alone(mine, "forward"), (self._forward(), 1))
        size, kernels = _alone(mine, "backward")
        alone = sum((_times(each, 3) for _, each in added), size), kernels + len(added)
        yield first, _priced(ops[first], forward, _lesser(alone, (self._backward(), 1 + norms)))

    def _forward(self) -> Cost:
        written = {value.storage for value in self.outputs} | {root for root in self.fusion.kept if self._makes(root)}
        return _size(self._read(self.inputs)) + _size(map(self._value, written))

    def _read(self, values: Iterable[Value]) -> list[Value]:
        """Of several views of one memory no more than all of it."""
        by_memory: dict[int, list[Value]] = {}
        for value in values:
            by_memory.setdefault(value.storage, []).append(value)
        found = []
        for root, views in by_memory.items():
            whole = self._value(root)
            found += [whole] if _size(views).at(1) > _size([whole]).at(1) else views
        return found

    def _backward(self) -> Cost:
        arriving = [value for value in self.outputs for _ in range(self._gradients(value.id)) if value.requires_grad]
        leaving: dict[int, Value] = {}
        for value in self.inputs:
            if value.requires_grad and value.parameter is None:
                passed = self._passed(value.id)
                leaving[passed] = self._value(passed)
                # the gradients of its readers behind are added on the way
                arriving += [value] * any(reader > max(self.members) for reader in self._outside(value.id))
        needed = {self._value(i).storage for index in self.working for i in self.body.ops[index].saved} & self.fusion.kept
        return _size(arriving) + _size(map(self._value, needed)) + _size(self._read(leaving.values()))

    def _gradients(self, i: int) -> int:
        return len(self._outside(i)) + (i in self.fusion.leaves)

    def _passed(self, i: int) -> int:
        """The tensor of the chain whose gradient is this one's as well: sums pass it on."""
        for reader in self.fusion.readers.get(i, ()):
            op = self.body.ops[reader]
            alike = self._value(i).shape == self._value(op.outputs[0]).shape
            if reader in self.members and op.kind == "pointwise" and op.linear and not op.backward_kernels and alike:
                return self._passed(self.fusion.source(op.outputs[0]))
        return i

    def _additions(self, ops: list[Op]) -> Iterator[tuple[int, Cost]]:
        """(product that reads what this chain makes, size of the gradients that it adds up): it does no more."""
        left: dict[int, int] = {}
        for value in self.outputs:
            for reader in [each for each in self._outside(value.id) if value.requires_grad and ops[each].kind in _PRODUCTS]:
                op = ops[reader]
                additions = left.setdefault(reader, op.backward_kernels - _PRODUCTS[op.kind] - (len(op.inputs) > 2))
                if additions > 0:
                    left[reader] -= 1
                    yield reader, _size([value])


Priced = tuple[Cost, int]
"""Bytes and kernels."""


def _alone(ops: list[Op], which: str) -> Priced:
    costs = [getattr(op, f"{which}_bytes") for op in ops]
    return sum(costs, Cost()), sum(getattr(op, f"{which}_kernels") for op in ops)


def _lesser(alone: Priced, together: Priced) -> Priced:
    """Of bytes and of kernels the fewer."""
    return min(alone[0], together[0], key=lambda cost: cost.at(1)), min(alone[1], together[1])


def _priced(op: Op, forward: Priced, backward: Priced) -> Op:
    return replace(
        op, forward_bytes=forward[0], forward_kernels=forward[1], backward_bytes=backward[0], backward_kernels=backward[1]
    )


def _times(cost: Cost, number: float) -> Cost:
    return Cost(cost.per_sample * number, cost.fixed * number)


def _size(values: Iterable[Value]) -> Cost:
    """Of one sample, and what does not grow with the batch."""
    found = Cost()
    for value in values:
        size = value.bytes_at(1)
        found += Cost(size, 0.0) if value.batch_dim is not None else Cost(0.0, size)
    return found
