"""The closed loop on this machine: measure it, plan, run every plan, compare; writes docs/closed-loop.md and its pictures.

    python -m benchmarks.closed_loop              measure, run, write (an hour or more; nothing else should run)
    python -m benchmarks.closed_loop --small --folder FOLDER      a small part of it, with its page, to see that it works
    python -m benchmarks.closed_loop --page       write the page again from what was measured

For each number of ranks the machine is profiled with as many ranks as the plans use; for each model the space of uniform plans
(benchmarks.uniform_plans) is run for real in rounds over all plans, so that a machine that grows slower wrongs none of them.
The fastest of hundreds of noisy times is the luckiest of the fast ones. So the picked plan and all that came near the fastest are
run again in some final rounds, and the median of a plan's rounds counts.
What is measured stands in benchmarks/measured/closed-loop-*.json; an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from math import log, sqrt
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

from autoplan import api
from autoplan.calibrate.calibration import Run, calibrated
from autoplan.cost.model import CostModel
from autoplan.errors import UsageError
from autoplan.files.hardware import load_hardware
from autoplan.files.workload import workload
from autoplan.graph import Graph
from autoplan.hardware import HardwareProfile
from autoplan.measurement import MeasuredSteps
from autoplan.plan import Plan, Prediction
from autoplan.profile.ranks import start
from benchmarks.closed_loop_page import NEAR, Case, Row, write
from benchmarks.uniform_plans import uniform_plans

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks" / "measured"
MODELS = {
    "gpt": "examples/gpt.py?layers=4&hidden=256&heads=8&ffn=1024&vocab=2048&seq_len=512",
    "llama": "examples/llama.py?size=125M&layers=4&hidden=256&heads=8&kv_heads=4&ffn=704&vocab=2048&seq_len=512",
}
BATCH = 4
"""Samples of a step."""
CHUNK = 24
"""Plans that one set of processes runs one after another."""
EVERY = 4
"""One plan in so many calibrates; the others are held out."""


@dataclass(frozen=True)
class Settings:
    """How much is done."""

    folder: Path
    ranks: tuple[int, ...]
    models: tuple[str, ...]
    budget: str
    rounds: int
    finals: int
    """Rounds more over the plans that came near the fastest."""
    steps: int
    plans: int | None
    """At most so many of each case, drawn once."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--budget", default="100s", help="of a profile")
    parser.add_argument("--rounds", type=int, default=1, help="over all plans")
    parser.add_argument("--finals", type=int, default=4, help="rounds more over the plans that came near the fastest")
    parser.add_argument("--steps", type=int, default=4, help="of each plan in each round")
    parser.add_argument("--plans", type=int, help="at most so many of each case")
    parser.add_argument("--folder", type=Path, default=MEASURED, help="of the measurements; another one gets the page too")
    parser.add_argument("--small", action="store_true", help="two ranks, one model, few plans, one round")
    parser.add_argument("--page", action="store_true", help="only write the page")
    asked = parser.parse_args(arguments)
    small = asked.small
    settings = Settings(
        folder=asked.folder,
        ranks=(2,) if small else tuple(asked.ranks),
        models=("gpt",) if small else tuple(asked.models),
        budget="20s" if small else asked.budget,
        rounds=1 if small else asked.rounds,
        finals=1 if small else asked.finals,
        steps=asked.steps,
        plans=4 if small else asked.plans,
    )
    settings.folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for ranks in settings.ranks:
        profile = profiled(ranks, settings, measure=not asked.page)
        for name in settings.models:
            cases.append(case(name, ranks, profile, settings, run=not asked.page))
    where = ROOT / "docs" if settings.folder == MEASURED else settings.folder
    write(cases, where)
    print((where / "closed-loop.md").read_text(encoding="utf-8"))


def profiled(ranks: int, settings: Settings, *, measure: bool) -> HardwareProfile:
    """The profile of this machine with so many ranks; measured if it is not there yet."""
    path = settings.folder / f"cpu-{ranks}-ranks.yaml"
    if measure and not path.exists():
        command = [sys.executable, "-m", "autoplan", "profile", "-o", str(path), "--ranks", str(ranks)]
        subprocess.run([*command, "--budget", settings.budget, "--dtype", "float32", "--force"], check=True)
        path.with_suffix(".html").unlink()
    return load_hardware(path)


