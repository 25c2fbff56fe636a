"""What a report says about a plan, as data: the terminal and the page only decide how it looks.

Every text in here is fit for reading (people's units, no control characters) and none of it is escaped for HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from autoplan.plan import Baseline, Candidate, CandidateStatus, Plan
from autoplan.report import words

GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The answer, before anything else."""

    title: str
    answer: str
    """One sentence: the plan."""
    step_time: str
    throughput: str
    mfu: str
    memory: str
    limit: str
    headroom: str
    speedup: str
    """A factor, or a dash."""
    speedup_over: str
    """What the factor is over, or why there is none."""
    proof: str


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a sum: of the step's time or of the peak memory."""

    key: str
    label: str
    note: str
    value: float
    text: str
    share: float
    """Of the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineRow:
    """A plan that people write by hand, against this one."""

    name: str
    mesh: str
    micro_batch: int
    recompute: str
    step_time: str
    memory: str
    speedup: float | None
    """How many times faster the plan is; None when the baseline cannot run."""
    verdict: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateRow:
    """A mesh and micro-batch that was looked at; `seconds` and `bytes` are its place in the scatter."""

    mesh: str
    micro_batch: int
    schedule: str
    status: CandidateStatus
    reason: str
    step_time: str
    memory: str
    seconds: float | None
    bytes: float | None
    bound: bool


@dataclass(frozen=True, slots=True)
class Fact:
    """A line of a two-column table."""

    label: str
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """A line to copy."""

    text: str
    note: str


def headline(plan: Plan) -> Headline:
    """The answer."""
    prediction, memory = plan.prediction, plan.prediction.memory.total
    speedup, over = _best_speedup(plan)
    return Headline(
        title=f"{words.clean(plan.model)} on {words.plural(plan.mesh.size, 'device')}",
        answer=_answer(plan),
        step_time=words.seconds(prediction.step_time),
        throughput=words.count(prediction.tokens_per_second),
        mfu=words.percent(prediction.mfu),
        memory=words.size(memory),
        limit=words.size(plan.memory_limit),
        headroom=_headroom(plan),
        speedup=speedup,
        speedup_over=over,
        proof=proof(plan),
    )


def _answer(plan: Plan) -> str:
    where = "on 1 device" if plan.mesh.size == 1 else f"as {plan.mesh} over {words.plural(plan.mesh.size, 'device')}"
    accumulated = f" x {plan.micro_batches} accumulated" if plan.micro_batches > 1 else ""
    batch = f"{words.plural(plan.micro_batch, 'sample')} a micro-batch{accumulated}"
    compiled = ", compiled layers" if plan.workload.compile else ""
    return (
        f"Train {words.clean(plan.model)} {where}, {batch}, {recompute_clause(plan)}{compiled}: "
        f"{words.seconds(plan.prediction.step_time)} a step."
    )


def recompute_clause(plan: Plan) -> str:
    """How much of the model runs its forward twice."""
    used = [strategy.recompute for _, strategy in plan.layers()]
    full, some = used.count("full"), used.count("selective")
    parts = [(full, "recomputation"), (some, "selective recomputation")]
    clauses = [f"{what} in {'all' if n == len(used) else f'{n}'}" for n, what in parts if n]
    if not clauses:
        return "no recomputation"
    of = "" if len(used) in (full, some) else "of "
    return f"{' and '.join(clauses)} {of}{words.plural(len(used), 'layer')}"


def _headroom(plan: Plan) -> str:
    left = plan.memory_limit - plan.prediction.memory.total
    if left < 0:
        return f"{words.size(-left)} over the limit"
    return f"{words.size(left)} free"


def proof(plan: Plan) -> str:
    """What the search proved, in one sentence."""
    solve = plan.solve
    covers = f"over {words.plural(solve.candidates, 'combination')} of mesh and micro-batch"
    if solve.status == "optimal":
        within = "" if solve.gap <= 1e-9 else f" within {words.percent(solve.gap)}"
        return f"Proved optimal for the cost model{within}, {covers}.{_beaten(plan)}"
    if solve.status == "feasible":
        return f"Best found; the best possible is at most {words.percent(solve.gap)} less, {covers}.{_beaten(plan)}"
    return "Given by hand and priced; nothing was searched."


def _beaten(plan: Plan) -> str:
    """Why a baseline can be faster than the best plan: the flags kept its mesh out of the search."""
    allowed = {candidate.mesh for candidate in plan.candidates}
    outside = [b for b in plan.baselines if b.step_time is not None and b.mesh not in allowed]
    best = min(outside, key=lambda b: b.step_time or 0.0, default=None)
    if best is None or (best.step_time or 0.0) >= plan.solve.bound:
        return ""
    return f" {words.clean(best.name)} would be faster: its mesh, {best.mesh}, is outside of what was asked for."


def _best_speedup(plan: Plan) -> tuple[str, str]:
    running = [row for row in baselines(plan) if row.speedup is not None]
    if not plan.baselines:
        return "-", "no baselines were priced"
    if not running:
        return "-", f"none of {words.plural(len(plan.baselines), 'baseline')} can run here"
    best = min(running, key=lambda row: row.speedup or 0.0)
    return words.factor(best.speedup or 0.0), f"the best baseline, {best.name}"


def speedups(plan: Plan) -> str:
    """The speed-up over every baseline in one clause, the strongest baseline first; empty when none can run."""
    running = sorted((row for row in baselines(plan) if row.speedup is not None), key=lambda row: row.speedup or 0.0)
    said = "; ".join(_faster(row) for row in running)
    return said[:1].upper() + said[1:]


def _faster(row: BaselineRow) -> str:
    same = words.factor(row.speedup or 0.0) == words.factor(1.0)
    return f"as fast as {row.name}" if same else f"{row.verdict} the speed of {row.name}"


def time_parts(plan: Plan) -> tuple[Part, ...]:
    """Where the step goes; parts that are zero are kept, so that the table says that they are."""
    return parts(plan.prediction.time.items(), words.TIME_WORDS, words.seconds)


def simulated(plan: Plan) -> str:
    """How far the sum that the search adds up is from the plan's event simulation; nothing where it was not simulated."""
    events, step = plan.prediction.simulated, plan.prediction.step_time
    if events is None or not step or not plan.prediction.units:
        return ""
    change = events / step - 1
    if abs(change) < 5e-6:
        return f"The event simulation of this plan says as much: {words.seconds(events)}."
    side = "less" if change < 0 else "more"
    return (
        f"This price is the sum that the search adds up. The event simulation of this plan says {words.seconds(events)}, "
        f"{words.percent(abs(change))} {side}."
    )


