"""Meshes that are alike are one, as long as the process group of all ranks is the same."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import HashStore

from autoplan.apply.meshes import mesh_of
from autoplan.strategy import Mesh, Sharding
from tests.apply.plans import make


def test_meshes_end_with_their_process_group() -> None:
    plan, cpu = make({}, Sharding((), ()), Mesh()), torch.device("cpu")
    found = []
    for _ in range(2):
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            found.append(mesh_of(plan, cpu))
            groups = len(dist.distributed_c10d._world.pg_map)
            assert mesh_of(plan, cpu) is found[-1]
            assert len(dist.distributed_c10d._world.pg_map) == groups
        finally:
            dist.destroy_process_group()
    assert found[0] is not found[1]
