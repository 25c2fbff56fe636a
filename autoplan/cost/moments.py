"""What a layer holds at the fullest moments of its backward pass, and FSDP for it. cost.step tells how they come together.

A layer's parameters are `gathered` in the compute dtype, its unreduced gradients are made in it, `raw`, copied into a `buffer` in
the reduce dtype, and come out of it as the rank's `own`. FSDP frees the parameters before it makes that buffer, and the raw
gradients before it makes the rank's own (`post_backward`, `foreach_reduce`): so while they are `turned` there are

    levels 2, 3   max(raw, own) + max(0, buffer - gathered)     own: beside the sum of those of other micro-batches
    level 1       max(raw, buffer - gathered)                   beside whole gradients, in whose place own ones come

of the layer; under level 3 its neighbour's gathered parameters as well. `fsdp_bytes` has these sizes, `of_layer` and `of_outer`
the moments. All arithmetic is elementwise, as that of cost.step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autoplan.cost.data_parallel import DataParallel
from autoplan.cost.layer import LayerCost
from autoplan.graph import DTYPE_BYTES
from autoplan.strategy import Zero
from autoplan.units import Bytes
from autoplan.workload import Workload


class Fsdp(NamedTuple):
    """Bytes of a layer's whole parameters and gradients: see the module."""

    raw: Bytes
    buffer: Bytes
    turned: Bytes
    stays: Bytes
    """Gathered parameters that are there for both passes, under level 1 for the whole step, as whole gradients."""
    passing: Bytes
    """... that are there for a pass."""
    going: Bytes
    """... for both passes, and go with the backward one."""
    last: Bytes
    """The buffer that stays between the passes of other micro-batches."""
    early: Bytes
    """See `LayerStep`, as `come`."""
    come: Bytes


class Moments(NamedTuple):
    """See `LayerStep`."""

    unsharded: Bytes
    resharded: Bytes
    less: Bytes
    whole: Bytes
    ending: Bytes
    alone: Bytes
    inside: Bytes
    window: Bytes
    reducing: Bytes
    buffer: Bytes
    early: Bytes
    come: Bytes


def fsdp_bytes(dp: DataParallel, zero: Zero, micro_batches: int, load: Workload, *, outer: bool, pipelined: bool) -> Fsdp:
    """Of a layer, or of the `outer` one; `zero`: 1 only where there are several micro-batches."""
    size, compute, reduce = (DTYPE_BYTES[t] for t in (load.param_dtype, load.compute_dtype, load.reduce_dtype))
    gathered, raw, buffer = dp.whole * compute, dp.whole_trainable * compute, dp.whole_trainable * reduce
    none, several = 0.0 * gathered, micro_batches > 1
    stays = none if zero == 3 and not outer else gathered  # FSDP's root stays gathered for the whole backward pass
    between = pipelined and several and zero != 1
    copied = none if outer and between else larger(buffer - stays, none)
    own = dp.trainable * reduce if several else none  # else they are the gradients
    gradients = dp.trainable * size
    return Fsdp(
        raw=raw,
        buffer=none if zero == 1 else buffer,
        turned=larger(raw, copied) if zero == 1 else larger(raw, own) + copied,
        stays=stays + (buffer if zero == 1 else none),
        passing=gathered - stays,
        going=stays if zero == 2 and not outer else none,
        last=buffer if between else none,
        early=none if several and zero != 1 else gradients,
        come=none if several else gradients,  # under level 1 whole ones go
    )


def of_outer(cost: LayerCost, kept: Bytes, fsdp: Fsdp, ahead: Bytes) -> Moments:
    """The outer layer's moments; while layers run some of its gradients are there, and the last buffer of others' passes."""
    gradients = smaller(cost.beneath, fsdp.raw)  # nearly all that is beneath are gradients
    none, made = 0.0 * fsdp.raw, fsdp.raw > 0  # without FSDP its own are there from the head's moment on
    return Moments(
        unsharded=fsdp.stays + gradients + fsdp.last,
        resharded=none,
        less=kept - (cost.beneath - gradients),
        whole=ahead,
        ending=kept + fsdp.turned - cost.beneath,
        alone=cost.peak + ahead - cost.beneath,
        inside=none,
        window=none,
        reducing=none,
        buffer=none,
        early=fsdp.early * made,
        come=larger(fsdp.come - fsdp.raw, none) * made,  # beside what is `ending`
    )


def of_layer(most: Bytes, kept: Bytes, fsdp: Fsdp) -> Moments:
    """The moments of a layer that holds at most so much besides what is `kept`."""
    none, window = 0.0 * fsdp.raw, 2 * fsdp.passing
    reducing = larger(fsdp.last, fsdp.buffer - kept - fsdp.going)
    return Moments(
        unsharded=fsdp.stays,
        resharded=fsdp.going,
        less=none,
        whole=fsdp.raw,
        ending=none,
        alone=none,
        inside=larger(most, fsdp.turned + fsdp.passing - kept - window - reducing),
        window=window,
        reducing=reducing,
        buffer=fsdp.buffer,
        early=fsdp.early,
        come=fsdp.come,
    )


def larger(one: Bytes, other: Bytes) -> Bytes:
    """The larger of two numbers, or of each pair."""
    return np.maximum(one, other) if isinstance(one, np.ndarray) or isinstance(other, np.ndarray) else max(one, other)


def smaller(one: Bytes, other: Bytes) -> Bytes:
    """The smaller of two numbers, or of each pair."""
    return np.minimum(one, other) if isinstance(one, np.ndarray) or isinstance(other, np.ndarray) else min(one, other)
