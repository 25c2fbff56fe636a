"""What each operation can do on the tensor-parallel axis: the sharding rules, one function a kind.

Given the layouts in which an operation's inputs arrive, a rule says in which layouts its outputs can leave without any
communication (but for the two small reductions of a vocabulary-parallel loss). With `n` devices on the axis, `x` an
activation, `w` a parameter whose layout is still free:

    linear      y = x w' + b    x REPLICATE, w REPLICATE                          -> y REPLICATE
                                x GATHERED,  w shard(0),  b shard(0)              -> y shard(last)            column
                                x shard(last), w shard(1), b REPLICATE            -> y PARTIAL                row
                                x GATHERED,  w shard(0, blocks=k), b GATHERED     -> y shard(last, blocks=k)  packed column
    embedding   y = w[i]        w REPLICATE -> REPLICATE;  w shard(0) -> PARTIAL;  w shard(1) -> shard(last)
    norm                        x shard(d), d not normalised, w GATHERED          -> shard(d)
    attention                   q, k, v shard(1) (heads)                          -> shard(1)
    matmul                      both shard(d), d a batch dim                      -> shard(d)
    pointwise                   one common sharded dim; operands that are broadcast along it: GATHERED if they need a gradient
    cross_entropy               logits shard(classes)                             -> REPLICATE

and REPLICATE -> REPLICATE for everything. Nothing here knows of "column then row" or of sequence parallelism: the
classic plans come out of the search because the chain of rules that avoids redistribution is theirs. Source of the
algebra: Megatron-LM (arXiv:1909.08053, 2205.05198) and DTensor's placements.

`outcomes` lists what is possible, for the search; `cost.walk` follows one plan through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autoplan.graph import Body, Op, Value
from autoplan.strategy import GATHERED, PARTIAL, REPLICATE, Layout, shard

Layouts = Sequence[Layout | None]
"""One per input; None where a parameter's layout is still free."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way to run an operation: the layouts of all its inputs (free parameters decided) and outputs."""

    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    sharded: bool
    """Every device does 1/n of the work; otherwise all do all of it."""


def outcomes(op: Op, body: Body, layouts: Layouts, tp: int, packings: tuple[int, ...] = ()) -> Iterator[Outcome]:
    """Every way in which `op` can run when its inputs arrive as `layouts` on `tp` devices, the fully replicated one first."""
    values = [body.values[i] for i in op.inputs]
    results = [body.values[i] for i in op.outputs]
    if all(layout in (None, REPLICATE) for layout in layouts):
        yield Outcome((REPLICATE,) * len(values), (REPLICATE,) * len(results), False)
    rule = _RULES.get(op.kind)
    if rule is not None and tp > 1:
        for outcome in rule(op, values, results, tuple(layouts), tp, packings):
            if all(_divides(layout, value, tp) for layout, value in zip(outcome.outputs, results, strict=True)):
                yield outcome


def packings(body: Body) -> dict[int, tuple[int, ...]]:
    """For each operation that a packed parameter may feed (by index): into how many equal parts its result is taken apart."""
    consumers: dict[int, list[int]] = {}
    for index, op in enumerate(body.ops):
        for i in op.inputs:
            consumers.setdefault(i, []).append(index)
    found: dict[int, tuple[int, ...]] = {}
    for index, op in enumerate(body.ops):
        if op.kind == "linear":
            found[index] = tuple(sorted(set(_parts(body, op.outputs[0], consumers))))
        elif op.kind == "split" and body.values[op.inputs[0]].parameter and _equal_parts(body, op):
            found[index] = (len(op.outputs),)
    return {index: parts for index, parts in found.items() if parts}


def _parts(body: Body, value: int, consumers: dict[int, list[int]]) -> Iterator[int]:
    last = len(body.values[value].shape) - 1
    for index in consumers.get(value, ()):
        op = body.ops[index]
        if op.kind in ("enter", "exit"):
            yield from _parts(body, op.outputs[0], consumers)
        elif op.kind == "split" and op.dims == (last,) and _equal_parts(body, op):
            yield len(op.outputs)
        elif op.kind == "view":
            parts = body.values[op.outputs[0]].shape[last : last + 1]
            taken_apart = any(
                body.ops[i].kind in ("split", "dims") and _touches(body.ops[i], last) for i in consumers.get(op.outputs[0], ())
            )
            if parts and len(body.values[op.outputs[0]].shape) > last + 1 and taken_apart:
                yield parts[0]


