"""How far the price of a plan is from its event simulation: the plans of reports/, and changes to them.

python -m benchmarks.simulation [-o FILE.md]          half a minute

Nothing is measured: both numbers are predictions of the same layers' seconds, added up (`cost.model`) and as events on streams
(`cost.events`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from autoplan import api
from autoplan.cost.model import CostModel
from autoplan.cost.simulated import simulated
from autoplan.graph import Graph
from autoplan.hardware import HardwareProfile
from autoplan.plan import Pipeline, Plan
from autoplan.profile.catalog import find_hardware
from autoplan.strategy import Mesh, Zero
from autoplan.units import SECOND, show

REPORTS = Path(__file__).parent.parent / "reports"
SLOW = 8.0
"""How many times slower the last rows' network is."""

TEXT = """\
# The price and the event simulation

Written by `python -m benchmarks.simulation -o docs/simulation.md`, from the plans of the sample reports as they are and as they
would be with something changed (which may then not fit). Both numbers are predictions: the price is the sum over layers that the
search adds up, the event simulation runs the same layers on the streams of every device
([how](cost-model.md#the-event-simulation)). Nothing here was measured.

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
        apart = prediction.simulated / prediction.step_time - 1
        schedule = self.plan.pipeline.schedule if self.plan.pipeline else ""
        seconds = (show(prediction.step_time, SECOND, 4), show(prediction.simulated, SECOND, 4), f"{apart * 100:+.2f} %")
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
    costs = CostModel(graph, hardware, plan.workload)
    return replace(plan, prediction=simulated(costs, replace(plan, prediction=costs.predict_plan(plan))))


def table(found: list[Row]) -> str:
    """As Markdown."""
    titles = ("report", "changed", "mesh", "schedule", "micro-batches", "price", "events", "events - price")
    lines = [titles, ("---",) * len(titles), *(row.cells() for row in found)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    """Print the table, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    found = [row for path in sorted(REPORTS.glob("*.yaml")) for row in rows(path.stem)]
    text = table(found)
    print(text, end="")
    if asked.output is not None:
        asked.output.write_text(TEXT + text, encoding="utf-8")


if __name__ == "__main__":
    main()