def memory_parts(plan: Plan) -> tuple[Part, ...]:
    """What fills the fullest device at its peak."""
    return parts(plan.prediction.memory.items(), words.MEMORY_WORDS, words.size)


def allocated(plan: Plan) -> str:
    """What of the fullest device's memory tensors hold at once; nothing where that is all."""
    memory = plan.prediction.memory
    held = f"Tensors hold at most {words.size(memory.allocated)} at once, as torch.cuda.max_memory_allocated counts."
    return held if memory.awaited else ""


def parts(
    items: Iterable[tuple[str, float]], labels: dict[str, tuple[str, str]], text: Callable[[float], str]
) -> tuple[Part, ...]:
    """(key, value) of every part of a sum, with its words and its share."""
    pairs = list(items)
    total = sum(value for _, value in pairs)
    return tuple(
        Part(key, *labels.get(key, (key.replace("_", " "), "")), value, text(value), value / total if total else 0.0)
        for key, value in pairs
    )


def baselines(plan: Plan) -> tuple[BaselineRow, ...]:
    """Plans written by hand, in the order of the plan."""
    return tuple(_baseline(plan, baseline) for baseline in plan.baselines)


def _baseline(plan: Plan, baseline: Baseline) -> BaselineRow:
    speedup = None if baseline.step_time is None else baseline.step_time / plan.prediction.step_time
    return BaselineRow(
        name=words.clean(baseline.name),
        mesh=str(baseline.mesh),
        micro_batch=baseline.micro_batch,
        recompute=words.clean(baseline.recompute),
        step_time="-" if baseline.step_time is None else words.seconds(baseline.step_time),
        memory="-" if baseline.memory is None else words.size(baseline.memory),
        speedup=speedup,
        verdict="cannot run" if speedup is None else words.factor(speedup),
        note=words.clean(baseline.note),
    )


_ORDER: dict[CandidateStatus, int] = {"chosen": 0, "slower": 1, "out of memory": 2, "illegal": 3}


