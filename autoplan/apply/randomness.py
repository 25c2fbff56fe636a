"""Random numbers of a rank's own, among ranks that otherwise draw alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh


@contextmanager
def own_randomness(mesh: DeviceMesh, own: bool) -> Iterator[None]:
    """Random numbers of this rank's own, from a seed that the common generator draws (so that recomputing repeats them)."""
    if not own:
        yield
        return
    seed = int(torch.randint(2**48, ()).item())
    kind = mesh.device_type
    devices = [] if kind == "cpu" else [torch.get_device_module(kind).current_device()]
    with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
        torch.manual_seed(seed + mesh.get_local_rank())
        yield
