"""Equal layers: a Llama of 126 equal blocks is traced like a Llama of one.

Members of a `ModuleList`, `ModuleDict` or `Sequential` that are equal in everything that can change what they compute
have one *signature*. The first two members that are called with a given kind of arguments are recorded and compared; a later
one with the same signature and the same kind of arguments is not run at all: a *stub* stands for it in the autograd
graph, whose outputs and gradients have the right shapes. If the two differ, all of their kind are run.

The signature sees classes, simple attributes (but for index-like ones), the names of callables, parameters, buffers and
children. Two blocks that differ only in something else (the contents of an object of theirs) have equal signatures, and the
comparison of the first two is what tells them apart.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoplan.capture.private import pytree, storage_key
from autoplan.capture.scope import Call, Item, Owned, Scope

_INDEX_LIKE = frozenset(
    ("layer_idx", "layer_id", "layer_number", "layer_index", "layer_no", "block_idx", "block_id", "idx", "index", "i")
)
_SIMPLE = (int, float, str, bool, type(None), torch.dtype)


def signature(module: nn.Module, foreign: frozenset[int] = frozenset()) -> Hashable:
    """Equal for modules that compute the same function of their arguments and parameters. `foreign`: ids of tied parameters."""
    attributes = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in _INDEX_LIKE and k != "training"}
    simple = tuple(sorted((k, repr(v)) for k, v in attributes.items() if _is_simple(v)))
    functions = tuple(sorted((k, _function(v)) for k, v in attributes.items() if callable(v)))
    tensors = tuple(
        (name, tuple(t.shape), str(t.dtype), t.requires_grad, id(t) if id(t) in foreign else 0)
        for table in (module._parameters, module._buffers)
        for name, t in table.items()
        if t is not None
    )
    children = tuple((k, None if c is None else signature(c, foreign)) for k, c in module._modules.items())
    return (type(module).__module__, type(module).__qualname__, simple, functions, tensors, children)


def _is_simple(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_simple(item) for pair in value.items() for item in pair)
    if isinstance(value, tuple | list):
        return all(_is_simple(item) for item in value)
    return isinstance(value, _SIMPLE)


def _function(value: Any) -> str:
    if isinstance(value, functools.partial):
        return f"{_function(value.func)}{value.args!r}{value.keywords!r}"
    return str(getattr(value, "__qualname__", type(value).__name__))


def find_blocks(root: nn.Module, excluded: frozenset[str] = frozenset()) -> dict[str, Hashable]:
    """Full name -> signature of the members of every list that has at least two equal members; the outermost ones only.

    Leaf modules, and modules without parameters, are no blocks. `excluded` are names that turned out not to be.
    """
    found: dict[str, Hashable] = {}
    shared = _shared_parameters(root)
    for name, module in root.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) or len(module) < 2:
            continue
        if any(name == block or name.startswith(f"{block}.") for block in found):
            continue
        members = {key: child for key, child in module._modules.items() if child is not None and _may_be_block(child)}
        signatures = {key: signature(child, shared) for key, child in members.items()}
        if max(Counter(signatures.values()).values(), default=0) >= 2:
            prefix = f"{name}." if name else ""
            found.update({f"{prefix}{key}": sig for key, sig in signatures.items() if f"{prefix}{key}" not in excluded})
    return found


def _may_be_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _shared_parameters(root: nn.Module) -> frozenset[int]:
    counts = Counter(id(p) for module in root.modules() for p in module._parameters.values() if p is not None)
    return frozenset(key for key, count in counts.items() if count > 1)


def ownership(root: nn.Module, blocks: Mapping[str, Hashable]) -> tuple[dict[int, Owned], tuple[tuple[str, ...], ...]]:
    """Id of every parameter and buffer -> where it lives; and the groups of names that are one tensor."""
    names: dict[int, list[str]] = {}
    for kind in (root.named_parameters, root.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    owned = {key: Owned(group[0], block_of(group[0], blocks)) for key, group in names.items()}
    return owned, tuple(tuple(group) for group in names.values() if len(group) > 1)


def block_of(name: str, blocks: Mapping[str, Hashable]) -> str:
    """The block that a parameter or module is under, "" for none."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        prefix = ".".join(parts[:i])
        if prefix in blocks:
            return prefix
    return ""


