"""Measure this machine's processor and gloo, and write the profile: `python -m autoplan.profile.measure -o my.yaml`.

One device is one process with one thread, as torchrun starts them. Kernels are timed alone; collectives by 2 and by 4
processes that this module starts itself. Times are medians after a warm-up. Rates have no data sheet here, so the
nominal rate is the best one seen and the curves say what smaller sizes reach of it.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn

from autoplan.cost.collectives import collective_time
from autoplan.errors import UsageError
from autoplan.files.document import write_text
from autoplan.files.hardware import dump_hardware
from autoplan.hardware import Device, HardwareProfile, Link
from autoplan.profile.fit import Sample, error_of, fit_curve, fractions
from autoplan.units import Bytes, Seconds

KIB, MIB, GIB = 2**10, 2**20, 2**30
RANKS = (2, 4)
_GEMM = (64, 128, 256, 512, 1024, 1536)
_ATTENTION = (128, 256, 512, 1024, 2048)
_MOVED = (48 * KIB, 192 * KIB, 768 * KIB, 3 * MIB, 12 * MIB, 48 * MIB, 192 * MIB)
_MESSAGES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class Message:
    """One timed collective."""

    kind: str
    group: int
    bytes: Bytes
    seconds: Seconds


def measure(name: str = "cpu-gloo", ranks: Sequence[int] = RANKS, messages: Sequence[int] = _MESSAGES) -> HardwareProfile:
    """The profile of this machine's processor and of gloo between processes on it. Takes about a minute.

    Raises `UsageError` when the machine is too busy for its times to mean anything.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        device = _device(max(ranks))
    finally:
        torch.set_num_threads(threads)
    timed = [message for world in ranks for message in _collectives(world, messages)]
    source = "overlap: those that communicate are those that compute, on the same cores: nothing is hidden (assumption)"
    return HardwareProfile(
        name=name,
        device=device,
        links=_links(timed, device.launch),
        overlap=1.0,
        backend="gloo",
        measured=date.today().isoformat(),
        source=source,
    )


def median_time(work: Callable[[], object], budget: Seconds = 0.4) -> Seconds:
    """Median seconds of `work` after a warm-up, from at least five runs and as many as fit into `budget`.

    Counted in processor time of the calling thread: what other programs take of the machine is not the kernel's.
    """
    work()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 1000):
        begin = time.thread_time()
        work()
        times.append(time.thread_time() - begin)
    return steady(times)


def steady(times: Sequence[Seconds]) -> Seconds:
    """The median of `times`. Raises `UsageError` when their quarters lie so far apart that it says nothing."""
    low, middle, high = quantiles(times, n=4, method="inclusive")
    if not low > 0 or high > 4 * low:
        raise UsageError(
            f"this machine is too busy to be measured: one kernel takes between {low:.3g} and {high:.3g} s.",
            "Try again when nothing else runs.",
        )
    return middle


