"""Prices a published run with the planner's own functions: `LayerModel`, `layer_cost`, `CostModel`, the schedule.

Megatron's column/row sharding is not written down here: it is looked up among the unbeaten shardings that the search finds
for the run's stream (sequence parallel or not), as the fastest one that cuts every linear of the layer and, without
sequence parallelism, leaves the norms whole.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml

from autoplan.cost.model import OUTER, CostModel
from autoplan.cost.walk import Step
from autoplan.errors import UsageError
from autoplan.graph import Graph
from autoplan.hardware import Curve, HardwareProfile
from autoplan.profile.catalog import find_hardware
from autoplan.search.shardings import pareto_shardings
from autoplan.strategy import GATHERED, REPLICATE, UNSHARDED, Sharding, shard
from autoplan.workload import DType, Workload
from benchmarks.arrangement import Arranged, ArrangedStep, Arrangement, Recomputed, Software
from benchmarks.models import Shape, graph_of
from benchmarks.runs import Refused, Run

FRAMEWORKS = Path(__file__).with_name("frameworks.yaml")


def frameworks(path: Path = FRAMEWORKS) -> dict[str, Software]:
    """The constants of every framework; keys that are no constants ("why") are for the reader."""
    names = Software.__dataclass_fields__
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = {name: Software(**{k: float(v) for k, v in entry.items() if k in names}) for name, entry in document.items()}
    return {**found, "nanotron-slow": found["nanotron"]}


class Pricer:
    """Prices runs; everything that equal runs share is made once."""

    def __init__(self, software: dict[str, Software], hardware: dict[str, HardwareProfile] | None = None) -> None:
        self.software, self.hardware = software, hardware or {}
        self._costs: dict[tuple[Shape, str, str], CostModel] = {}
        self._arranged: dict[tuple[object, ...], Arranged] = {}

    def use(self, source: str, software: Software) -> None:
        """Price this source's runs with other constants from now on; the tables stay."""
        self.software[source] = software
        for key, arranged in self._arranged.items():
            if key[3] == source:
                arranged.software = software

    def price(self, run: Run) -> ArrangedStep:
        """Raises `Refused` where the model or the machine does not allow what the row says."""
        try:
            arranged, place = self._placed(run)
            return arranged.price(place)
        except UsageError as error:
            raise Refused(f"the model refuses: {error.message[:60]}") from None

    def memory(self, run: Run) -> float:
        """Bytes of the fullest rank. Raises `Refused` like `price`."""
        try:
            arranged, place = self._placed(run)
            return arranged.memory(place)
        except UsageError as error:
            raise Refused(f"the model refuses: {error.message[:60]}") from None

    def _placed(self, run: Run) -> tuple[Arranged, Arrangement]:
        costs = self._cost_model(run)
        arranged = self._arranged.setdefault(
            (run.shape, run.hardware, run.dtype, run.source, run.recompute),
            Arranged(costs, self.software.get(run.source, Software()), RECOMPUTED[run.recompute]),
        )
        arranged.costs = costs.with_batch(run.global_batch)
        return arranged, arrangement(run, *shardings(run.shape, run.tp, run.sequence_parallel))

    def seconds(self, run: Run) -> float:
        """Of one step; a row of a single layer is that layer's forward and backward pass."""
        if not run.single_layer:
            return self.price(run).step_time
        arranged, place = self._placed(run)
        one, two = (arranged.price(replace(place, layers=n)).pipeline for n in (1, 2))
        return two - one

    def _cost_model(self, run: Run) -> CostModel:
        key = (run.shape, run.hardware, run.dtype)
        if key not in self._costs:
            hardware = self.hardware.get(run.hardware) or find_hardware(run.hardware)
            load = Workload(global_batch=run.global_batch, compute_dtype=cast(DType, run.dtype))
            self._costs[key] = CostModel(graph_of(run.shape), hardware, load)
        return self._costs[key]


def dealt(run: Run) -> tuple[int, ...]:
    """nanotron cuts by cost: a stage takes blocks until the sum passes its share, the head counting as what it multiplies
    (its `get_block_compute_costs`). Others deal layers evenly, which the arrangement does by itself."""
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
        if passed > total * (stage + 1) / run.pp and stage + 1 < run.pp:
            stage += 1
    return tuple(counts)


def arrangement(run: Run, block: Sharding, outer: Sharding) -> Arrangement:
    return Arrangement(
        tp=run.tp,
        dp=run.dp,
        pp=run.pp,
        micro_batch=run.micro_batch,
        zero=3 if run.zero >= 2 else run.zero,
        schedule="interleaved-1f1b" if run.chunks > 1 else "1f1b",
        chunks=run.chunks,
        block=block,
        outer=outer,
        layers=run.layers,
        counts=dealt(run),
        again=0.5 if run.recompute == "alternate" else 1.0,
        stays=run.stays,
    )


@lru_cache(maxsize=1024)
def shardings(shape: Shape, tp: int, sequence_parallel: bool) -> tuple[Sharding, Sharding]:
    """(of a block, of the outer body): column/row parallel, vocabulary parallel."""
    if tp == 1:
        return UNSHARDED, UNSHARDED
    costs = CostModel(graph_of(shape), find_hardware("a100-80g-sxm-8x"), Workload(global_batch=1))
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
    return (module in ("attn", "attention") and step.op.kind in ("matmul", "along", "attention")) or (
        module == "attn" and step.op.name == "dropout"
    )


def _selected(step: Step) -> bool:
    """torchtitan's per-operation choice: attention and every second product are kept, the rest runs again."""
    if step.op.kind == "attention" or step.op.kind in ("enter", "exit"):
        return False
    return step.op.kind != "linear" or step.index % 2 == 0


RECOMPUTED: dict[str, Recomputed | None] = {
    "none": None,
    "full": lambda step: True,
    "core": _core,
    "op": _selected,
    "alternate": lambda step: True,
}


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
