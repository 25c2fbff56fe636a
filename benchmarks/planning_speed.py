"""Processor seconds and memory of planning after capture, each case in a process of its own, the solver's import included.

python -m benchmarks.planning_speed [-o FILE.md] [--autoparallel FOLDER]     exit code 1 when a case is not proven or takes over
                                                                            its limits

A case that is not done after LIMIT processor seconds is ended and told as a miss. The page that -o writes has beside it what
other planners take for their own cases, as they or we have measured it before: `PLANNERS`. With a checkout of AutoParallel its
case is run at the end (`benchmarks.autoparallel_case`; minutes), so that both are from one run.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

MOST_BYTES = 500e6
LIMIT = 60.0
"""Processor seconds after which a case is ended."""


@dataclass(frozen=True)
class Case:
    """`batch` samples of 8192 tokens on `gpus` devices, with `memory` bytes usable of each when it is cut; `model`: a size of the
    zoo's, an example, or a row of the published tables with its own tokens."""

    model: str
    gpus: int
    batch: int
    memory: float = 0.0
    most_seconds: float = 5.0
    hardware: str = "h100-sxm-8x"
    why: str = ""
    """Whose case it is, when it isn't a goal of our own."""


EXAMPLE = "examples/llama.py?size=8B"
MEGATRON = "megatron.csv:"
CASES = (
    Case("llama-3:full", 8, 32, why="Galvatron"),
    Case("llama-3:70B", 64, 256),
    Case("llama-3:70B", 256, 1024),
    Case("llama-3:405B", 1024, 2048),
    Case("llama-3:405B", 4096, 2048),
    Case("llama-3:405B", 16384, 2048),
    Case("llama-3:405B", 1024, 2048, 24e9, 10.0),
    Case("deepseek-v3:full", 2048, 8192),
    Case("deepseek-v3:full", 2048, 8192, hardware="b200-sxm-8x", most_seconds=inf),
    Case("llama-3:full", 256, 512, most_seconds=287.4 / 30, why="AutoParallel"),
    *(Case(f"{EXAMPLE}&layers={layers}", 256, 512) for layers in (32, 128, 512)),
    # attention that writes its scores and drops some out, whose layers have ten times as many unbeaten options
    Case(f"{MEGATRON}narayanan-t1-39B", 512, 1536, hardware="a100-80g-sxm-8x", most_seconds=inf),
    Case(f"{MEGATRON}narayanan-t1-145B", 1536, 2304, hardware="a100-80g-sxm-8x", most_seconds=inf),
)


@dataclass(frozen=True)
class Planner:
    """What another planner takes. `cpu_seconds` as measured; ours of the case `why` stands beside it."""

    name: str
    case: str
    cpu_seconds: str
    space: str
    source: str


PLANNERS = (
    Planner(
        "AutoParallel",
        "Llama-3 8B, 32 layers, 8,192 tokens, 2 sequences a data-parallel rank, on a mesh (32, 8) that the user chose",
        "287.4 (27.9 capture, 91.9 strategies and program, 70.1 CBC, 91.3 apply); 4.3 GB",
        "shardings of every operation on one mesh; no memory limit, pipeline or recomputation",
        "meta-pytorch/autoparallel at a54c252 with torch 2.13 and PuLP's CBC 2.10.3, measured on 2 cores of an AMD EPYC, not in "
        "this run",
    ),
    Planner(
        "Galvatron",
        "Llama-7B on 8 GPUs (ours: Llama-3 8B on 8 H100)",
        "109 to 209",
        "pp, dp, sdp and tp by layer, recomputation; dynamic program over memory in steps of a megabyte; no bound",
        "measured before on the same kind of machine, not in this run",
    ),
    Planner(
        "Calculon",
        "GPT-3 175B on 4,096 GPUs; at 512 as shipped",
        "217; about 2,900",
        "exhaustive over execution settings, the same for all layers",
        "measured before on the same kind of machine, not in this run",
    ),
)


def capture(model: str, path: Path) -> None:
    """Captures a model at 8192 tokens and pickles its graph."""
    if model.startswith(EXAMPLE):
        from autoplan import api

        path.write_bytes(pickle.dumps(api.inspect(api.load_model(model))))
        return
    if model.startswith(MEGATRON):
        from benchmarks.models import graph_of
        from benchmarks.rows import read
        from benchmarks.runs import run_of

        rows = read(Path(__file__).with_name("published") / "megatron.csv")
        run = run_of(next(row for row in rows if row.text("id") == model.removeprefix(MEGATRON)))
        path.write_bytes(pickle.dumps(graph_of(run.shape, run.layers)))
        return
    from autoplan.capture.fake import build_on_meta
    from autoplan.capture.huggingface import example_inputs
    from autoplan.capture.model import capture_module
    from tests.models import ZOO

    family, size = model.split(":")
    loaded = ZOO[family].load(size)
    config = loaded.build.args[0]  # type: ignore[attr-defined]
    module = build_on_meta(loaded.build)
    graph = capture_module(module, lambda batch: example_inputs(config, model, 8192, batch), name=model)
    path.write_bytes(pickle.dumps(graph))


