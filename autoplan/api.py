"""The journey on one page: a model and a number of GPUs -> a plan -> a report, or the model running in parallel.

    graph    = inspect(model)                  what the model computes
    plan     = plan(model, gpus=8)             how to run it, with its price and the proof
    page     = report(plan)                    something to look at
    parallel = apply(build_model, plan)        run it (under torchrun)

torch and the solver are imported where they are used, so that `import autoplan` stays light.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoplan.constraints import Constraints
from autoplan.errors import UsageError
from autoplan.files.constraints import load_constraints
from autoplan.files.plan import load_plan, plan_json, save_plan
from autoplan.files.workload import workload
from autoplan.graph import Graph
from autoplan.hardware import HardwareProfile
from autoplan.measurement import MeasuredSteps
from autoplan.plan import Plan, Prediction
from autoplan.profile.catalog import DEFAULT_HARDWARE, find_hardware, hardware_names
from autoplan.workload import DType, OptimizerName

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from autoplan.apply import ParallelModel
    from autoplan.calibrate.calibration import Calibration
    from autoplan.calibrate.timer import Timer
    from autoplan.capture import LoadedModel
    from autoplan.export.exported import Exported
    from autoplan.report.rows import Table
    from autoplan.search.explaining import Answer
    from autoplan.search.planner import Progress
    from autoplan.verify import DryRun

__all__ = [
    "Timer",
    "apply",
    "calibrate",
    "compare",
    "estimate",
    "explain",
    "export",
    "frame",
    "hardware_names",
    "imported",
    "inspect",
    "load_hardware",
    "load_model",
    "load_plan",
    "plan",
    "plan_json",
    "plans",
    "report",
    "save_plan",
    "verify",
]


Objective = Literal["fewest", "speed", "cost"]
"""Of several numbers of GPUs: the fewest, the most tokens a second, the fewest GPU-hours a token."""

load_hardware = find_hardware


def load_model(spec: str, **kwargs: Any) -> LoadedModel:
    """The model that `model.py` or `model.py:factory` builds; `kwargs` go to its `build_model` and `example_inputs`.

    Raises `UsageError`, naming file and line, when the file does not keep the contract.
    """
    from autoplan.capture import load_model as load

    return load(spec, kwargs=kwargs)


def inspect(model: str | LoadedModel, *, compute_dtype: str = "bfloat16", **kwargs: Any) -> Graph:
    """What the model computes: operations, shapes, FLOPs, bytes, blocks. Nothing is allocated."""
    from autoplan.capture import capture

    loaded = load_model(model, **kwargs) if isinstance(model, str) else model
    return capture(loaded, compute_dtype=compute_dtype)


def _graph_of(model: str | LoadedModel | Graph, compute_dtype: DType) -> Graph:
    """A model's graph in this dtype; a given one must have it."""
    return model.computing_in(compute_dtype) if isinstance(model, Graph) else inspect(model, compute_dtype=compute_dtype)


def plan(
    model: str | LoadedModel | Graph,
    *,
    gpus: int | tuple[int, int],
    step_time: float | None = None,
    hardware: str | HardwareProfile = DEFAULT_HARDWARE,
    global_batch: int | None = None,
    compute_dtype: DType | None = None,
    param_dtype: DType | None = None,
    optimizer: OptimizerName | None = None,
    compile: bool | None = None,
    expert_imbalance: float | None = None,
    objective: Objective = "fewest",
    fixed: Mapping[str, int] | None = None,
    constraints: str | Path | Constraints | None = None,
    headroom: float = 0.0,
    frontier: int = 0,
    gap: float = 1e-4,
    time_limit: float | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    beside: Sequence[str | Path] = (),
    on_progress: Callable[[Progress], None] | None = None,
) -> Plan:
    """The fastest plan for `gpus` devices, proven within a relative `gap` for the cost model.

    With a range of `gpus`, (8, 64), it is the plan for the "fewest" that fit, and take at most `step_time` seconds a step; or,
    with that `objective`, the one of the most "speed" (tokens a second) or of the least "cost" (GPU-hours a token). The global
    batch is then one for all numbers, by default that of the largest.
    What is not given here is taken from the file's `workload`, else from `Workload`'s defaults. `fixed` holds axes of the
    mesh that the user has decided, {"tp": 8}; `constraints`, or a file of them, say more: see `autoplan.constraints`;
    `headroom` is a fraction of each device's memory to keep free. A search that `time_limit` seconds or Ctrl-C ends gives the
    best plan so far, see `Solve.stopped`. With `frontier` the plan tells so many of the fastest plans on less memory, see
    `Plan.frontier`. `beside` are configurations of other trainers (see `imported`) for as many GPUs, that
    become baselines of the plan.
    Raises `NothingFits` when no plan fits into memory and `UsageError` for a wish or a model that cannot be met.
    """
    asked = dict(locals())
    return plans(asked.pop("model"), 1, **asked)[0]


