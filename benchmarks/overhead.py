"""Seconds of a step of the applied model beside those of the same plan written by hand, with FSDP2 and parallelize_module.

python -m benchmarks.overhead [-o FILE.md] [--steps 60]      exit code 1 when a case takes more than MOST

Both models live in the same processes, which talk through gloo, and take steps in turn: each pair of steps gives a ratio.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from autoplan.apply import apply
from autoplan.capture import LoadedModel, capture, load_model
from autoplan.cost.model import OUTER, CostModel
from autoplan.plan import Plan
from autoplan.profile.catalog import find_hardware
from autoplan.search.columns import Tables
from autoplan.strategy import REPLICATE, Mesh, shard
from autoplan.workload import Workload
from tests.apply.plans import make
from tests.apply.ranks import run

MOST = 1.05
"""The goal: seconds beside those of the model that is parallel by hand."""
SIZES = {"size": "125M", "layers": 4, "hidden": 512, "heads": 8, "kv_heads": 4, "ffn": 1024, "vocab": 2048, "seq_len": 64}
SAMPLES, WARM = 4, 3
CASES = (Mesh(dp_shard=2), Mesh(tp=2), Mesh(dp_shard=4), Mesh(dp_shard=2, tp=2))
Step = Callable[[], float]


@dataclass(frozen=True)
class Found:
    """Of a rank: seconds of every pair of steps (applied, by hand), of the clock and of the processor; collectives of a step."""

    wall: list[tuple[float, float]]
    processor: list[tuple[float, float]]
    collectives: tuple[int, int]
    apart: float
    """The largest relative difference of a loss."""


def loaded() -> LoadedModel:
    return load_model("examples/llama.py", kwargs=SIZES)


def plan_of(mesh: Mesh) -> Plan:
    """FSDP of every layer, and over tp what the planner would shard, with the sequence between layers."""
    load = Workload(global_batch=SAMPLES * mesh.dp, param_dtype="float32", compute_dtype="float32", reduce_dtype="float32")
    known = Tables(CostModel(capture(loaded(), compute_dtype="float32"), find_hardware("cpu-gloo"), load))
    stream = shard(1) if mesh.tp > 1 else REPLICATE
    chosen = {
        body: max(
            known.shardings(body, mesh.within, SAMPLES, stream),
            key=lambda sharding: sum(layout.sharded for _, layout in sharding.parameters),
        )
        for body in known.classes
    }
    layers = {block.name: chosen[block.body] for block in known.graph.blocks}
    plan = make(layers, chosen[OUTER], mesh, micro_batch=SAMPLES, batch=load.global_batch, dtype="float32")
    return replace(plan, tied=known.graph.tied)


def by_hand(mesh: Mesh) -> nn.Module:
    """The same plan, as one writes it with PyTorch."""
    torch.manual_seed(0)
    model: Any = loaded().build()
    devices = init_device_mesh("cpu", (mesh.dp_shard, mesh.tp), mesh_dim_names=("dp", "tp"))
    if mesh.tp > 1:
        tp, sequence, whole = devices["tp"], Shard(1), Replicate()
        column = ColwiseParallel()
        outside = {
            "embedding": ColwiseParallel(output_layouts=whole),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=sequence, output_layouts=Shard(-1), use_local_output=False),
        }
        parallelize_module(model, tp, outside)
        first = PrepareModuleInput(
            input_layouts=(whole, None, None), desired_input_layouts=(sequence, None, None), use_local_output=True
        )
        parallelize_module(model.layers[0], tp, first)
        for layer in model.layers:
            inside = {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(input_layouts=(sequence, None, None), desired_input_layouts=(whole, None, None)),
                **{f"attention.{name}": column for name in ("wq", "wk", "wv")},
                "attention.wo": RowwiseParallel(output_layouts=sequence),
                "mlp_norm": SequenceParallel(),
                "mlp": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(whole,)),
                **{f"mlp.{name}": column for name in ("gate", "up")},
                "mlp.down": RowwiseParallel(output_layouts=sequence),
            }
            parallelize_module(layer, tp, inside)
    if mesh.dp_shard > 1:
        for layer in model.layers:
            fully_shard(layer, mesh=devices["dp"])
        fully_shard(model, mesh=devices["dp"])
    made: nn.Module = model
    return made


def steps(mesh: Mesh, plan: Plan) -> tuple[Step, Step]:
    """A whole step of the applied model, and of the one by hand; they return this rank's loss."""
    batch = loaded().example_inputs(SAMPLES)
    parallel = apply(loaded().build, plan, device="cpu", seed=0)
    model = by_hand(mesh)
    optimizers = [torch.optim.AdamW(m.parameters()) for m in (parallel, model)]

    def applied() -> float:
        loss = parallel.step(batch)
        optimizers[0].step()
        optimizers[0].zero_grad()
        return loss.item()

    def hand() -> float:
        if mesh.tp > 1:
            with loss_parallel():
                loss = model(**batch)
                loss.backward()
        else:
            loss = model(**batch)
            loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        return loss.item()

    return applied, hand


