"""Counts what a step sends, and answers in place of the ranks that are not there."""

from __future__ import annotations

from typing import Any

import torch

from autoplan.strategy import Mesh
from autoplan.verify._torch import Peak, group_of, tree_leaves
from autoplan.verify.traffic import KINDS, Amount, Key, Traffic, axis_of, total


class Counting(Peak):
    """While it is on, collectives of more than one rank are counted, too.

    What is received from a neighbouring stage is all ones. In its first step a schedule asks the stages whether they know the
    shapes of what is sent (`torch.distributed.pipelining`), with one int32, which is not counted; one means yes, which the
    fake process group would not say.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._mesh = mesh
        self._found: list[tuple[Key, Amount]] = []
        self._axes: dict[tuple[int, ...], str] = {}
        self._marks: list[int] = []

    @property
    def traffic(self) -> Traffic:
        return total(self._found)

    @property
    def outside(self) -> Traffic:
        """What was sent before the first mark and after the last."""
        return total([*self._found[: self._marks[0]], *self._found[self._marks[-1] :]])

    def mark(self) -> None:
        """Remember this moment."""
        self._marks.append(len(self._found))

    def forget(self) -> None:
        """Begin anew, after a step."""
        self._found.clear()
        self._marks.clear()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is LOCAL_SCALAR and args[0].dtype == torch.int32:
            return 1  # the question above; a fake tensor has no value to be read
        result = super().run(func, args, kwargs)
        if func.namespace in SENDING:
            self._count(func, args, result)
        return result

    def _count(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        ranks = group_of(func, args)
        name = func._schema.name.partition("::")[2].replace("_", "")
        kind = next((kind for kind in KINDS if kind.replace("_", "") in name), None)
        leaves = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        if ranks is None or kind is None or any(leaf.is_meta for leaf in leaves):  # on meta shapes are computed, nothing is sent
            return
        if kind == "recv":
            for tensor in tree_leaves(args[0]):
                tensor.fill_(1)
        if kind in ("send", "recv") and all(leaf.numel() == 1 and leaf.dtype == torch.int32 for leaf in leaves):
            return
        if len(ranks) > 1:
            size = max(leaf.numel() * leaf.element_size() for leaf in leaves)  # of input and output the one that is whole
            self._found.append(((self._axis(tuple(ranks)), kind), Amount(1, size)))

    def _axis(self, ranks: tuple[int, ...]) -> str:
        if ranks not in self._axes:
            self._axes[ranks] = axis_of(ranks, self._mesh)
        return self._axes[ranks]


LOCAL_SCALAR = torch.ops.aten._local_scalar_dense.default
SENDING = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
"""Where operations that send live."""
