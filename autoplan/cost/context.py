"""Which models the cp axis can cut along the sequence, and along which dims: the dim of every tensor that runs over positions.

The walk starts at the model's inputs of token numbers (`context_inputs`) and follows the dim through every operation:

    linear, embedding, norm, pointwise, dims, view, split, cat, along    keep it, while they work along other dims
    attention        query, key and value [batch, heads, positions, head_dim]: exchanged for heads, then exchanged back; or keys
                     and values pass round
    cross_entropy    rows of positions: each device takes its own

(`_follow`). Whatever else meets a tensor that is cut would need the whole of it: then the model is refused, with the place
(`refusal`). Tensors that carry no gradient (token numbers, masks) are brought together where need be, and the gradients of what
is whole and meets what is cut (learned positions) are: these are small, and told (`gathered`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from autoplan.cost.rules import Outcome, through_view
from autoplan.graph import Body, Graph, Op, Value
from autoplan.strategy import CP_KINDS, CpKind, key_copies, shard

Dims = tuple[int | None, ...]
"""Of each tensor the dim that is cut; None when it is whole."""


class _MixedError(Exception):
    """An operation needs all positions at once; its words say which."""


def context_inputs(graph: Graph) -> tuple[tuple[str, int], ...]:
    """(name, dim) of the inputs that hold a number for every token."""
    found: list[tuple[str, int]] = []
    if len(graph.inputs) != len(graph.outer.inputs):  # a graph by hand, whose inputs are names alone
        return ()
    for (name, _, _), i in zip(graph.inputs, graph.outer.inputs, strict=True):
        dim = tokens_dim(graph.outer.values[i])
        if dim is not None:
            found.append((name, dim))
    return tuple(found)


def tokens_dim(value: Value) -> int | None:
    """The dim along which a model's input holds a number for every token, if it does."""
    numbers = value.dtype.startswith(("int", "bool")) and len(value.shape) == 2
    return 1 - value.batch_dim if numbers and value.batch_dim is not None else None


class Gather(NamedTuple):
    """An all_gather over cp of the value `value`, or with `backward` of its gradient."""

    value: int
    backward: bool
    dim: int = 0
    """Of a gradient: the dim that runs over positions."""