def measure(mesh: Mesh, plan: Plan, number: int) -> Found:
    """On a rank: warm steps, then pairs, each other one in the other order."""
    torch.manual_seed(1)
    both = steps(mesh, plan)
    apart = 0.0
    for _ in range(WARM):
        a, b = (step() for step in both)
        apart = max(apart, abs(a - b) / abs(b))
    sent = []
    for step in both:
        with CommDebugMode() as mode:
            step()
        sent.append(mode.get_total_counts())
    wall, processor = [], []
    for i in range(number):
        seconds = [(0.0, 0.0), (0.0, 0.0)]
        for which in (0, 1) if i % 2 else (1, 0):
            dist.barrier()
            start = time.perf_counter(), time.process_time()
            both[which]()
            seconds[which] = time.perf_counter() - start[0], time.process_time() - start[1]
        wall.append((seconds[0][0], seconds[1][0]))
        processor.append((seconds[0][1], seconds[1][1]))
    return Found(wall, processor, (sent[0], sent[1]), apart)


def ratios(found: list[Found], what: str) -> list[float]:
    """Applied beside by hand, pair by pair: the ranks' sum."""
    pairs = zip(*(getattr(each, what) for each in found), strict=True)
    return [sum(a for a, _ in pair) / sum(b for _, b in pair) for pair in pairs]


def row(mesh: Mesh, found: list[Found]) -> str:
    """A row of the table."""
    wall, processor = ratios(found, "wall"), ratios(found, "processor")
    low, _, high = quantiles(wall, n=4)
    seconds = [median(pair[which] for each in found for pair in each.wall) for which in (0, 1)]
    cells = [
        f"{mesh}" + (" + sequence" if mesh.tp > 1 else ""),
        mesh.size,
        *(f"{1000 * each:.0f}" for each in seconds),
        f"{median(wall):.3f}" + " (missed)" * (median(wall) > MOST),
        f"{low:.3f} to {high:.3f}",
        f"{median(processor):.3f}",
        "{} / {}".format(*found[0].collectives),
        f"{max(each.apart for each in found):.0e}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD = """| plan | ranks | ms a step, applied | by hand | ratio, median | half of all ratios | of processor seconds \
| collectives a step, applied / by hand | losses differ by |
|---|---|---|---|---|---|---|---|---|"""

PAGE = """# Overhead

Written by `python -m benchmarks.overhead -o docs/overhead.md`. A step of `ParallelModel.step`, AdamW included, beside the same
plan written by hand with `fully_shard` and `parallelize_module`: {layers} layers of the example Llama, {hidden} wide, {samples}
samples of {seq_len} tokens a rank, in float32, through gloo. Both models live in the same processes and take steps in turn; a
ratio is that of two steps that follow one another. The goal: a median of at most {most}. {steps} pairs of steps. Python {python},
torch {torch}, {cores} cores, load average {load:.0f}: on a busy machine the ratios of the clock spread, and those of processor
seconds tell more.

{table}

The applied model returns the mean loss of all ranks, which the other doesn't.
"""


def main() -> int:
    """Runs every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--case", type=int, help="one alone")
    asked = parser.parse_args()
    rows, missed = [], False
    for i, mesh in enumerate(CASES):
        if asked.case in (None, i):
            found = run(mesh.size, measure, mesh, plan_of(mesh), asked.steps, timeout=1200.0)
            rows.append(row(mesh, found))
            missed |= median(ratios(found, "wall")) > MOST
            print(rows[-1], file=sys.stderr, flush=True)
    table = "\n".join([HEAD, *rows])
    print(table)
    if asked.o:
        text = PAGE.format(
            **SIZES, samples=SAMPLES, most=MOST, python=platform.python_version(), torch=version("torch"), cores=os.cpu_count(),
            table=table, steps=asked.steps, load=os.getloadavg()[0],
        )  # fmt: skip
        asked.o.write_text(text, encoding="utf-8")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
