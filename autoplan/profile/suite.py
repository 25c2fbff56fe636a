"""What is measured of a machine, in which order. No torch in here.

Sizes suit the device: a GPU's kernels must be large to fill it. Of matrix products all three layouts of a linear layer's
forward and backward pass are timed, and besides square ones those that a Transformer has (many rows, wide, narrow).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autoplan.measurement import Operation
from autoplan.profile.bench import Machine

KIB, MIB = 2**10, 2**20
HEADS, WIDTH = 8, 64
"""Of the attention kernels."""
LAYOUTS = ("nn", "nt", "tn")
MOVERS = {"add": 3, "gelu": 2, "layer_norm": 2, "softmax": 2, "sum": 1}
"""Kinds of kernel that move bytes, and how many tensors of the first one's size they read and write."""
ADAM_TENSORS = 7
"""A fused AdamW step reads parameter, gradient and two states and writes three of them."""
BACKWARD = 2.5
"""FLOPs of attention's backward pass over those of its forward pass: five products instead of two."""

LAUNCHES = 20
"""Kernels of one element, of which the mean is the time of launching one: of plain tensors, and of DTensors."""

_SQUARE = {False: (64, 128, 256, 512, 1024), True: (256, 512, 1024, 2048, 4096, 8192)}
_LENGTHS = {False: (128, 256, 512, 1024), True: (512, 1024, 2048, 4096, 8192)}
_MOVED = {
    False: (48 * KIB, 192 * KIB, 768 * KIB, 3 * MIB, 12 * MIB, 48 * MIB),
    True: (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB),
}
_MESSAGES = {
    False: (4 * KIB, 256 * KIB, 4 * MIB, 16 * KIB, 64 * KIB, MIB, 16 * MIB),
    True: (16 * KIB, MIB, 64 * MIB, 64 * KIB, 256 * KIB, 4 * MIB, 16 * MIB, 256 * MIB, 1024 * MIB),
}
"""The first three are always measured: latency, bandwidth and what is between."""
_TOGETHER = {False: (512, 4 * MIB), True: (4096, 64 * MIB)}
"""Size of the products and bytes of the all_reduce that run at the same time."""
_TIMES = 4
"""So many products."""
_BEFORE = 8
"""Products before a collective: about as long as a Transformer's layers compute between two of them."""


def suite(machine: Machine, dtypes: Sequence[str]) -> list[Operation]:
    """Every operation that a profile of `machine` is made of; of a series first what must be measured however short the time.

    `dtypes`: the first is the one that curves are measured in, of the others the peak.
    """
    device = [*_products(machine, dtypes), *_attention(machine, dtypes[0]), *_moving(machine, dtypes[0])]
    calls = [Operation(kind, 4.0, "float32", (LAUNCHES,)) for kind in ("launch", "dispatch")]
    return [*calls, *device, *_collectives(machine), *_arrivals(machine, dtypes[0]), *_together(machine, dtypes[0])]


def _products(machine: Machine, dtypes: Sequence[str]) -> Iterator[Operation]:
    squares = _SQUARE[machine.accelerator]
    for layout in LAYOUTS:
        for n in squares:
            yield _product((n, n, n), dtypes[0], layout)
    for n in squares[1:-1]:
        yield _product((4 * n, n, n // 2), dtypes[0], "nt")
        yield _product((n // 2, 4 * n, n), dtypes[0], "nt")
    for dtype in dtypes[1:]:
        for n in squares[-3:-1]:
            yield _product((n, n, n), dtype, "nt")


def _product(shape: tuple[int, int, int], dtype: str, layout: str) -> Operation:
    m, n, k = shape
    return Operation("matmul", 2.0 * m * n * k, dtype, shape, layout)


def _attention(machine: Machine, dtype: str) -> Iterator[Operation]:
    for length in _LENGTHS[machine.accelerator]:
        flops = 4.0 * HEADS * WIDTH * length**2 / 2  # the causal mask leaves half
        yield Operation("attention", flops, dtype, (HEADS, length, WIDTH))
    for length in _LENGTHS[machine.accelerator]:
        flops = 4.0 * HEADS * WIDTH * length**2 / 2
        yield Operation("attention_backward", BACKWARD * flops, dtype, (HEADS, length, WIDTH))


def _moving(machine: Machine, dtype: str) -> Iterator[Operation]:
    sizes = _MOVED[machine.accelerator]
    for kind in MOVERS:
        for size in sizes if kind == "add" else sizes[1:-1]:
            yield Operation(kind, float(size), dtype)
    for size in sizes[-2:]:
        yield Operation("optimizer", float(size), "float32")
    if machine.accelerator:
        for kind in ("host_to_device", "device_to_host"):
            yield Operation(kind, float(64 * MIB), dtype)


def groups(machine: Machine) -> list[tuple[int, int]]:
    """(ranks, how far apart) of the collectives: within a node in two sizes, and between nodes."""
    inside = machine.per_node if machine.per_node > 1 else machine.ranks
    nodes = machine.ranks // inside
    found = [(inside, 1)] if inside > 1 else []
    if inside > 2 and inside % 2 == 0:
        found.insert(0, (2, 1))
    return found + ([(nodes, inside)] if nodes > 1 else [])


def _collectives(machine: Machine) -> Iterator[Operation]:
    for group, stride in groups(machine):
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
            for size in _MESSAGES[machine.accelerator]:
                yield Operation(kind, float(size), "float32", (), "", group, stride)
        if group == 2 or (group, stride) == groups(machine)[0] or stride > 1:
            for size in _MESSAGES[machine.accelerator]:
                yield Operation("send_recv", float(size), "float32", (), "", group, stride)


def _arrivals(machine: Machine, dtype: str) -> Iterator[Operation]:
    """The smallest all_reduce, each after some products: what it takes longer than one after another is waiting for the last."""
    n, _ = _TOGETHER[machine.accelerator]
    for group, stride in groups(machine):
        yield Operation("arrival", float(_MESSAGES[machine.accelerator][0]), dtype, (_BEFORE, n), "", group, stride)


def _together(machine: Machine, dtype: str) -> Iterator[Operation]:
    """Products alone, an all_reduce alone, both at the same time."""
    if machine.ranks > 1:
        n, size = _TOGETHER[machine.accelerator]
        for kind in ("products", "reduction", "together"):
            yield Operation(kind, float(size), dtype, (_TIMES, n), "", machine.ranks)