def plans(
    model: str | LoadedModel | Graph,
    top: int,
    *,
    gpus: int | tuple[int, int],
    step_time: float | None = None,
    hardware: str | HardwareProfile = DEFAULT_HARDWARE,
    global_batch: int | None = None,
    compute_dtype: DType | None = None,
    param_dtype: DType | None = None,
    optimizer: OptimizerName | None = None,
    compile: bool | None = None,
    expert_imbalance: float | None = None,
    objective: Objective = "fewest",
    fixed: Mapping[str, int] | None = None,
    constraints: str | Path | Constraints | None = None,
    headroom: float = 0.0,
    frontier: int = 0,
    gap: float = 1e-4,
    time_limit: float | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    beside: Sequence[str | Path] = (),
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Plan]:
    """The `top` best plans, each on another mesh, the best first: no other mesh has a faster one than the last of them.

    The rest as in `plan`; of a range of `gpus` they are for the number that `plan` would choose.
    """
    from autoplan.importing.beside import baselines
    from autoplan.search import numbers, planner

    if top < 1:
        raise UsageError(f"{top} plans are too few.", "Ask for at least one.")
    if isinstance(constraints, str | Path):
        constraints = load_constraints(constraints)
    first, last = (gpus, gpus) if isinstance(gpus, int) else gpus
    if first < 1:
        raise UsageError(f"{first} GPUs are too few.", "Ask for at least one.")
    if not 0 <= headroom < 1:
        raise UsageError(f"a memory head-room of {headroom} is no fraction.", "Give a number from 0 to below 1.")
    if not 0 < gap < 1:
        raise UsageError(f"a gap of {gap} is no fraction.", "Give a number between 0 and 1, such as 1e-4.")
    profile = _profile(hardware)
    loaded = load_model(model, **(model_kwargs or {})) if isinstance(model, str) else model
    wishes = {
        "global_batch": global_batch,
        "compute_dtype": compute_dtype,
        "param_dtype": param_dtype,
        "optimizer": optimizer,
        "compile": compile,
        "expert_imbalance": expert_imbalance,
    }
    load = workload({} if isinstance(loaded, Graph) else loaded.workload, wishes, last)
    graph = _graph_of(loaded, load.compute_dtype)

    today = baselines(beside, graph, profile, load, (first, last), headroom)

    def plans_for(number: int, top: int = 1, frontier: int = 0) -> list[Plan]:
        found = planner.plans(
            graph,
            profile,
            load,
            top,
            gpus=number,
            fixed=fixed,
            constraints=constraints,
            headroom=headroom,
            frontier=frontier,
            gap=gap,
            time_limit=inf if time_limit is None else time_limit,
            tell=on_progress,
        )
        return [replace(plan, baselines=(*today, *plan.baselines)) for plan in found]

    if first == last and step_time is None:
        return plans_for(first, top, frontier)
    range_of, one = numbers.counts(first, last, profile), lambda number: plans_for(number)[0]
    if objective == "fewest":
        best = numbers.fewest(range_of, one, step_time)
    else:
        cost = numbers.device_seconds if objective == "cost" else numbers.step_seconds
        best = numbers.least(range_of, one, cost, step_time)
    return [best] if top == 1 and not frontier else plans_for(best.mesh.size, top, frontier)


def estimate(
    plan: Plan, model: str | LoadedModel | Graph | None = None, *, model_kwargs: Mapping[str, Any] | None = None
) -> Prediction:
    """Price a plan, as it is written, anew. `model` defaults to the one that the plan names.

    Raises `UsageError` when the plan is not one of this model or breaks a sharding rule.
    """
    from autoplan.cost.model import CostModel
    from autoplan.cost.simulated import predicted

    source = model if model is not None else plan.model
    loaded = load_model(source, **(model_kwargs or {})) if isinstance(source, str) else source
    graph = _graph_of(loaded, plan.workload.compute_dtype)
    return predicted(CostModel(graph, find_hardware(plan.hardware), plan.workload), plan)


def imported(
    source: str | Path,
    model: str | LoadedModel,
    *,
    gpus: int | None = None,
    hardware: str | HardwareProfile = DEFAULT_HARDWARE,
    global_batch: int | None = None,
    micro_batch: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Plan, tuple[str, ...]]:
    """The plan that another trainer's configuration (torchtitan, Megatron-LM, accelerate) makes of `model`, priced; and in
    sentences what it leaves out. `gpus` where the file does not say them; batch sizes count before the file's.
    Raises `UsageError` where the file makes no sense or the model can't be run so. What does not fit into memory is priced.
    """
    from autoplan.importing.kinds import read_configuration
    from autoplan.importing.planned import planned

    mesh = (told := read_configuration(source)).mesh(gpus)
    loaded = load_model(model, **(model_kwargs or {})) if isinstance(model, str) else model
    wishes = {**told.workload, "global_batch": global_batch or told.batch(mesh)}
    load = workload(loaded.workload, wishes, mesh.size)
    graph = inspect(loaded, compute_dtype=load.compute_dtype)
    return planned(told, graph, _profile(hardware), load, mesh, micro_batch)


