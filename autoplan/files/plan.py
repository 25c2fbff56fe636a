"""plan.yaml <-> `Plan`: readable, editable, versioned, deterministic, keyed by module name, run-length coded.

The file has a shape of its own (`autoplan.files.plan_document`: quantities as text, layouts as text, layers as ranges); the
functions below carry it to the noun and back. What a reader may edit is everything; what does not hang together is
refused with the place.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from autoplan.errors import UsageError
from autoplan.files.document import read_document, validate, write_text
from autoplan.files.plan_document import PLAN, PipelineDocument, PlanDocument, StageDocument, StrategyDocument, UnitDocument
from autoplan.files.shorthand import border_text, parse_border, ranges, unfold
from autoplan.plan import (
    PLAN_VERSION,
    Baseline,
    Candidate,
    LayerRun,
    MemoryBreakdown,
    Pipeline,
    Plan,
    Point,
    Prediction,
    Solve,
    StagePrediction,
    TimeBreakdown,
    UnitPrediction,
)
from autoplan.strategy import REPLICATE, Experts, Mesh, Sharding, Strategy
from autoplan.units import BYTE, SECOND, exact

HEADER = f"""\
# autoplan {version("autoplan-torch")} plan: `autoplan report` shows it, `autoplan.apply(model, plan)` runs it.
# Edit it freely: what does not hang together is refused with the place. Layouts are those of DTensor over the tp axis
# ("Replicate|Partial": the value is replicated, its gradient is partial).
"""


def load_plan(path: str | Path) -> Plan:
    """Read a plan. Raises `UsageError` when the file is missing, malformed or does not hang together."""
    path = Path(path)
    document = validate(PLAN, read_document(path, "plan"), path, "plan")
    try:
        return _plan(document)
    except UsageError as error:
        raise UsageError(f"{path} is not a valid plan: {error.message}", error.hint) from None


def save_plan(plan: Plan, path: str | Path, *, force: bool = False) -> None:
    """Write a plan; the same plan gives the same bytes. Raises `UsageError` when the file exists and `force` is not set."""
    write_text(Path(path), dump_plan(plan), force=force)


def dump_plan(plan: Plan) -> str:
    """The text of plan.yaml."""
    return HEADER + yaml.dump(document(plan), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def plan_json(plan: Plan) -> str:
    """The plan as JSON, in the same schema as the file."""
    return json.dumps(document(plan), indent=2)


class _Dumper(yaml.SafeDumper):
    """Small mappings on one line, and nothing aliased."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> Any:
        pairs = list(mapping.items())
        small = len(pairs) > 1 and sum(len(f"{k}{v}") + 4 for k, v in pairs) < 90
        flat = not any(isinstance(v, dict | list) for _, v in pairs)
        return super().represent_mapping(tag, pairs, flow_style=flat and small)


