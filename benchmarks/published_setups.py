"""Plans beside published setups: of every model and number of GPUs the published configuration that ran fastest, priced by our
model as the option `--beside` of `autoplan plan` prices it, and the plan that autoplan proposes in its place.

    python -m benchmarks.published_setups [ROWS.csv ...] [-o docs/published-setups.md]     exit code 1 where a plan is slower

A plan may use what the published configuration did not have (bf16 for fp16, attention in one kernel): both are priced with the
same kernels, those that PyTorch has today.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from autoplan.errors import NothingFits, UsageError
from autoplan.importing.configuration import Configuration
from autoplan.importing.planned import planned
from autoplan.plan import Plan
from autoplan.profile.catalog import find_hardware
from autoplan.search.planner import search
from autoplan.strategy import Mesh, Zero
from autoplan.units import SECOND, show
from autoplan.workload import DType, Workload
from benchmarks.models import graph_of
from benchmarks.runs import Refused, Run, read, run_of

PUBLISHED = Path(__file__).parent / "published"
FEWEST = 8
"""GPUs below which there is little to choose."""
LAYERS = {"none": 0, "alternate": 2, "full": 1}
"""Recomputation -> every how many-th layer is recomputed."""
ROUNDING = 1 + 1e-4
"""The gap of the search."""


@dataclass(frozen=True)
class Beside:
    """A published configuration, priced, and our plan."""

    run: Run
    theirs: Plan
    ours: Plan

    @property
    def fits(self) -> bool:
        return self.theirs.prediction.memory.total <= self.theirs.memory_limit

    @property
    def missed(self) -> bool:
        """Whether the plan is slower; one that does not fit is no rival."""
        return self.fits and self.ours.prediction.step_time > self.theirs.prediction.step_time * ROUNDING


def fastest(runs: Iterable[Run]) -> list[Run]:
    """Of every (source, model, GPUs, batch) the run that was measured fastest."""
    best: dict[tuple[object, ...], Run] = {}
    for run in runs:
        key = run.source, run.shape, run.layers, run.gpus, run.global_batch
        if key not in best or run.seconds < best[key].seconds:
            best[key] = run
    return list(best.values())


def spread(runs: Sequence[Run], most: int) -> Iterator[Run]:
    """Of every source at most so many, evenly from its first to its last."""
    for source in dict.fromkeys(run.source for run in runs):
        own = [run for run in runs if run.source == source]
        yield from (own[i * len(own) // min(most, len(own))] for i in range(min(most, len(own))))


def configuration(run: Run) -> tuple[Configuration, Mesh]:
    """What ran, in autoplan's words. Raises `Refused` for what it has none for."""
    if run.recompute not in LAYERS:
        raise Refused(f"recomputation of parts ({run.recompute}) has another meaning here")
    if run.float8 or run.single_layer:
        raise Refused("products in 8 bits" if run.float8 else "a single layer")
    zero: Zero = 3 if run.zero == 3 and not run.stays else 2 if run.zero >= 2 else 1
    cut = run.zero > 0
    told = Configuration(
        path=Path(run.id),
        trainer=run.source,
        pp=run.pp,
        dp_replicate=1 if cut else run.dp,
        dp_shard=run.dp if cut else 1,
        cp=run.cp,
        tp=run.tp,
        ep=run.ep,
        sequence_parallel=run.sequence_parallel,
        zero=zero,
        micro_batch=run.micro_batch,
        schedule="interleaved-1f1b" if run.chunks > 1 else "1f1b",
        chunks=run.chunks,
        recompute_every=LAYERS[run.recompute],
    )
    return told, told.mesh(run.gpus)


