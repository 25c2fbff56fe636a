"""Build a model without its weights, and compute each weight later, one at a time, exactly as construction would have.

`record` calls the user's factory on the meta device and writes down every operation. `Recording.replay` runs on the CPU
those that matter, in the original order, with the original random numbers. Two facts make it cheap in memory:

- An operation that overwrites a tensor whole makes everything that happened to it before dead. Only the last such
  epoch of a storage is computed (a second `init` after the constructor's own); dead random operations still draw their
  numbers, into a scratch tensor that is dropped at once.
- A storage is given to `emit` and freed after the last operation that touches it. Constructors and `apply(init)` loops
  touch one parameter after another, so about one parameter is alive at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoplan.apply._torch import replaced_inits
from autoplan.apply.trees import tree_leaves, tree_map_only
from autoplan.errors import AutoplanError, UsageError


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a window on a storage."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


@dataclass(frozen=True, slots=True)
class Node:
    """One recorded operation; tensors in `args` and `outputs` are `View`s (or real tensors, which are constants)."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Any, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    """Storages that the operation makes or changes."""
    overwrites: bool
    """Nothing of what was in `writes` before survives."""
    random: bool


@dataclass
class Recording:
    """The operations of a constructor, and the size of every storage that they touch."""

    nodes: list[Node] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    peak: int = 0
    """Most bytes of storages that were alive at once in `replay`."""

    def replay(self, wanted: dict[int, Callable[[torch.UntypedStorage], None]], seed: int) -> None:
        """Compute the storages in `wanted`, and call each one's function with it as soon as it is final."""
        live = self._live(set(wanted))
        last = {storage: i for i, node in enumerate(self.nodes) if live[i] for storage in (*node.reads, *node.writes)}
        missing = set(wanted) - set(last)
        ends = defaultdict(list)
        for storage, i in last.items():
            ends[i].append(storage)
        alive: dict[int, torch.UntypedStorage] = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for i, node in enumerate(self.nodes):
                if live[i]:
                    self._run(node, alive)
                elif node.random:
                    self._run(node, {})
                for storage in ends.get(i, ()):
                    data = alive.pop(storage)
                    if storage in wanted:
                        wanted[storage](data)
        for storage in missing:  # torch.empty that nobody filled: any value is right, zero is a kind one
            wanted[storage](_blank(self.sizes[storage]))

    def _live(self, needed: set[int]) -> list[bool]:
        """Which operations the final values of the storages `needed` depend on."""
        live = [False] * len(self.nodes)
        needed = set(needed)
        for i in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[i]
            if needed.isdisjoint(node.writes):
                continue
            live[i] = True
            if node.overwrites:
                needed.difference_update(node.writes)
            needed.update(node.reads)
        return live

    def _run(self, node: Node, alive: dict[int, torch.UntypedStorage]) -> None:
        def real(leaf: View) -> torch.Tensor:
            if leaf.storage not in alive:
                alive[leaf.storage] = _blank(self.sizes[leaf.storage])
            return leaf.on(alive[leaf.storage])

        args, kwargs = tree_map_only(View, real, (node.args, node.kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        results = tree_leaves(node.func(*args, **kwargs))
        for view, result in zip(node.outputs, results, strict=True):
            if isinstance(view, View) and view.storage not in node.reads and view.storage not in alive:
                alive[view.storage] = _storage_of(result, view)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))


def _blank(size: int) -> torch.UntypedStorage:
    return torch.zeros(size, dtype=torch.uint8).untyped_storage()


def _storage_of(result: torch.Tensor, view: View) -> torch.UntypedStorage:
    """The storage of a new tensor, laid out as it was on meta."""
    if tuple(result.stride()) != view.stride or result.storage_offset() != view.offset:
        fresh = torch.empty_strided(view.shape, view.stride, dtype=view.dtype)
        result = fresh.copy_(result)
    return result.untyped_storage()


_RANDOM_FILLS = {"normal_", "uniform_", "exponential_", "log_normal_", "cauchy_", "geometric_", "random_", "bernoulli_"}
_FILLS = {"zero_", "fill_", "copy_", *_RANDOM_FILLS}
"""Operations that give every element of `self` a new value without reading the old one."""


_REAL = {"arange", "linspace", "logspace", "scalar_tensor"}
"""Creations that are left alone: small tables that constructors like to read from, with values that cost nothing."""


def _name(func: Any) -> str:
    return str(func._schema.name).split("::")[-1]


def _refuse_real_writes(func: Any, args: tuple[Any, ...]) -> None:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, torch.Tensor) and not value.is_meta:
            raise UsageError(
                f"the model's constructor writes weights into a table ({func}).",
                "Build the module yourself and pass it to apply instead of the factory.",
            )


