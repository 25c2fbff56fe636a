"""What an export is, and what every one of them asks of a plan.

A trainer's configuration is coarser than a plan: one recomputation, one level of ZeRO and one sharding for all layers. Where
the plan mixes, the export recomputes all layers, in full where the plan does so in some, so that what it writes fits, and takes
the level and the sharding of most layers; `lost` says so, and whether that needs more memory.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autoplan.plan import Plan
from autoplan.strategy import Sharding


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The text of a configuration, and in sentences what of the plan is not in it."""

    text: str
    lost: tuple[str, ...]
    filename: str
    """What such a file is usually called."""


@dataclass(frozen=True, slots=True)
class Choices:
    """The plan as far as one value for all layers goes, and what that loses."""

    zero: int
    """0 where nothing is sharded over `dp_shard` and `cp`."""
    recompute: bool
    """In every layer, in some way."""
    selective: bool
    """In that way: none is recomputed in full."""
    sequence_parallel: bool
    sharding: Sharding
    """Of most layers."""
    lost: tuple[str, ...]


Exporter = Callable[[Plan], Exported]


def choices(plan: Plan, *, compiles: bool = False) -> Choices:
    """One value for all layers; `compiles`: the configuration can say that they are compiled."""
    lost: list[str] = []
    zero, shardings = _zero(plan, lost), [strategy.sharding for _, strategy in plan.layers()]
    again, layers = [strategy.recompute for _, strategy in plan.layers() if strategy.recompute != "none"], len(shardings)
    some = again.count("selective")
    if 0 < len(again) < layers or 0 < some < len(again):
        parts = "" if not some else " selectively" if some == len(again) else f", {some} of them selectively"
        how = "all are in full" if 0 < some < len(again) else "all are"
        lost.append(f"the plan recomputes {len(again)} of {layers} layers{parts}; here {how}, which costs time and saves memory")
    if plan.workload.compile and not compiles:
        lost.append("that layers are compiled (torch.compile), which is called in the script")
    main = max(dict.fromkeys(shardings), key=shardings.count) if shardings else plan.outer_strategy.sharding
    others = sum(sharding != main for sharding in shardings)
    if others:
        lost.append(f"{others} of {layers} layers are split over tp in another way than the rest; here all are alike")
    if plan.mesh.tp > 1 and not by_the_book(main):
        lost.append("the plan's split over tp is not the usual column-then-row one, which is what is used here")
    return Choices(zero, bool(again), bool(again) and some == len(again), sequence_parallel(main), main, tuple(lost))


def _zero(plan: Plan, lost: list[str]) -> int:
    """The level of most layers."""
    if plan.mesh.shards == 1:
        return 0
    levels = [strategy.zero for _, strategy in plan.layers()] or [plan.outer_strategy.zero]
    main = max(dict.fromkeys(levels), key=levels.count)
    for level in sorted(set(levels) - {main}):
        effect = "needs more memory: leave room with --memory-headroom" if level > main else "sends more and saves memory"
        lost.append(f"{levels.count(level)} of {len(levels)} layers are ZeRO-{level}; here all are ZeRO-{main}, which {effect}")
    return main


def in_full(made: Choices, target: str) -> list[str]:
    """What a trainer loses that recomputes whole layers alone."""
    if not made.selective:
        return []
    return [f"selective recomputation: {target} recomputes layers as a whole, which costs time and saves memory"]


def sequence_parallel(sharding: Sharding) -> bool:
    """Whether activations between the tensor-parallel modules are split along the sequence."""
    return sharding.stream.sharded or any(
        border.source.kind == "partial" and border.target.sharded and border.target.dim < 2 for border in sharding.borders
    )


def by_the_book(sharding: Sharding) -> bool:
    """Whether a layer is split as Megatron does: into each pair of matrices once gathered, out of it once summed."""
    if any(layout.sharded and layout.dim > 1 for _, layout in sharding.parameters):
        return False
    return all(
        (border.side == "in" and border.target.kind == "gathered")
        or (border.side == "out" and border.source.kind == "partial" and not (border.target.sharded and border.target.dim > 1))
        for border in sharding.borders
    )


def stage_sizes(plan: Plan) -> tuple[int, ...]:
    """Layers of every virtual stage."""
    return tuple(map(len, plan.stages))


def no_pipeline(plan: Plan, target: str) -> list[str]:
    """What a trainer without pipelines loses."""
    if plan.mesh.pp == 1:
        return []
    return [
        f"{target} has no pipelines: without the plan's {plan.mesh.pp} stages each device holds more than the plan says; "
        "plan anew with --pp 1"
    ]


def no_context(plan: Plan, target: str) -> list[str]:
    """What a trainer loses that cannot cut sequences."""
    if plan.mesh.cp == 1:
        return []
    return [
        f"{target} does not split sequences: without the plan's cp {plan.mesh.cp} each device holds more than the plan says; "
        "plan anew with --cp 1"
    ]


def no_experts(plan: Plan, target: str) -> list[str]:
    """What a trainer loses that has no setting to deal experts over devices."""
    if plan.mesh.ep == 1:
        return []
    return [
        f"{target} does not deal experts: without the plan's ep {plan.mesh.ep} each device gathers all of them and holds more "
        "than the plan says; plan anew with --ep 1"
    ]


def ring(plan: Plan, target: str) -> list[str]:
    """What a trainer changes that splits sequences, but passes keys and values on in a ring."""
    if plan.mesh.cp == 1 or plan.mesh.cp_kind == "ring":
        return []
    return [f"the all_to_all around attention: {target} passes keys and values round the {plan.mesh.cp} devices, in another time"]


def clean(text: str) -> str:
    """`text` on one line and without control characters: names come from strangers and end up in comments."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


def header(plan: Plan, lost: Sequence[str], sign: str = "#") -> str:
    """Comment lines: where this comes from, what it should cost, and what is missing."""
    lines = [
        f"{clean(plan.model)}: {plan.mesh} over {plan.mesh.size} devices, exported by autoplan",
        f"predicted: {plan.prediction.step_time:.4g} s a step, {plan.prediction.memory.total / 2**30:.4g} GiB a device",
    ]
    lines += [f"not expressed: {sentence}" for sentence in lost]
    return "".join(f"{sign} {line}\n" for line in lines)


def nodes(devices: int) -> tuple[int, int]:
    """(nodes, devices of each), which are alike and have at most eight."""
    each = max(count for count in range(1, 9) if devices % count == 0)
    return devices // each, each


def wildcard(names: Sequence[str]) -> str | None:
    """ "model.layers.*" for `model.layers.0`, `model.layers.1` ...; None where the names do not count up like that."""
    patterns = {re.sub(r"\.\d+$", ".*", name) for name in names}
    return patterns.pop() if len(patterns) == 1 and names[0] != next(iter(patterns), "") else None
