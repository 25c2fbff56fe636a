"""Two recordings, of two and of three samples, become one `Graph` whose costs are affine in the batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from autoplan.capture.private import storage_key
from autoplan.capture.record import Recorder
from autoplan.capture.scope import Call, Item, Owned, Scope
from autoplan.errors import UsageError
from autoplan.graph import Block, Body, Cost, Graph, Op, Parameter, Value

BATCHES = (2, 3)
"""The two batch sizes. Neither is 1, so that no dim of length one is taken for the batch."""


SAME = "Capture needs a program that does not depend on the batch size."


def merge(name: str, dtype: str, root: nn.Module, two: Recorder, three: Recorder) -> Graph:
    """The graph of a model that was recorded twice. Raises `UsageError` when the batch changes more than sizes."""
    if list(two.layers) != list(three.layers):
        raise UsageError(f"{name} runs other layers for a batch of 3 than for a batch of 2.", SAME)
    bodies: dict[Body, int] = {}
    known: dict[tuple[int, int], int] = {}
    blocks = []
    for layer, scope in two.layers.items():
        pair = (id(scope), id(three.layers[layer]))
        if pair not in known:
            body = _body(name, root, scope, three.layers[layer], two.owned)
            known[pair] = bodies.setdefault(body, len(bodies))
        blocks.append(Block(layer, known[pair]))
    outer = _body(name, root, two.outer, three.outer, two.owned)
    inputs = tuple(
        (leaf, outer.values[i].shape, outer.values[i].dtype) for leaf, i in zip(outer.input_leaves, outer.inputs, strict=True)
    )
    return Graph(name, dtype, outer, tuple(bodies), tuple(blocks), two.tied, inputs, tuple({**two.warnings, **three.warnings}))


def _body(name: str, root: nn.Module, two: Scope, three: Scope, owned: Mapping[int, Owned]) -> Body:
    if len(two.calls) != len(three.calls) or len(two.items) != len(three.items):
        raise UsageError(
            f"{name} runs {len(two.calls)} operations for a batch of 2 and {len(three.calls)} for a batch of 3{_where(two)}.",
            SAME,
        )
    users = {value: call for call in reversed(two.calls) for value in call.outputs}
    values = tuple(_value(i, a, b, two, users.get(i)) for i, (a, b) in enumerate(zip(two.items, three.items, strict=True)))
    kept: set[int] = set()
    ops = tuple(_op(a, b, two, three, values, kept) for a, b in zip(two.calls, three.calls, strict=True))
    return Body(values, ops, tuple(two.inputs), tuple(two.outputs), _parameters(root, two.name, owned), tuple(two.input_leaves))


def _where(scope: Scope) -> str:
    return f" in {scope.name}" if scope.name else ""


def _value(index: int, two: Item, three: Item, scope: Scope, maker: Call | None) -> Value:
    differing = [dim for dim, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    where = f"{maker.name} at {maker.place}" if maker is not None and maker.place else "an input of the model"
    if len(differing) > 1:
        raise UsageError(
            f"{where} makes a tensor of {list(two.shape)} for a batch of 2 and of {list(three.shape)} for a batch of 3.",
            "Capture needs samples that do not meet each other: at most one dim may grow with the batch.",
        )
    shape, batch_dim = two.shape, None
    if differing:
        batch_dim = differing[0]
        length = three.shape[batch_dim] - two.shape[batch_dim]
        if two.shape[batch_dim] != BATCHES[0] * length:
            raise UsageError(
                f"{where} makes a tensor of {list(two.shape)} for a batch of 2 and of {list(three.shape)} for a batch of 3.",
                "Capture needs sizes that are proportional to the batch.",
            )
        shape = (*shape[:batch_dim], length, *shape[batch_dim + 1 :])
    return Value(index, shape, two.dtype, batch_dim, two.requires_grad, two.storage, two.parameter)


def _op(two: Call, three: Call, scope: Scope, scope3: Scope, values: tuple[Value, ...], kept: set[int]) -> Op:
    same = ("kind", "name", "module", "inputs", "outputs", "leaf", "block")
    if any(getattr(two, key) != getattr(three, key) for key in same):
        raise UsageError(
            f"{two.place or two.module} runs {two.name} for a batch of 2, where {three.place or three.module} runs {three.name} "
            "for a batch of 3.",
            SAME,
        )
    before = set(kept)
    saved, extra = _saved(two, scope, values, kept)
    _, extra3 = _saved(three, scope3, values, before)
    return Op(
        two.kind,
        two.name,
        two.module,
        two.inputs,
        two.outputs,
        two.dims,
        two.dim_map,
        two.linear,
        two.leaf,
        two.block,
        _cost(two.forward.flops, three.forward.flops),
        _cost(two.backward.flops, three.backward.flops),
        _cost(two.forward.bytes, three.forward.bytes),
        _cost(two.backward.bytes, three.backward.bytes),
        two.forward.kernels,
        two.backward.kernels,
        saved,
        _cost(extra, extra3),
    )


def _cost(two: float, three: float) -> Cost:
    return Cost(three - two, 3 * two - 2 * three)


def _saved(call: Call, scope: Scope, values: tuple[Value, ...], kept: set[int]) -> tuple[tuple[int, ...], float]:
    """The values that a call keeps, and the bytes of kept memory that is no value.

    `kept`: what earlier calls counted.
    """
    saved: dict[int, None] = {}
    extra = 0.0
    for tensor in call.packed:
        root = scope.root(tensor)
        if root is not None:
            if values[root].parameter is not None or _constant(scope, root):
                continue
            saved[root] = None
        key = storage_key(tensor)
        if key not in kept:
            kept.add(key)
            extra += tensor.untyped_storage().nbytes() - (0 if root is None else _size(scope.items[root].tensor))
    return tuple(saved), extra


def _size(tensor: Tensor) -> int:
    """Bytes that the value stands for; a slice keeps all of its storage, an expanded tensor less than its size."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _constant(scope: Scope, root: int) -> bool:
    return any(scope.items[root].tensor is tensor for tensor in scope.constants)


def _parameters(root: nn.Module, block: str, owned: Mapping[int, Owned]) -> tuple[Parameter, ...]:
    """All parameters and buffers under `block` and under no other ("" : under none), tied ones under their first name."""
    found = []
    prefix = f"{block}." if block else ""
    module = root.get_submodule(block)
    seen: set[int] = set()
    for buffer, table in ((False, module.named_parameters()), (True, module.named_buffers())):
        for _, tensor in table:
            home = owned[id(tensor)]
            if home.block == block and id(tensor) not in seen:
                seen.add(id(tensor))
                found.append(_parameter(home.name.removeprefix(prefix), tensor, buffer))
    return tuple(found)


def _parameter(name: str, tensor: Tensor, buffer: bool) -> Parameter:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Parameter(name, tuple(tensor.shape), dtype, trainable=tensor.requires_grad and not buffer, buffer=buffer)
