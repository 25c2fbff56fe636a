"""Every private name of PyTorch that `apply` needs, with the reason: the one file to look at when PyTorch is upgraded."""

from __future__ import annotations

# The store of a process group of one. `torch.distributed` has it, but does not export it to type checkers.
from torch._C._distributed_c10d import HashStore

# The placement of a packed weight (q, k and v in one): every rank holds its share of each part. It has no public name.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

# Tensors in Python containers (arguments, outputs); torch keeps its pytree private although everybody uses it.
from torch.utils._pytree import tree_any, tree_flatten, tree_leaves, tree_map, tree_map_only

__all__ = ["HashStore", "StridedShard", "tree_any", "tree_flatten", "tree_leaves", "tree_map", "tree_map_only"]
