"""Prices a published run with the planner's own functions: `LayerModel`, `layer_cost`, `CostModel`, the schedule.

Megatron's column/row sharding is not written down here: it is looked up among the unbeaten shardings that the search finds
for the run's stream (sequence parallel or not), as the fastest one that cuts every linear of the layer and, without
sequence parallelism, leaves the norms whole.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

from autoplan.cost.model import OUTER, CostModel
from autoplan.cost.walk import Step
from autoplan.errors import UsageError
from autoplan.graph import Graph
from autoplan.hardware import Curve, HardwareProfile
from autoplan.profile.catalog import find_hardware
from autoplan.search.shardings import pareto_shardings
from autoplan.strategy import GATHERED, PARTIAL, REPLICATE, UNSHARDED, Sharding, shard
from autoplan.units import Bytes
from autoplan.workload import DType, Workload
from benchmarks.arrangement import Arranged, ArrangedStep, Arrangement, Recomputed
from benchmarks.models import Shape, graph_of
from benchmarks.nanotron import reserved
from benchmarks.runs import Refused, Run, framework
from benchmarks.software import NEUTRAL, Software, frameworks


class Pricer:
    """Prices runs; everything that equal runs share is made once."""

    def __init__(self, software: dict[str, Software], hardware: dict[str, HardwareProfile] | None = None) -> None:
        self.software, self.hardware = software, hardware or {}
        self._costs: dict[tuple[Shape, str, str, bool], CostModel] = {}
        self._arranged: dict[tuple[object, ...], Arranged] = {}

    def use(self, source: str, software: Software) -> None:
        """Price this source's runs with other constants from now on; the tables stay."""
        self.software[source] = software
        for key, arranged in self._arranged.items():
            if key[3] == source:
                arranged.software = software
                if arranged.plain:
                    arranged.plain.software = software

    def price(self, run: Run) -> ArrangedStep:
        """Raises `Refused` where the model or the machine does not allow what the row says."""
        try:
            arranged, place = self._placed(run)
            return arranged.price(place)
        except UsageError as error:
            raise Refused(f"the model refuses: {_short(error.message)}") from None

    def memory(self, run: Run) -> float:
        """Bytes of the fullest rank, or of the one whose peak is published. Raises `Refused` like `price`."""
        try:
            arranged, place = self._placed(run)
            if not arranged.software.allocations:
                return arranged.memory(place)
            return reserved(run, place.dealt[0], self._room(run), arranged.software, *arranged.pace(place))
        except UsageError as error:
            raise Refused(f"the model refuses: {_short(error.message)}") from None

    def fits(self, run: Run) -> bool:
        """Whether the run fits into its device, beside what PyTorch's allocator cannot have. Raises `Refused` like `price`."""
        return self.memory(run) <= self._room(run)

    def _room(self, run: Run) -> Bytes:
        own, device = self._own(run), self._cost_model(run).hardware.device
        return own.room * 2**30 if own.room else device.memory - device.reserved

    def _own(self, run: Run) -> Software:
        return self.software.get(framework(run.source), NEUTRAL)

    def _placed(self, run: Run) -> tuple[Arranged, Arrangement]:
        how = run.recompute if run.recompute != "unknown" else self._least_that_fits(run)
        costs = self._cost_model(run)
        key = (run.shape, run.hardware, run.dtype, run.source, how, run.float8, run.compiled)
        if key not in self._arranged:
            own = self._own(run)
            plain = self._cost_model(run, plain=True) if run.plain else None
            first = Arranged(plain, own, recomputed(how, plain.graph, own.whole)) if plain else None
            self._arranged[key] = Arranged(costs, own, recomputed(how, costs.graph, own.whole), first)
        arranged = self._arranged[key]
        arranged.costs = costs.with_batch(run.global_batch)
        return arranged, arrangement(run, *shardings(run.shape, run.tp, run.sequence_parallel, run.ep))

    def _least_that_fits(self, run: Run) -> str:
        """What is recomputed where the source does not tell: nothing, attention's core, or whole layers."""
        return next((how for how in ("none", "core") if self.fits(replace(run, recompute=how))), "full")

    def seconds(self, run: Run) -> float:
        """Of one step; a row of a single layer is that layer's forward and backward pass."""
        if not run.single_layer:
            return self.price(run).step_time
        arranged, place = self._placed(run)
        one, two = (arranged.price(replace(place, layers=n)).pipeline for n in (1, 2))
        return two - one

    def _cost_model(self, run: Run, plain: bool = False) -> CostModel:
        """`plain`: of a model whose layers have no experts."""
        experts = run.shape.experts
        shape = run.shape._replace(experts=experts._replace(plain=True)) if plain and experts else run.shape
        key = (shape, run.hardware, run.dtype, run.compiled)
        if key not in self._costs:
            hardware = self.hardware.get(run.hardware) or find_hardware(run.hardware)
            load = Workload(global_batch=run.global_batch, compute_dtype=cast(DType, run.dtype), compile=run.compiled)
            self._costs[key] = CostModel(graph_of(shape), hardware, load, copies=False)
        return self._costs[key]


def dealt(run: Run) -> tuple[int, ...]:
    """nanotron cuts by cost: a stage takes blocks until the sum reaches its share, the head counting as what it multiplies
    (its `get_block_compute_costs`; its source of today wants the sum above the share, the runs' memory shows otherwise).
    Megatron-Bridge counts embedding and head as a layer each where that divides. Others deal layers evenly, which the arrangement
    does by itself."""
    virtual = run.pp * run.chunks
    if framework(run.source) == "megatron-bridge" and virtual > 1 and run.layers % virtual and (run.layers + 2) % virtual == 0:
        each = (run.layers + 2) // virtual
        return (each - 1, *[each] * (virtual - 2), each - 1)
    if not run.source.startswith("nanotron") or run.pp == 1:
        return ()
    shape = run.shape
    layer = (2 + 2 * shape.kv_heads / shape.heads) * shape.hidden**2 + 3 * shape.ffn * shape.hidden
    head = shape.vocab * shape.hidden
    total, passed, stage = run.layers * layer + head, 0.0, 0
    counts = [0] * run.pp
    for _ in range(run.layers):
        counts[stage] += 1
        passed += layer
        if passed >= total * (stage + 1) / run.pp and stage + 1 < run.pp:
            stage += 1
    return tuple(counts)


