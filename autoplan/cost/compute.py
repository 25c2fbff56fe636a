"""How long one device computes: a roofline whose two slopes are measured, above a floor.

For an operation that runs as `k` kernels and does `F` FLOPs over `M` bytes, each kernel an equal share of both,

    time  = max(moved, multiplied, k launch)
    moved = M / (bandwidth e_mem(M / k))              e_mem: `Device.memory_efficiency`
    multiplied = F / (peak(dtype) e(F / k))           e: `Device.attention` for attention, else `Device.matmul`

(`kernel_time`.) Only `MULTIPLIES` have the second term: elsewhere FLOPs cost nothing beside the bytes they work on. The
curves come from kernels that read and write their operands too, so for one kernel the larger term is the time; over
the kernels of a layer the times add up, which is why a layer's arithmetic and traffic come out nearer to a sum than to
a maximum. An optimizer step reads parameter, gradient and `s` states and writes all but the gradient:

    time  = (3 + 2 s) P / (bandwidth e_mem(largest size))                       P: bytes of the device's parameters

(`optimizer_time`: a fused kernel; the unfused default of PyTorch moves up to three times as much.)

Where tensors are DTensors (tp, cp) the host finds out for every call what each rank has to do. A call is a kernel or a view, and
a product views its two operands and its result as matrices, so an operation with `p` products makes max(k, 1) + 3 p calls, for
each axis (of both, one is taken after the other: `apply.two_axes`), and

    time  = max(moved, multiplied, k launch + calls dispatch)       where the host runs ahead of its device
    time  = max(moved, multiplied, k launch) + calls dispatch       where it is the device

(`spread_time`. Counted on torch 2.13: 344 calls of a forward and backward pass for 365 by this rule in a GPT, 823 for 640 in a
Llama, whose norms are several operations there. Under cp fewer are of DTensors, but more of what goes into them and comes out.)

Every curve of a profile obeys `e(x) / x` falling (`files.hardware` refuses others), so more FLOPs or bytes never take
less time, and an operation cut into n pieces never takes longer than the whole.
"""

from __future__ import annotations

from autoplan.hardware import Device, HardwareProfile
from autoplan.units import Bytes, Flops, Seconds

MULTIPLIES = frozenset(("linear", "matmul", "attention", "opaque"))
"""Kinds of operation whose FLOPs can take longer than their bytes."""


def kernel_time(kind: str, flops: Flops, bytes: Bytes, kernels: int, dtype: str, device: Device) -> Seconds:
    """One operation on one device. An operation without kernels (a view) takes no time.

    Raises `UsageError` when the device has no peak for the `dtype` of a multiplication.
    """
    if kernels <= 0 and flops <= 0 and bytes <= 0:
        return 0.0
    count = max(kernels, 1)
    seconds = device.launch * count
    if bytes > 0:
        moved = bytes / (device.bandwidth * device.memory_efficiency.at(bytes / count))
        seconds = max(seconds, moved)
    if flops > 0 and kind in MULTIPLIES:
        curve = device.attention if kind == "attention" else device.matmul
        multiplied = flops / (device.peak_of(dtype) * curve.at(flops / count))
        seconds = max(seconds, multiplied)
    return seconds


def spread_time(kernel: Seconds, kind: str, kernels: int, products: int, axes: int, hardware: HardwareProfile) -> Seconds:
    """Of an operation on DTensors over so many axes, which takes `kernel` seconds on plain tensors; `products`: 1 forward, 2
    backward."""
    device = hardware.device
    host = axes * device.dispatch * (max(kernels, 1) + (3 * products if kind in ("linear", "matmul") else 0))
    return kernel + host if hardware.computes_on_host else max(kernel, device.launch * kernels + host)


def optimizer_time(parameters: Bytes, states: int, device: Device) -> Seconds:
    """One fused optimizer step over `parameters` bytes of parameters, with `states` tensors of the same size and dtype."""
    if parameters <= 0:
        return 0.0
    return max(device.launch, memory_time((3 + 2 * states) * parameters, device))


def memory_time(moved: Bytes, device: Device) -> Seconds:
    """Reading and writing `moved` bytes of large tensors."""
    return moved / (device.bandwidth * device.memory_efficiency.points[-1][1])