def explain(
    plan: Plan, wishes: Mapping[str, int | str], *, model: str | LoadedModel | Graph | None = None, gap: float = 1e-4
) -> Answer:
    """Why not `wishes`, {"tp": 2, "schedule": "zero-bubble"}? The best plan that keeps them, under the same workload and memory,
    beside the given one. They are axes of the mesh, micro_batch, schedule, cp_kind, and recompute and zero of all layers.

    A wish that is illegal or does not fit is an answer too. Raises `UsageError` for a wish that is none, or when the model cannot
    be captured.
    """
    from autoplan.files.wishes import wishes as checked
    from autoplan.search.explaining import answer

    asked = checked(wishes)
    graph = _graph_of(model or plan.model, plan.workload.compute_dtype)
    return answer(graph, find_hardware(plan.hardware), plan, asked, gap)


def verify(plan: Plan, model: str | LoadedModel | None = None) -> DryRun:
    """Run a step of every pipeline rank of `plan` in this process, which stands for one after another; compare what is sent and
    held with the plan. `model` defaults to the one that the plan names.

    Raises `UsageError` for a plan that can't be applied to the model.
    """
    from autoplan.verify import dry_run

    source = model if model is not None else plan.model
    return dry_run(plan, load_model(source) if isinstance(source, str) else source)


def calibrate(
    plans: Sequence[Plan],
    steps: Sequence[MeasuredSteps],
    *,
    hardware: str | HardwareProfile | None = None,
    model: str | LoadedModel | Graph | None = None,
) -> Calibration:
    """A hardware profile that would have predicted the `steps` that were measured of each of `plans`, and what was wrong.

    `hardware` is the profile to correct, by default the first plan's; `model` defaults to the one that each plan names.
    Raises `UsageError` when there is not one measurement for each plan, or a plan is not one of its model.
    """
    from autoplan.calibrate.calibration import Run, calibrated

    if len(plans) != len(steps) or not plans:
        raise UsageError(f"there are {len(plans)} plans and {len(steps)} measurements.", "Give one measurement for each plan.")
    for plan, measured in zip(plans, steps, strict=True):
        if measured.ranks != plan.mesh.size:
            raise UsageError(
                f"the steps were measured on {measured.ranks} ranks, the plan is for {plan.mesh.size}.", "Give the plan that ran."
            )
    given = hardware if hardware is not None else _hardware_of(plans[0])
    profile = _profile(given)
    keys = dict.fromkeys((plan.model, plan.workload.compute_dtype) for plan in plans)
    graphs = {(name, dtype): _graph_of(name if model is None else model, dtype) for name, dtype in keys}
    runs = [Run(graphs[p.model, p.workload.compute_dtype], p, s) for p, s in zip(plans, steps, strict=True)]
    return calibrated(profile, runs, date.today().isoformat())


def _profile(hardware: str | HardwareProfile) -> HardwareProfile:
    return find_hardware(hardware) if isinstance(hardware, str) else hardware


def _hardware_of(plan: Plan) -> str:
    """The name of a plan's profile, or a file of that name here."""
    here = Path(f"{plan.hardware}.yaml")
    return plan.hardware if plan.hardware in hardware_names() or not here.is_file() else str(here)


def report(plan: Plan) -> str:
    """The plan as one self-contained HTML page."""
    from autoplan.report.page import page

    return page(plan)


def compare(plans: Sequence[tuple[str, Plan]]) -> str:
    """Two to five plans, each with the name of its column, side by side on one self-contained HTML page."""
    from autoplan.report.page import comparison

    return comparison(plans)


def export(plan: Plan, to: str) -> Exported:
    """The plan as a configuration of another trainer: its `text`, and in `lost` what the trainer cannot express.

    Raises `UsageError` when there is no export to `to`.
    """
    from autoplan.export.targets import export as make

    return make(plan, to)


def frame(plan: Plan, table: Table = "candidates") -> pd.DataFrame:
    """A table of the plan as a pandas DataFrame, in bytes and seconds: "candidates", "layers" or "ranks" (of the pipeline).

    Raises `UsageError` when pandas is not installed.
    """
    from autoplan.report.rows import frame as make

    return make(plan, table)


def _notebook(plan: Plan) -> str:
    """What a notebook shows of a plan."""
    from autoplan.report.notebook import card

    return card(plan)


Plan._repr_html_ = _notebook  # type: ignore[attr-defined]  # the noun stands below the room that draws it


def apply(
    model: nn.Module | Callable[[], nn.Module],
    plan: Plan | str | Path,
    **options: Any,
) -> ParallelModel:
    """Run the user's own module as the plan says, in place; call it on every rank under torchrun.

    Give a function that builds the model and no rank ever holds all of it. `options`: see `autoplan.apply.apply`.
    """
    from autoplan.apply import apply as run

    return run(model, plan if isinstance(plan, Plan) else load_plan(plan), **options)


def __getattr__(name: str) -> Any:
    if name == "Timer":  # needs torch
        from autoplan.calibrate.timer import Timer

        return Timer
    raise AttributeError(f"module 'autoplan.api' has no attribute '{name}'")
