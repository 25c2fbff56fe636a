"""The shape of plan.yaml: quantities as text or plain numbers, layouts as text, layers as ranges. Its JSON schema is published.

What stands here is only the form; what does not hang together is refused by `autoplan.files.plan`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, WithJsonSchema

from autoplan.errors import AutoplanError
from autoplan.plan import CandidateStatus, SolveStatus
from autoplan.schedule import ScheduleKind
from autoplan.strategy import REPLICATE, CpKind, Layout, Recompute, Zero, parse_layout
from autoplan.units import BYTE, SECOND, Unit, parse
from autoplan.workload import Workload


def _reader(unit: Unit) -> BeforeValidator:
    def read(text: Any) -> float:
        try:
            return parse(text, unit)
        except AutoplanError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(read)


def _layout(text: Any) -> Layout:
    try:
        return parse_layout(str(text))
    except AutoplanError as error:
        raise ValueError(str(error)) from None


def _quantity(what: str, example: str) -> WithJsonSchema:
    number = {"type": "number", "minimum": 0}
    return WithJsonSchema({"description": what, "anyOf": [number, {"type": "string"}], "examples": [example]})


_Seconds = Annotated[float, _reader(SECOND), Field(ge=0, allow_inf_nan=False), _quantity("Seconds, or with a unit.", "45.2 ms")]
_Bytes = Annotated[float, _reader(BYTE), Field(ge=0, allow_inf_nan=False), _quantity("Bytes, or with a unit.", "76 GiB")]
_Count = Annotated[int, Field(ge=1, le=10**9, strict=True)]
_Fraction = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_LayoutText = Annotated[
    Any,
    BeforeValidator(_layout),
    WithJsonSchema(
        {
            "description": "Layout over the tp axis.",
            "type": "string",
            "pattern": r"^(Replicate|Replicate\|Partial|Partial|Shard\(\d+(, blocks=\d+)?\))$",
        }
    ),
]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MeshDocument(_Document):
    """Devices by axis, outermost first."""

    pp: _Count = 1
    dp_replicate: _Count = 1
    dp_shard: _Count = 1
    cp: _Count = 1
    tp: _Count = 1
    ep: _Count = 1
    cp_kind: CpKind = "ulysses"


class ExpertsDocument(_Document):
    """A module that holds experts: how it is called, and how many it has."""

    form: Literal["chosen", "sorted"]
    number: _Count


class StrategyDocument(_Document):
    """One way to place and run one layer."""

    recompute: Recompute = "none"
    zero: Zero = 3
    stream: Annotated[_LayoutText, Field(json_schema_extra={"default": str(REPLICATE)})] = REPLICATE
    parameters: dict[str, _LayoutText] = {}
    borders: list[str] = []
    experts: dict[str, ExpertsDocument] = {}


class PipelineDocument(_Document):
    """How the layers are dealt to the pipeline ranks."""

    schedule: ScheduleKind = "1f1b"
    chunks: _Count = 1
    split_before: list[str]


class StageDocument(_Document):
    """What one pipeline rank should cost: seconds of one micro-batch by chunk (under zero-bubble also what of the backward pass
    are gradients of weights), bytes by category."""

    forward: list[_Seconds]
    backward: list[_Seconds]
    weights: list[_Seconds] = []
    memory: dict[str, _Bytes]


class UnitDocument(_Document):
    """Seconds that each of some layers, or what stands outside them before or after one, takes on every stream of a device: of
    one micro-batch, the last two of a step."""

    layers: str | None = None
    before: str | None = None
    after: str | None = None
    forward: _Seconds = 0.0
    tp_forward: _Seconds = 0.0
    recompute: _Seconds = 0.0
    backward: _Seconds = 0.0
    weights: _Seconds = 0.0
    tp_backward: _Seconds = 0.0
    gather: _Seconds = 0.0
    unpack: _Seconds = 0.0
    pack: _Seconds = 0.0
    reduce: _Seconds = 0.0
    all_reduce: _Seconds = 0.0
    optimizer: _Seconds = 0.0


class PredictionDocument(_Document):
    """What one optimizer step should cost; the parts of time add up to the step."""

    step_time: _Seconds
    simulated: _Seconds | None = None
    scheduled: _Seconds | None = None
    hop: _Seconds = 0.0
    stages: list[StageDocument] = []
    overlap: _Fraction = 0.0
    units: list[UnitDocument] = []
    tokens_per_second: _Fraction
    mfu: _Fraction
    hidden_communication: _Seconds
    time: dict[str, _Seconds]
    memory: dict[str, _Bytes]


class BaselineDocument(_Document):
    """A plan that people write by hand, priced by the same model."""

    name: str
    mesh: MeshDocument
    micro_batch: _Count
    recompute: str
    step_time: _Seconds | None = None
    memory: _Bytes | None = None
    note: str = ""


class CandidateDocument(_Document):
    """A mesh and micro-batch that was looked at, and why it was not taken."""

    mesh: MeshDocument
    micro_batch: _Count
    schedule: str = ""
    status: CandidateStatus
    reason: str
    step_time: _Seconds | None = None
    bound: bool = False
    memory: _Bytes | None = None


class PointDocument(_Document):
    """The fastest plan on less memory; `--memory-headroom` with this share gives it."""

    headroom: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mesh: MeshDocument
    micro_batch: _Count
    schedule: str = ""
    recompute: str
    step_time: _Seconds
    memory: _Bytes
    tokens_per_second: _Fraction


class SolveDocument(_Document):
    """What was proved."""

    status: SolveStatus
    gap: _Fraction
    bound: _Seconds
    solver: str
    candidates: Annotated[int, Field(ge=0)]
    stopped: Literal["", "interrupted", "time limit"] = ""


class PlanDocument(_Document):
    """A plan of autoplan: what plan.yaml and `--json` hold."""

    version: Literal[1]
    model: str
    graph: str
    hardware: str
    hardware_fingerprint: str
    workload: Workload
    tokens: _Count
    mesh: MeshDocument
    micro_batch: _Count
    outer: str
    pipeline: PipelineDocument | None = None
    layers: list[dict[str, str]]
    strategies: dict[str, StrategyDocument]
    context: dict[str, Annotated[int, Field(ge=0)]] = {}
    tied: list[list[str]] = []
    memory_limit: _Bytes
    prediction: PredictionDocument
    solve: SolveDocument
    baselines: list[BaselineDocument] = []
    candidates: list[CandidateDocument] = []
    frontier: list[PointDocument] = []
    warnings: list[str] = []


PLAN = TypeAdapter(PlanDocument)


def plan_schema() -> dict[str, Any]:
    """The JSON schema of plan.yaml and of `--json`."""
    schema = PLAN.json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "autoplan plan, version 1"}
