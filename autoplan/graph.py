"""What a model computes: values, operations and blocks, with the costs of one sample. No torch in here.

A `Graph` is an `outer` body (embeddings, final norm, head, loss, and one `call` per block) and the `bodies` of its
repeated blocks: a Llama with 126 equal layers has one body and 126 `Block`s that name it.

A tensor that crosses the border of a module is a new `Value` on the other side, made by an `enter` or `exit` operation:
those borders are the only places where a plan may redistribute a tensor over the tensor-parallel axis, because they are
the places where a hook can do it.

Costs are affine in the batch: `Cost.at(batch) = per_sample * batch + fixed`. Shapes are those of **one sample**:
the dim `batch_dim` holds the length that one sample contributes (1 for `[batch, seq, hidden]`, `seq` for `[batch*seq, hidden]`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from json import dumps
from math import prod
from typing import Any, Literal

from autoplan.errors import UsageError
from autoplan.units import Bytes, Flops

OpKind = Literal[
    "linear",  # (x, weight[, bias]) -> x @ weight.T + bias
    "matmul",  # (a, b): the last two dims multiply, the others are batch dims
    "attention",  # (query, key, value[, mask]) of [batch, heads, seq, head_dim]: scaled_dot_product_attention
    "embedding",  # (indices, weight)
    "norm",  # (x[, weight[, bias]]): layer_norm, rms_norm over the last `dims` dims
    "pointwise",  # elementwise with broadcasting: add, mul, gelu, dropout, cast
    "along",  # works along `dims` and is free in the others: softmax, cumsum
    "dims",  # dims are moved, dropped, made or cut, none is mixed: permute, slice, expand, mean; see `dim_map`
    "view",  # reshape, flatten, unflatten
    "split",  # one tensor into several along `dims[0]`: split, chunk, unbind
    "cat",  # several tensors into one along `dims[0]`
    "cross_entropy",  # (logits [rows, classes], target) -> loss
    "opaque",  # anything else: only on replicated tensors
    "enter",  # a tensor passes a module's border, inwards
    "exit",  # a tensor passes a module's border, outwards
    "call",  # a block, in the outer body
]

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
}


@dataclass(frozen=True, slots=True)
class Cost:
    """A cost that grows with the batch: `per_sample * batch + fixed`."""

    per_sample: float = 0.0
    fixed: float = 0.0

    def at(self, batch: float) -> float:
        return self.per_sample * batch + self.fixed

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.per_sample + other.per_sample, self.fixed + other.fixed)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or buffer. `name` is relative to the module whose body this is; `shape` is the full, unsharded one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True
    buffer: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor as one scope sees it. `id` is its index in `Body.values`."""

    id: int
    shape: tuple[int, ...]
    dtype: str
    batch_dim: int | None
    requires_grad: bool
    storage: int
    """The id of the value that allocated the memory: a view, or a border passed unchanged, shares it."""
    parameter: str | None = None
    """Name of the parameter or buffer of this body that the value is, if it is one."""

    def bytes_at(self, batch: float) -> Bytes:
        """Size in bytes for a micro-batch of `batch` samples."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype] * (batch if self.batch_dim is not None else 1)


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of the user's code, forward and backward together.

    FLOPs are those of the kernels that really run; `forward_bytes` and `backward_bytes` are read plus written by them.
    """

    kind: OpKind
    name: str
    """The function as the user called it: "linear", "gelu", "transpose"."""
    module: str
    """Name, relative to the body, of the module whose forward runs the operation ("" is the body's own module)."""
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dims: tuple[int, ...] = ()
    dim_map: tuple[int, ...] = ()
    """For `dims`: which input dim each output dim is, whole and unchanged, or -1. For `view` and others: empty."""
    linear: bool = False
    """For `pointwise`: f(a + b) = f(a) + f(b), so that a Partial may pass (add, cast, scaling by a number)."""
    causal: bool = False
    """For `attention`: a causal mask, so that the kernel skips half of the products. FLOPs are counted in full all the same."""
    dropout: bool = False
    """For `attention`: some of the weights are dropped."""
    leaf: str = ""
    """For `enter` and `exit`: which argument or output it is: "0", "mask", "1.0" (joined by "," when passed several times)."""
    block: int = -1
    """For `call`: index into `Graph.blocks`."""
    forward_flops: Cost = Cost()
    backward_flops: Cost = Cost()
    forward_bytes: Cost = Cost()
    backward_bytes: Cost = Cost()
    forward_kernels: int = 0
    backward_kernels: int = 0
    saved: tuple[int, ...] = ()
    """Values kept for the backward pass (by their storage; parameters and the model's inputs are not among them)."""
    saved_extra: Cost = Cost()
    """Bytes kept for the backward pass that are no value of the graph: softmax statistics, dropout masks, norm means."""


