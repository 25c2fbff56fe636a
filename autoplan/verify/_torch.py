"""Every private name of PyTorch that `verify` needs, with the reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

# Tensors without memory.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

# Where an operation of either family, c10d or functional, keeps its process group.
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops

# The only tracker that sees FSDP resize storages.
from torch.distributed._tools.mem_tracker import MemTracker

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


class Peak(MemTracker):
    """`MemTracker` without its statistics of modules, which forbid that a module is called twice: in accumulation it is.

    DTensor finds the shapes of its results on fake tensors of whole, unsharded shapes. `MemTracker` tells them by their fake
    mode, which is the tracked one when the step itself runs on fake tensors; here they are not counted in either case.
    """

    _shapes_only = False

    def __enter__(self) -> Peak:
        original = self._propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def apart(propagator: ShardingPropagator, schema: Any) -> Any:
            self._shapes_only = True
            try:
                return original(propagator, schema)
            finally:
                self._shapes_only = False

        ShardingPropagator._propagate_tensor_meta_non_cached = apart  # type: ignore[method-assign,assignment]
        self._fake_mode_on_entry = torch._guards.active_fake_mode()
        self._track_resize()
        self._peak_mem_snap = self.get_tracker_snapshot()
        self._peak_mem = {device: found["Total"] for device, found in self._peak_mem_snap.items()}
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore_resize()
        TorchDispatchMode.__exit__(self, *error)
        ShardingPropagator._propagate_tensor_meta_non_cached = self._propagate  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._shapes_only and not any(issubclass(t, DTensor) for t in types):
            return func(*args, **kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)

    @property
    def peak(self) -> dict[str, int]:
        """Most bytes at once so far, by the type of the device."""
        return {device.type: found["Total"] for device, found in self.get_tracker_snapshot("peak").items()}


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
