"""Large plans, each run dry: is what every pipeline rank sends and holds what the plan says, and how long does that take?

python -m benchmarks.dry_runs [-o FILE.md] [--only NAME] [--keep FOLDER]      exit code 1 when a case misses a goal

Plans are those of `autoplan plan`. Every pipeline rank is run in a process of its own, which is ended after LIMIT seconds. With
`--keep` what was found is kept in a folder, and is not run again while it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from autoplan.capture import LoadedModel

LIMIT = 480.0
"""Seconds after which a rank is ended."""
SECONDS, OVER = 60.0, 0.03
"""The goals: processor seconds of a rank, and how much more memory may be predicted than is seen."""
EXAMPLES = Path("examples")
Found = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`batch` samples of `model` on `gpus` devices: an example with its arguments, or a family of the zoo in full."""

    name: str
    model: str
    gpus: int
    batch: int
    hardware: str = "h100-sxm-8x"

    def load(self) -> LoadedModel:
        from autoplan.capture import load_model
        from tests.models import ZOO

        return ZOO[self.model].load("full") if self.model in ZOO else load_model(str(EXAMPLES / self.model))


CASES = (
    Case("Llama 3 8B", "llama.py?size=8B", 64, 256),
    Case("Llama 3 8B, 128k tokens", "llama.py?size=8B&seq_len=131072", 64, 64),
    Case("Llama 3 8B, 1M tokens", "llama.py?size=8B&seq_len=1048576", 64, 8),
    Case("Mixtral 8x7B", "mixtral", 16, 64),
    Case("Qwen3 30B-A3B", "qwen3-moe", 32, 256),
    Case("Llama 3 405B", "llama.py?size=405B", 1024, 2048),
    Case("DeepSeek-V3", "deepseek-v3", 2048, 15360),
)


def planned(case: Case, folder: Path) -> None:
    """Leaves the case's plan and graph in `folder`."""
    import autoplan
    from autoplan.files.plan import dump_plan

    loaded = case.load()
    graph = autoplan.inspect(loaded)
    plan = autoplan.plan(graph, gpus=case.gpus, global_batch=case.batch, hardware=case.hardware)
    (folder / "graph.pickle").write_bytes(pickle.dumps(graph))
    (folder / "plan.yaml").write_text(dump_plan(plan), encoding="utf-8")


