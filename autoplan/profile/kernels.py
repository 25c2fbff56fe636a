"""The operations of the suite on this process's device, ready to be called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from autoplan.errors import UsageError
from autoplan.measurement import Operation
from autoplan.profile.suite import ADAM_TENSORS, MOVERS

Work = Callable[[], object]


def kernel(operation: Operation, device: torch.device) -> Work:
    """A function that runs the operation once (on a GPU: that starts it). Raises `UsageError` for an unknown kind."""
    dtype: torch.dtype = getattr(torch, operation.dtype)
    kind = operation.kind
    if kind == "launch":
        return _chain(operation, torch.ones(1, device=device, requires_grad=True))
    if kind == "matmul":
        return _product(operation, dtype, device)
    if kind in ("attention", "attention_backward"):
        return _attention(operation, dtype, device)
    if kind in MOVERS:
        return _mover(operation, dtype, device)
    if kind == "optimizer":
        return _adam(operation, device)
    if kind in ("host_to_device", "device_to_host"):
        return _copy(operation, dtype, device)
    raise UsageError(f"'{kind}' is not an operation that can be timed.")


def products(operation: Operation, device: torch.device) -> Work:
    """The matrix products that run beside a collective."""
    times, n = operation.shape
    a, b = (torch.rand(n, n, device=device).to(getattr(torch, operation.dtype)) for _ in range(2))

    def work() -> None:
        for _ in range(times):
            torch.mm(a, b)

    return work


def dispatches(operation: Operation, mesh: DeviceMesh) -> Work:
    """The same kernels as those of "launch", of DTensors."""
    one = DTensor.from_local(torch.ones(1, device=mesh.device_type), mesh, [Replicate()], run_check=False)
    return _chain(operation, one.requires_grad_())


def _chain(operation: Operation, one: torch.Tensor) -> Work:
    """Kernels of one element, half of them forward and half backward: their time is that of launching, autograd's included."""
    links = operation.shape[0] // 2

    def work() -> None:
        x = one
        for _ in range(links):
            x = x * 1.5
        torch.autograd.grad(x, one)

    return work


def _product(operation: Operation, dtype: torch.dtype, device: torch.device) -> Work:
    m, n, k = operation.shape
    left = (k, m) if operation.layout[0] == "t" else (m, k)
    right = (n, k) if operation.layout[1] == "t" else (k, n)
    a, b = (torch.rand(shape, device=device).to(dtype) for shape in (left, right))
    return partial(torch.mm, a.t() if operation.layout[0] == "t" else a, b.t() if operation.layout[1] == "t" else b)


def _attention(operation: Operation, dtype: torch.dtype, device: torch.device) -> Work:
    heads, length, width = operation.shape
    backward = operation.kind == "attention_backward"
    q, k, v = (torch.rand(1, heads, length, width, device=device).to(dtype).requires_grad_(backward) for _ in range(3))
    forward = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    if not backward:
        return forward
    output = forward()
    gradient = torch.rand_like(output)
    return lambda: torch.autograd.grad(output, (q, k, v), gradient, retain_graph=True)


def _mover(operation: Operation, dtype: torch.dtype, device: torch.device) -> Work:
    numel = int(operation.size) // MOVERS[operation.kind] // dtype.itemsize
    width = 512
    x = torch.rand(max(numel // width, 1), width, device=device).to(dtype)
    if operation.kind == "add":
        y, out = torch.rand_like(x), torch.empty_like(x)
        return partial(torch.add, x, y, out=out)
    if operation.kind == "gelu":
        return partial(F.gelu, x, approximate="tanh")
    if operation.kind == "layer_norm":
        weight = torch.ones(width, device=device).to(dtype)
        return partial(F.layer_norm, x, (width,), weight, weight)
    if operation.kind == "softmax":
        return partial(F.softmax, x, dim=-1)
    return x.sum


def _adam(operation: Operation, device: torch.device) -> Work:
    numel = int(operation.size) // ADAM_TENSORS // 4
    parameters = [torch.rand(numel // 4, device=device, requires_grad=True) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.rand_like(parameter)
    return torch.optim.AdamW(parameters, lr=1e-6, fused=True).step


def _copy(operation: Operation, dtype: torch.dtype, device: torch.device) -> Work:
    host = torch.rand(int(operation.size) // dtype.itemsize).to(dtype).pin_memory()
    there = host.to(device)
    if operation.kind == "host_to_device":
        return partial(there.copy_, host, non_blocking=True)
    return partial(host.copy_, there, non_blocking=True)
