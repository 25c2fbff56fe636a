"""Plans by hand: what the planner would say for the models of `models.py`."""

from __future__ import annotations

from dataclasses import replace

from autoplan.plan import LayerRun, MemoryBreakdown, Pipeline, Plan, Prediction, Solve, TimeBreakdown
from autoplan.schedule import ScheduleKind
from autoplan.strategy import GATHERED, PARTIAL, REPLICATE, Border, Layout, Mesh, Sharding, Strategy, Zero, shard
from autoplan.workload import Workload

SEQUENCE = shard(1)


def make(
    layers: dict[str, Sharding],
    outer: Sharding,
    mesh: Mesh,
    *,
    micro_batch: int = 0,
    batch: int = 8,
    recompute: str = "none",
    zero: Zero = 3,
    dtype: str = "float64",
    compute: str | None = None,
    schedule: ScheduleKind = "1f1b",
    chunks: int = 1,
    cuts: tuple[int, ...] | None = None,
    compile: bool = False,
) -> Plan:
    """A plan for `layers` (block name -> sharding); the micro-batch is the whole share unless given.

    With `mesh.pp` the layers are cut before those with the numbers `cuts`, else evenly.
    """
    strategies = {name: Strategy(sharding, recompute, zero) for name, sharding in layers.items()}  # type: ignore[arg-type]
    return Plan(
        model="test",
        graph="",
        hardware="cpu",
        hardware_fingerprint="",
        workload=Workload(
            global_batch=batch,
            param_dtype=dtype,  # type: ignore[arg-type]
            compute_dtype=compute or dtype,  # type: ignore[arg-type]
            reduce_dtype=dtype,  # type: ignore[arg-type]
            compile=compile,
        ),
        tokens=16,
        mesh=mesh,
        micro_batch=micro_batch or batch // mesh.dp,
        strategies=(("outer", Strategy(outer, "none", zero)), *strategies.items()),
        outer="outer",
        runs=tuple(LayerRun(layers=(name,), strategy=name) for name in strategies),
        pipeline=pipeline(list(layers), mesh.pp, schedule, chunks, cuts),
        prediction=Prediction(
            step_time=0.0,
            time=TimeBreakdown(),
            memory=MemoryBreakdown(),
            hidden_communication=0.0,
            tokens_per_second=0.0,
            mfu=0.0,
        ),
        memory_limit=0.0,
        solve=Solve(status="given", gap=0.0, bound=0.0, solver="", candidates=0),
    )


def pipeline(
    layers: list[str], pp: int, schedule: ScheduleKind = "1f1b", chunks: int = 1, cuts: tuple[int, ...] | None = None
) -> Pipeline | None:
    if pp == 1:
        return None
    stages = pp * chunks
    cuts = cuts or tuple(round(len(layers) * i / stages) for i in range(1, stages))
    return Pipeline(schedule=schedule, chunks=chunks, split_before=tuple(layers[i] for i in cuts))


def _around(module: str, leaf: str, stream: Layout, result: Layout = PARTIAL) -> tuple[Border, Border]:
    """Into a tensor-parallel region and out of it."""
    return Border(module, "in", leaf, stream, GATHERED), Border(module, "out", "0", result, stream)


def llama(mesh: Mesh, sequence: bool = False, **options: object) -> Plan:
    stream = SEQUENCE if sequence else REPLICATE
    norm = GATHERED if sequence else REPLICATE
    column, row = shard(0), shard(1)
    block = Sharding(
        parameters=(
            *((f"attention.{name}.weight", column) for name in ("wq", "wk", "wv")),
            ("attention.wo.weight", row),
            *((f"feed_forward.{name}.weight", column) for name in ("w1", "w3")),
            ("feed_forward.w2.weight", row),
            ("attention_norm.weight", norm),
            ("ffn_norm.weight", norm),
        ),
        borders=(*_around("attention", "0", stream), *_around("feed_forward", "0", stream)),
    )
    outer = Sharding(
        parameters=(("tok.weight", shard(0)), ("output.weight", shard(0)), ("norm.weight", norm)),
        borders=(Border("tok", "out", "0", PARTIAL, stream), Border("output", "in", "0", stream, GATHERED)),
    )
    return make({f"layers.{i}": block for i in range(2)}, outer, mesh, **options)  # type: ignore[arg-type]