def one_rank(case: Case, folder: Path, stage: int) -> Found:
    """What a dry run finds on the first rank of a pipeline stage."""
    import autoplan
    from autoplan.cost.model import CostModel
    from autoplan.profile.catalog import find_hardware
    from autoplan.verify import dry
    from autoplan.verify.steady import sample_of, told

    warnings.simplefilter("ignore")
    plan, loaded = autoplan.load_plan(folder / "plan.yaml"), case.load()
    graph = pickle.loads((folder / "graph.pickle").read_bytes())
    costs = CostModel(graph, find_hardware(plan.hardware), plan.workload)
    start, wall = time.process_time(), time.perf_counter()
    seen = dry.one_rank(plan, loaded, stage * (plan.mesh.size // plan.mesh.pp))
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    found = dry.compare(plan, costs, {stage: seen})
    return {
        "seconds": seconds,
        "wall": wall,
        "collectives": len(found.rows),
        "equal": sum(row.agrees for row in found.rows),
        "count": sum(row.seen.count for row in found.rows),
        "bytes": sum(row.seen.bytes for row in found.rows),
        "over": [each.over for each in found.memory],
        "held": seen[1],
        "ran": told({sample_of(plan, stage)}),
        "differences": list(found.differences),
    }


def run_alone(number: int, folder: Path, stage: int) -> Found:
    """A rank, or with -1 the planning, in a process of its own."""
    file = folder / f"rank-{stage}.json"
    if not file.exists():
        command = [
            sys.executable,
            "-m",
            "benchmarks.dry_runs",
            "--case",
            str(number),
            "--keep",
            str(folder),
            "--stage",
            str(stage),
        ]
        try:
            out = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {LIMIT:.0f} s"}
        if out.returncode:
            return {"failed": (out.stderr.strip().splitlines() or ["ended"])[-1]}
        file.write_text(out.stdout, encoding="utf-8")
    found: Found = json.loads(file.read_text(encoding="utf-8"))
    return found


def run(number: int, folder: Path) -> Found:
    """A case: its plan, and what was found on each pipeline rank."""
    import autoplan

    folder.mkdir(parents=True, exist_ok=True)
    none = run_alone(number, folder, -1)
    if none:
        return {"plan": "", "ranks": [none]}
    plan = autoplan.load_plan(folder / "plan.yaml")
    pipeline = f"{plan.pipeline.schedule} x {plan.pipeline.chunks}" if plan.pipeline else ""
    ranks = []
    for stage in range(plan.mesh.pp):
        ranks.append(run_alone(number, folder, stage))
        print(f"{CASES[number].name}, pipeline rank {stage} of {plan.mesh.pp}: {ranks[-1]}", file=sys.stderr, flush=True)
    return {"plan": str(plan.mesh), "schedule": pipeline, "micro_batches": plan.micro_batches, "ranks": ranks}


def misses(found: Found) -> Iterator[str]:
    """What is not as it should be, one sentence each."""
    for stage, rank in enumerate(found["ranks"]):
        where = f"pipeline rank {stage}: " if len(found["ranks"]) > 1 else ""
        if "failed" in rank:
            yield f"{where}{rank['failed']}."
            continue
        yield from (f"{where}{sentence}" for sentence in rank["differences"])
        yield from (f"{where}{over:.1%} more memory is predicted than is seen." for over in rank["over"] if over > OVER)
        if rank["seconds"] > SECONDS:
            yield f"{where}it takes {rank['seconds']:.0f} s."


def table(rows: list[tuple[Case, Found]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | devices | batch | plan | schedule | micro-batches | ranks run | collectives a rank | as predicted "
        "| memory predicted beside seen | CPU s a rank |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, found in rows:
        done = [rank for rank in found["ranks"] if "failed" not in rank]
        cells = [case.name, f"{case.gpus} x {case.hardware.partition('-')[0]}", case.batch, found["plan"]]
        if not done:
            cells += ["", "", f"0 of {len(found['ranks'])} (missed)", "", "", "", ""]
        else:
            equal, all_kinds = (sum(rank[key] for rank in done) for key in ("equal", "collectives"))
            overs = [over for rank in done for over in rank["over"]]
            slowest, missing = max(rank["seconds"] for rank in done), len(done) < len(found["ranks"])
            cells += [
                found["schedule"],
                found["micro_batches"],
                f"{len(done)} of {len(found['ranks'])}" + " (missed)" * missing,
                _span([rank["count"] for rank in done], "{:,.0f}"),
                f"{equal} of {all_kinds}" + " (missed)" * (equal < all_kinds),
                _span(overs, "{:+.1%}") + " (missed)" * (min(overs) < 0 or max(overs) > OVER),
                _span([rank["seconds"] for rank in done], "{:.0f}") + " (missed)" * (slowest > SECONDS),
            ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _span(numbers: list[float], form: str) -> str:
    least, most = form.format(min(numbers)), form.format(max(numbers))
    return least if least == most else f"{least} to {most}"


def page(rows: list[tuple[Case, Found]], kept: str) -> str:
    """docs/dry-runs.md."""
    missed = [f"- {case.name}: {sentence}" for case, found in rows for sentence in misses(found)]
    return PAGE.format(
        seconds=SECONDS,
        limit=LIMIT,
        load=os.getloadavg()[0],
        over=OVER,
        table=table(rows),
        missed="\n".join(["## Missed", "", *missed]) if missed else "No goal is missed.",
        python=platform.python_version(),
        torch=version("torch"),
        kept=kept,
        transformers=version("transformers"),
        cores=os.cpu_count(),
    )


KEPT = " Results kept from earlier runs are among these (`--keep`), at other loads."

PAGE = """# Dry runs of large plans

Written by `python -m benchmarks.dry_runs -o docs/dry-runs.md`. Plans of `autoplan plan`, each verified as `autoplan verify` does
([verifying](verifying.md)): the first rank of every pipeline stage runs a step and the optimizer, in one process without GPUs,
and what it sends and holds stands beside what the plan says. "As predicted": of how many kinds of collectives on an axis count
and bytes are equal, over all ranks. The goals: all are; never less memory is predicted than is seen, and at most {over:.0%} more;
at most {seconds:.0f} processor seconds a rank, without imports and capture. A rank is ended after {limit:.0f} s of the clock.
Python {python}, torch {torch}, transformers {transformers}, {cores} cores, one used; load average {load:.0f}: on a busy machine
the same work takes more processor seconds.{kept}

{table}
{missed}
"""


def main() -> int:
    """Runs every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", type=Path)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--keep", type=Path, help="folder for what was found")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case is not None:
        case = CASES[asked.case]
        print(json.dumps(planned(case, asked.keep) or {} if asked.stage < 0 else one_rank(case, asked.keep, asked.stage)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        keep = asked.keep or Path(folder)
        rows = [(c, run(i, keep / str(i))) for i, c in enumerate(CASES) if c.name.startswith(asked.only)]
    print(table(rows), end="")
    if asked.o:
        asked.o.write_text(page(rows, KEPT if asked.keep else ""), encoding="utf-8")
    return int(any(next(misses(found), "") for _, found in rows))


if __name__ == "__main__":
    sys.exit(main())
