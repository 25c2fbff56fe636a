"""What a layer's parameters cost on the dp axes of a mesh: g, r, a, u and p of cost.step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from autoplan.cost.collectives import collective_time
from autoplan.cost.compute import memory_time, optimizer_time
from autoplan.cost.parameters import Sizes
from autoplan.graph import DTYPE_BYTES
from autoplan.hardware import HardwareProfile
from autoplan.plan import needs_fsdp
from autoplan.strategy import Mesh
from autoplan.units import Bytes, Seconds
from autoplan.workload import OPTIMIZER_STATES, Workload


class DataParallel(NamedTuple):
    """What a layer's parameters cost on the dp axes of a mesh, whatever the strategy."""

    gather: Seconds
    reduce: Seconds
    final: Seconds
    unpack: Seconds
    """FSDP's copies of what it gathered; `pack`: into what it reduces."""
    pack: Seconds
    optimizer: Seconds
    numel: float
    """On one rank, cut by tp and dp_shard; `trainable` ones among them."""
    trainable: float
    whole: float
    """Cut by tp alone, where FSDP makes them so; `whole_trainable` ones among them."""
    whole_trainable: float


class HasParameters(Protocol):
    """What has parameters: a layer's cost."""

    def sizes(self, dealt: bool, shards: int) -> Sizes:
        """`cost.parameters.sizes` of them."""


def data_parallel(cost: HasParameters, mesh: Mesh, hardware: HardwareProfile, load: Workload) -> DataParallel:
    """Seconds of gathering parameters and reducing gradients over dp_shard, of all-reducing their shards over dp_replicate,
    and of the optimizer."""
    size, compute, reduce = (DTYPE_BYTES[t] for t in (load.param_dtype, load.compute_dtype, load.reduce_dtype))
    gather = reduction = final = unpacked = packed = 0.0
    numel = trainable = whole = whole_trainable = 0.0
    for dealt, shards, stride in ((False, mesh.shards, mesh.tp), (True, mesh.efsdp, mesh.ep)):
        local = cost.sizes(dealt, shards)
        if not np.any(local.numel):
            continue
        gathered, trained = local.numel * shards, local.trainable * shards  # with what FSDP fills up the last shards
        numel, trainable = numel + local.numel, trainable + local.trainable
        whole, whole_trainable = whole + gathered, whole_trainable + trained
        of_one, of_gradient = copied(load, alone=shards == 1)
        unpacked, packed = unpacked + gathered * of_one, packed + trained * of_gradient

        def seconds(kind: str, sent: Bytes, group: int, apart: int) -> Seconds:
            return _of_each(lambda one: collective_time(kind, one, group, apart, hardware), sent)

        gather = gather + seconds("all_gather", gathered * compute, shards, stride)
        reduction = reduction + seconds("reduce_scatter", trained * reduce, shards, stride)
        final = final + seconds("all_reduce", trained * reduce / shards, mesh.dp_replicate, shards * stride)
    if not needs_fsdp(mesh, load):  # gradients are made in their place
        whole = whole_trainable = unpacked = packed = 0.0 * numel
    states = OPTIMIZER_STATES[load.optimizer]
    optimizer = _of_each(lambda one: optimizer_time(one, states, hardware.device), trainable * size)
    unpack, pack = (memory_time(each, hardware.device) for each in (unpacked, packed))
    return DataParallel(gather, reduction, final, unpack, pack, optimizer, numel, trainable, whole, whole_trainable)


def copied(load: Workload, *, alone: bool) -> tuple[Bytes, Bytes]:
    """u and p: bytes read and written for a parameter and for a gradient; `alone`: of what one rank has whole."""
    size, compute, reduce = (DTYPE_BYTES[t] for t in (load.param_dtype, load.compute_dtype, load.reduce_dtype))
    cast = size + compute if alone and load.param_dtype != load.compute_dtype else 0.0
    return 2 * compute + cast, compute + reduce + (2 * reduce if alone else 0.0)


def _of_each(price: Callable[[Bytes], Seconds], sizes: Bytes) -> Seconds:
    """`price` of a size, or of every size of an array: most of them are alike."""
    if not isinstance(sizes, np.ndarray):
        return price(sizes)
    different, which = np.unique(sizes, return_inverse=True)
    found: Seconds = np.array([price(size) for size in different.tolist()])[which]
    return found
