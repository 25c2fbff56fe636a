"""One device, one model: the profile that was measured here beside the shipped one, and real steps beside what it predicts.

    autoplan profile -o my.yaml --ranks 1 --budget 120s
    python -m benchmarks.one_device my.yaml                             Llama-1B, on a GPU
    python -m benchmarks.one_device my.yaml --model 'examples/gpt.py?layers=2&hidden=64&heads=4&vocab=256&seq_len=64'

Without a GPU the second form runs on the CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist

from autoplan import api
from autoplan.cost.model import CostModel
from autoplan.errors import UsageError
from autoplan.files.hardware import load_hardware
from autoplan.files.workload import workload
from autoplan.hardware import HardwareProfile
from autoplan.measurement import MeasuredSteps
from autoplan.plan import Plan
from autoplan.profile.catalog import detected
from autoplan.profile.ranks import this_device
from autoplan.tune.steps import measured_steps
from autoplan.units import BYTE, BYTE_PER_SECOND, FLOP_PER_SECOND, SECOND, Unit, show
from benchmarks.uniform_plans import uniform_plans

LLAMA = "examples/llama.py?size=1B"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path, help="what `autoplan profile` wrote")
    parser.add_argument("--model", default=LLAMA)
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="measure compiled steps too")
    asked = parser.parse_args(arguments)
    profile = load_hardware(asked.profile)
    for line in differences(profile):
        print(line)
    device = this_device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # as profiled
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    loaded = api.load_model(asked.model)
    graph = api.inspect(loaded, compute_dtype=dtype)
    print(f"\n{asked.model} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}, {asked.batch} samples a step")
    for compiled in (False, True) if asked.compile else (False,):
        load = workload({}, {"global_batch": asked.batch, "compute_dtype": dtype, "compile": compiled}, 1)
        for plan in uniform_plans(CostModel(graph, profile, load), 1):
            if plan.micro_batch == asked.micro_batch:
                print(line_of(plan, measured_steps(plan, loaded, asked.steps, device=device)))
    dist.destroy_process_group()


def differences(mine: HardwareProfile) -> list[str]:
    """What was measured beside what is shipped for this machine."""
    try:
        shipped = api.load_hardware(detected().name)
    except UsageError as error:
        return [f"no shipped profile to compare with: {error.message}"]

    def line(what: str, a: float, b: float, unit: Unit) -> str:
        return f"  {what:22s} {show(a, unit):>14s} measured, {show(b, unit):>14s} in {shipped.name} ({a / b - 1:+.0%})"

    shared = [dtype for dtype, _ in mine.device.peak if dtype in dict(shipped.device.peak)]
    reached = [
        (p.device.matmul.points[-1][1], p.device.memory_efficiency.points[-1][1], p.device.attention.points[-1][1])
        for p in (mine, shipped)
    ]
    return [
        f"{mine.device.name}: largest kernels",
        *(
            line(
                f"matmul {d}", mine.device.peak_of(d) * reached[0][0], shipped.device.peak_of(d) * reached[1][0], FLOP_PER_SECOND
            )
            for d in shared
        ),
        *(
            line(
                f"attention {d}",
                mine.device.peak_of(d) * reached[0][2],
                shipped.device.peak_of(d) * reached[1][2],
                FLOP_PER_SECOND,
            )
            for d in shared[:1]
        ),
        line("memory", mine.device.bandwidth * reached[0][1], shipped.device.bandwidth * reached[1][1], BYTE_PER_SECOND),
        line("launch", mine.device.launch, shipped.device.launch, SECOND),
    ]


def line_of(plan: Plan, steps: MeasuredSteps) -> str:
    """One plan: time and memory, predicted and measured."""
    said, took = plan.prediction.step_time, steps.step_time
    recompute = next(strategy.recompute for _, strategy in plan.layers())
    text = f"  recompute {recompute}{', compiled' if plan.workload.compile else ''}: {show(took, SECOND)} measured, "
    text += f"{show(said, SECOND)} predicted ({said / took - 1:+.1%})"
    if steps.device != "cpu" and steps.peak_memory:
        size = plan.prediction.memory.allocated
        text += f"; {show(steps.peak_memory, BYTE)} held, {show(size, BYTE)} predicted ({size / steps.peak_memory - 1:+.1%})"
    return text


if __name__ == "__main__":
    main()
