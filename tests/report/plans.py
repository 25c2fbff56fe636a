"""Plans to look at, made by hand: no cost model, no torch, numbers of a believable size."""

from __future__ import annotations

from dataclasses import replace

from autoplan.plan import (
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
from autoplan.schedule import ScheduleKind
from autoplan.strategy import GATHERED, PARTIAL, REPLICATE, Border, Mesh, Sharding, Strategy, shard
from autoplan.workload import Workload

GIB = 2.0**30
SEQUENCE = shard(1)


def _megatron(module: str) -> tuple[Border, Border]:
    return Border(module, "in", "0", SEQUENCE, GATHERED), Border(module, "out", "0", PARTIAL, SEQUENCE)


LLAMA_BLOCK = Sharding(
    parameters=(
        ("attention_norm.weight", GATHERED),
        *((f"attention.{name}.weight", shard(0)) for name in ("wq", "wk", "wv")),
        ("attention.wo.weight", shard(1)),
        ("ffn_norm.weight", GATHERED),
        *((f"feed_forward.{name}.weight", shard(0)) for name in ("w1", "w3")),
        ("feed_forward.w2.weight", shard(1)),
    ),
    borders=(*_megatron("attention"), *_megatron("feed_forward")),
)
LLAMA_OUTER = Sharding(
    parameters=(("tok_embeddings.weight", shard(0)), ("norm.weight", GATHERED), ("output.weight", shard(0))),
    borders=(
        Border("tok_embeddings", "out", "0", PARTIAL, SEQUENCE),
        Border("output", "in", "0", SEQUENCE, GATHERED),
        Border("output", "out", "0", shard(2), REPLICATE),
    ),
)


def _candidates() -> tuple[Candidate, ...]:
    rows = [
        Candidate(
            mesh=Mesh(dp_shard=4, tp=2),
            micro_batch=2,
            status="chosen",
            reason="fastest that fits",
            step_time=7.92,
            memory=70.26 * GIB,
        )
    ]
    for tp, base in ((1, 8.41), (2, 7.92), (4, 8.77), (8, 10.9)):
        for replicate in (1, 2):
            if 8 % (tp * replicate):
                continue
            mesh = Mesh(dp_replicate=replicate, dp_shard=8 // tp // replicate, tp=tp)
            for micro_batch in (1, 2, 4, 8):
                memory = (15 * replicate + 21.5 * micro_batch / tp + 6) * GIB
                time = base * (1 + 0.06 / micro_batch + 0.02 * (replicate - 1))
                key = (mesh, micro_batch)
                if key == (Mesh(dp_shard=4, tp=2), 2):
                    continue
                if memory > 96 * GIB:
                    rows.append(
                        Candidate(
                            mesh=mesh,
                            micro_batch=micro_batch,
                            status="out of memory",
                            reason=f"needs {memory / GIB:.1f} GiB of 76 GiB",
                            step_time=None,
                            memory=memory,
                        )
                    )
                elif micro_batch == 8 or tp == 8:
                    rows.append(
                        Candidate(
                            mesh=mesh,
                            micro_batch=micro_batch,
                            status="slower",
                            reason=f"at least {time:.2f} s, {time / 7.92 - 1:.0%} slower".replace("%", " %"),
                            step_time=time,
                            bound=True,
                            memory=memory * 0.7,
                        )
                    )
                else:
                    status = "slower" if memory <= 76 * GIB else "out of memory"
                    reason = (
                        f"{time:.2f} s, {time / 7.92 - 1:.0%} slower".replace("%", " %")
                        if status == "slower"
                        else f"needs {memory / GIB:.1f} GiB of 76 GiB"
                    )
                    rows.append(
                        Candidate(mesh=mesh, micro_batch=micro_batch, status=status, reason=reason, step_time=time, memory=memory)
                    )
    rows.append(
        Candidate(
            mesh=Mesh(dp_shard=8),
            micro_batch=16,
            status="illegal",
            reason="8 groups of 16 samples do not divide the global batch of 64",
        )
    )
    return tuple(rows)


def frontier(plan: Plan) -> Plan:
    """With plans on less memory: the plan itself, one that recomputes more and one over more devices."""
    now = plan.prediction
    first = Point(
        headroom=0.0,
        mesh=plan.mesh,
        micro_batch=plan.micro_batch,
        recompute="12 full, 20 none",
        step_time=now.step_time,
        memory=now.memory.total,
        tokens_per_second=now.tokens_per_second,
    )
    second = replace(first, headroom=0.35, recompute="full", step_time=now.step_time * 1.1, memory=45 * GIB)
    third = replace(
        second, headroom=0.8125, mesh=Mesh(pp=2, tp=4), schedule="1f1b", step_time=now.step_time * 1.9, memory=14 * GIB
    )
    return replace(plan, frontier=(first, second, third))


def llama() -> Plan:
    """Llama 3 8B on 8 H100: FSDP over 4 groups, tensor parallel over 2, 12 layers recompute."""
    time = TimeBreakdown(
        forward=2.10, backward=4.22, recompute=0.78, tp_communication=0.55, dp_communication=0.21, optimizer=0.06
    )
    memory = MemoryBreakdown(
        parameters=3.74 * GIB,
        gradients=3.74 * GIB,
        optimizer=7.48 * GIB,
        activations=48.2 * GIB,
        recompute=1.9 * GIB,
        unsharded=1.1 * GIB,
        temporary=4.1 * GIB,
    )
    return Plan(
        model="examples/llama.py (8B)",
        graph="3f1c9a7be2d04418",
        hardware="h100-sxm-8x",
        hardware_fingerprint="9b62d1a0c55f7e31",
        workload=Workload(global_batch=64),
        tokens=8192,
        mesh=Mesh(dp_shard=4, tp=2),
        micro_batch=2,
        strategies=(
            ("tp+sp", Strategy(LLAMA_BLOCK, "none", 3)),
            ("tp+sp, recompute", Strategy(LLAMA_BLOCK, "full", 3)),
            ("outer", Strategy(LLAMA_OUTER, "none", 2)),
        ),
        outer="outer",
        runs=(
            LayerRun(layers=tuple(f"layers.{i}" for i in range(12)), strategy="tp+sp, recompute"),
            LayerRun(layers=tuple(f"layers.{i}" for i in range(12, 32)), strategy="tp+sp"),
        ),
        prediction=Prediction(
            step_time=time.total,
            time=time,
            memory=memory,
            hidden_communication=0.43,
            tokens_per_second=64 * 8192 / time.total,
            mfu=0.462,
            simulated=time.total * 1.0034,
            overlap=0.1,
            units=units(tuple(f"layers.{i}" for i in range(32)), gather=0.006, reduce=0.011),
        ),
        memory_limit=76 * GIB,
        baselines=(
            Baseline(
                name="DDP",
                mesh=Mesh(dp_replicate=8),
                micro_batch=1,
                recompute="full",
                step_time=None,
                memory=141.0 * GIB,
                note="needs 141 GiB of 76 GiB",
            ),
            Baseline(
                name="FSDP",
                mesh=Mesh(dp_shard=8),
                micro_batch=1,
                recompute="none",
                step_time=8.91,
                memory=61.4 * GIB,
                note="fully_shard on every layer",
            ),
            Baseline(
                name="FSDP, full recompute",
                mesh=Mesh(dp_shard=8),
                micro_batch=4,
                recompute="full",
                step_time=9.87,
                memory=48.8 * GIB,
                note="activation checkpointing on every layer",
            ),
            Baseline(
                name="Megatron tp 8",
                mesh=Mesh(tp=8),
                micro_batch=4,
                recompute="none",
                step_time=12.1,
                memory=58.3 * GIB,
                note="tensor and sequence parallel over the node",
            ),
        ),
        candidates=_candidates(),
        solve=Solve(status="optimal", gap=0.0001, bound=7.9192, solver="HiGHS 1.15.1", candidates=212),
        warnings=("The causal mask is built inside the model: 2.0 GiB of it would be saved with eager attention.",),
    )


def units(layers: tuple[str, ...], **seconds: float) -> tuple[UnitPrediction, ...]:
    """What layers and the embedding and head beside them might take."""
    return (
        UnitPrediction(layers=layers, forward=0.04, tp_forward=0.01, backward=0.08, tp_backward=0.01, optimizer=1e-3, **seconds),
        UnitPrediction(layers=layers[:1], place="before", forward=0.002, backward=0.003, optimizer=1e-3, **seconds),
        UnitPrediction(layers=layers[-1:], place="after", forward=0.02, backward=0.04),
    )


def single() -> Plan:
    """A small model on one device: no mesh, no baselines, no candidates but the chosen one."""
    time = TimeBreakdown(forward=0.031, backward=0.062, optimizer=0.004)
    memory = MemoryBreakdown(
        parameters=0.46 * GIB, gradients=0.46 * GIB, optimizer=0.93 * GIB, activations=6.1 * GIB, temporary=1.5 * GIB
    )
    return replace(
        llama(),
        model="gpt2",
        hardware="l4",
        mesh=Mesh(),
        micro_batch=4,
        tokens=1024,
        workload=Workload(global_batch=4, optimizer="sgd"),
        strategies=(("plain", Strategy()),),
        outer="plain",
        runs=(LayerRun(layers=tuple(f"transformer.h.{i}" for i in range(12)), strategy="plain"),),
        prediction=Prediction(
            step_time=time.total,
            time=time,
            memory=memory,
            hidden_communication=0.0,
            tokens_per_second=4096 / time.total,
            mfu=0.31,
            units=units(tuple(f"transformer.h.{i}" for i in range(12))),
        ),
        memory_limit=21 * GIB,
        baselines=(),
        candidates=(),
        solve=Solve(status="given", gap=0.0, bound=0.0, solver="none", candidates=1),
        warnings=(),
    )


def piped(schedule: ScheduleKind = "1f1b", pp: int = 4, chunks: int = 1, batch: int = 128) -> Plan:
    """Llama over `pp` pipeline ranks with tp 2: the first rank is the fullest, the last the slowest."""
    plan = llama()
    names = [name for name, _ in plan.layers()]
    virtual = pp * chunks
    cuts = [round(k * len(names) / virtual) for k in range(1, virtual)]
    stages = tuple(
        StagePrediction(
            forward=tuple(0.020 / chunks * (1.1 if s == pp - 1 else 1.0) for _ in range(chunks)),
            backward=tuple(0.041 / chunks * (1.1 if s == pp - 1 else 1.0) for _ in range(chunks)),
            weights=(0.018,) if schedule == "zero-bubble" else (),
            memory=replace(
                plan.prediction.memory, activations=(40 * (pp - s) / pp + 4) * GIB, pipeline=(0.25 if s else 0.125) * GIB
            ),
        )
        for s in range(pp)
    )
    candidates = (
        Candidate(
            mesh=Mesh(pp=pp, tp=2),
            micro_batch=1,
            schedule=schedule,
            status="chosen",
            reason="the fastest",
            step_time=9.0,
            memory=stages[0].memory.total,
        ),
        *plan.candidates[1:],
    )
    time = TimeBreakdown(
        forward=2.6, backward=5.2, tp_communication=0.8, dp_communication=0.02, pp_communication=0.06, bubble=0.3, optimizer=0.01
    )
    return replace(
        plan,
        mesh=Mesh(pp=pp, tp=2),
        micro_batch=1,
        workload=Workload(global_batch=batch),
        pipeline=Pipeline(schedule=schedule, chunks=chunks, split_before=tuple(names[cut] for cut in cuts)),
        prediction=Prediction(
            step_time=time.total,
            time=time,
            memory=stages[0].memory,
            hidden_communication=0.1,
            tokens_per_second=batch * 8192 / time.total,
            hop=0.0006,
            stages=stages,
            simulated=time.total * 0.997,
            scheduled=time.total * 0.996,
            mfu=0.41,
            units=units(tuple(names), **({"weights": 0.001} if schedule == "zero-bubble" else {})),
        ),
        candidates=candidates,
    )


EVIL = "</script><img src=x onerror=alert(1)>[bold red]\x1b[31m\u202e"


def hostile() -> Plan:
    """Every name that comes from outside tries to break out of where it is printed; also 1,024 devices and no fit."""
    plan = llama()
    names = (EVIL, f"{EVIL}.2", *(f"x.{i}" for i in range(200)))
    sharding = Sharding(
        parameters=((f"{EVIL}.weight", shard(0, 3)), ("", shard(4)), (f"{EVIL}.bias", PARTIAL)),
        borders=(Border(EVIL, "in", EVIL, shard(3), shard(1)), Border("", "out", "0", GATHERED, PARTIAL)),
    )
    return replace(
        plan,
        model=EVIL * 3,
        graph=EVIL,
        hardware=EVIL,
        hardware_fingerprint=EVIL,
        mesh=Mesh(dp_replicate=16, dp_shard=8, tp=8),
        workload=Workload(global_batch=2048),
        strategies=((EVIL, Strategy(sharding, "full", 2)),),
        outer=EVIL,
        runs=(
            LayerRun(layers=names[:2], strategy=EVIL),
            LayerRun(layers=names[2:], strategy=EVIL),
        ),
        prediction=replace(plan.prediction, units=units(names, gather=0.001)),
        memory_limit=60 * GIB,
        baselines=(Baseline(name=EVIL, mesh=Mesh(), micro_batch=1, recompute=EVIL, step_time=None, memory=None, note=EVIL),),
        candidates=(Candidate(mesh=Mesh(), micro_batch=1, status="illegal", reason=EVIL),),
        solve=Solve(status="feasible", gap=0.031, bound=7.67, solver=EVIL, candidates=3),
        warnings=(EVIL,),
    )
