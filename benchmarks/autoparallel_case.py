"""AutoParallel's own case in processor seconds, on a machine without GPUs; ours beside it is in `benchmarks.planning_speed`.

python -m benchmarks.autoparallel_case FOLDER [--layers 32]      FOLDER: a checkout of meta-pytorch/autoparallel

Their example `example_llama3.py` as it is (Llama-3 8B, 8192 tokens, 2 sequences a data-parallel rank, mesh (dp 32, tp 8)), with
what a machine without a GPU needs: the mesh is one of CPUs, the device limits are the first of their table's, H100, and attention
is the GPU's flash kernel on fake tensors. Prints JSON: seconds of every phase, of this process and of the solver's, and the peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import Any

DP, TP = 32, 8
LENGTH, VOCABULARY = 8192, 128256


def main() -> None:
    """Runs the case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.folder))
    print(json.dumps(measure(asked.layers)))


def measure(layers: int) -> dict[str, float]:
    """Processor seconds by phase and in all, and GB of the larger process."""
    import torch
    import torch.nn.functional as F
    from autoparallel._testing.models.llama3 import Transformer, TransformerModelArgs
    from autoparallel.api import AutoParallel
    from autoparallel.cost_models import compute_estimation
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor.placement_types import Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    compute_estimation._get_device_limit = lambda: compute_estimation.DEVICE_LIMITS[0]
    F.scaled_dot_product_attention = _flash
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=DP * TP)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (DP, TP), mesh_dim_names=("dp", "tp"))
    with torch.device("meta"):
        model = Transformer(
            TransformerModelArgs(
                dim=4096,
                n_layers=layers,
                n_heads=32,
                n_kv_heads=8,
                ffn_dim_multiplier=1.3,
                multiple_of=1024,
                rope_theta=500000,
                vocab_size=VOCABULARY,
                max_seq_len=LENGTH,
            )
        )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    start = last = _seconds()
    phases: dict[str, float] = {}

    def done(phase: str) -> None:
        nonlocal last
        phases[phase], last = round(_seconds() - last, 1), _seconds()

    def inputs() -> Any:
        return torch.randint(0, VOCABULARY, (2 * DP, LENGTH))

    with AutoParallel(model, inputs, mesh, policy, repeated_subgraphs=True) as planner:
        planner.add_parameter_memory_constraint(low=None, high=None)
        planner.add_input_constraints([(Shard(0), Replicate())])
        planner.add_output_constraints([(Shard(0), Shard(2))])
        done("capture, strategies and program")
        found = planner.optimize_placement(verbose=False)
        done("solve")
        planner.apply_placement(found)
        done("apply")
    return {**phases, "all": round(last - start, 1), "GB": round(_peak() / 1e9, 2)}


def _flash(query: Any, key: Any, value: Any, is_causal: bool = False) -> Any:
    import torch

    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]


def _seconds() -> float:
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def _peak() -> float:
    return 1024.0 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    main()
