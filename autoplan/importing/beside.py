"""What somebody runs today as a baseline: the configuration of another trainer, priced beside the plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autoplan.cost.model import CostModel
from autoplan.errors import UsageError
from autoplan.graph import Graph
from autoplan.hardware import HardwareProfile
from autoplan.importing.kinds import read_configuration
from autoplan.importing.planned import planned
from autoplan.plan import Baseline, Plan
from autoplan.units import BYTE, Bytes, show
from autoplan.workload import Workload


def baselines(
    files: Sequence[str | Path], graph: Graph, hardware: HardwareProfile, load: Workload, gpus: tuple[int, int], headroom: float
) -> tuple[Baseline, ...]:
    """Each file as a baseline for the same model, machine and workload: of the file count its mesh, micro-batch, schedule,
    ZeRO level and recomputation.

    Raises `UsageError`, naming the file, where it makes no sense, is for another number of devices, or can't run this model.
    """
    if files and gpus[0] != gpus[1]:
        raise UsageError(f"{files[0]} is for one number of GPUs, and a range is asked for.", "Give one number to --gpus.")
    limit, found = CostModel(graph, hardware, load).memory_limit(headroom), []
    for file in files:
        told = read_configuration(file)
        mesh = told.mesh(gpus[0])
        plan, lost = planned(told, graph, hardware, load, mesh)
        said = {**told.workload, "global_batch": told.batch(mesh) or load.global_batch}
        other = [f"{name} {value}, not {now}" for name, value in said.items() if value != (now := getattr(load, name))]
        lost = (*lost, *(["what it says of " + ", ".join(other) + ": the plan's is priced"] if other else []))
        found.append(_baseline(f"{told.trainer}: {told.path.name}", plan, lost, limit))
    return tuple(found)


def _baseline(name: str, plan: Plan, lost: Sequence[str], limit: Bytes) -> Baseline:
    size = plan.prediction.memory.total
    used = sorted({strategy.recompute for _, strategy in plan.layers()})
    notes = [*([f"needs {show(size, BYTE)} of {show(limit, BYTE)}"] if size > limit else []), *lost]
    return Baseline(
        name=name,
        mesh=plan.mesh,
        micro_batch=plan.micro_batch,
        recompute=" and ".join(used),
        step_time=None if size > limit else plan.prediction.step_time,
        memory=size,
        note="; ".join(notes),
    )