def candidates(plan: Plan) -> tuple[CandidateRow, ...]:
    """Everything that was looked at, the most interesting first: chosen, then by time, then what cannot run."""
    ordered = sorted(
        plan.candidates,
        key=lambda c: (_ORDER[c.status], c.step_time or float("inf"), c.memory or float("inf"), c.mesh, c.micro_batch),
    )
    return tuple(_candidate(candidate) for candidate in ordered)


def _candidate(candidate: Candidate) -> CandidateRow:
    time = "-" if candidate.step_time is None else words.seconds(candidate.step_time)
    return CandidateRow(
        mesh=str(candidate.mesh),
        micro_batch=candidate.micro_batch,
        schedule=words.clean(candidate.schedule),
        status=candidate.status,
        reason=words.clean(candidate.reason),
        step_time=f"≥ {time}" if candidate.bound and candidate.step_time is not None else time,
        memory="-" if candidate.memory is None else words.size(candidate.memory),
        seconds=candidate.step_time,
        bytes=candidate.memory,
        bound=candidate.bound,
    )


def candidate_counts(plan: Plan) -> tuple[tuple[CandidateStatus, int], ...]:
    """How many candidates have each status, those that occur."""
    counts = {status: sum(c.status == status for c in plan.candidates) for status in _ORDER}
    return tuple((status, number) for status, number in counts.items() if number)


def workload(plan: Plan) -> tuple[Fact, ...]:
    """What was asked of the machine."""
    load, mesh = plan.workload, plan.mesh
    return (
        Fact(
            "Global batch", f"{words.plural(load.global_batch, 'sample')}, {words.count(load.global_batch * plan.tokens)} tokens"
        ),
        Fact("Sample", words.plural(plan.tokens, "token")),
        Fact(
            "Split as",
            f"{words.plural(mesh.dp, 'data-parallel group')} x {words.plural(plan.micro_batch, 'sample')} x "
            f"{words.plural(plan.micro_batches, 'micro-batch')}",
        ),
        Fact("Optimizer", load.optimizer),
        *([Fact("Expert imbalance", _imbalance(load.expert_imbalance))] if mesh.ep > 1 else []),
        *([Fact("Layers", "compiled by torch.compile")] if load.compile else []),
        Fact("Number formats", f"parameters {load.param_dtype}, compute {load.compute_dtype}, reduce {load.reduce_dtype}"),
    )


def _imbalance(factor: float) -> str:
    return (
        f"the fullest device has {factor:g} times the mean of tokens" if factor != 1 else "none: every device has as many tokens"
    )


def hardware(plan: Plan) -> tuple[Fact, ...]:
    """What the prediction stands on."""
    return (
        Fact("Profile", words.clean(plan.hardware)),
        Fact("Devices", words.count(plan.mesh.size)),
        Fact("Memory limit", f"{words.size(plan.memory_limit)} of each device"),
        Fact("Hidden communication", f"{words.seconds(plan.prediction.hidden_communication)} a step runs under computation"),
        Fact("Sources", f"autoplan hardware {words.clean(plan.hardware)} tells the source of each number"),
        Fact("Profile fingerprint", words.clean(plan.hardware_fingerprint)),
        Fact("Graph fingerprint", words.clean(plan.graph)),
        Fact("Solver", f"{words.clean(plan.solve.solver)}; lower bound {words.seconds(plan.solve.bound)}"),
    )


def warnings(plan: Plan) -> tuple[str, ...]:
    """What the reader should know before trusting the plan."""
    return tuple(words.clean(warning) for warning in plan.warnings)


def commands(plan: Plan, path: str = "plan.yaml") -> tuple[Command, ...]:
    """What to do next, ready to be copied."""
    nodes = -(-plan.mesh.size // GPUS_PER_NODE)
    launch = f"--nproc-per-node {min(plan.mesh.size, GPUS_PER_NODE)}"
    if nodes > 1:
        launch = f"--nnodes {nodes} {launch} \\\n  --rdzv-backend c10d --rdzv-endpoint $HEAD_NODE:29500"
    applied = f'model = autoplan.apply(model, "{path}")'
    if plan.pipeline is not None:  # the order of the forward pass is found by running it once, without memory
        applied = f'parallel = autoplan.apply(build_model, "{path}", inputs=example_inputs)'
    return (
        Command(applied, "in your training script, before the optimizer is made"),
        Command(f"torchrun {launch} train.py", f"on each of {nodes} nodes" if nodes > 1 else "runs it"),
        Command(f"autoplan report {path} --format terminal", "shows this summary again"),
    )