def _touches(op: Op, dim: int) -> bool:
    return op.dims == (dim,) if op.kind == "split" else dim not in op.dim_map


def _equal_parts(body: Body, op: Op) -> bool:
    return len({body.values[i].shape for i in op.outputs}) == 1 and len(op.outputs) > 1


def _divides(layout: Layout, value: Value, tp: int) -> bool:
    if not layout.sharded:
        return True
    return layout.dim != value.batch_dim and value.shape[layout.dim] % (tp * layout.blocks) == 0


def divided(body: Body, tp: int) -> frozenset[tuple[int, int]]:
    """The sizes of dims, and into how many parts they are taken apart, that `tp` divides. All degrees above 1 for which these are
    equal have the same outcomes and conversions."""
    parts = {1, *(blocks for some in packings(body).values() for blocks in some)}
    sizes = {size for value in body.values for size in value.shape}
    return frozenset((size, blocks) for size in sizes for blocks in parts if size % (tp * blocks) == 0)


def shardable(value: Value, dim: int, tp: int, blocks: int = 1) -> bool:
    """Whether `dim` of `value` can be split over `tp` devices (never the batch: that is the data-parallel axes' dim)."""
    return _divides(shard(dim, blocks), value, tp)


def _quiet(value: Value, layout: Layout | None) -> bool:
    """The value takes part in no gradient and is whole on every device."""
    return not value.requires_grad and layout in (None, REPLICATE)


def _linear(
    op: Op, values: list[Value], results: list[Value], layouts: Layouts, tp: int, packed: tuple[int, ...]
) -> Iterator[Outcome]:
    x, w, rest = layouts[0], layouts[1], layouts[2:]
    last_in, last_out = len(values[0].shape) - 1, len(results[0].shape) - 1
    bias = values[2] if len(values) > 2 else None

    def ok(layout: Layout | None, wanted: Layout, value: Value) -> bool:
        return layout == wanted or (layout is None and value.parameter is not None and _divides(wanted, value, tp))

    if x == GATHERED or _quiet(values[0], x):
        source = x or REPLICATE
        if ok(w, shard(0), values[1]):
            for b in (shard(0), GATHERED):
                if bias is None or ok(rest[0], b, bias):
                    yield Outcome((source, shard(0), *([b] if bias else [])), (shard(last_out),), True)
                    break
        for k in packed:
            if len(values[1].shape) == 2 and ok(w, shard(0, k), values[1]) and (bias is None or ok(rest[0], GATHERED, bias)):
                yield Outcome((source, shard(0, k), *([GATHERED] if bias else [])), (shard(last_out, k),), True)
    if x == shard(last_in) and ok(w, shard(1), values[1]) and (bias is None or ok(rest[0], REPLICATE, bias)):
        yield Outcome((x, shard(1), *([REPLICATE] if bias else [])), (PARTIAL,), True)


def _embedding(
    op: Op, values: list[Value], results: list[Value], layouts: Layouts, tp: int, packed: tuple[int, ...]
) -> Iterator[Outcome]:
    indices, w = layouts[0], layouts[1]
    if indices not in (None, REPLICATE):
        return
    last = len(results[0].shape) - 1
    for wanted, result in ((shard(0), PARTIAL), (shard(1), shard(last))):
        if w == wanted or (w is None and _divides(wanted, values[1], tp)):
            yield Outcome((REPLICATE, wanted), (result,), True)


def _norm(
    op: Op, values: list[Value], results: list[Value], layouts: Layouts, tp: int, packed: tuple[int, ...]
) -> Iterator[Outcome]:
    x = layouts[0]
    normalised = op.dims[0] if op.dims else 1
    if x is None or not x.sharded or x.blocks > 1 or x.dim >= len(values[0].shape) - normalised:
        return
    affine = [GATHERED if value.requires_grad else REPLICATE for value in values[1:]]
    if all(layout in (None, wanted) for layout, wanted in zip(layouts[1:], affine, strict=True)):
        yield Outcome((x, *affine), (x,) * len(results), True)


def _attention(
    op: Op, values: list[Value], results: list[Value], layouts: Layouts, tp: int, packed: tuple[int, ...]
) -> Iterator[Outcome]:
    heads = shard(1)
    if len(results) != 1 or any(len(value.shape) != 4 for value in values[:3]):
        return
    if all(layout == heads for layout in layouts[:3]) and all(_quiet(v, x) for v, x in zip(values[3:], layouts[3:], strict=True)):
        yield Outcome((heads,) * 3 + (REPLICATE,) * len(values[3:]), (heads,), True)


