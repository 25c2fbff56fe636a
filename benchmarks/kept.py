"""What of a layer's activations stays until its backward pass, when some operations run again or are fused.

Saved without either is `LayerCost.saved`. Here every tensor has a maker, the operation (or the border that moved data, or the
layer's own input) that its memory comes from:

    again    a tensor stays when its maker does not run again and somebody needs it: an operation that saves it for its
             backward pass, or one that runs again and reads it; torchtitan's policy by operation also keeps what nobody needs
    fuses    a pointwise result that only pointwise operations save is made again in the kernel of their backward pass
    float8   what only linears save is kept as they multiply it, in one byte
"""

from __future__ import annotations

from collections.abc import Callable

from autoplan.cost.prices import LayerModel
from autoplan.cost.walk import Step, changes_memory, saved_values, shared_root, stream_layout, walk
from autoplan.strategy import REPLICATE, Layout, Sharding
from autoplan.units import Bytes


class Tensors:
    """The memories of a layer under one sharding: who makes them and who needs them."""

    def __init__(self, model: LayerModel, sharding: Sharding) -> None:
        self.model, body = model, model.body
        self.makers: dict[int, Step | None] = dict.fromkeys(body.inputs)
        self.layouts: dict[int, Layout] = {i: stream_layout(body.values[i], sharding.stream) for i in body.inputs}
        self.readers: dict[int, list[Step]] = {}
        self.savers: dict[int, list[Step]] = {}
        self.extra: list[tuple[Step, Bytes]] = []
        root = {i: i for i in body.inputs}
        for step in walk(model, sharding):
            op = step.op
            for i in op.inputs:
                self.readers.setdefault(root.get(i, i), []).append(step)
            for i, layout in zip(op.outputs, step.outcome.outputs, strict=True):
                moved = op.kind in ("enter", "exit")
                if moved and not changes_memory(step.outcome.inputs[0], layout):
                    root[i] = root.get(op.inputs[0], op.inputs[0])
                else:
                    root[i] = i if moved else shared_root(body, op, i, root)
                if root[i] == i:
                    self.makers[i], self.layouts[i] = step, layout
            if op.kind not in ("enter", "exit", "call"):
                self.extra.append((step, model.op(step.index, step.outcome).saved_extra))
                for i in saved_values(body, op):
                    self.savers.setdefault(root.get(i, i), []).append(step)

    def _bytes(self, i: int) -> Bytes:
        value = self.model.body.values[i]
        return 0.0 if value.parameter else self.model.local_bytes(value, self.layouts.get(i, REPLICATE))

    def kept(self, again: Callable[[Step], bool], everything: bool) -> Bytes:
        """Bytes that stay when the operations `again` says run again; `everything`: results of the others stay in any case."""
        total = sum(size for step, size in self.extra if not again(step))
        for i, maker in self.makers.items():
            needed = self.savers.get(i) or any(again(step) for step in self.readers.get(i, ()))
            if maker is None:
                total += self._bytes(i) if needed and self.model.body.values[i].requires_grad else 0.0
            elif not again(maker) and (needed or everything):
                total += self._bytes(i)
        return total

    def halved(self) -> Bytes:
        """Bytes that are not kept because linears save their inputs in fp8."""
        return sum(
            self._bytes(i) / 2
            for i, savers in self.savers.items()
            if i in self.makers and all(step.op.kind == "linear" for step in savers)
        )

    def fused(self) -> Bytes:
        """Bytes of what fused pointwise kernels do not keep."""
        return sum(
            self._bytes(i)
            for i, maker in self.makers.items()
            if maker is not None
            and maker.op.kind == "pointwise"
            and self.savers.get(i)
            and all(step.op.kind == "pointwise" for step in self.savers[i])
        )