class _Recorder(TorchDispatchMode):
    """Moves creations to the meta device, where tensors have no memory, and writes down what happens to them.

    It does so below PyTorch's own `torch.device("meta")`, which libraries look for, to leave out their initialisation.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self._storages: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not inputs and kwargs.get("device") is not None and _name(func) not in _REAL:
            kwargs["device"] = torch.device("meta")
            kwargs.pop("pin_memory", None)
        recorded = tree_map_only(torch.Tensor, self.view, (args, kwargs))
        random = torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
        if any(tensor.is_meta for tensor in inputs):
            _refuse_real_writes(func, args)
            args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        elif inputs and random:
            raise UsageError(
                f"the model's constructor draws random numbers into a tensor with a value ({func}).",
                "Build the module yourself and pass it to apply instead of the factory.",
            )
        result = func(*args, **kwargs)
        outputs = tree_leaves(result)
        if any(isinstance(out, torch.Tensor) and out.is_meta for out in outputs):
            self._note(func, recorded, inputs, outputs, random)
        return result

    def _note(self, func: Any, recorded: Any, inputs: list[torch.Tensor], outputs: list[Any], random: bool) -> None:
        args, kwargs = recorded
        views = tuple(self.view(out) if isinstance(out, torch.Tensor) else out for out in outputs)
        read = {view.storage for view in map(self.view, inputs) if isinstance(view, View)}
        mutated = [
            view.storage
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, View)
            for view in [value]
        ]
        made = [view.storage for view in views if isinstance(view, View) and view.storage not in read]
        if not made and not mutated:
            return  # a view: its readers know its window
        whole = bool(mutated) and _name(func) in _FILLS and self._covers(args[0])
        if whole:
            sources = {view.storage for view in tree_leaves((args[1:], kwargs)) if isinstance(view, View)}
            whole = args[0].storage not in sources
            read = sources if whole else read
        writes = tuple(dict.fromkeys([*made, *mutated]))
        overwrites = whole or (bool(made) and not mutated)
        self.recording.nodes.append(Node(func, args, kwargs, views, tuple(read), writes, overwrites, random))

    def draw(self, original: Callable[..., torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """An initialisation that needs values to look at: written down as one operation."""
        if not tensor.is_meta:
            return original(tensor, *args, **kwargs)
        view = self.view(tensor)
        reads = () if self._covers(view) else (view.storage,)
        random = kwargs.get("generator") is None
        node = Node(original, (view, *args), kwargs, (view,), reads, (view.storage,), not reads, random)
        self.recording.nodes.append(node)
        return tensor

    def _covers(self, view: View) -> bool:
        """Does the tensor fill its storage?"""
        numel = 1
        for size in view.shape:
            numel *= size
        dense = len(set(view.stride)) == len(view.stride) or numel <= 1 or 1 in view.shape
        return dense and numel * view.dtype.itemsize == self.recording.sizes[view.storage] and 0 not in view.stride

    def view(self, tensor: torch.Tensor) -> Any:
        """The window that a meta tensor is; a real tensor stays what it is."""
        if not tensor.is_meta:
            return tensor
        storage = tensor.untyped_storage()
        key, _ = self._storages.setdefault(storage._cdata, (len(self._storages), storage))  # kept, so that no id is used twice
        self.recording.sizes[key] = storage.nbytes()
        return View(key, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.dtype)


@dataclass(frozen=True)
class Deferred:
    """A model on meta, and how to compute what belongs into it."""

    model: nn.Module
    recording: Recording
    views: dict[str, View]
    """By full name: parameters, buffers, and other tensor attributes (`module.attribute`)."""
    constants: dict[str, torch.Tensor]
    """Those of them that have their values already."""

    def values(self, seed: int, emit: Callable[[str, torch.Tensor], None]) -> None:
        """Call `emit(name, full CPU tensor)` for every name, one storage at a time. The tensor is gone afterwards."""
        for name, tensor in self.constants.items():
            emit(name, tensor)
        by_storage: dict[int, list[str]] = defaultdict(list)
        for name, view in self.views.items():
            by_storage[view.storage].append(name)

        def deliver(names: list[str]) -> Callable[[torch.UntypedStorage], None]:
            def give(storage: torch.UntypedStorage) -> None:
                for name in names:
                    emit(name, self.views[name].on(storage))

            return give

        self.recording.replay({storage: deliver(names) for storage, names in by_storage.items()}, seed)


def record(factory: Callable[[], nn.Module]) -> Deferred:
    """Call `factory` without allocating its weights."""
    recording = Recording()
    recorder = _Recorder(recording)
    try:
        with torch.random.fork_rng(devices=[]), recorder, replaced_inits(recorder.draw):
            model = factory()
    except AutoplanError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error).lower():
            raise
        raise UsageError(
            f"the model's constructor reads a tensor's values or moves it ({str(error).splitlines()[0]})",
            "Build the module yourself and pass it to apply instead of the factory.",
        ) from error
    tensors = dict(named_tensors(model))
    views = {name: recorder.view(tensor) for name, tensor in tensors.items() if tensor.is_meta}
    return Deferred(model, recording, views, {name: tensor for name, tensor in tensors.items() if not tensor.is_meta})


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers and tensors that are mere attributes of modules, by full name, tied names each."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for holder in (module._parameters, module._buffers, module.__dict__):
            for name, tensor in holder.items():
                if isinstance(tensor, torch.Tensor):
                    yield f"{prefix}.{name}" if prefix else name, tensor