def case(name: str, ranks: int, profile: HardwareProfile, settings: Settings, *, run: bool) -> Case:
    """One model on so many ranks: every plan with what was predicted and what was measured."""
    spec = MODELS[name]
    load = workload({}, {"global_batch": BATCH, "compute_dtype": "float32", "param_dtype": "float32"}, ranks)
    graph = api.inspect(api.load_model(str(ROOT / spec)), compute_dtype="float32")
    costs = CostModel(graph, profile, load)
    picked = api.plan(graph, gpus=ranks, hardware=profile, global_batch=BATCH, compute_dtype="float32", param_dtype="float32")
    plans = [picked, *(plan for plan in uniform_plans(costs, ranks) if key(plan) != key(picked))]
    if settings.plans is not None and len(plans) > settings.plans:
        plans = [picked, *random.Random(1).sample(plans[1:], settings.plans - 1)]
    path = settings.folder / f"closed-loop-{name}-{ranks}.json"
    if run:
        _run_all(plans, str(ROOT / spec), path, ranks, settings)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return _case(name, ranks, profile, graph, plans, found)


def key(plan: Plan) -> str:
    """What tells a plan from others of its case."""
    schedule = f", {plan.pipeline.schedule} x {plan.pipeline.chunks}" if plan.pipeline else ""
    strategies = {strategy for _, strategy in plan.layers()}
    recompute = "/".join(sorted({s.recompute for s in strategies}))
    zero = "/".join(sorted({str(s.zero) for s in strategies})) if plan.mesh.shards > 1 else ""
    stream = ", sequence parallel" if plan.outer_strategy.sharding.stream.sharded else ""
    parts = f"{plan.mesh}{schedule}, micro-batch {plan.micro_batch}, recompute {recompute}{stream}"
    return parts + (f", zero {zero}" if zero else "")


def _run_all(plans: list[Plan], spec: str, path: Path, ranks: int, settings: Settings) -> None:
    """Rounds over all plans, then over those near the fastest; each in another order."""
    for turn in range(settings.rounds):
        _round(plans, spec, path, ranks, settings, turn)
    close = near(plans, _read(path), settings.rounds)
    final = [plans[0], *(plan for plan in close if plan is not plans[0])]
    for turn in range(settings.rounds, settings.rounds + settings.finals):
        _round(final, spec, path, ranks, settings, turn)


def near(plans: list[Plan], found: dict[str, Any], rounds: int) -> list[Plan]:
    """Those whose first rounds took at most `NEAR` times as long as the fastest's."""
    times = {key(plan): _median(found[key(plan)]["rounds"][:rounds]) for plan in plans if found[key(plan)].get("rounds")}
    most = NEAR * min(times.values(), default=0.0)
    return [plan for plan in plans if key(plan) in times and times[key(plan)] <= most]


def _round(plans: list[Plan], spec: str, path: Path, ranks: int, settings: Settings, turn: int) -> None:
    """One round; what is there already is not run again."""
    found = _read(path)
    left = [p for p in plans if len(found.get(key(p), {}).get("rounds", [])) <= turn and "error" not in found.get(key(p), {})]
    random.Random(turn).shuffle(left)
    begin = monotonic()
    if left:
        found.setdefault("load", []).append(round(os.getloadavg()[0], 1))
        _save(path, found)
    while left:
        chunk, left = left[:CHUNK], left[CHUNK:]
        try:
            start(ranks, run_chunk, chunk, spec, str(path), settings.steps)
        except UsageError as error:
            left = _after_failure(chunk, path, turn, str(error)) + left
        print(f"{path.name}: round {turn + 1}, {len(left)} plans left, {monotonic() - begin:.0f} s", file=sys.stderr)