@dataclass
class Context:
    """What is known of a model's sequences, whatever the size of cp."""

    graph: Graph
    heads: list[tuple[int, int, str]] = field(default_factory=list)
    """Of every attention the queries' heads, the keys', and its place."""
    lengths: dict[int, str] = field(default_factory=dict)
    """Lengths of the sequences that are cut, with where they were met first."""
    gathered: dict[tuple[int, int], tuple[Gather, ...]] = field(default_factory=dict)
    """By body (-1: the outer one) and operation."""
    reason: str = ""
    """Why it can't be cut at all."""
    no_ring: str = ""
    """Why no attention can pass its keys and values round."""
    halves: bool = False
    """Whether some attention is causal, which a ring deals out in halves."""

    def __post_init__(self) -> None:
        self._through: dict[tuple[int, Dims], Dims] = {}
        cut = dict(context_inputs(self.graph))
        if not cut:
            self.reason = "no input of the model is a sequence of token numbers"
            return
        outer = self.graph.outer
        dims: list[int | None] = [cut.get(name) for name, _, _ in self.graph.inputs]
        try:
            self._walk(-1, outer, tuple(dims), "")
        except _MixedError as error:
            self.reason = str(error)
        if not self.heads and not self.reason:
            self.reason = "no attention was found between its positions"

    def kinds(self, cp: int, tp: int) -> tuple[CpKind, ...]:
        """In which ways attention can bring the parts of a sequence on `cp` devices together."""
        return tuple(kind for kind in CP_KINDS[: 1 if cp == 1 else None] if not self.refusal(cp, tp, kind))

    def refusal(self, cp: int, tp: int, kind: CpKind = "ulysses") -> str:
        """Why the model can't run on `cp` devices along the sequence, each with a share of 1/tp of the heads; "" when it can."""
        if cp == 1 or self.reason:
            return self.reason if cp > 1 else ""
        return self._unringed(cp, tp) if kind == "ring" else self._unexchanged(cp, tp)

    def _unringed(self, cp: int, tp: int) -> str:
        if self.no_ring or tp > 1:
            return self.no_ring or "ring attention and tp are not combined yet"
        for length, place in self.lengths.items():
            if length % (cp * (2 if self.halves else 1)):
                twice = "twice " if self.halves and length % cp == 0 else ""
                return f"{length} positions of {place} do not divide over {twice}cp {cp}"
        return ""

    def _unexchanged(self, cp: int, tp: int) -> str:
        for queries, keys, place in self.heads:
            for heads, copied in ((queries, 1), (keys, key_copies(keys // tp, cp))):
                if heads % tp or heads // tp * copied % cp:
                    return f"{heads} heads of {place} do not divide over cp {cp}" + (f" x tp {tp}" if tp > 1 else "")
        for length, place in self.lengths.items():
            if length % (cp * tp):
                return f"{length} positions of {place} do not divide over cp {cp}" + (f" x tp {tp}" if tp > 1 else "")
        return ""

    def _walk(self, number: int, body: Body, dims: Dims, prefix: str) -> Dims:
        known: dict[int, int | None] = dict(zip(body.inputs, dims, strict=True))
        for index, op in enumerate(body.ops):
            arriving = tuple(known.get(i) for i in op.inputs)
            name = f"{prefix}{op.module}".removesuffix(".")
            where = f"'{name}'" if name else "the model itself"
            if op.kind == "call":
                leaving = self._call(op, arriving)
            else:
                leaving = _follow(op, [body.values[i] for i in op.inputs], [body.values[i] for i in op.outputs], arriving, where)
            if gathers := tuple(_gathers(op, body, arriving, leaving)):
                self.gathered[number, index] = gathers
            if op.kind == "attention" and any(dim is not None for dim in arriving):
                queries, keys = (body.values[i].shape[1] for i in op.inputs[:2])
                self.heads.append((queries, keys, f"attention in {where}"))
                self.no_ring = self.no_ring or _no_ring(op, body, f"attention in {where}")
                self.halves = self.halves or op.causal
            for i, dim in zip(op.outputs, leaving, strict=True):
                known[i] = dim
                if dim is not None and body.values[i].requires_grad:
                    self.lengths.setdefault(body.values[i].shape[dim], where)
        return tuple(known.get(i) for i in body.outputs)

    def _call(self, op: Op, arriving: Dims) -> Dims:
        block = self.graph.blocks[op.block]
        body = self.graph.bodies[block.body]
        for i, dim in zip(body.inputs, arriving, strict=True):
            if dim is None and body.values[i].requires_grad:
                raise _MixedError(f"'{block.name}' is given activations that are not cut along a sequence")
        key = (block.body, arriving)
        if key not in self._through:
            self._through[key] = self._walk(block.body, body, arriving, f"{block.name}.")
        return self._through[key]


def _no_ring(op: Op, body: Body, place: str) -> str:
    """Why an attention can't pass its keys and values round; "" when it can."""
    query, key, value = (body.values[i].shape for i in op.inputs[:3])
    if len(op.inputs) > 3:
        return f"a mask of {place} is of all positions"
    if op.dropout:
        return f"{place} drops weights out"
    if query[3] != value[3] or key[:3] != value[:3]:
        return f"values of {place} are not like its keys"
    if query[1] % key[1] or (op.causal and query[2] != key[2]):
        return f"queries and keys of {place} do not go together"
    return ""


def _follow(op: Op, values: Sequence[Value], results: Sequence[Value], dims: Dims, where: str) -> Dims:
    """The dims of the results. Raises `_MixedError` where the operation would need all positions."""
    whole: Dims = (None,) * len(results)
    cut = [(value, dim) for value, dim in zip(values, dims, strict=True) if dim is not None]
    if not cut:
        return whole
    if op.kind in ("enter", "exit"):
        return (dims[0],)
    followed = _RULES[op.kind](op, values, results, dims) if op.kind in _RULES else None
    if followed is None:
        if not any(value.requires_grad for value in results):
            return whole  # token numbers, masks: brought together where need be
        raise _MixedError(f"'{op.name}' in {where} takes all positions at once")
    return (followed,) * len(results) if op.kind != "cross_entropy" else whole


def _gathers(op: Op, body: Body, arriving: Dims, leaving: Dims) -> Iterator[Gather]:
    """What the operation has brought together: see the module."""
    if op.kind in ("enter", "exit", "call", "cross_entropy") or all(dim is None for dim in arriving):
        return
    rank = max((len(body.values[i].shape) for i in op.outputs), default=0)
    for position, (i, dim) in enumerate(zip(op.inputs, arriving, strict=True)):
        value = body.values[i]
        if dim is not None and (leaving[0] is None or (op.kind == "attention" and position > 2)):
            yield Gather(i, backward=False)
        elif dim is None and op.kind == "pointwise" and value.requires_grad and leaving[0] is not None:
            own = leaving[0] - (rank - len(value.shape))
            if own >= 0 and value.shape[own] > 1:
                yield Gather(i, backward=True, dim=own)


def misplaced(gathers: Iterable[Gather], op: Op, outcome: Outcome) -> bool:
    """Whether a tensor that cp has whole and that meets one which cp cuts is itself cut over tp along the positions: it would be
    cut in other places."""
    layouts = dict(zip(op.inputs, outcome.inputs, strict=True))
    along = [(layouts[each.value], each.dim) for each in gathers if each.backward]
    return any(layout.sharded and layout.dim == dim for layout, dim in along)


def _before_last(op: Op, values: Sequence[Value], results: Sequence[Value], dims: Dims) -> int | None:
    """Operations on the last dim (`linear`), or on the last `dims[0]` (`norm`): the first input alone is cut."""
    free = len(values[0].shape) - (op.dims[0] if op.kind == "norm" and op.dims else 1)
    return dims[0] if dims[0] is not None and dims[0] < free and all(dim is None for dim in dims[1:]) else None


def _embedding(op: Op, values: Sequence[Value], results: Sequence[Value], dims: Dims) -> int | None:
    return dims[0] if dims[1] is None else None


def _attention(op: Op, values: Sequence[Value], results: Sequence[Value], dims: Dims) -> int | None:
    return 2 if dims[:3] == (2, 2, 2) and all(len(value.shape) == 4 for value in values[:3]) else None


def _matmul(op: Op, values: Sequence[Value], results: Sequence[Value], dims: Dims) -> int | None:
    same = dims[0] == dims[1] and len(values[0].shape) == len(values[1].shape)
    return dims[0] if same and dims[0] is not None and dims[0] < len(results[0].shape) - 2 else None


def _pointwise(op: Op, values: Sequence[Value], results: Sequence[Value], dims: Dims) -> int | None:
    rank = len(results[0].shape)
    along = {dim + rank - len(value.shape) for value, dim in zip(values, dims, strict=True) if dim is not None}
    return along.pop() if len(along) == 1 and len(results) == 1 else None


def _elsewhere(op: Op, values: Sequence[Value], results: Sequence[Value], dims: Dims) -> int | None:
    """`along`, `split` and `cat` of tensors of one form, along other dims."""
    moved = any(len(result.shape) != len(values[0].shape) for result in results)
    return dims[0] if len(set(dims)) == 1 and dims[0] not in op.dims and not moved else None


def _dims(op: Op, values: Sequence[Value], results: Sequence[Value], dims: Dims) -> int | None:
    return op.dim_map.index(dims[0]) if dims[0] in op.dim_map else None


def _view(op: Op, values: Sequence[Value], results: Sequence[Value], dims: Dims) -> int | None:
    if len(values) != 1 or dims[0] is None:
        return None
    target = through_view(values[0], results[0], shard(dims[0]))
    if target is not None:
        return target.dim
    # [batch, positions, ...] as [batch * positions, ...], every device its own rows
    rest = values[0].shape[dims[0] + 1 :]
    flat = values[0].batch_dim == 0 and dims[0] == 1 and results[0].batch_dim == 0 and results[0].shape[1:] == rest
    return 0 if flat and results[0].shape[0] == values[0].shape[1] else None


def _rows(op: Op, values: Sequence[Value], results: Sequence[Value], dims: Dims) -> int | None:
    return 0 if dims[0] == 0 and len(values[0].shape) == 2 and all(dim in (None, 0) for dim in dims) else None


_RULES = {
    "linear": _before_last,
    "norm": _before_last,
    "embedding": _embedding,
    "attention": _attention,
    "matmul": _matmul,
    "pointwise": _pointwise,
    "along": _elsewhere,
    "split": _elsewhere,
    "cat": _elsewhere,
    "dims": _dims,
    "view": _view,
    "cross_entropy": _rows,
}