def _device(share: int) -> Device:
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    one = torch.ones(1)
    launch = _tidy(median_time(lambda: one.add(1.0)))
    rates = {dtype: _gemm_samples(getattr(torch, dtype), _GEMM if dtype == "float32" else _GEMM[3:5]) for dtype in _DTYPES}
    peaks = {dtype: _tidy(max(flops / seconds for flops, seconds in samples)) for dtype, samples in rates.items()}
    matmul = fit_curve(fractions(rates["float32"], peaks["float32"]), [flops for flops, _ in rates["float32"]])
    attention = _attention_samples()
    moved = _moving_samples()
    bandwidth = _tidy(max(size / seconds for size, seconds in moved))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tokens = f"{_ATTENTION[0]} to {_ATTENTION[-1]} tokens"
    here = f"measured on one thread of {_processor()}, torch {torch.__version__}"
    sources = {
        "memory": f"{physical / GIB:.1f} GiB of the machine, shared by {share} processes, rounded down",
        "reserved": "resident memory of a process that has loaded torch",
        "bandwidth": f"{here}: the best of adding two float32 tensors, three transfers an element (small ones stay in the cache)",
        "peak": f"{here}: the best square GEMM",
        "matmul": f"{here}: square float32 GEMMs of {_GEMM[0]} to {_GEMM[-1]}",
        "attention": f"{here}: causal scaled_dot_product_attention, float32, 8 heads of 64, {tokens}",
        "memory_efficiency": f"{here}: adding two float32 tensors",
        "launch": f"{here}: adding to a tensor of one element",
    }
    return Device(
        name=_processor(),
        memory=physical // (share * GIB // 10) * GIB / 10,
        reserved=float(-(-resident // MIB) * MIB),
        bandwidth=bandwidth,
        peak=tuple(peaks.items()),
        matmul=matmul,
        attention=fit_curve(fractions(attention, peaks["float32"]), [flops for flops, _ in attention]),
        memory_efficiency=fit_curve(fractions(moved, bandwidth), [size for size, _ in moved], growing=False),
        launch=launch,
        source=_sources(sources),
    )


def _gemm_samples(dtype: torch.dtype, sizes: Sequence[int]) -> list[Sample]:
    samples = []
    for size in sizes:
        a, b = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
        samples.append((2.0 * size**3, median_time(partial(torch.mm, a, b))))
    return samples


def _attention_samples() -> list[Sample]:
    heads, width = 8, 64
    samples = []
    for length in _ATTENTION:
        query = torch.rand(1, heads, length, width)
        flops = 4.0 * heads * width * length**2 / 2  # the mask leaves half
        run = partial(F.scaled_dot_product_attention, query, query, query, is_causal=True)
        samples.append((flops, median_time(run)))
    return samples


def _moving_samples() -> list[Sample]:
    samples = []
    for size in _MOVED:
        a, b, c = (torch.rand(size // 12) for _ in range(3))
        samples.append((float(size), median_time(partial(torch.add, a, b, out=c))))
    return samples


def _collectives(world: int, messages: Sequence[int]) -> list[Message]:
    """What `world` processes on this machine take for every kind of collective and every size."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "times.pt"
        spawn(_rank, (world, tuple(messages), f"{folder}/store", str(result)), nprocs=world)
        return [Message(*row) for row in torch.load(result)]


def _rank(rank: int, world: int, messages: Sequence[int], store: str, result: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # newer names of the same calls, which torch 2.10 lacks
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    rows = []
    for size in messages:
        whole = torch.rand(size // 4)
        part = torch.rand(size // 4 // world)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": partial(dist.all_reduce, whole, op=dist.ReduceOp.MAX),
            "all_gather": partial(dist.all_gather_into_tensor, whole, part),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole),
        }
        for kind, call in calls.items():
            rows.append((kind, world, float(size), _slowest(call, 20 if size <= MIB else 7)))
    if rank == 0:
        torch.save(rows, result)
    dist.destroy_process_group()


def _slowest(call: Callable[[], object], runs: int) -> Seconds:
    """Median over `runs` of the time of the slowest rank."""
    times = []
    for run in range(runs + 2):
        dist.barrier()
        begin = time.perf_counter()
        call()
        if run >= 2:
            times.append(time.perf_counter() - begin)
    slowest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest.median())


def _links(timed: Sequence[Message], launch: Seconds) -> tuple[Link, ...]:
    """One link for each number of ranks, from the fewest: more processes than cores are a slower network than few."""
    groups = sorted({message.group for message in timed})
    links: list[Link] = []
    for group in groups:
        mine = [message for message in timed if message.group == group]
        inside = links[-1].span if links else 1
        span = 0 if group == groups[-1] else group
        links.append(_link(mine, inside, span, launch, links[-1].latency if links else 0.0))
    return tuple(links)


def _link(timed: Sequence[Message], inside: int, span: int, launch: Seconds, inner: Seconds) -> Link:
    """The link that joins domains of `inside` ranks: latency from the smallest messages, bandwidth and curve from all.

    `inner` is the latency of the link below.
    """

    def trips(message: Message) -> int:
        return 2 if message.kind == "all_reduce" else 1

    def overhead(message: Message) -> Seconds:
        return launch + trips(message) * (message.group - message.group / inside) * inner * (inside > 1)

    def hops(message: Message) -> float:
        return trips(message) * (message.group / inside - 1)

    smallest = min(message.bytes for message in timed)
    latency = _tidy(median(max(m.seconds - overhead(m), 1e-9) / hops(m) for m in timed if m.bytes == smallest))
    samples = []
    for m in timed:
        sent = trips(m) * (m.group - 1) / m.group * m.bytes / inside
        samples += fractions([(sent, m.seconds)], 1.0, overhead(m) + hops(m) * latency)
    low, high = samples[0][0], max(size for size, _ in samples)
    knots = [low * 4**i for i in range(1, 9) if low * 4**i <= high] or [low]
    bandwidth = _tidy(max(median(near) for knot in knots if (near := _near(samples, knot))))
    sources = {
        "latency": f"measured: collectives of {smallest / KIB:.0f} KiB",
        "all": f"measured: {len(timed)} all_reduces, all_gathers and reduce_scatters of {timed[0].group} processes of one thread "
        f"on one machine of {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} after them), torch {torch.__version__}; "
        "bandwidth is the best median",
    }
    return Link(
        name=f"gloo, {timed[0].group} processes",
        span=span,
        bandwidth=bandwidth,
        latency=latency,
        efficiency=fit_curve([(size, rate / bandwidth) for size, rate in samples], knots),
        source=_sources(sources),
    )


def _near(samples: Sequence[Sample], knot: float) -> list[float]:
    return [rate for size, rate in samples if knot / 2 <= size < knot * 2]


def _tidy(value: float) -> float:
    """Three digits: what a measurement is good for."""
    return float(f"{value:.3g}")


def _sources(sources: dict[str, str]) -> str:
    return "\n".join(f"{key}: {text}" for key, text in sources.items())


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "this processor"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "this processor"


def residuals(profile: HardwareProfile, timed: Sequence[Message]) -> list[tuple[str, int, float]]:
    """(collective, ranks, mean absolute relative error) of the profile's own model on what was timed."""
    keys = sorted({(m.kind, m.group) for m in timed})
    rows = []
    for kind, group in keys:
        mine = [m for m in timed if (m.kind, m.group) == (kind, group)]
        predicted = [collective_time(kind, m.bytes, group, 1, profile) for m in mine]
        rows.append((kind, group, error_of(predicted, [m.seconds for m in mine])))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Prints the file it wrote, and how far the profile is from what it was fitted to."""
    parser = argparse.ArgumentParser(prog="python -m autoplan.profile.measure", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="the YAML file to write")
    parser.add_argument("--force", action="store_true", help="overwrite it")
    options = parser.parse_args(arguments)
    try:
        if options.output.exists() and not options.force:
            raise UsageError(f"{options.output} exists already.", "Use --force to overwrite it.")
        if not options.output.absolute().parent.is_dir():  # said before a minute is spent
            raise UsageError(f"{options.output} cannot be written: its folder does not exist.")
        profile = measure(name=options.output.stem)
        write_text(options.output, dump_hardware(profile), force=options.force)
        checked = [message for world in RANKS for message in _collectives(world, _MESSAGES[::2])]
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.output}; collectives measured once more, mean error of the profile:")
    for kind, group, off in residuals(profile, checked):
        print(f"  {kind:15s} {group} ranks  {off:6.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