def _matmul(
    op: Op, values: list[Value], results: list[Value], layouts: Layouts, tp: int, packed: tuple[int, ...]
) -> Iterator[Outcome]:
    a, b = layouts[0], layouts[1]
    rank = len(results[0].shape)
    if (
        a is not None
        and a == b
        and a.sharded
        and a.blocks == 1
        and a.dim < rank - 2
        and len(values[0].shape) == len(values[1].shape)
    ):
        yield Outcome((a, a), (a,), True)


def _pointwise(
    op: Op, values: list[Value], results: list[Value], layouts: Layouts, tp: int, packed: tuple[int, ...]
) -> Iterator[Outcome]:
    if len(results) != 1:
        return
    if op.linear:
        for passing in (PARTIAL, GATHERED):
            if all(layout == passing for layout in layouts):
                yield Outcome((passing,) * len(values), (passing,), False)
    rank = len(results[0].shape)
    for dim in {
        x.dim + rank - len(v.shape) for v, x in zip(values, layouts, strict=True) if x is not None and x.sharded and x.blocks == 1
    }:
        aligned = [_align(v, x, dim - (rank - len(v.shape)), tp) for v, x in zip(values, layouts, strict=True)]
        if all(layout is not None for layout in aligned):
            yield Outcome(tuple(layout for layout in aligned if layout is not None), (shard(dim),), True)


def _align(value: Value, layout: Layout | None, dim: int, tp: int) -> Layout | None:
    """The layout in which an operand joins a result sharded on (the operand's own) `dim`, or None when it cannot."""
    along = dim >= 0 and value.shape[dim] > 1
    if layout is None:  # a free parameter
        if along:
            return shard(dim) if shardable(value, dim, tp) else None
        return GATHERED if value.requires_grad else REPLICATE
    if along:
        return layout if layout == shard(dim) else (REPLICATE if _quiet(value, layout) else None)
    if layout == GATHERED or _quiet(value, layout):
        return layout
    return None


def _along(
    op: Op, values: list[Value], results: list[Value], layouts: Layouts, tp: int, packed: tuple[int, ...]
) -> Iterator[Outcome]:
    x = layouts[0]
    if len(values) == 1 and x is not None and x.sharded and x.blocks == 1 and x.dim not in op.dims:
        yield Outcome((x,), (x,) * len(results), True)


def _dims(
    op: Op, values: list[Value], results: list[Value], layouts: Layouts, tp: int, packed: tuple[int, ...]
) -> Iterator[Outcome]:
    x = layouts[0]
    if x is None or len(values) != 1 or len(results) != 1:
        return
    if x in (GATHERED, PARTIAL):
        yield Outcome((x,), (x,), False)
    elif x.sharded and x.dim in op.dim_map:
        yield Outcome((x,), (shard(op.dim_map.index(x.dim), x.blocks),), True)
    elif x.sharded and x.dim in op.dims and x.blocks == 1:  # repeat_interleave of whole heads
        yield Outcome((x,), (x,), True)


def _view(
    op: Op, values: list[Value], results: list[Value], layouts: Layouts, tp: int, packed: tuple[int, ...]
) -> Iterator[Outcome]:
    x = layouts[0]
    if x is None or len(values) != 1:
        return
    if x in (GATHERED, PARTIAL):
        yield Outcome((x,), (x,), False)
    elif x.sharded:
        target = through_view(values[0], results[0], x)
        if target is not None:
            yield Outcome((x,), (target,), True)


def through_view(source: Value, result: Value, layout: Layout) -> Layout | None:
    """The sharded dim must lead its group of dims: the devices' parts are then whole pieces of the result too."""
    for before, after in _groups(_full_shape(source), _full_shape(result)):
        if layout.dim not in before:
            continue
        if not after or before[0] != layout.dim:
            return None
        if layout.blocks > 1:
            if len(before) == 1 and len(after) == 1:
                return shard(after[0], layout.blocks)
            whole = len(before) == 1 and len(after) > 1 and result.shape[after[0]] == layout.blocks
            return shard(after[1]) if whole else None
        return shard(after[0])
    return None


def _full_shape(value: Value) -> list[int]:
    """The shape with more than one sample, so that a batch dim is never taken for a dim of length one."""
    return [size * 2 if dim == value.batch_dim else size for dim, size in enumerate(value.shape)]


