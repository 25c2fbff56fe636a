"""Our trees are torch's: the same leaves in the same order, and the same containers around them."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils import _pytree as theirs

from autoplan.apply import trees


class Pair(NamedTuple):
    first: Any
    second: Any


TENSOR = torch.ones(2)
TREES = [
    TENSOR,
    None,
    (),
    {"a": [TENSOR, (1, "x")], "b": {}},
    [Pair(TENSOR, [2.0]), OrderedDict(z=TENSOR, a=1), defaultdict(list, key=[TENSOR]), deque([TENSOR, 3])],
    (slice(0, 1), torch.float32, torch.device("cpu"), torch.Size((2, 3)), ..., object, torch.nn.Parameter(TENSOR)),
]


@pytest.mark.parametrize("tree", TREES, ids=[str(i) for i in range(len(TREES))])
def test_trees_are_those_of_torch(tree: Any) -> None:
    found, expected = trees.tree_leaves(tree), theirs.tree_leaves(tree)
    assert len(found) == len(expected)
    assert all(a is b for a, b in zip(found, expected, strict=True))
    for kind in (torch.Tensor, int):
        mapped = trees.tree_map_only(kind, str, tree)
        assert repr(mapped) == repr(theirs.tree_map_only(kind, str, tree))
