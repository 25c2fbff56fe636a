"""Every private name of PyTorch that `verify` needs, with the reason."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

# Tensors without memory.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

# The storages within a tensor that holds others.
from torch.distributed._tools.common_utils import get_untyped_storages

# Where an operation of either family, c10d or functional, keeps its process group.
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops

# What a pipeline's first step sends in some versions: see `unannounced`.
from torch.distributed.pipelining import PipelineStage

# `_clear_python_sharding_prop_cache` and its fast twin. One function that does both came after 2.10.
from torch.distributed.tensor import DTensor, debug

# Where DTensor makes fake tensors of whole shapes, which are not memory.
from torch.distributed.tensor._sharding_prop import ShardingPropagator

# Is a torch function mode asked, or is it at work itself?
from torch.overrides import _get_current_function_mode

# A process group of any size of which only this process is there.
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoplan.apply.outside import running


class Peak(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most at once; what was made before it must be given to `track`.

    The total is that of PyTorch's own `MemTracker` (a test compares them), found in a fraction of its time: nothing is kept by
    module or purpose. Not counted are fake tensors of whole, unsharded shapes on which DTensor finds the shapes of its results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.most = 0
        self._known: dict[int, tuple[int, weakref.ref[Any]]] = {}
        """By storage: its bytes, and what tells when it is gone."""
        self._shapes_only = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that it would get costs more than all that is done here

    def track(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            for storage in [tensor.untyped_storage()] if type(tensor) in PLAIN else get_untyped_storages(tensor):
                self._track(storage, tensor)
        self.most = max(self.most, self.held)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation's result."""
        return func(*args, **kwargs)

    def __enter__(self) -> Peak:
        original = self._propagate = ShardingPropagator._propagate_tensor_meta_non_cached
        resize = self._resize = torch.UntypedStorage.resize_

        def apart(propagator: ShardingPropagator, schema: Any) -> Any:
            self._shapes_only = True
            try:
                return original(propagator, schema)
            finally:
                self._shapes_only = False

        def resized(storage: torch.UntypedStorage, size: int) -> None:  # FSDP's way to free what it has gathered
            resize(storage, size)
            if storage._cdata in self._known:
                self._renew(storage)

        ShardingPropagator._propagate_tensor_meta_non_cached = apart  # type: ignore[method-assign,assignment]
        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = self._propagate  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is PRIM_DEVICE:  # more than half of all calls
            return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        if DTensor in types:
            return NotImplemented
        if self._shapes_only:
            return func(*args, **kwargs or {})
        result = self.run(func, args, kwargs or {})
        if (func is WAIT or (func is INDEX_PUT and True in args[3:])) and torch._guards.active_fake_mode():
            result = args[0]  # it makes a tensor here, but not in training: an index's backward pass adds up in place there
        if isinstance(result, torch.Tensor):
            self.track(result)
        elif result is not None:
            self.track(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)))
        return result

    def _track(self, storage: torch.UntypedStorage, tensor: torch.Tensor) -> None:
        key = storage._cdata
        if key in self._known:
            if self._known[key][0] != storage.size():
                self._renew(storage)
        elif tensor.device.type != "meta":
            size = storage.size()
            self._known[key] = size, weakref.ref(storage, lambda _: self._forget(key))
            self.held += size

    def _renew(self, storage: torch.UntypedStorage) -> None:
        old, reference = self._known[storage._cdata]
        self._known[storage._cdata] = storage.size(), reference
        self.held += storage.size() - old

    def _forget(self, key: int) -> None:
        self.held -= self._known.pop(key)[0]


PRIM_DEVICE = torch.ops.prim.device.default
WAIT = torch.ops._c10d_functional.wait_tensor.default
INDEX_PUT = torch.ops.aten.index_put.default
PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)
"""Types of tensors that hold no other ones."""


@contextmanager
def told_devices() -> Iterator[None]:
    """While it lasts, a fake tensor that another pipeline stage makes says to the model's own code that it is where the others
    are, as a real one does by `apply.outside`: `device` of a fake tensor is Python's own, which no torch function mode sees."""
    original = vars(FakeTensor)["device"]

    def device(self: FakeTensor) -> torch.device:
        found: torch.device = original.__get__(self)
        mode = running()
        heard = mode is not None and not mode.paused and _get_current_function_mode() is mode
        return mode.device if heard and found.type == "meta" else found  # type: ignore[union-attr]

    FakeTensor.device = property(device, original.fset)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        FakeTensor.device = original  # type: ignore[method-assign]


@contextmanager
def unannounced() -> Iterator[None]:
    """While it lasts, stages send no number to their neighbours before a schedule's first step, to make a connection.

    Some versions of torch do; nobody is there to connect to, and it is no part of a plan.
    """
    original = PipelineStage._get_init_p2p_neighbors_ops
    PipelineStage._get_init_p2p_neighbors_ops = lambda self: []  # type: ignore[method-assign]
    try:
        yield
    finally:
        PipelineStage._get_init_p2p_neighbors_ops = original  # type: ignore[method-assign]


def forget_meshes() -> None:
    """Clear what DTensor remembers: meshes of another rank are equal to those of the next, but their groups are gone."""
    debug._clear_python_sharding_prop_cache()
    debug._clear_fast_path_sharding_prop_cache()
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.distributed.tensor") and module is not None:
            for found in list(vars(module).values()):
                if not isinstance(found, type) and callable(getattr(found, "cache_clear", None)):
                    found.cache_clear()


def group_of(func: Any, args: tuple[Any, ...]) -> list[int] | None:
    """The ranks that take part in a collective operation; None where `func` is none."""
    if func not in collective_ops or func in sync_ops:
        return None
    return dist.get_process_group_ranks(CollectiveOp.get_process_group(func, args))


__all__ = [
    "FakeStore",
    "FakeTensorMode",
    "Peak",
    "TorchDispatchMode",
    "forget_meshes",
    "group_of",
    "told_devices",
    "tree_leaves",
    "unannounced",
]
