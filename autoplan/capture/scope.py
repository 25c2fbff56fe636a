"""Bookkeeping of one recording: which tensor is which value in which scope, and the calls in order.

A `Scope` becomes a `Body`. Inside it every module that is running has a *frame*, a map from tensors to values: on entering
a module its arguments get new values that only its frame knows, on leaving its outputs get new values in the frame
outside. A tensor that no frame knows is a parameter, or comes from the scope outside, or is a constant.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoplan.capture.private import storage_key
from autoplan.graph import OpKind

_HOUSE = (str(Path(torch.__file__).parent), str(Path(__file__).parent), str(Path(__file__).parent.parent / "adapt.py"))


def place() -> str:
    """file:line of the innermost frame of the user's code."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_HOUSE):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


@dataclass
class Meter:
    """What the kernels of one call cost in one direction."""

    flops: float = 0.0
    bytes: float = 0.0
    kernels: int = 0


@dataclass
class Call:
    """An operation as it is recorded, at one batch size."""

    kind: OpKind
    name: str
    module: str
    place: str
    """file:line of the user's code."""
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    dim_map: tuple[int, ...] = ()
    linear: bool = False
    causal: bool = False
    dropout: bool = False
    leaf: str = ""
    block: int = -1
    block_name: str = ""
    """Name of the block in whose scope the call is, "" for the outer one."""
    forward: Meter = field(default_factory=Meter)
    backward: Meter = field(default_factory=Meter)
    packed: list[Tensor] = field(default_factory=list)
    """Tensors that autograd keeps for the backward pass of this call."""
    func: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    result: Any = None


@dataclass
class Item:
    """A value as it is recorded."""

    tensor: Tensor
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    storage: int
    parameter: str | None = None
    each_sample: bool = False
    """Whether there is one such tensor for each sample; see `bundle`."""


@dataclass(frozen=True)
class Owned:
    """Where a parameter or buffer lives: its full (first) name, and the block that it is under, "" for none."""

    name: str
    block: str


class Scope:
    """One body while it is recorded. `name` is the block's full name, "" for the outer one."""

    def __init__(self, name: str, parent: Scope | None, owned: Mapping[int, Owned]) -> None:
        self.name = name
        self.parent = parent
        self.items: list[Item] = []
        self.calls: list[Call] = []
        self.inputs: list[int] = []
        self.input_leaves: list[str] = []
        self.outputs: list[int] = []
        self.constants: list[Tensor] = []
        self._owned = owned
        self._frames: list[dict[int, int]] = [{}]
        self._left: dict[int, int] = {}
        self._roots: dict[int, int] = {}

    def push(self) -> None:
        self._frames.append({})

    def pop(self) -> None:
        self._left.update(self._frames.pop())

    @property
    def depth(self) -> int:
        """How many modules are running."""
        return len(self._frames)

    @depth.setter
    def depth(self, depth: int) -> None:
        while self.depth > depth:
            self.pop()

    def value(self, tensor: Tensor, parameter: str | None = None, outside: bool = False) -> int:
        """A new value for `tensor`, known to the innermost frame (`outside`: to the outermost one)."""
        index = len(self.items)
        root = self._roots.setdefault(storage_key(tensor), index)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.items.append(Item(tensor, tuple(tensor.shape), dtype, tensor.requires_grad, root, parameter))
        self._frames[0 if outside else -1][id(tensor)] = index
        return index

    def renumber(self, new: Mapping[int, int]) -> None:
        """Items have new numbers; those without one are gone."""
        self._roots = {key: new[index] for key, index in self._roots.items() if index in new}
        self.inputs = [new[index] for index in self.inputs]
        self.outputs = [new[index] for index in self.outputs]

    def root(self, tensor: Tensor) -> int | None:
        """The value that allocated the memory of `tensor`, as far as this scope knows it."""
        return self._roots.get(storage_key(tensor))

    def known(self, tensor: Tensor) -> int | None:
        """The value that `tensor` is in the innermost frame that knows it."""
        for frame in reversed(self._frames):
            if id(tensor) in frame:
                return frame[id(tensor)]
        return self._left.get(id(tensor))

    def find(self, tensor: Tensor) -> int:
        """The value that `tensor` is here, made now if the scope has not met it."""
        index = self.known(tensor)
        if index is not None:
            return index
        owned = self._owned.get(id(tensor))
        if owned is not None and (self.parent is None or owned.block == self.name):
            name = owned.name.removeprefix(f"{self.name}.") if self.name else owned.name
            return self.value(tensor, parameter=name, outside=True)
        if self.parent is not None and (owned is not None or self.parent.reaches(tensor)):
            return self.take(tensor, "")
        index = self.value(tensor, outside=True)
        self.constants.append(tensor)
        self.calls.append(Call("opaque", "constant", "", "", outputs=(index,), result=tensor))
        return index

    def reaches(self, tensor: Tensor) -> bool:
        """Whether this scope or one outside it knows the tensor."""
        return self.known(tensor) is not None or (self.parent is not None and self.parent.reaches(tensor))

    def take(self, tensor: Tensor, leaf: str) -> int:
        """A new input of the body."""
        index = self.value(tensor, outside=True)
        self.inputs.append(index)
        self.input_leaves.append(leaf)
        return index


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """(place, tensor) of the tensors in a call's arguments or results: "0", "mask", "1.0"."""
    if isinstance(tree, Tensor):
        yield path or "0", tree
        return
    prefix = f"{path}." if path else ""
    if isinstance(tree, list | tuple):
        for i, item in enumerate(tree):
            yield from leaves(item, f"{prefix}{i}")
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from leaves(item, f"{prefix}{key}")
    elif is_dataclass(tree) and not isinstance(tree, type):
        for entry in fields(tree):
            yield from leaves(getattr(tree, entry.name), f"{prefix}{entry.name}")


def argument_leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors passed in one call, each once: "0,1,2" for one that is passed three times."""
    return merged([*leaves(args), *leaves(kwargs)])


def merged(found: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """One entry a tensor, its places joined by ","."""
    places: dict[int, list[str]] = {}
    for place, tensor in found:
        places.setdefault(id(tensor), []).append(place)
    once = {id(tensor): tensor for _, tensor in found}
    return [(",".join(names), once[key]) for key, names in places.items()]