def measure(case: Case, graph_file: Path) -> dict[str, Any]:
    """Plans in this process."""
    graph = pickle.loads(graph_file.read_bytes())
    start = time.process_time()
    from autoplan.errors import NothingFits
    from autoplan.profile.catalog import find_hardware
    from autoplan.search.planner import search
    from autoplan.workload import Workload

    hardware = find_hardware(case.hardware)
    usable = hardware.device.memory - hardware.device.reserved
    headroom = 1 - case.memory / usable if case.memory else 0.0
    row: dict[str, Any] = {"plan": "", "schedule": "", "step_s": "", "status": "", "gap": "", "candidates": ""}
    try:
        plan = search(graph, hardware, Workload(global_batch=case.batch), gpus=case.gpus, headroom=headroom)
    except NothingFits as error:
        row |= {"plan": error.message.partition(" (")[0], "status": "no plan, proven"}
    else:
        row |= {
            "plan": str(plan.mesh),
            "schedule": f"{plan.pipeline.schedule} x {plan.pipeline.chunks}" if plan.pipeline else "",
            "step_s": round(plan.prediction.step_time, 3),
            "status": plan.solve.status,
            "gap": f"{plan.solve.gap:.0e}",
            "candidates": plan.solve.candidates,
        }
    return row | {"cpu_s": round(time.process_time() - start, 2), "peak_mb": round(_peak() / 1e6)}


def _peak() -> float:
    """Bytes of this process at most. Linux counts in `ru_maxrss` what the process was before it became this program."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024.0 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def run_alone(number: int, graph_file: Path) -> dict[str, Any]:
    """A case in a process of its own, which the system ends after LIMIT processor seconds."""
    command = [sys.executable, "-m", "benchmarks.planning_speed", "--case", str(number), "--graph", str(graph_file)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"plan": "", "schedule": "", "step_s": "", "status": f"not done after {LIMIT:.0f} s", "gap": "", "candidates": "",
                "cpu_s": LIMIT, "peak_mb": 0}  # fmt: skip
    if out.returncode:
        raise RuntimeError(out.stderr)
    found: dict[str, Any] = json.loads(out.stdout)
    return found


def missed(case: Case, row: dict[str, Any]) -> bool:
    """Whether the case is not proven, or takes more than it may."""
    proven = row["status"] in ("optimal", "no plan, proven")
    return not proven or row["cpu_s"] > case.most_seconds or row["peak_mb"] * 1e6 > MOST_BYTES


def table(rows: list[tuple[Case, dict[str, Any]]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | devices | batch | plan | schedule | step s | status | gap | combinations | CPU s | MB | goal, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, row in rows:
        cut = f", {case.memory / 1e9:g} GB of each" if case.memory else ""
        devices = f"{case.gpus} x {case.hardware.partition('-')[0]}{cut}"
        goal = f"{case.most_seconds:.3g}" + (" (missed)" if missed(case, row) else "") if case.most_seconds < inf else ""
        lines.append("| " + " | ".join(map(str, (case.model, devices, case.batch, *row.values(), goal))) + " |")
    return "\n".join(lines) + "\n"


def beside_autoparallel(folder: Path) -> Planner:
    """AutoParallel's own case, now."""
    command = [sys.executable, "-m", "benchmarks.autoparallel_case", str(folder)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(out.stderr)
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    head = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    parts = ", ".join(f"{seconds} {phase}" for phase, seconds in found.items() if phase not in ("all", "GB"))
    return replace(
        PLANNERS[0],
        cpu_seconds=f"{found['all']} ({parts}); {found['GB']} GB",
        source=f"meta-pytorch/autoparallel at {head or 'no commit'} with torch {version('torch')} and PuLP's CBC, in this run",
    )


def page(rows: list[tuple[Case, dict[str, Any]]], planners: Sequence[Planner]) -> str:
    """docs/planning-speed.md."""
    ours = {case.why: row for case, row in rows if case.why}
    lines = [
        "| planner | its case | CPU s | what it searches | autoplan, the same model and devices, CPU s | source |",
        "|---|---|---|---|---|---|",
    ]
    for planner in planners:
        told = f"{ours[planner.name]['cpu_s']} (every mesh, under memory, proven)" if planner.name in ours else "not run"
        lines.append(f"| {planner.name} | {planner.case} | {planner.cpu_seconds} | {planner.space} | {told} | {planner.source} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "pulp", "highspy"))
    return PAGE.format(
        table=table(rows), planners="\n".join(lines), python=platform.python_version(), versions=versions, load=_load()
    )


def _load() -> str:
    return f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.0f}"


PAGE = """# Planning speed

Written by `python -m benchmarks.planning_speed -o docs/planning-speed.md`. Processor seconds of a process that plans a captured
model, imports included, and its largest resident memory. Every plan is proven to a gap of 0.0001 over all meshes, micro-batches,
schedules, cuts and strategies of layers. Python {python}, {versions}; {load}: on a busy machine the same work takes more
processor seconds.

`megatron.csv:` is a row of the published tables: a GPT whose attention writes its scores and drops some out, so that a layer has
up to 173 options that none beats.

{table}
## Beside other planners

{planners}

Other planners' numbers that are not of this run stand as they were measured; machines differ, so they are orders of magnitude.
"""


def main() -> int:
    """Runs every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", type=Path)
    parser.add_argument("--autoparallel", type=Path, metavar="FOLDER", help="a checkout of meta-pytorch/autoparallel")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--graph", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(LIMIT), int(LIMIT) + 1))
        print(json.dumps(measure(CASES[asked.case], asked.graph)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, case in enumerate(CASES):
            graph = Path(folder) / case.model.translate(str.maketrans(":/", "--"))
            if not graph.exists():
                capture(case.model, graph)
            rows.append((case, run_alone(i, graph)))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows), end="")
    planners = [beside_autoparallel(asked.autoparallel), *PLANNERS[1:]] if asked.autoparallel else PLANNERS
    for planner in planners:
        print(f"{planner.name}: {planner.cpu_seconds}: {planner.source}", file=sys.stderr)
    if asked.o:
        asked.o.write_text(page(rows, planners), encoding="utf-8")
    return int(any(missed(case, row) for case, row in rows))


if __name__ == "__main__":
    sys.exit(main())
