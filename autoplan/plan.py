"""What was decided, what it should cost, and what was refused and why. A `Plan` carries its own prediction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from autoplan.schedule import ScheduleKind
from autoplan.strategy import Mesh, Strategy, Zero
from autoplan.units import Bytes, Seconds
from autoplan.workload import Workload

PLAN_VERSION = 1

SolveStatus = Literal["optimal", "feasible", "given"]
CandidateStatus = Literal["chosen", "slower", "out of memory", "illegal"]


def needs_fsdp(mesh: Mesh, load: Workload) -> bool:
    """Whether FSDP has anything to do: gather, reduce, cast, serve a pipeline's stages. Over tp alone it would only copy what is
    whole already; a model on one device keeps it, so that its parameters are of one kind everywhere."""
    casts = not load.param_dtype == load.compute_dtype == load.reduce_dtype
    return casts or mesh.tp == 1 or mesh.size > mesh.tp


def zero_level(zero: Zero, mesh: Mesh, load: Workload) -> Zero:
    """The level at which FSDP runs a strategy; 3 where there is none: nothing is kept besides the parameters."""
    return zero if needs_fsdp(mesh, load) else 3


def spread_over(mesh: Mesh) -> str:
    """The first axis over which the tensors of a layer are spread, "" where none is: such layers are not compiled."""
    return next((axis for axis in ("tp", "cp", "ep") if getattr(mesh, axis) > 1), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeBreakdown:
    """Where one step's seconds go, on the slowest stage; the parts add up to the step."""

    forward: Seconds = 0.0
    backward: Seconds = 0.0
    recompute: Seconds = 0.0
    tp_communication: Seconds = 0.0
    """Collectives of the tp axis: never hidden."""
    dp_communication: Seconds = 0.0
    """Gathers of parameters and reductions of gradients that computation does not hide."""
    pp_communication: Seconds = 0.0
    """Passing activations and their gradients between stages, where it keeps them waiting."""
    bubble: Seconds = 0.0
    """The slowest stage waits for the others to fill and drain."""
    optimizer: Seconds = 0.0

    @property
    def total(self) -> Seconds:
        return sum(seconds for _, seconds in self.items())

    def items(self) -> Iterator[tuple[str, Seconds]]:
        for name in self.__dataclass_fields__:  # `fields` is slow, and this is asked often
            yield name, getattr(self, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBreakdown:
    """Peak bytes of the fullest rank by category; the parts add up to the peak."""

    parameters: Bytes = 0.0
    gradients: Bytes = 0.0
    awaited: Bytes = 0.0
    """Gradients that come when the peak is over, on a stream of FSDP's own, for which PyTorch reserves memory apart."""
    optimizer: Bytes = 0.0
    buffers: Bytes = 0.0
    activations: Bytes = 0.0
    """Tensors saved for the backward pass, of all micro-batches in flight."""
    pipeline: Bytes = 0.0
    """Buffers for what the neighbouring stages send."""
    recompute: Bytes = 0.0
    """What the layer whose forward runs again keeps for a moment."""
    unsharded: Bytes = 0.0
    """Gathered parameters and unreduced gradients of the layers in flight."""
    temporary: Bytes = 0.0
    """The largest tensors that live only inside one operation, forward or backward: logits and their gradient."""

    @property
    def total(self) -> Bytes:
        """What PyTorch reserves."""
        return sum(size for _, size in self.items())

    @property
    def allocated(self) -> Bytes:
        """What tensors hold at once, as `torch.cuda.max_memory_allocated` and MemTracker count."""
        return self.total - self.awaited

    def items(self) -> Iterator[tuple[str, Bytes]]:
        for name in self.__dataclass_fields__:
            yield name, getattr(self, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrediction:
    """What one pipeline rank should cost. `forward` and `backward` are seconds of one micro-batch, for each of its chunks."""

    forward: tuple[Seconds, ...]
    backward: tuple[Seconds, ...]
    weights: tuple[Seconds, ...] = ()
    """What of `backward` are gradients of weights that come later; empty but under zero-bubble."""
    memory: MemoryBreakdown


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPrediction:
    """What runs of every micro-batch, and how long it occupies a device's streams: each of some layers, or what stands outside
    the layers beside one of them."""

    layers: tuple[str, ...]
    place: Literal["", "before", "after"] = ""
    """Of what stands outside the layers: before or after the one layer named."""
    forward: Seconds = 0.0
    tp_forward: Seconds = 0.0
    recompute: Seconds = 0.0
    backward: Seconds = 0.0
    weights: Seconds = 0.0
    """What of `backward` comes later under zero-bubble."""
    tp_backward: Seconds = 0.0
    gather: Seconds = 0.0
    """Of its parameters; what stands outside the layers of a stage is gathered in one, and reduced."""
    unpack: Seconds = 0.0
    """Of copying what was gathered to where it belongs; `pack`: gradients into what is reduced."""
    pack: Seconds = 0.0
    reduce: Seconds = 0.0
    """Of its gradients over dp_shard."""
    all_reduce: Seconds = 0.0
    """Of their shards over dp_replicate, once a step."""
    optimizer: Seconds = 0.0

    def seconds(self) -> Iterator[tuple[str, Seconds]]:
        for name in self.__dataclass_fields__:
            if name not in ("layers", "place"):
                yield name, getattr(self, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What one optimizer step should cost."""

    step_time: Seconds
    time: TimeBreakdown
    memory: MemoryBreakdown
    hidden_communication: Seconds
    """Communication that runs under computation: not part of `step_time`."""
    tokens_per_second: float
    hop: Seconds = 0.0
    """Passing one micro-batch's activations to the next stage."""
    stages: tuple[StagePrediction, ...] = ()
    """By pipeline rank; empty without a pipeline."""
    scheduled: Seconds | None = None
    """With a pipeline, the step on the exact timeline of the schedule, where `step_time` is a sum that the search can add up."""
    simulated: Seconds | None = None
    """The step as events on every device's streams (`cost.events`), from `units` and `overlap` alone."""
    overlap: float = 0.0
    """Of the hardware's profile: how much of communication beside computation slows both down."""
    units: tuple[UnitPrediction, ...] = ()
    mfu: float
    """Model FLOPs (forward and backward once, nothing recomputed) over the peak of all devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A mesh and micro-batch that was looked at, at its best schedule."""

    mesh: Mesh
    micro_batch: int
    schedule: str = ""
    """The schedule with its chunks, where there is a pipeline."""
    status: CandidateStatus
    reason: str
    """One clause: "needs 93.1 GiB of 76 GiB", "at least 2.31 s, 14 % slower"."""
    step_time: Seconds | None = None
    """Predicted, or a proven lower bound when `bound` is true."""
    bound: bool = False
    memory: Bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A plan that people write by hand, priced by the same model."""

    name: str
    mesh: Mesh
    micro_batch: int
    recompute: str
    step_time: Seconds | None
    """None when it does not fit or is not legal."""
    memory: Bytes | None
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The fastest plan on less memory, proven as the plan itself is."""

    headroom: float
    """The share of each device's memory that was kept free: `--memory-headroom` gives this plan."""
    mesh: Mesh
    micro_batch: int
    schedule: str = ""
    recompute: str
    """Of how many layers: "30 selective, 2 none"; of all of them "full"."""
    step_time: Seconds
    memory: Bytes
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Solve:
    """What was proved. `gap` is (step_time - bound) / step_time; "optimal" means that it is within the gap asked for."""

    status: SolveStatus
    gap: float
    bound: Seconds
    solver: str
    candidates: int
    """Meshes and micro-batches that the proof covers."""
    stopped: Literal["", "interrupted", "time limit"] = ""
    """What ended the search before it had proved its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """How the layers are dealt to the `pp` axis, and in what order its ranks work.

    The layers are cut into `pp * chunks` virtual stages, in the order of the model; virtual stage `k` lives on pipeline
    rank `k % pp`. What stands outside the layers belongs to the stage of the layer that follows it in the forward pass,
    and to the last stage after the last layer.
    """

    schedule: ScheduleKind = "1f1b"
    chunks: int = 1
    """Virtual stages of every rank: above 1 only under an interleaved schedule."""
    split_before: tuple[str, ...]
    """The first layer of every virtual stage but the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRun:
    """Consecutive blocks that share one strategy."""

    layers: tuple[str, ...]
    strategy: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `apply` and `report` need."""

    model: str
    graph: str
    """Fingerprint of the captured graph that the plan was made for."""
    hardware: str
    hardware_fingerprint: str
    workload: Workload
    tokens: int
    """Tokens of one sample."""
    mesh: Mesh
    micro_batch: int
    """Samples that one data-parallel group runs at a time."""
    strategies: tuple[tuple[str, Strategy], ...]
    outer: str
    """Name of the strategy of everything outside the blocks."""
    runs: tuple[LayerRun, ...]
    """The blocks in the order of the model."""
    pipeline: Pipeline | None = None
    """None where `mesh.pp` is 1."""
    context: tuple[tuple[str, int], ...] = ()
    """Inputs of the model that are cut over `mesh.cp`, and the dim: that of the sequence."""
    tied: tuple[tuple[str, ...], ...] = ()
    prediction: Prediction
    memory_limit: Bytes
    """What the plan may use of one device."""
    baselines: tuple[Baseline, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    frontier: tuple[Point, ...] = ()
    """The fastest plans on less and less memory, none of them beaten in both; empty where they were not asked for."""
    solve: Solve
    warnings: tuple[str, ...] = ()
    version: int = PLAN_VERSION

    @property
    def micro_batches(self) -> int:
        """Micro-batches that each data-parallel group runs one after another in a step (gradient accumulation)."""
        return self.workload.global_batch // (self.mesh.dp * self.micro_batch)

    @cached_property
    def by_name(self) -> dict[str, Strategy]:
        return dict(self.strategies)

    def layers(self) -> Iterator[tuple[str, Strategy]]:
        """(block name, strategy) of every block, in order."""
        for run in self.runs:
            for layer in run.layers:
                yield layer, self.by_name[run.strategy]

    @cached_property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Names of the layers of every virtual stage."""
        starts = set(self.pipeline.split_before) if self.pipeline else set()
        found: list[list[str]] = [[]]
        for name, _ in self.layers():
            if name in starts:
                found.append([])
            found[-1].append(name)
        return tuple(map(tuple, found))

    @property
    def outer_strategy(self) -> Strategy:
        return self.by_name[self.outer]