@dataclass(frozen=True)
class Body:
    """The operations of a block, or of everything outside the blocks, in the order in which they run."""

    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: tuple[Parameter, ...]
    input_leaves: tuple[str, ...] = ()
    """Where in the block's call each input is passed: "0", "mask". "" for a tensor that reaches the block unseen."""

    def parameter(self, name: str) -> Parameter:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Parameter]:
        return {parameter.name: parameter for parameter in self.parameters}

    @cached_property
    def last_use(self) -> dict[int, int]:
        """The last operation (an index) that uses each value; what leaves the body is used after all of them."""
        found = {i: index for index, op in enumerate(self.ops) for i in op.inputs}
        return found | dict.fromkeys(self.outputs, len(self.ops))

    @cached_property
    def waiting(self) -> tuple[tuple[int, ...], ...]:
        """Of every operation the values whose gradients wait while its backward pass runs: made before it, used after it."""
        found, alive = [], list(self.inputs)
        for index, op in enumerate(self.ops):
            alive = [i for i in alive if self.last_use.get(i, -1) > index]
            found.append(tuple(i for i in alive if self._carries(self.values[i])))
            alive += op.outputs
        return tuple(found)

    @cached_property
    def repeated(self) -> frozenset[int]:
        """Calls that follow another call, of which the next one takes all results and nobody else does, and that are given
        nothing besides that is not given to the one before: what holds of the first of such a row holds of each."""
        users: dict[int, list[int]] = {}
        for index, op in enumerate(self.ops):
            for i in op.inputs:
                users.setdefault(i, []).append(index)
        found = set()
        for index in range(1, len(self.ops) - 1):
            before, op, after = self.ops[index - 1 : index + 2]
            passed = all(users.get(i) == [index + 1] and i not in self.outputs for i in op.outputs)
            alike = passed and not op.saved and set(op.inputs) <= {*before.inputs, *before.outputs}
            if alike and before.kind == op.kind == after.kind == "call":
                found.add(index)
        return frozenset(found)

    @cached_property
    def rerun(self) -> int:
        """How many operations run again where all is recomputed: PyTorch stops at the last one that saves something, before it
        runs if that is what it is given, after it if that is what it makes."""
        last = max((index for index, op in enumerate(self.ops) if op.saved or op.saved_extra.at(1)), default=-1)
        if last < 0:
            return 0
        op = self.ops[last]
        own = {self.values[i].storage for i in op.outputs}
        return last + (op.saved_extra.at(1) > 0 or any(self.values[i].storage in own for i in op.saved))

    def made(self, value: int) -> bool:
        """Whether an operation makes the memory in which a value lives."""
        return self.values[value].storage in self._made

    @cached_property
    def _made(self) -> frozenset[int]:
        return frozenset(i for op in self.ops for i in op.outputs)

    def _carries(self, value: Value) -> bool:
        """Whether a gradient passes along it: what is made of parameters alone has that of the parameter."""
        return value.requires_grad and self.values[value.storage].parameter is None

    def total(self, what: str) -> Cost:
        """Sum of one cost ("forward_flops", "backward_bytes", ...) over the operations."""
        costs: list[Cost] = [getattr(op, what) for op in self.ops]
        return sum(costs, Cost())

    @cached_property
    def saved(self) -> Cost:
        """Bytes kept for the backward pass when nothing is sharded and nothing recomputed, each storage once."""
        roots = {self.values[i].storage for op in self.ops for i in op.saved}
        cost = sum((op.saved_extra for op in self.ops), Cost())
        for root in roots:
            value = self.values[root]
            size = value.bytes_at(1)
            cost += Cost(size, 0.0) if value.batch_dim is not None else Cost(0.0, size)
        return cost


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: its fully qualified module name and the body that it shares with its equals."""

    name: str
    body: int


@dataclass(frozen=True)
class Graph:
    """A captured model."""

    model: str
    compute_dtype: str
    outer: Body
    bodies: tuple[Body, ...]
    blocks: tuple[Block, ...]
    tied: tuple[tuple[str, ...], ...] = ()
    """Groups of full parameter names that are one tensor; the first of each group is the one that `outer` knows."""
    inputs: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    """(name, shape of one sample, dtype) of the model's inputs."""
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def members(self) -> Iterator[tuple[str, Body]]:
        """(prefix, body) of the outer body and of every block, in order; a full name is `prefix + parameter.name`."""
        yield "", self.outer
        for block in self.blocks:
            yield f"{block.name}.", self.bodies[block.body]

    def total(self, what: str) -> Cost:
        """Sum of one cost over the whole model, every block counted."""
        return sum((body.total(what) for _, body in self.members()), Cost())

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel for _, body in self.members() for p in body.parameters if not p.buffer)

    @cached_property
    def saved(self) -> Cost:
        """Bytes kept for the backward pass, nothing recomputed; what several blocks keep (the encoder's output) once."""
        total = sum((body.saved for _, body in self.members()), Cost())
        kept = {self.outer.values[i].storage for op in self.outer.ops for i in op.saved}
        for op in self.outer.ops:
            if op.kind != "call":
                continue
            body = self.bodies[self.blocks[op.block].body]
            passed = dict(zip((*body.inputs, *body.outputs), (*op.inputs, *op.outputs), strict=True))
            roots = {body.values[i].storage for each in body.ops for i in each.saved}
            for inside in roots & passed.keys():
                outside = self.outer.values[passed[inside]].storage
                if outside in kept:
                    value = body.values[inside]
                    size = -value.bytes_at(1)
                    total += Cost(size, 0.0) if value.batch_dim is not None else Cost(0.0, size)
                kept.add(outside)
        return total

    @property
    def forward_flops(self) -> Flops:
        """FLOPs of the forward pass of one sample."""
        return self.total("forward_flops").at(1)

    @property
    def backward_flops(self) -> Flops:
        """FLOPs of the backward pass of one sample."""
        return self.total("backward_flops").at(1)

    @property
    def saved_bytes(self) -> Bytes:
        """Bytes kept for the backward pass of one sample, nothing recomputed."""
        return self.saved.at(1)

    @property
    def tokens(self) -> int:
        """Tokens of one sample: the longest sequence among the integer inputs, or 1."""
        lengths = [shape[1] for _, shape, dtype in self.inputs if len(shape) == 2 and dtype.startswith("int")]
        return max(lengths, default=1)

    def computing_in(self, dtype: str) -> Graph:
        """Itself. Raises `UsageError` where it was captured in another dtype."""
        if self.compute_dtype == dtype:
            return self
        raise UsageError(
            f"the graph was captured in {self.compute_dtype}, and the plan computes in {dtype}.",
            f'Capture it in the same: autoplan.inspect(model, compute_dtype="{dtype}").',
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that a plan depends on: the model's structure, not its place on disk."""
        parts = {
            "dtype": self.compute_dtype,
            "outer": asdict(self.outer, dict_factory=_told),
            "bodies": [asdict(body, dict_factory=_told) for body in self.bodies],
            "blocks": [asdict(block) for block in self.blocks],
            "tied": self.tied,
        }
        return hashlib.sha256(dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _told(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """What a fingerprint is made of: fields that came later are in it where they say something, so that older ones hold."""
    return {name: value for name, value in fields if name != "dropout" or value}