def document(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, in the schema of the file."""
    return {
        "version": plan.version,
        "model": plan.model,
        "graph": plan.graph,
        "hardware": plan.hardware,
        "hardware_fingerprint": plan.hardware_fingerprint,
        "workload": asdict(plan.workload),
        "tokens": plan.tokens,
        "mesh": _mesh_document(asdict(plan.mesh)),
        "micro_batch": plan.micro_batch,
        **({"pipeline": _pipeline_document(plan.pipeline)} if plan.pipeline else {}),
        "outer": plan.outer,
        "layers": [{ranges(run.layers): run.strategy} for run in plan.runs],
        "strategies": {name: _strategy_document(strategy) for name, strategy in plan.strategies},
        **({"context": dict(plan.context)} if plan.context else {}),
        **({"tied": [list(group) for group in plan.tied]} if plan.tied else {}),
        "memory_limit": exact(plan.memory_limit, BYTE),
        "prediction": _prediction_document(plan.prediction),
        "solve": {k: v for k, v in asdict(plan.solve).items() if v != ""} | {"bound": exact(plan.solve.bound, SECOND)},
        "baselines": [_with_units(asdict(b)) for b in plan.baselines],
        "candidates": [_with_units(asdict(c)) for c in plan.candidates],
        **({"frontier": [_with_units(asdict(p)) for p in plan.frontier]} if plan.frontier else {}),
        **({"warnings": list(plan.warnings)} if plan.warnings else {}),
    }


def _mesh_document(mesh: dict[str, Any]) -> dict[str, Any]:
    usual = {"ep": 1, "cp_kind": "ulysses"}
    return {axis: size for axis, size in mesh.items() if size != usual.get(axis)}


def _pipeline_document(pipeline: Pipeline) -> dict[str, Any]:
    return {**asdict(pipeline), "split_before": list(pipeline.split_before)}


def _with_units(data: dict[str, Any]) -> dict[str, Any]:
    shown = {k: v for k, v in data.items() if v not in (None, "", False)} | {"mesh": _mesh_document(data["mesh"])}
    for key, unit in (("step_time", SECOND), ("memory", BYTE)):
        if key in shown:
            shown[key] = exact(shown[key], unit)
    return shown


def _strategy_document(strategy: Strategy) -> dict[str, Any]:
    sharding = strategy.sharding
    data: dict[str, Any] = {"recompute": strategy.recompute, "zero": strategy.zero}
    if sharding.stream != REPLICATE:
        data["stream"] = str(sharding.stream)
    if sharding.parameters:
        data["parameters"] = {name: str(layout) for name, layout in sharding.parameters}
    if sharding.borders:
        data["borders"] = [border_text(border) for border in sharding.borders]
    if sharding.experts:
        data["experts"] = {each.module: {"form": each.form, "number": each.number} for each in sharding.experts}
    return data


def _prediction_document(prediction: Prediction) -> dict[str, Any]:
    return {
        "step_time": exact(prediction.step_time, SECOND),
        **({} if prediction.simulated is None else {"simulated": exact(prediction.simulated, SECOND)}),
        "tokens_per_second": prediction.tokens_per_second,
        "mfu": prediction.mfu,
        "hidden_communication": exact(prediction.hidden_communication, SECOND),
        "time": {name: exact(seconds, SECOND) for name, seconds in prediction.time.items()},
        "memory": _memory_document(prediction.memory),
        **(_stages_document(prediction) if prediction.stages else {}),
        **(_units_document(prediction) if prediction.units else {}),
    }


def _memory_document(memory: MemoryBreakdown) -> dict[str, str]:
    return {name: exact(size, BYTE) for name, size in memory.items()}


def _stages_document(prediction: Prediction) -> dict[str, Any]:
    stages = [
        {
            "forward": [exact(seconds, SECOND) for seconds in stage.forward],
            "backward": [exact(seconds, SECOND) for seconds in stage.backward],
            **({"weights": [exact(seconds, SECOND) for seconds in stage.weights]} if stage.weights else {}),
            "memory": _memory_document(stage.memory),
        }
        for stage in prediction.stages
    ]
    told = {} if prediction.scheduled is None else {"scheduled": exact(prediction.scheduled, SECOND)}
    return {**told, "hop": exact(prediction.hop, SECOND), "stages": stages}


def _units_document(prediction: Prediction) -> dict[str, Any]:
    units = [
        {unit.place or "layers": ranges(unit.layers), **{name: exact(took, SECOND) for name, took in unit.seconds() if took}}
        for unit in prediction.units
    ]
    return {"overlap": prediction.overlap, "units": units}


def _plan(data: PlanDocument) -> Plan:
    strategies = tuple((name, _strategy(name, item)) for name, item in data.strategies.items())
    runs = tuple(LayerRun(layers=unfold(key), strategy=value) for item in data.layers for key, value in item.items())
    prediction = Prediction(
        step_time=data.prediction.step_time,
        time=_parts(TimeBreakdown, data.prediction.time, "prediction.time"),
        memory=_parts(MemoryBreakdown, data.prediction.memory, "prediction.memory"),
        hidden_communication=data.prediction.hidden_communication,
        hop=data.prediction.hop,
        scheduled=data.prediction.scheduled,
        simulated=data.prediction.simulated,
        overlap=data.prediction.overlap,
        units=tuple(_unit(i, unit) for i, unit in enumerate(data.prediction.units)),
        stages=tuple(_stage(i, stage) for i, stage in enumerate(data.prediction.stages)),
        tokens_per_second=data.prediction.tokens_per_second,
        mfu=data.prediction.mfu,
    )
    plan = Plan(
        version=PLAN_VERSION,
        model=data.model,
        graph=data.graph,
        hardware=data.hardware,
        hardware_fingerprint=data.hardware_fingerprint,
        workload=data.workload,
        tokens=data.tokens,
        mesh=Mesh(**data.mesh.model_dump()),
        micro_batch=data.micro_batch,
        strategies=strategies,
        outer=data.outer,
        runs=runs,
        pipeline=_pipeline(data.pipeline) if data.pipeline else None,
        context=tuple(data.context.items()),
        tied=tuple(tuple(group) for group in data.tied),
        memory_limit=data.memory_limit,
        prediction=prediction,
        solve=Solve(**data.solve.model_dump()),
        baselines=tuple(Baseline(**{**b.model_dump(), "mesh": Mesh(**b.mesh.model_dump())}) for b in data.baselines),
        candidates=tuple(Candidate(**{**c.model_dump(), "mesh": Mesh(**c.mesh.model_dump())}) for c in data.candidates),
        frontier=tuple(Point(**{**p.model_dump(), "mesh": Mesh(**p.mesh.model_dump())}) for p in data.frontier),
        warnings=tuple(data.warnings),
    )
    _check(plan)
    return plan


def _stage(i: int, data: StageDocument) -> StagePrediction:
    memory = _parts(MemoryBreakdown, data.memory, f"prediction.stages.{i}.memory")
    return StagePrediction(forward=tuple(data.forward), backward=tuple(data.backward), weights=tuple(data.weights), memory=memory)


def _unit(i: int, data: UnitDocument) -> UnitPrediction:
    seconds = data.model_dump(exclude={"layers", "before", "after"})
    found: list[tuple[Literal["", "before", "after"], str | None]] = [
        ("", data.layers), ("before", data.before), ("after", data.after)
    ]  # fmt: skip
    named = [(place, unfold(text) if text else ()) for place, text in found if text is not None]
    if len(named) != 1 or (named[0][0] and len(named[0][1]) > 1):
        raise UsageError(
            f"prediction.units.{i} is of some layers, or before or after one layer.", "Price the plan anew: autoplan estimate."
        )
    return UnitPrediction(layers=named[0][1], place=named[0][0], **seconds)


def _pipeline(data: PipelineDocument) -> Pipeline:
    return Pipeline(schedule=data.schedule, chunks=data.chunks, split_before=tuple(data.split_before))


def _strategy(name: str, data: StrategyDocument) -> Strategy:
    try:
        borders = tuple(parse_border(text) for text in data.borders)
    except UsageError as error:
        raise UsageError(f"strategies.{name}.borders: {error.message}", error.hint) from None
    experts = tuple(Experts(module, each.form, each.number) for module, each in data.experts.items())
    sharding = Sharding(tuple(data.parameters.items()), borders, data.stream, experts)
    return Strategy(sharding, data.recompute, data.zero)


def _parts(kind: type[Any], data: dict[str, float], place: str) -> Any:
    known = set(kind.__dataclass_fields__)
    unknown = sorted(set(data) - known)
    if unknown:
        raise UsageError(f"'{place}.{unknown[0]}' is not a known key.")
    return kind(**data)


def _check(plan: Plan) -> None:
    """What the schema cannot see. Raises `UsageError` with the place."""
    load, mesh = plan.workload, plan.mesh
    if load.global_batch < 1 or load.global_batch % (mesh.dp * plan.micro_batch):
        raise UsageError(
            f"workload.global_batch {load.global_batch} does not divide into {mesh.dp} data-parallel groups "
            f"x micro_batch {plan.micro_batch}."
        )
    names = [name for run in plan.runs for name in run.layers]
    if len(set(names)) != len(names):
        raise UsageError(f"layers: '{max(names, key=names.count)}' is placed twice.")
    _check_pipeline(plan, names)
    for place, name in [("outer", plan.outer), *((f"layers.{ranges(run.layers)}", run.strategy) for run in plan.runs)]:
        if name not in plan.by_name:
            raise UsageError(f"{place}: there is no strategy '{name}'.")
    total = plan.prediction.time.total
    if abs(total - plan.prediction.step_time) > 1e-6 * max(total, plan.prediction.step_time):
        raise UsageError("prediction: the parts of time do not add up to step_time.")
    for name, strategy in plan.strategies:
        sharded = any(layout.sharded for _, layout in strategy.sharding.parameters) or strategy.sharding.borders
        if sharded and mesh.tp == 1:
            raise UsageError(f"strategies.{name} shards over tp, but mesh.tp is 1.")
    if mesh.cp > 1 and mesh.tp > 1:
        raise UsageError(f"mesh: cp {mesh.cp} and tp {mesh.tp} can't be combined yet.", "Set one of them to 1.")
    _check_experts(plan)
    if mesh.cp_kind == "ring" and mesh.tp > 1:
        raise UsageError(f"mesh: ring attention over cp and tp {mesh.tp} can't be combined yet.", "Set cp_kind to ulysses.")
    if mesh.cp == 1 and mesh.cp_kind != "ulysses":
        raise UsageError(f"mesh.cp_kind is {mesh.cp_kind}, but mesh.cp is 1.", "Leave cp_kind out.")
    if mesh.cp > 1 and not plan.context:
        raise UsageError(f"mesh.cp is {mesh.cp}, but no input is cut.", "Say which inputs and along which dim: context.")


def _check_experts(plan: Plan) -> None:
    mesh = plan.mesh
    if mesh.ep > 1 and (mesh.shards * mesh.tp % mesh.ep or mesh.ep % (mesh.cp * mesh.tp)):
        raise UsageError(
            f"mesh.ep {mesh.ep} does not fold into dp_shard {mesh.dp_shard} x cp {mesh.cp} x tp {mesh.tp}.",
            "Let it be cp x tp times a divisor of dp_shard.",
        )
    for name, strategy in plan.strategies:
        for each in strategy.sharding.experts:
            if mesh.ep == 1 or each.number % mesh.ep:
                raise UsageError(
                    f"strategies.{name} deals the {each.number} experts of '{each.module}' over ep, but mesh.ep is {mesh.ep}."
                )


def _check_pipeline(plan: Plan, layers: list[str]) -> None:
    mesh, pipeline = plan.mesh, plan.pipeline
    if pipeline is None:
        if mesh.pp > 1:
            raise UsageError(f"mesh.pp is {mesh.pp}, but there is no pipeline.", "Say where to cut: pipeline.split_before.")
        return
    if pipeline.chunks > 1 and pipeline.schedule != "interleaved-1f1b":
        raise UsageError(f"pipeline: {pipeline.schedule} has one chunk of layers a rank, not {pipeline.chunks}.")
    places = [layers.index(name) if name in layers else -1 for name in pipeline.split_before]
    if len(places) != mesh.pp * pipeline.chunks - 1 or places != sorted(set(places)) or (places and places[0] < 1):
        raise UsageError(
            f"pipeline.split_before does not name the first layers of {mesh.pp * pipeline.chunks - 1} stages in the order of "
            "the model.",
            "Name one layer for every virtual stage but the first.",
        )
    if pipeline.schedule == "interleaved-1f1b" and plan.micro_batches % mesh.pp:
        raise UsageError(f"pipeline: interleaved-1f1b needs micro-batches ({plan.micro_batches}) in multiples of pp {mesh.pp}.")
    told = plan.prediction.stages
    if told and (len(told) != mesh.pp or any({len(s.forward), len(s.backward)} != {pipeline.chunks} for s in told)):
        raise UsageError(
            f"prediction.stages does not have times of {pipeline.chunks} chunks of layers for each of {mesh.pp} ranks.",
            "Price the plan anew: autoplan estimate.",
        )