def call_key(sig: Hashable, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Equal for two calls of equal blocks that run the same operations: same tensors but for their contents."""
    flat, spec = pytree.tree_flatten((args, dict(kwargs)))
    first: dict[int, int] = {}
    described = tuple(_describe(leaf, first) for leaf in flat)
    return (sig, str(spec), described, torch.is_grad_enabled(), module.training)


def _describe(leaf: Any, first: dict[int, int]) -> Hashable:
    if isinstance(leaf, Tensor):
        place = first.setdefault(id(leaf), len(first))
        return (place, tuple(leaf.shape), leaf.stride(), str(leaf.dtype), leaf.requires_grad)
    return repr(leaf) if isinstance(leaf, _SIMPLE) else type(leaf).__name__


@dataclass
class Twin:
    """What a stub needs to know of the recorded block that it repeats."""

    scope: Scope
    unseen: list[Tensor]
    spec: Any
    constants: dict[int, Any]
    """Leaves of the result that are no tensors."""
    passed: dict[int, int]
    """Leaves of the result that are arguments: which one."""
    made: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]]
    """Shape, stride, dtype, requires_grad of the tensors that the block made."""
    repeats: dict[int, int]
    """Leaves of the result that are an earlier leaf again."""


def remember(scope: Scope, arguments: list[Tensor], unseen: list[Tensor], result: Any) -> Twin | None:
    """The twin for later stubs, or None when the block can't be repeated: it returns a view of an argument, or an odd object."""
    flat, spec = pytree.tree_flatten(result)
    inputs = {id(tensor): i for i, tensor in enumerate(arguments)}
    storages = {storage_key(tensor) for tensor in (*arguments, *unseen)}
    twin = Twin(scope, unseen, spec, {}, {}, [], {})
    seen: dict[int, int] = {}
    for i, leaf in enumerate(flat):
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, _SIMPLE):
                return None
            twin.constants[i] = leaf
        elif id(leaf) in inputs:
            twin.passed[i] = inputs[id(leaf)]
        elif id(leaf) in seen:
            twin.repeats[i] = seen[id(leaf)]
        elif storage_key(leaf) in storages:
            return None
        else:
            seen[id(leaf)] = i
            twin.made.append((tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad))
    return twin


def difference(one: Twin, other: Twin) -> str:
    """Where two recorded blocks differ: a call and its place, or "" when they are equal in all that a graph holds."""
    a, b = one.scope, other.scope
    for left, right in zip(a.calls, b.calls, strict=False):
        if _facts(a, left) != _facts(b, right):
            return f"{left.name} ({left.place or left.module or 'border'})"
    if len(a.calls) != len(b.calls):
        return f"the number of operations ({len(a.calls)} and {len(b.calls)})"
    if [_item(item) for item in a.items] != [_item(item) for item in b.items]:
        return "a tensor's shape, dtype or memory"
    if (a.inputs, a.input_leaves, a.outputs) != (b.inputs, b.input_leaves, b.outputs):
        return "what goes in and comes out"
    if [id(tensor) for tensor in one.unseen] != [id(tensor) for tensor in other.unseen]:
        return "a tensor that they reach unseen"
    return ""


def _facts(scope: Scope, call: Call) -> Hashable:
    kept = tuple((scope.root(tensor), tensor.untyped_storage().nbytes()) for tensor in call.packed)
    what = (call.kind, call.name, call.module, call.inputs, call.outputs, call.dims, call.dim_map, call.linear, call.leaf)
    costs = tuple((meter.flops, meter.bytes, meter.kernels) for meter in (call.forward, call.backward))
    return (what, costs, kept)


def _item(item: Item) -> Hashable:
    return (item.shape, item.dtype, item.requires_grad, item.storage, item.parameter)


def repeat(twin: Twin, arguments: list[Tensor], unseen: list[Tensor], anchor: Tensor | None) -> Any:
    """The result of a block that is not run. `anchor` is a parameter of it, so that the result can need a gradient."""
    anchors = [] if anchor is None else [anchor]
    made = iter(_Stub.apply(twin, *arguments, *unseen, *anchors) if twin.made else ())
    flat: list[Any] = []
    for i in range(len(twin.constants) + len(twin.passed) + len(twin.made) + len(twin.repeats)):
        if i in twin.constants:
            flat.append(twin.constants[i])
        elif i in twin.passed:
            flat.append(arguments[twin.passed[i]])
        elif i in twin.repeats:
            flat.append(flat[twin.repeats[i]])
        else:
            flat.append(next(made))
    return pytree.tree_unflatten(flat, twin.spec)


class _Stub(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, twin: Twin, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.shapes = [(t.shape, t.dtype) for t in inputs]
        outputs = [torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype, _ in twin.made]
        ctx.mark_non_differentiable(*(out for out, made in zip(outputs, twin.made, strict=True) if not made[3]))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made = [
            torch.empty(shape, dtype=dtype) if needed else None
            for (shape, dtype), needed in zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        ]
        return (None, *made)
