"""The legal meshes and micro-batches, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product

from autoplan.constraints import Constraints
from autoplan.cost.context import Context
from autoplan.cost.experts import Mixtures
from autoplan.cost.model import CostModel
from autoplan.errors import UsageError
from autoplan.graph import Graph
from autoplan.plan import Candidate, spread_over
from autoplan.schedule import ScheduleKind
from autoplan.strategy import DEGREES, Mesh
from autoplan.workload import Workload


@lru_cache(maxsize=1024)
def divisors(number: int) -> tuple[int, ...]:
    """All divisors in rising order."""
    return tuple(d for d in range(1, number + 1) if number % d == 0)


def meshes(gpus: int, fixed: Mapping[str, int], cps: Sequence[int] = (1,), eps: Sequence[int] = (1,)) -> Iterator[Mesh]:
    """Every way to arrange exactly `gpus` devices, with the axes in `fixed` as given, cp one of `cps` and ep one of `eps`.

    Where experts are dealt, they are over all of cp and tp.

    Raises `UsageError` when an axis is unknown or its size does not divide `gpus`.
    """
    for axis, size in fixed.items():
        if axis not in DEGREES:
            raise UsageError(f"there is no mesh axis '{axis}'.", f"Use one of {', '.join(DEGREES)}.")
        if size < 1 or gpus % size:
            raise UsageError(
                f"{axis} {size} does not divide {gpus} devices.", f"Use one of {', '.join(map(str, divisors(gpus)))}."
            )
    found = [
        mesh
        for pp, dp_replicate, dp_shard in product(divisors(gpus), repeat=3)
        if gpus % (pp * dp_replicate * dp_shard) == 0
        for rest in [gpus // (pp * dp_replicate * dp_shard)]
        for cp in divisors(rest)
        for tp in [rest // cp]
        for ep in dict.fromkeys((1, *eps, fixed.get("ep", 1)))
        if ep == 1 or (ep % (cp * tp) == 0 and dp_shard % (ep // (cp * tp)) == 0)
        for mesh in [Mesh(pp, dp_replicate, dp_shard, cp, tp, ep)]
        if all(getattr(mesh, axis) == size for axis, size in fixed.items())
    ]
    legal = sorted(mesh for mesh in found if mesh.cp in cps and mesh.ep in eps)
    if not found:
        raise UsageError(f"{' x '.join(f'{axis} {size}' for axis, size in fixed.items())} does not make {gpus} devices.")
    yield from legal


def check_parameters(graph: Graph) -> None:
    """Raises `UsageError` when the model has a parameter that no plan could be applied to."""
    for prefix, body in graph.members():
        for parameter in body.parameters:
            if not parameter.buffer and not parameter.shape:
                raise UsageError(
                    f"parameter '{prefix}{parameter.name}' is a scalar, which FSDP cannot shard.", "Give it the shape (1,)."
                )


def micro_batches(mesh: Mesh, workload: Workload) -> tuple[int, ...]:
    """Micro-batches that the mesh can run: divisors of each data-parallel group's share of the global batch."""
    if workload.global_batch % mesh.dp:
        return ()
    return divisors(workload.global_batch // mesh.dp)


def indivisible(mesh: Mesh, workload: Workload) -> Candidate:
    """The candidate of a mesh over which the global batch does not divide."""
    reason = f"a global batch of {workload.global_batch} does not divide over {mesh.dp} data-parallel groups"
    return Candidate(mesh=mesh, micro_batch=1, status="illegal", reason=reason)


def schedules(mesh: Mesh, micro_batches: int, costs: CostModel) -> list[tuple[ScheduleKind, int]]:
    """The schedules with their chunks a rank that the mesh can run."""
    if mesh.pp == 1:
        return [("1f1b", 1)]
    found: list[tuple[ScheduleKind, int]] = [("1f1b", 1), ("gpipe", 1)]
    if not unscheduled("zero-bubble", mesh, micro_batches, costs):
        found.append(("zero-bubble", 1))
    if not unscheduled("interleaved-1f1b", mesh, micro_batches, costs):
        found += [("interleaved-1f1b", chunks) for chunks in _chunks(len(costs.graph.blocks), mesh.pp)]
    return found


def unscheduled(kind: ScheduleKind, mesh: Mesh, micro_batches: int, costs: CostModel) -> str:
    """Why a mesh with a pipeline does not run a schedule; "" when it does."""
    graph = costs.graph
    if kind == "zero-bubble" and costs.workload.compile:
        return "zero-bubble parts backward passes, and those of compiled layers are whole"
    if kind == "zero-bubble" and micro_batches < mesh.pp:
        return f"zero-bubble is not searched with fewer micro-batches ({micro_batches}) than pp {mesh.pp} stages"
    if kind != "interleaved-1f1b":
        return ""
    if len(graph.bodies) > 1:
        return "interleaved-1f1b is searched for layers that are all alike, and do the same"
    if micro_batches % mesh.pp:
        return f"interleaved-1f1b needs micro-batches ({micro_batches}) in multiples of pp {mesh.pp}"
    layers = len(graph.blocks)
    return "" if _chunks(layers, mesh.pp) else f"{layers} layers over pp {mesh.pp} leave a rank no chunks of equal length"


def _chunks(layers: int, stages: int) -> list[int]:
    """Chunks a rank that can be equally long: divisors of the layers of a stage, rounded down or up."""
    either = {chunks for size in (layers // stages, -(-layers // stages)) for chunks in divisors(size)}
    return sorted(chunks for chunks in either if 1 < chunks <= layers // stages)


def unstageable(mesh: Mesh, graph: Graph, order: Sequence[int]) -> Candidate | None:
    """The candidate of a mesh whose pipeline the model cannot fill; None when it can."""
    if mesh.pp == 1:
        return None
    layers = len(graph.blocks)
    if layers < mesh.pp:
        reason = f"{layers} layers do not fill pp {mesh.pp} stages"
    elif list(order) != list(range(layers)):
        reason = "a layer is called several times or out of order, so that there is no cut into stages"
    else:
        return None
    return Candidate(mesh=mesh, micro_batch=1, status="illegal", reason=reason)


def uncut(gpus: int, fixed: Mapping[str, int], context: Context) -> tuple[list[int], list[Candidate]]:
    """The sizes of cp that the model can be cut into, and the candidate of the first that it can't."""
    sizes = [size for size in divisors(gpus) if size == fixed.get("cp", size)]
    refused = [size for size in sizes if not context.kinds(size, 1)]
    told = [
        Candidate(mesh=Mesh(dp_shard=gpus // cp, cp=cp), micro_batch=1, status="illegal", reason=context.refusal(cp, 1))
        for cp in refused[:1]
    ]
    return [size for size in sizes if size not in refused], told


def uncombined(context: Context, mixtures: Mixtures, mesh: Mesh) -> str:
    """Why the model can't have cp and tp of the mesh together; "" when it can."""
    if mesh.cp == 1 or mesh.tp == 1:
        return ""
    return "experts and cp x tp are not run together yet" if mixtures.numbers else context.refusal(mesh.cp, mesh.tp)


def uncompiled(mesh: Mesh, workload: Workload) -> str:
    """Why layers on the mesh can't be compiled; "" when they can, or need not."""
    axis = spread_over(mesh)
    return f"layers that are spread over {axis} can't be compiled yet" if workload.compile and axis else ""


def combined(
    gpus: int, fixed: Mapping[str, int], cps: Sequence[int], eps: Sequence[int], costs: CostModel
) -> tuple[list[Mesh], list[Candidate]]:
    """The `meshes` but for those whose cp and tp the model can't have together, or that the workload doesn't allow, and of these
    the first for each reason."""
    possible: list[Mesh] = []
    refused: dict[str, Candidate] = {}
    for mesh in meshes(gpus, fixed, cps, eps):
        reason = uncompiled(mesh, costs.workload) or uncombined(costs.context, costs.mixtures, mesh)
        if reason:
            refused.setdefault(reason, Candidate(mesh=mesh, micro_batch=1, status="illegal", reason=reason))
        else:
            possible.append(mesh)
    return possible, list(refused.values())


def of_each_kind(mesh: Mesh, context: Context) -> Iterator[Mesh]:
    """The mesh with every way in which attention can bring the parts of a sequence together."""
    return (replace(mesh, cp_kind=kind) for kind in context.kinds(mesh.cp, mesh.tp))


def legal(gpus: int, fixed: Mapping[str, int], constraints: Constraints, costs: CostModel) -> tuple[list[Mesh], list[Candidate]]:
    """The meshes that the constraints allow and the model can be cut into, with every kind of cp; and what is told of others."""
    cps, uncuttable = uncut(gpus, fixed, costs.context)
    eps, undivided = undealt(gpus, fixed, costs.mixtures)
    possible, apart = combined(gpus, fixed, cps, eps, costs)
    every = [each for mesh in possible for each in of_each_kind(mesh, costs.context)]
    degrees = [mesh for mesh in every if all(constraints.allows(axis, getattr(mesh, axis)) for axis in DEGREES)]
    allowed = [mesh for mesh in degrees if mesh.cp == 1 or constraints.allows("cp_kind", mesh.cp_kind)]
    return allowed, [*undivided, *uncuttable, *apart]


def undealt(gpus: int, fixed: Mapping[str, int], mixtures: Mixtures) -> tuple[list[int], list[Candidate]]:
    """The sizes of ep over which the model's experts can be dealt, and the candidate of one that was asked for in vain."""
    asked = fixed.get("ep")
    sizes = [size for size in divisors(gpus) if asked in (None, size) and not mixtures.refusal(size)]
    if asked is None or sizes:
        return sizes, []
    mesh = Mesh(dp_shard=gpus, ep=asked)
    return [], [Candidate(mesh=mesh, micro_batch=1, status="illegal", reason=mixtures.refusal(asked))]


def unplaceable(mesh: Mesh, micro_batch: int, unmet: str) -> Candidate:
    """The candidate of a mesh on which some layer has no legal strategy, or none that does what is asked of it (`unmet`)."""
    reason = unmet or f"a packed weight of every sharding that may be used does not divide over dp_shard {mesh.dp_shard}"
    return Candidate(mesh=mesh, micro_batch=micro_batch, status="illegal", reason=reason)


def unsplit(mesh: Mesh, micro_batch: int) -> Candidate:
    """The candidate of a mesh under zero-bubble, where some layer must be recomputed."""
    reason = "zero-bubble is searched without recomputation: what waits for gradients of weights is kept all the same"
    return Candidate(mesh=mesh, micro_batch=micro_batch, schedule="zero-bubble", status="illegal", reason=reason)
