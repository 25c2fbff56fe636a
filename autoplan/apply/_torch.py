"""Every private name of PyTorch that `apply` needs, with the reason: the one file to look at when PyTorch is upgraded."""

from __future__ import annotations

# The placement of a packed weight (q, k and v in one): every rank holds its share of each part. DTensor has no public name for it.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

# Tensors in Python containers (arguments, outputs); torch keeps its pytree private although everybody uses it.
from torch.utils._pytree import tree_any, tree_flatten, tree_map, tree_map_only

__all__ = ["StridedShard", "tree_any", "tree_flatten", "tree_map", "tree_map_only"]
