"""Tensors in containers, as torch's pytree finds them, which takes ten times as long: this runs at every call of a model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autoplan.apply import _torch

_ALONE = frozenset((type(None), type(...), bool, int, float, str, torch.device, torch.dtype))
"""Beside tensors, types of what is no container."""


def tree_leaves(tree: Any) -> list[Any]:
    """Everything in `tree` that is no container, in order."""
    found: list[Any] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Any]) -> None:
    kind = type(tree)
    if kind in _ALONE or isinstance(tree, torch.Tensor):
        found.append(tree)
    elif kind is tuple or kind is list:
        for each in tree:
            _collect(each, found)
    elif kind is dict:
        for each in tree.values():
            _collect(each, found)
    else:  # a container of another kind, perhaps one that is registered
        found += _torch.tree_leaves(tree)


def tree_map_only(kind: type, call: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `call(leaf)` in the place of every leaf that is a `kind`."""
    own = type(tree)
    if own is tuple:
        return tuple([tree_map_only(kind, call, each) for each in tree])
    if own is list:
        return [tree_map_only(kind, call, each) for each in tree]
    if own is dict:
        return {key: tree_map_only(kind, call, each) for key, each in tree.items()}
    if isinstance(tree, kind):
        return call(tree)
    return tree if own in _ALONE or isinstance(tree, torch.Tensor) else _torch.tree_map_only(kind, call, tree)