def beside(run: Run) -> Beside:
    """Raises `Refused` where one of the two can't be had."""
    told, mesh = configuration(run)
    graph = graph_of(run.shape._replace(unfused=False), run.layers)
    hardware, load = find_hardware(run.hardware), Workload(global_batch=run.global_batch, compute_dtype=cast(DType, run.dtype))
    try:
        theirs, _ = planned(told, graph, hardware, load, mesh)
        ours = search(graph, hardware, load, gpus=run.gpus)
    except (UsageError, NothingFits) as error:
        raise Refused(error.message.removeprefix(f"{run.id}: ")) from None
    return Beside(run, theirs, ours)


def page(found: Sequence[Beside], refused: Counter[str], most: int) -> str:
    """docs/published-setups.md."""
    lines = [
        "| source | run | GPUs | batch | its configuration | measured | priced | the plan | priced | speed-up |",
        "|---|---|--:|--:|---|--:|--:|---|--:|--:|",
    ]
    for each in found:
        run, theirs, ours = each.run, each.theirs, each.ours
        ratio = theirs.prediction.step_time / ours.prediction.step_time
        cells = (
            run.source,
            run.id,
            run.gpus,
            run.global_batch,
            _told(theirs),
            show(run.seconds, SECOND),
            show(theirs.prediction.step_time, SECOND) + ("" if each.fits else ", does not fit"),
            _told(ours),
            show(ours.prediction.step_time, SECOND),
            f"{ratio:.2f}" + (" (missed)" if each.missed else ""),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    misses = sum(each.missed for each in found)
    counts = "\n".join(f"- {number}: {reason}" for reason, number in refused.most_common()) or "- none"
    return PAGE.format(
        number=len(found),
        most=most,
        fit=sum(each.fits for each in found),
        misses="none is slower" if not misses else f"{misses} are slower",
        table="\n".join(lines),
        refused=counts,
    )


def _told(plan: Plan) -> str:
    used = sorted({strategy.recompute for _, strategy in plan.layers()})
    schedule = f", {plan.pipeline.schedule} x {plan.pipeline.chunks}" if plan.pipeline else ""
    return f"{plan.mesh}{schedule}, micro-batch {plan.micro_batch}, recompute {' and '.join(used)}"


PAGE = """# Plans beside published setups

Written by `python -m benchmarks.published_setups -o docs/published-setups.md`. Of every model, number of GPUs and
global batch in `benchmarks/published/` the configuration that was measured fastest, at most {most} of a source
(`--most`), priced by autoplan's cost model as the option `--beside` of `autoplan plan` prices it; and the plan that
autoplan proposes for the same model, GPUs and batch. Both are priced with the kernels of PyTorch today, and without the
constants of the framework that ran them, so that "priced" is not a prediction of what was "measured" with the software
of its time ([accuracy](accuracy.md) is); the speed-up is that of the plan over the configuration, both as priced.

Of {number} setups {misses}; {fit} of the published configurations fit into memory by our model.

{table}

## Not compared

{refused}
"""


def main(arguments: list[str] | None = None) -> int:
    """Compares every setup."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="*", default=sorted(PUBLISHED.glob("*.csv")))
    parser.add_argument("-o", type=Path)
    parser.add_argument("--most", type=int, default=8, help="at most so many setups of a source")
    asked = parser.parse_args(arguments)
    refused: Counter[str] = Counter()
    runs, found = [], []
    for path in asked.rows:
        for row in read(path):
            try:
                run = run_of(row)
                configuration(run)
            except (Refused, UsageError) as error:
                refused[str(error)] += 1
                continue
            if run.gpus >= FEWEST:
                runs.append(run)
    for run in spread(fastest(runs), asked.most):
        try:
            found.append(beside(run))
        except Refused as error:
            refused[str(error)] += 1
            continue
        print(f"{run.id}: {found[-1].theirs.prediction.step_time / found[-1].ours.prediction.step_time:.2f}", file=sys.stderr)
    text = page(found, refused, asked.most)
    print(text)
    if asked.o:
        asked.o.write_text(text, encoding="utf-8")
    return int(any(each.missed for each in found))


if __name__ == "__main__":
    sys.exit(main())