def run_chunk(plans: list[Plan], spec: str, path: str, steps: int) -> None:
    """On every rank: some plans one after another; the first rank keeps what each took."""
    from autoplan.profile.ranks import joined, this_device
    from autoplan.tune.steps import measured_steps

    device, loaded = this_device(), api.load_model(spec)
    if device.type == "cpu":
        import torch

        torch.set_num_threads(1)
    with joined(device):
        for plan in plans:
            steps_of = measured_steps(plan, loaded, steps, warmup=1, device=device)
            if os.environ["RANK"] == "0":
                _keep(Path(path), plan, steps_of)


def _keep(path: Path, plan: Plan, steps: MeasuredSteps) -> None:
    found = _read(path)
    entry = found.setdefault(key(plan), {"rounds": [], "memory": 0.0})
    entry["rounds"].append([float(f"{seconds:.4g}") for seconds in steps.seconds])
    entry["memory"] = max(entry["memory"], steps.peak_memory or 0.0)
    _save(path, found)


def _after_failure(chunk: list[Plan], path: Path, turn: int, error: str) -> list[Plan]:
    """The first plan of the chunk that was not kept is the one that failed; those after it are still to run."""
    found = _read(path)
    open_ = [plan for plan in chunk if len(found.get(key(plan), {}).get("rounds", [])) <= turn]
    if open_:
        found[key(open_[0])] = {"error": error}
        _save(path, found)
    return open_[1:]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _save(path: Path, found: dict[str, Any]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(found.items()))
    path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def _case(name: str, ranks: int, profile: HardwareProfile, graph: Graph, plans: list[Plan], found: dict[str, Any]) -> Case:
    ran = [plan for plan in plans if found.get(key(plan), {}).get("rounds")]
    runs = {key(plan): Run(graph, plan, _steps(found[key(plan)], ranks)) for plan in ran}
    teachers = [key(plan) for plan in sorted(ran, key=key)[::EVERY]]
    taught = calibrated(profile, [runs[each] for each in teachers], date.today().isoformat())
    rows = []
    costs = {
        which: CostModel(graph, hardware, plans[0].workload) for which, hardware in (("said", profile), ("now", taught.profile))
    }
    for plan in ran:
        rows.append(
            Row(
                plan=key(plan),
                picked=plan is plans[0],
                taught=key(plan) in teachers,
                predicted=_seconds(costs["said"].predict_plan(plan)),
                calibrated=_seconds(costs["now"].predict_plan(plan)),
                measured=runs[key(plan)].steps.step_time,
                rounds=len(found[key(plan)]["rounds"]),
            )
        )
    failed = {key(plan): found[key(plan)]["error"] for plan in plans if "error" in found.get(key(plan), {})}
    rounds = min(len(found[key(plan)]["rounds"]) for plan in ran)
    load = tuple(found.get("load", ()))
    noise = _noise([(plan, runs[key(plan)].steps.step_time) for plan in ran])
    return Case(name, ranks, tuple(rows), dict(taught.factors), failed, profile.device.name, MODELS[name], load, rounds, noise)


def _noise(measured: list[tuple[Plan, float]]) -> float:
    """See `Case`."""
    alike: dict[str, list[float]] = {}
    for plan, seconds in measured:
        if plan.pipeline and plan.pipeline.schedule in ("gpipe", "1f1b") and plan.micro_batches == 1:
            alike.setdefault(key(plan).replace("gpipe", "1f1b"), []).append(log(seconds))
    apart = [one - two for one, two in (times for times in alike.values() if len(times) == 2)]
    return sqrt(sum(each**2 for each in apart) / len(apart)) if apart else float("nan")


def _steps(entry: dict[str, Any], ranks: int) -> MeasuredSteps:
    return MeasuredSteps(seconds=(_median(entry["rounds"]),), ranks=ranks, device="cpu")


def _median(rounds: list[list[float]]) -> float:
    """The median of the rounds' medians counts."""
    return median(median(each) for each in rounds)


def _seconds(prediction: Prediction) -> float:
    return prediction.step_time if prediction.scheduled is None else prediction.scheduled


if __name__ == "__main__":
    main()
