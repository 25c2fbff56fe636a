"""Processor seconds and memory of planning after capture, each case in a process of its own, the solver's import included.

python -m benchmarks.planning_speed [-o FILE.md]      exit code 1 when a plan isn't proven or a case takes over its limits
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_BYTES = 500e6


@dataclass(frozen=True)
class Case:
    """`batch` samples of 8192 tokens on `gpus` H100s, with `memory` bytes usable of each when it is cut."""

    model: str
    gpus: int
    batch: int
    memory: float = 0.0
    most_seconds: float = 5.0


CASES = (
    Case("llama-3:full", 8, 32),
    Case("llama-3:70B", 64, 256),
    Case("llama-3:70B", 256, 1024),
    Case("llama-3:405B", 1024, 2048),
    Case("llama-3:405B", 4096, 2048),
    Case("llama-3:405B", 16384, 2048),
    Case("llama-3:405B", 1024, 2048, 24e9, 10.0),
    Case("deepseek-v3:full", 2048, 8192),
)


def capture(model: str, path: Path) -> None:
    """Captures a model of the zoo at 8192 tokens and pickles its graph."""
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
    from autoplan.profile.catalog import find_hardware
    from autoplan.search.planner import search
    from autoplan.workload import Workload

    hardware = find_hardware("h100-sxm-8x")
    usable = hardware.device.memory - hardware.device.reserved
    headroom = 1 - case.memory / usable if case.memory else 0.0
    plan = search(graph, hardware, Workload(global_batch=case.batch), gpus=case.gpus, headroom=headroom)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform != "darwin" else 1)
    return {
        "plan": str(plan.mesh),
        "schedule": f"{plan.pipeline.schedule} x {plan.pipeline.chunks}" if plan.pipeline else "",
        "step_s": round(plan.prediction.step_time, 3),
        "status": plan.solve.status,
        "gap": plan.solve.gap,
        "candidates": plan.solve.candidates,
        "cpu_s": round(seconds, 2),
        "peak_mb": round(peak / 1e6),
    }


def table(rows: list[tuple[Case, dict[str, Any]]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | GPUs | batch | plan | schedule | step s | status | gap | combinations | CPU s | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, row in rows:
        cut = f" ({case.memory / 1e9:g} GB)" if case.memory else ""
        told = (
            case.model,
            f"{case.gpus}{cut}",
            case.batch,
            *list(row.values())[:4],
            f"{row['gap']:.0e}",
            *list(row.values())[5:],
        )
        lines.append("| " + " | ".join(map(str, told)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", type=Path)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--graph", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case is not None:
        print(json.dumps(measure(CASES[asked.case], asked.graph)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, case in enumerate(CASES):
            graph = Path(folder) / case.model.replace(":", "-")
            if not graph.exists():
                capture(case.model, graph)
            command = [sys.executable, "-m", "benchmarks.planning_speed", "--case", str(i), "--graph", str(graph)]
            out = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append((case, json.loads(out.stdout)))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows), end="")
    if asked.o:
        asked.o.write_text(table(rows), encoding="utf-8")
    slow = [row for case, row in rows if row["cpu_s"] > case.most_seconds or row["peak_mb"] * 1e6 > MOST_BYTES]
    return int(bool(slow) or any(row["status"] != "optimal" for _, row in rows))


if __name__ == "__main__":
    sys.exit(main())