def _groups(before: list[int], after: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Dims of a reshape that belong together: (input dims, output dims), dims of length one left out."""
    left = [(dim, size) for dim, size in enumerate(before) if size > 1]
    right = [(dim, size) for dim, size in enumerate(after) if size > 1]
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        size_a, size_b = a[0][1], b[0][1]
        while size_a != size_b:
            if size_a < size_b and left:
                a.append(left.pop(0))
                size_a *= a[-1][1]
            elif size_b < size_a and right:
                b.append(right.pop(0))
                size_b *= b[-1][1]
            else:
                return
        yield [dim for dim, _ in a], [dim for dim, _ in b]


def _split(
    op: Op, values: list[Value], results: list[Value], layouts: Layouts, tp: int, packed: tuple[int, ...]
) -> Iterator[Outcome]:
    x = layouts[0]
    dim = op.dims[0]
    removed = bool(results) and len(results[0].shape) < len(values[0].shape)  # unbind

    def moved(layout: Layout) -> Layout:
        return shard(layout.dim - (removed and layout.dim > dim), layout.blocks)

    if x is None:
        for k in packed:
            if k == len(results) and len(values[0].shape) == 2 and _divides(shard(dim, k), values[0], tp):
                yield Outcome((shard(dim, k),), (shard(dim),) * k, True)
        if values[0].requires_grad:
            yield Outcome((GATHERED,), (GATHERED,) * len(results), False)
    elif x in (GATHERED, PARTIAL):
        yield Outcome((x,), (x,) * len(results), False)
    elif x.sharded and x.dim != dim:
        yield Outcome((x,), tuple(moved(x) for _ in results), True)
    elif x.sharded and x.blocks == len(results) and not removed and len({r.shape for r in results}) == 1:
        yield Outcome((x,), (shard(dim),) * len(results), True)


def _cat(
    op: Op, values: list[Value], results: list[Value], layouts: Layouts, tp: int, packed: tuple[int, ...]
) -> Iterator[Outcome]:
    x = layouts[0]
    if x is None or any(layout != x for layout in layouts):
        return
    if x in (GATHERED, PARTIAL):
        yield Outcome((x,) * len(values), (x,), False)
    elif x.sharded and x.blocks == 1:
        made = op.name == "stack"
        if made or x.dim != op.dims[0]:
            yield Outcome((x,) * len(values), (shard(x.dim + (made and x.dim >= op.dims[0])),), True)


def _cross_entropy(
    op: Op, values: list[Value], results: list[Value], layouts: Layouts, tp: int, packed: tuple[int, ...]
) -> Iterator[Outcome]:
    if layouts[0] == shard(1) and len(values[0].shape) == 2 and all(layout in (None, REPLICATE) for layout in layouts[1:]):
        yield Outcome((shard(1),) + (REPLICATE,) * len(values[1:]), (REPLICATE,) * len(results), True)


_RULES = {
    "linear": _linear,
    "embedding": _embedding,
    "norm": _norm,
    "attention": _attention,
    "matmul": _matmul,
    "pointwise": _pointwise,
    "along": _along,
    "dims": _dims,
    "view": _view,
    "split": _split,
    "cat": _cat,
    "cross_entropy": _cross_entropy,
}


def conversions(value: Value, source: Layout, tp: int) -> Iterator[Layout]:
    """The layouts to which a border can bring `value`, the unchanged one first."""
    yield source
    if tp == 1 or not value.requires_grad or source == GATHERED or source.blocks > 1:
        return
    if source != REPLICATE:
        yield REPLICATE
    yield GATHERED
    if not source.sharded:
        for dim in range(len(value.shape)):
            if shardable(value, dim, tp) and len(value.shape) > 1:
                yield shard(dim)


BORDER_COLLECTIVES: dict[tuple[str, str], tuple[str | None, str | None]] = {
    ("replicate", "gathered"): (None, "all_reduce"),
    ("replicate", "shard"): (None, "all_gather"),
    ("shard", "replicate"): ("all_gather", None),
    ("shard", "gathered"): ("all_gather", "reduce_scatter"),
    ("partial", "replicate"): ("all_reduce", None),
    ("partial", "gathered"): ("all_reduce", "all_reduce"),
    ("partial", "shard"): ("reduce_scatter", "all_gather"),
}
"""(forward, backward) collective of each redistribution: the table of `autoplan.strategy`."""
