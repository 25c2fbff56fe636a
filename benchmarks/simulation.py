"""How far the price of a plan is from its event simulation: the plans of reports/, and changes to them.

python -m benchmarks.simulation [-o FILE.md]          a minute

Nothing is measured: both numbers are predictions of the same layers' seconds, added up (`cost.model`) and as events on streams
(`cost.events`).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autoplan import api
from autoplan.cost.model import CostModel
from autoplan.cost.simulated import predicted
from autoplan.graph import Graph
from autoplan.hardware import HardwareProfile
from autoplan.plan import LayerRun, Pipeline, Plan
from autoplan.profile.catalog import find_hardware
from autoplan.schedule import ScheduleKind
from autoplan.strategy import UNSHARDED, Mesh, Strategy, Zero
from autoplan.units import SECOND, show

REPORTS = Path(__file__).parent.parent / "reports"
SLOW = 8.0
"""How many times slower the last rows' network is."""

DRAWS = 300
DRAWN = ("llama-8b-8", "transformer-4")
MACHINES = ("h100-sxm-8x", "a100-80g-sxm-8x", "l40s-pcie-8x")
MANY = 8
"""Micro-batches of a pipeline that are many."""

TEXT = """\
# The price and the event simulation

Written by `python -m benchmarks.simulation -o docs/simulation.md`, from the plans of the sample reports as they are and as they
would be with something changed (which may then not fit). Both numbers are predictions: the price is the sum over layers that the
search adds up, the event simulation runs the same layers on the streams of every device
([how](cost-model.md#the-event-simulation)). Nothing here was measured.

"""

BELOW = f"""
Drawn at random, {DRAWS} plans that nobody chose: Llama 8B and a small transformer on 1 to 256 H100, A100 and L40S, every layer
alike, 1 to 128 micro-batches, any ZeRO level, schedule and number of replicas. Most would be poor plans. In a pipeline of few
micro-batches over slow links the simulation says much more: FSDP gathers nothing before the activations are there, so that the
stages' gathers come one after another, which the sum counts once. In one of many it says much less where what stands outside the
layers is large beside a stage: FSDP waits for no reduction before the last micro-batch's, so that they run under the next one's
passes, and the sum hides none of them.

"""


@dataclass(frozen=True)
class Row:
    """A plan, and what both say of its step."""

    name: str
    changed: str
    plan: Plan

    def cells(self) -> tuple[str, ...]:
        prediction = self.plan.prediction
        assert prediction.simulated is not None
        schedule = self.plan.pipeline.schedule if self.plan.pipeline else ""
        seconds = (
            show(prediction.step_time, SECOND, 4),
            show(prediction.simulated, SECOND, 4),
            f"{apart(self.plan) * 100:+.2f} %",
        )
        return (self.name, self.changed, str(self.plan.mesh), schedule, str(self.plan.micro_batches), *seconds)


def zero(plan: Plan, level: Zero) -> Plan:
    """With this ZeRO level everywhere."""
    return replace(plan, strategies=tuple((name, replace(strategy, zero=level)) for name, strategy in plan.strategies))


def slower(hardware: HardwareProfile) -> HardwareProfile:
    """With all links slower."""
    return replace(hardware, links=tuple(replace(link, bandwidth=link.bandwidth / SLOW) for link in hardware.links))


def equal(plan: Plan, chunks: int) -> Plan:
    """Interleaved, in stages of equal numbers of layers."""
    names, virtual = [name for name, _ in plan.layers()], plan.mesh.pp * chunks
    starts = tuple(names[round(k * len(names) / virtual)] for k in range(1, virtual))
    return replace(plan, pipeline=Pipeline(schedule="interleaved-1f1b", chunks=chunks, split_before=starts))


