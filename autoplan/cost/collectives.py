"""How long a collective takes: alpha-beta with a saturating bandwidth, on a ring through the levels of the network.

`S` is the **unsharded** size: the tensor that each rank of an all_reduce holds, the result of an all_gather, the
input of a reduce_scatter, the whole of all ranks' shards for an all_to_all (each holds S/n), the message of a
send_recv. Each of `n` ranks sends

    all_reduce  2 (n-1)/n S        all_gather, reduce_scatter  (n-1)/n S        send_recv  S

(`_sent`; the "bus bandwidth" of nccl-tests, doc/PERFORMANCE.md, is this over the time). Ranks `stride` apart meet the
network level by level: `m` of them share one domain of the level below (1 for the innermost). A ring enters and leaves
each such domain once, over the links of all its m members in parallel, so each member sends sent/m over that level:

    time = launch + alpha + max_level  x / (bandwidth e(x) gain)            x = sent / m

(`collective_time`, `_levels`.) The levels work at the same time, hence `max`. `gain` is the switch's own adding up
(NVLink SHARP): 1 except for all_reduce of more than two ranks. A link's `slowdown` of a kind multiplies both terms. With `u`
domains joined at a level, alpha is

    ring  r sum_level (hops) latency                hops: n - u innermost ... u - 1 outermost;  r = 2 for all_reduce
    tree  2 sum_level (innermost: m - 1, outer: ceil(log2 u)) latency           only all_reduce, if it is shorter

(`_alpha`), as in NCCL's own model (NVIDIA/nccl src/graph/tuning.cc at 01afd20, `ncclTopoTuneModel`).

An all_to_all sends each of its n - 1 peers S/n^2 directly: at a level that joins domains of m ranks into one of q,
x = (q - m) S / n^2 over the rank's own link.

For the same group more bytes never take less time and more bandwidth never takes more.

Nobody is through before the last rank has come. Delays of a rank add up like steps of a random walk: after T seconds of the same
work the standard deviation of when ranks are done is jitter sqrt(T / 1 s). `n` ranks that meet `m` times in `W` seconds of work
wait, each time after W / m seconds,

    m jitter k(n) sqrt(W / m) = jitter k(n) sqrt(m W)

together (`waiting`), where k(n) is the expected largest of n standard normal numbers (`late`; Blom's approximation, Statistical
Estimates and Transformed Beta-Variables, 1958).
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, log2, sqrt
from statistics import NormalDist
from typing import Literal

from autoplan.errors import UsageError
from autoplan.hardware import HardwareProfile, Link
from autoplan.units import Bytes, Seconds

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]


def collective_time(kind: str, bytes: Bytes, group: int, stride: int, hardware: HardwareProfile) -> Seconds:
    """Seconds of one collective of `group` ranks that are `stride` apart, over a tensor of `bytes` unsharded.

    Nothing is sent by a group of one, or when there is nothing to send.
    """
    if group <= 1 or bytes <= 0:
        return 0.0
    levels = _levels(group, stride, tuple(link.span for link in hardware.links), hardware.name)
    slowest = 0.0
    for index, inside, joined in levels:
        link = hardware.links[index]
        sent = _sent(kind, bytes, group, inside, joined)
        gain = link.all_reduce_gain if kind == "all_reduce" and group > 2 else 1.0
        slowest = max(slowest, _transfer(sent, link, gain / link.slowdown_of(kind)))
    links = [(i, hardware.links[i], inside, joined) for i, inside, joined in levels]
    latencies = tuple((i, link.latency * link.slowdown_of(kind), inside, joined) for i, link, inside, joined in links)
    alpha = _alpha(kind, group, latencies)
    return hardware.device.launch + alpha + slowest


def waiting(work: Seconds, meetings: int, ranks: int, hardware: HardwareProfile) -> Seconds:
    """What ranks that meet so often in `work` seconds wait for the last of them, together."""
    return hardware.jitter * late(ranks) * sqrt(work * meetings)


@lru_cache(maxsize=1024)
def late(ranks: int) -> float:
    """By how many standard deviations the last of so many ranks comes later than the average one."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0


def _sent(kind: str, size: Bytes, group: int, inside: int, joined: int) -> Bytes:
    """What one rank sends over a level that joins domains of `inside` ranks into one of `joined`."""
    if kind == "all_reduce":
        return 2 * (group - 1) / group * size / inside
    if kind in ("all_gather", "reduce_scatter"):
        return (group - 1) / group * size / inside
    if kind == "all_to_all":
        return (joined - inside) * size / group**2
    if kind == "send_recv":
        return size
    raise UsageError(f"'{kind}' is not a collective that has a cost.")


def _transfer(sent: Bytes, link: Link, gain: float) -> Seconds:
    return sent / (link.bandwidth * link.efficiency.at(sent) * gain)


@lru_cache(maxsize=4096)
def _levels(group: int, stride: int, spans: tuple[int, ...], name: str) -> tuple[tuple[int, int, int], ...]:
    """(index of the link, ranks of the group in one domain below it, ranks in one of its own domains), innermost first.

    Only levels that the group really crosses; a domain of `span` devices holds `span // stride` ranks, at least one.
    """
    found = []
    inside = 1
    for index, span in enumerate(spans):
        joined = group if span == 0 else min(group, max(span // stride, 1))
        if joined > inside:
            found.append((index, inside, joined))
            inside = joined
        if joined == group:
            return tuple(found)
    raise UsageError(f"hardware '{name}' joins at most {spans[-1]} devices, {group * stride} are asked for.")


@lru_cache(maxsize=4096)
def _alpha(kind: str, group: int, levels: tuple[tuple[int, Seconds, int, int], ...]) -> Seconds:
    """The part of the time that does not depend on the size."""
    if kind == "send_recv":
        return max(latency for _, latency, _, _ in levels)
    ring = tree = 0.0
    for index, latency, inside, joined in levels:
        domains = ceil(group / inside)
        outer = ceil(group / joined)
        ring += (domains - outer) * latency
        tree += (joined - 1 if index == 0 else ceil(log2(ceil(joined / inside)))) * latency
    return min(2 * ring, 2 * tree) if kind == "all_reduce" else ring