def arrangement(run: Run, block: Sharding, outer: Sharding) -> Arrangement:
    return Arrangement(
        tp=run.tp,
        dp=run.dp * run.cp,
        pp=run.pp,
        cp=run.cp,
        ep=run.ep,
        micro_batch=run.micro_batch / run.cp if run.cp > 1 else run.micro_batch,
        zero=3 if run.zero >= 2 else run.zero,
        schedule="interleaved-1f1b" if run.chunks > 1 else "1f1b",
        chunks=run.chunks,
        block=block,
        outer=outer,
        layers=run.layers,
        counts=dealt(run),
        plain=run.plain,
        again=0.5 if run.recompute == "alternate" else 1.0,
        stays=run.stays,
        policy=run.recompute == "op",
        asynchronous=run.asynchronous,
        float8=run.float8,
    )


def _short(message: str) -> str:
    return message if len(message) <= 90 else f"{message[:87]}..."


@lru_cache(maxsize=1024)
def shardings(shape: Shape, tp: int, sequence_parallel: bool, ep: int = 1) -> tuple[Sharding, Sharding]:
    """(of a block, of the outer body): column/row parallel, vocabulary parallel; experts over ep."""
    if tp == ep == 1:
        return UNSHARDED, UNSHARDED
    costs = CostModel(graph_of(shape), find_hardware("a100-80g-sxm-8x"), Workload(global_batch=1), copies=False)
    if tp == 1:
        return Sharding(experts=tuple(each.experts for each in costs.mixtures.dealt[0])), UNSHARDED
    if shape.experts is not None:
        raise Refused("experts beside tp: not modelled")
    return _megatron(costs, 0, tp, sequence_parallel), _megatron(costs, OUTER, tp, sequence_parallel)


def _megatron(costs: CostModel, body: int, tp: int, sequence_parallel: bool) -> Sharding:
    model = costs.layer_model(body, tp, 1)
    wide = {p.name for p in model.body.parameters if len(p.shape) == 2 and not p.buffer and "wpe" not in p.name}
    found = []
    for sharding in pareto_shardings(model, shard(1) if sequence_parallel else REPLICATE):
        layouts = dict(sharding.parameters)
        norms = any(layouts.get(p.name) == GATHERED for p in model.body.parameters if "norm" in p.name or "ln_" in p.name)
        if all(layouts.get(name, REPLICATE).sharded for name in wide) and (sequence_parallel or not norms):
            cost = costs.layer_cost(body, sharding, tp, 1)
            found.append((cost.forward + cost.tp_forward + cost.backward + cost.tp_backward, len(found), sharding))
    if not found:
        raise Refused(f"no column/row sharding over tp {tp} (a dim does not divide)")
    return min(found)[2]


def _core(step: Step) -> bool:
    """Attention's scores: its two batched products and all between them."""
    module = step.op.module.rpartition(".")[2]
    return (module in ("attn", "attention", "self_attn") and step.op.kind in ("matmul", "along", "attention")) or (
        module == "attn" and step.op.name == "dropout"
    )


def _selected(graph: Graph) -> Recomputed:
    """torchtitan's choice by operation (its `_save_list`): attention and the first, third, ... product of a block are kept,
    the rest runs again. A product of torchao's tensors in fp8 is a product to the list."""
    linears = [index for index, op in enumerate(graph.bodies[0].ops) if op.kind == "linear"]
    kept = frozenset(linears[::2])  # of the collectives reduce_scatter, at a module's exit, is kept, all_gather is not

    def again(step: Step) -> bool:
        """A product whose partial sums are reduced and scattered is not needed where the result of that is kept."""
        reduced = step.op.kind == "linear" and step.outcome.outputs[0] == PARTIAL
        return step.op.kind not in ("attention", "exit") and step.index not in kept and not reduced

    return again


def recomputed(how: str, graph: Graph, whole: bool = False) -> Recomputed | None:
    """Which operations of a block run again, see `Run.recompute` and `Software.whole`."""
    if how == "op":
        return _selected(graph)
    last = len(graph.bodies[0].ops) if whole else graph.bodies[0].rerun
    return {"none": None, "core": _core}.get(how, lambda step: step.index < last)


def scaled(hardware: HardwareProfile, **factors: float) -> HardwareProfile:
    """The profile with curves or rates multiplied: what a fit of the hardware's own constants tries."""
    device, links = hardware.device, list(hardware.links)
    changes: dict[str, Any] = {}
    for name, factor in factors.items():
        if name in ("matmul", "attention", "memory_efficiency"):
            curve = getattr(device, name)
            changes[name] = Curve(tuple((size, min(1.0, y * factor)) for size, y in curve.points))
        elif name == "launch":
            changes[name] = factor
        elif name in ("nvlink", "network"):
            i = 0 if name == "nvlink" else -1
            links[i] = replace(links[i], bandwidth=links[i].bandwidth * factor)
    overlap = factors.get("overlap", hardware.overlap)
    return replace(hardware, device=replace(device, **changes), links=tuple(links), overlap=overlap)


__all__ = ["Graph", "Pricer", "arrangement", "frameworks", "scaled", "shardings"]
