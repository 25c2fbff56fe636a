"""This machine, timed: every rank of a torchrun launch has one of these, or one process alone.

A timing is of a block of repetitions that lasts some milliseconds, so that neither the clock's grain nor the operating system's
turns decide; before each block all ranks meet, so that they compute at the same time, as they do in a training step. On ranks
that share cores a kernel then takes as long as it will take there.
"""

from __future__ import annotations

import os
import resource
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autoplan.measurement import COLLECTIVES, Operation
from autoplan.profile.bench import Machine
from autoplan.profile.detect import clocks, processor
from autoplan.profile.kernels import Work, dispatches, kernel, products
from autoplan.profile.session import FEWEST
from autoplan.units import Seconds

KIB, MIB, GIB = 2**10, 2**20, 2**30
BLOCK: Seconds = 20e-3
"""About as long is one timed block."""
MOST = 40
"""Blocks of one operation."""
ARRIVALS = 10
"""Collectives of a block, when there are products between them."""


class TorchBench:
    """Times operations on `device`, with the other ranks of the default process group if there is one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._groups: dict[tuple[int, int], dist.ProcessGroup] = {}
        if device.type == "cpu":
            torch.set_num_threads(1)
        warnings.simplefilter("ignore", FutureWarning)  # newer names of the same calls, which torch 2.10 lacks
        self.machine = self._machine()

    def _machine(self) -> Machine:
        hosts: list[str] = [socket.gethostname()]
        if self.ranks > 1:
            hosts = [""] * self.ranks
            dist.all_gather_object(hosts, socket.gethostname())
        about = f"torch {torch.__version__}, {os.cpu_count()} cores"
        if self.device.type == "cpu":
            here = hosts.count(socket.gethostname())
            physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
            return Machine(
                device=processor(), accelerator=False, backend="gloo", hosts=tuple(hosts),
                memory=physical // (here * GIB // 10) * GIB / 10, reserved=float(-(-resident // MIB) * MIB),
                about=f"one thread a rank, {processor()}, {about}", sharing=max(1.0, here / (os.cpu_count() or here)),
                memory_source=f"{physical / GIB:.1f} GiB of the machine, shared by {here} processes, rounded down",
                reserved_source="resident memory of a process that has loaded torch",
            )  # fmt: skip
        free, total = torch.cuda.mem_get_info(self.device)
        return Machine(
            device=torch.cuda.get_device_name(self.device), accelerator=True, backend="nccl", hosts=tuple(hosts),
            memory=float(total), reserved=float(total - free),
            about=f"{about}, CUDA {torch.version.cuda}", memory_source="what the driver says", reserved_source="so far",
        )  # fmt: skip

    def settled(self) -> Machine:
        """The machine after it has worked: with its clocks under load, and what communicators have taken of a GPU's memory."""
        if self.device.type == "cpu":
            return self.machine
        free, total = torch.cuda.mem_get_info(self.device)
        held = self._largest([float(total - free - torch.cuda.memory_reserved(self.device))])[0]
        about = ", ".join(filter(None, (self.machine.about, clocks(self.device.index or 0))))
        taken = "taken by the driver, the process and its communicators"
        return replace(self.machine, reserved=held, reserved_source=taken, about=about)

    def clock(self) -> Seconds:
        return self._agree(time.perf_counter())

    def times(self, operation: Operation, seconds: Seconds) -> Sequence[Seconds]:
        work = self._work(operation)
        if work is None:  # a rank that no group of this shape has
            work = _nothing
        before = products(operation, self.device) if operation.kind == "arrival" else None
        for _ in range(2):
            self._meet()
            self._block(work, 1, before)
        once = self._largest([self._block(work, 1, before)])[0]
        repeats = max(1, ceil(min(BLOCK, seconds / FEWEST) / once)) if before is None else ARRIVALS
        found: list[Seconds] = []
        end = self.clock() + seconds
        while len(found) < FEWEST or (len(found) < MOST and self.clock() < end):
            for _ in range(FEWEST):
                self._meet()
                found.append(self._block(work, repeats, before))
        return self._largest(found) if operation.kind in COLLECTIVES else self._mean(found)

    def _block(self, work: Work, repeats: int, before: Work | None = None) -> Seconds:
        """Seconds of one repetition; what runs `before` each is not counted."""
        if before is not None:
            return sum(self._after(before, work) for _ in range(repeats)) / repeats
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats):
                work()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / repeats
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - started) / repeats

    def _after(self, before: Work, work: Work) -> Seconds:
        before()
        return self._block(work, 1)

    def _work(self, operation: Operation) -> Work | None:
        if operation.kind in COLLECTIVES:
            return self._collective(operation)
        if operation.kind == "arrival":
            return self._collective(replace(operation, kind="all_reduce"))
        if operation.kind == "dispatch":
            return self._dispatches(operation)
        if operation.kind in ("products", "reduction", "together"):
            return self._together(operation)
        return kernel(operation, self.device)

    def _collective(self, operation: Operation) -> Work | None:
        group = self._group(operation.group, operation.stride)
        if group is None:
            return None
        whole = torch.rand(int(operation.size) // 4, device=self.device)
        part = torch.rand(len(whole) // operation.group, device=self.device)
        part = part[: len(part) // operation.group * operation.group]  # all_to_all cuts it again
        whole = whole[: len(part) * operation.group]
        if operation.kind == "send_recv":
            return self._pass_on(whole, group)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": partial(dist.all_reduce, whole, op=dist.ReduceOp.MAX, group=group),
            "all_gather": partial(dist.all_gather_into_tensor, whole, part, group=group),
            "all_to_all": partial(dist.all_to_all_single, torch.empty_like(part), part, group=group),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole, op=dist.ReduceOp.MAX, group=group),
        }
        return calls[operation.kind]

    def _pass_on(self, message: torch.Tensor, group: dist.ProcessGroup) -> Work:
        """Even ranks send to the next one, odd ones receive; the last of an odd number waits."""
        at, size = dist.get_rank(group), dist.get_world_size(group)
        if at % 2 == 1:
            return partial(dist.recv, message, src=dist.get_global_rank(group, at - 1), group=group)
        if at + 1 < size:
            return partial(dist.send, message, dst=dist.get_global_rank(group, at + 1), group=group)
        return _nothing

    def _dispatches(self, operation: Operation) -> Work:
        world = dist.group.WORLD
        assert world is not None
        return dispatches(operation, DeviceMesh.from_group(world, self.device.type))

    def _together(self, operation: Operation) -> Work:
        compute = products(operation, self.device)
        message = torch.rand(int(operation.size) // 4, device=self.device)
        reduce = partial(dist.all_reduce, message, op=dist.ReduceOp.MAX, async_op=True)
        if operation.kind == "products":
            return compute

        def work() -> None:
            handle = reduce()
            if operation.kind == "together":
                compute()
            assert handle is not None
            handle.wait()

        return work

    def _group(self, size: int, stride: int) -> dist.ProcessGroup | None:
        """This rank's group of `size` ranks `stride` apart, of those into which all ranks are dealt."""
        if (size, stride) not in self._groups:
            block = size * stride
            for first in range(0, self.ranks - block + 1, block):
                for offset in range(stride):
                    ranks = list(range(first + offset, first + offset + block, stride))
                    group = dist.group.WORLD if size == self.ranks else dist.new_group(ranks)
                    if self.rank in ranks and isinstance(group, dist.ProcessGroup):
                        self._groups[size, stride] = group
        return self._groups.get((size, stride))

    def _meet(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.ranks > 1:
            dist.barrier(device_ids=[self.device.index or 0] if self.device.type == "cuda" else None)

    def _agree(self, value: float) -> float:
        return self._spread([value], lambda told: dist.broadcast(told, src=0))[0]

    def _largest(self, times: Sequence[Seconds]) -> list[Seconds]:
        """Block by block, that of the slowest rank."""
        return self._spread(times, lambda told: dist.all_reduce(told, op=dist.ReduceOp.MAX))

    def _mean(self, times: Sequence[Seconds]) -> list[Seconds]:
        return [total / self.ranks for total in self._spread(times, dist.all_reduce)]

    def _spread(self, values: Sequence[float], how: Callable[[torch.Tensor], object]) -> list[float]:
        if self.ranks == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=self.device)
        how(told)
        return [float(value) for value in told.tolist()]


def _nothing() -> None:
    return None