def hf_llama(mesh: Mesh, sequence: bool = False, **options: object) -> Plan:
    del sequence  # positions are made in the model for the whole sequence: planned without
    block = Sharding(
        parameters=(
            *((f"self_attn.{name}_proj.weight", shard(0)) for name in "qkv"),
            ("self_attn.o_proj.weight", shard(1)),
            *((f"mlp.{name}_proj.weight", shard(0)) for name in ("gate", "up")),
            ("mlp.down_proj.weight", shard(1)),
        ),
        borders=(*_around("self_attn", "hidden_states", REPLICATE), *_around("mlp", "0", REPLICATE)),
    )
    outer = Sharding(
        parameters=(("model.embed_tokens.weight", shard(0)), ("lm_head.weight", shard(0))),
        borders=(Border("model.embed_tokens", "out", "0", PARTIAL, REPLICATE), Border("lm_head", "in", "0", REPLICATE, GATHERED)),
    )
    return make({f"model.layers.{i}": block for i in range(2)}, outer, mesh, **options)  # type: ignore[arg-type]


def gpt(mesh: Mesh, sequence: bool = False, **options: object) -> Plan:
    stream = SEQUENCE if sequence else REPLICATE
    norm = GATHERED if sequence else REPLICATE
    block = Sharding(
        parameters=(
            ("attn.c_attn.weight", shard(0, blocks=3)),
            ("attn.c_attn.bias", GATHERED),
            ("attn.c_proj.weight", shard(1)),
            ("mlp.c_fc.weight", shard(0)),
            ("mlp.c_fc.bias", shard(0)),
            ("mlp.c_proj.weight", shard(1)),
            *((f"{name}.{part}", norm) for name in ("ln_1", "ln_2") for part in ("weight", "bias")),
        ),
        borders=(*_around("attn", "0", stream), *_around("mlp", "0", stream)),
    )
    tied = (("wte.weight", shard(0)), ("lm_head.weight", shard(0)), ("ln_f.weight", norm), ("ln_f.bias", norm))
    borders = [Border("wte", "out", "0", PARTIAL, REPLICATE), Border("lm_head", "in", "0", stream, GATHERED)]
    if sequence:
        borders.append(Border("h.0", "in", "0", REPLICATE, SEQUENCE))
    plan = make({f"h.{i}": block for i in range(2)}, Sharding(tied, tuple(borders)), mesh, **options)  # type: ignore[arg-type]
    return replace(plan, tied=(("wte.weight", "lm_head.weight"),))


def translator(mesh: Mesh, sequence: bool = False, **options: object) -> Plan:
    del sequence
    ffn = (("linear1.weight", shard(0)), ("linear1.bias", shard(0)), ("linear2.weight", shard(1)))
    encoder = Sharding(
        parameters=(*_attention("self_attn"), *ffn),
        borders=(
            Border("self_attn", "in", "0,1,2", REPLICATE, GATHERED),
            Border("self_attn", "out", "0", PARTIAL, REPLICATE),
            Border("linear1", "in", "0", REPLICATE, GATHERED),
            Border("linear2", "out", "0", PARTIAL, REPLICATE),
        ),
    )
    decoder = Sharding(
        parameters=(*encoder.parameters, *_attention("multihead_attn")),
        borders=(
            *encoder.borders,
            Border("multihead_attn", "in", "0", REPLICATE, GATHERED),
            Border("multihead_attn", "in", "1,2", REPLICATE, GATHERED),
            Border("multihead_attn", "out", "0", PARTIAL, REPLICATE),
        ),
    )
    layers = {f"transformer.encoder.layers.{i}": encoder for i in range(2)}
    layers |= {f"transformer.decoder.layers.{i}": decoder for i in range(2)}
    outer = Sharding(
        parameters=(("src.weight", shard(0)), ("tgt.weight", shard(0)), ("head.weight", shard(0)), ("head.bias", shard(0))),
        borders=(
            Border("src", "out", "0", PARTIAL, REPLICATE),
            Border("tgt", "out", "0", PARTIAL, REPLICATE),
            Border("head", "in", "0", REPLICATE, GATHERED),
        ),
    )
    return make(layers, outer, mesh, **options)  # type: ignore[arg-type]


def _attention(name: str) -> tuple[tuple[str, Layout], ...]:
    return (
        (f"{name}.in_proj_weight", shard(0, blocks=3)),
        (f"{name}.in_proj_bias", GATHERED),
        (f"{name}.out_proj.weight", shard(1)),
    )


PLANNERS = {"llama": llama, "gpt": gpt, "translator": translator, "hf_llama": hf_llama}
