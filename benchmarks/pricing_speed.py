"""How long pricing one plan takes once its tables are built: `python -m benchmarks.pricing_speed`.

Prices the planner's own `CostModel.predict` for Llama-8B over every mesh of 64 devices, and a pipeline of 16 stages and 64
micro-batches (its timeline included, uncached), and prints processor milliseconds a plan.
"""

from __future__ import annotations

from time import process_time

from autoplan.cost.model import CostModel
from autoplan.profile.catalog import find_hardware
from autoplan.schedule import pipeline_seconds
from autoplan.strategy import UNSHARDED, Mesh, Strategy
from autoplan.workload import Workload
from benchmarks.arrangement import Arranged, Arrangement
from benchmarks.models import Shape, graph_of

LAYERS, REPEATS = 32, 200
LLAMA_8B = Shape(True, 4096, 32, 8, 14336, 128256, 8192, False, False, 0.0)


def main() -> None:
    costs = CostModel(graph_of(LLAMA_8B), find_hardware("h100-sxm-8x"), Workload(global_batch=256))
    layers = [(0, Strategy())] * LAYERS
    meshes = [Mesh(dp_replicate=64 // n, dp_shard=n) for n in (1, 2, 4, 8, 16, 32, 64)]
    for mesh in meshes:
        costs.predict(mesh, 1, Strategy(), layers)
    start = process_time()
    for _ in range(REPEATS):
        for mesh in meshes:
            costs.predict(mesh, 1, Strategy(), layers)
    print(f"predict: {(process_time() - start) / REPEATS / len(meshes) * 1e3:.2f} ms a plan")
    pipeline = Arranged(costs)
    for pp in (1, 4, 16):
        at = Arrangement(tp=1, dp=4, pp=pp, micro_batch=1, zero=1, block=UNSHARDED, outer=UNSHARDED, layers=LAYERS)
        pipeline.price(at)
        seconds = 0.0
        for _ in range(20):
            pipeline_seconds.cache_clear()
            start = process_time()
            pipeline.price(at)
            seconds += process_time() - start
        start = process_time()
        for _ in range(20):
            pipeline.price(at)
        again = process_time() - start
        print(
            f"pipeline of {pp:2d} stages: {seconds / 20 * 1e3:.2f} ms with its timeline, {again / 20 * 1e3:.2f} ms with it known"
        )


if __name__ == "__main__":
    main()