def changes(name: str, plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The plan, and what else is made of it."""
    yield "", plan
    if name == "llama-8b-8":
        for level in (1, 2, 3):
            yield f"ZeRO-{level} everywhere", zero(plan, level)  # type: ignore[arg-type]
        yield "two replicas", zero(replace(plan, mesh=Mesh(dp_replicate=2, dp_shard=4)), 3)
        yield "replicas alone", zero(replace(plan, mesh=Mesh(dp_replicate=8)), 3)
    if name == "llama-70b-64-pipeline" and plan.pipeline:
        yield "ZeRO-3 everywhere", zero(plan, 3)
        yield "gpipe", replace(plan, pipeline=replace(plan.pipeline, schedule="gpipe"))
        yield "interleaved, 4 chunks a rank", equal(plan, 4)
        yield "zero-bubble", replace(plan, pipeline=replace(plan.pipeline, schedule="zero-bubble"))


def rows(name: str, graph: Graph | None = None) -> Iterator[Row]:
    """What is made of the plan of one report."""
    plan = api.load_plan(REPORTS / f"{name}.yaml")
    graph = graph or api.inspect(plan.model, compute_dtype=plan.workload.compute_dtype)
    hardware = find_hardware(plan.hardware)
    for changed, each in changes(name, plan):
        yield Row(name, changed, priced(graph, hardware, each))
    if name in ("llama-8b-8", "llama-70b-64-pipeline"):
        slow = slower(hardware)
        yield Row(name, f"links {SLOW:g} times slower", priced(graph, slow, plan))
        yield Row(name, f"ZeRO-3 everywhere, links {SLOW:g} times slower", priced(graph, slow, zero(plan, 3)))


def priced(graph: Graph, hardware: HardwareProfile, plan: Plan) -> Plan:
    """Priced and simulated anew."""
    return replace(plan, prediction=predicted(CostModel(graph, hardware, plan.workload), plan))


def drawn() -> list[Plan]:
    """Plans drawn at random, most of them poor ones."""
    dice, found = random.Random(0), []
    for name in DRAWN:
        plan = api.load_plan(REPORTS / f"{name}.yaml")
        graph = api.inspect(plan.model, compute_dtype=plan.workload.compute_dtype)
        for _ in range(DRAWS // len(DRAWN)):
            found.append(priced(graph, find_hardware(dice.choice(MACHINES)), draw(plan, dice)))
    return found


def draw(plan: Plan, dice: random.Random) -> Plan:
    """A plan for the same model, every layer alike."""
    names = tuple(name for name, _ in plan.layers())
    pp = dice.choice((1, 1, 2, 4))
    chunks = dice.choice((1, 2)) if pp > 1 and len(names) % (2 * pp) == 0 else 1
    mesh = Mesh(pp=pp, dp_replicate=dice.choice((1, 1, 2)), dp_shard=dice.choice((1, 2, 8, 32)))
    micro_batches = dice.choice((1, 2, 4, 8, 32)) * (pp if chunks > 1 else 1)
    levels: Sequence[Zero] = (1, 2, 3)
    layer = Strategy(UNSHARDED, dice.choice(("none", "full")), dice.choice(levels))
    one_chunk: Sequence[ScheduleKind] = ("1f1b", "gpipe", "zero-bubble")
    kind = "interleaved-1f1b" if chunks > 1 else dice.choice(one_chunk)
    starts = tuple(names[round(k * len(names) / (pp * chunks))] for k in range(1, pp * chunks))
    return replace(
        plan,
        mesh=mesh,
        micro_batch=1,
        workload=replace(plan.workload, global_batch=micro_batches * mesh.dp),
        strategies=(("layer", layer), ("outer", Strategy(UNSHARDED, "none", 2))),
        outer="outer",
        runs=(LayerRun(layers=names, strategy="layer"),),
        pipeline=Pipeline(schedule=kind, chunks=chunks, split_before=starts) if pp > 1 else None,
    )


def spread(plans: Sequence[Plan]) -> str:
    """How far apart both are, as Markdown."""
    titles = ("plans", "number", "least", "one in twenty is less", "half", "one in twenty is more", "most")
    groups = {
        "no pipeline": [plan for plan in plans if plan.pipeline is None],
        f"pipeline, {MANY} micro-batches or more": [p for p in plans if p.pipeline and p.micro_batches >= MANY],
        "pipeline, fewer": [plan for plan in plans if plan.pipeline and plan.micro_batches < MANY],
    }
    lines = [titles, ("---",) * len(titles)]
    for name, group in groups.items():
        parts = sorted(apart(plan) for plan in group)
        places = [0, len(parts) // 20, len(parts) // 2, -1 - len(parts) // 20, -1]
        lines.append((name, str(len(parts)), *(f"{parts[place] * 100:+.2f} %" for place in places)))
    return markdown(lines)


def apart(plan: Plan) -> float:
    """The event simulation over the price, less one."""
    assert plan.prediction.simulated is not None
    return plan.prediction.simulated / plan.prediction.step_time - 1


def table(found: list[Row]) -> str:
    """The rows as Markdown."""
    titles = ("report", "changed", "mesh", "schedule", "micro-batches", "price", "events", "events - price")
    return markdown([titles, ("---",) * len(titles), *(row.cells() for row in found)])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    """Print the table, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    found = [row for path in sorted(REPORTS.glob("*.yaml")) for row in rows(path.stem)]
    text = table(found) + BELOW + spread(drawn())
    print(text, end="")
    if asked.output is not None:
        asked.output.write_text(TEXT + text, encoding="utf-8")


if __name__ == "__main__":
    main()
