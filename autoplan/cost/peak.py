"""The most that a layer holds while its backward pass runs, of one micro-batch.

The operations run from the last to the first. At operation `k` what only later ones needed is freed, and the gradients of their
parameters are there, whole: they are reduced when all of the layer are made. With S_k what operations up to `k` have saved, and

    g_k  gradients of parameters of which `k` is the last user, so that its backward pass makes them    (`made`)
    d_k  what it holds besides: gradients of what it takes and returns                                  (`OpCost.temporary`),
         of a border, those of the tensor before and after it, and a copy in the order of the ranks     (`moved`)
    w_k  gradients that wait for operations before it, as that of a residual stream does                (`Body.waiting`)

    peak = max_k (S_k + d_k + w_k + sum_{j >= k} g_j)         that is  P_k = max(P_{k-1}, S_k + d_k + w_k) + g_k    (`grown`)

Of the outer body the same is the most that it holds before and after all layers. While those run it holds what was saved before
them and the gradients of what comes after them: at a call of a block B_k = max(B_{k-1}, S_k), at any other operation that some
call comes before, B_k = B_{k-1} + g_k.

All of it grows along the layer and with each of its parts, so that the search can add it up operation by operation.
"""

from __future__ import annotations

from autoplan.cost.prices import LayerModel
from autoplan.cost.rules import BORDER_COLLECTIVES, Outcome
from autoplan.graph import DTYPE_BYTES, Value
from autoplan.strategy import Layout
from autoplan.units import Bytes


def made(model: LayerModel, index: int, outcome: Outcome) -> Bytes:
    """Unreduced gradients of the parameters that operation `index` is the last to use."""
    body, layouts = model.body, dict[str, Layout]()
    for i, layout in zip(body.ops[index].inputs, outcome.inputs, strict=True):
        name = body.values[i].parameter
        if name is not None and body.last_use[i] == index and body.parameter(name).trainable:
            layouts[name] = layout
    numel = sum(model.local_parameter(body.parameter(name), layout).numel(1) for name, layout in layouts.items())
    return float(numel * DTYPE_BYTES[model.dtype])


def moved(model: LayerModel, value: Value, source: Layout, target: Layout) -> Bytes:
    """What the backward pass of a border holds that redistributes a tensor."""
    if source == target or not value.requires_grad:
        return 0.0
    sizes = model.local_bytes(value, source), model.local_bytes(value, target)
    _, kind = BORDER_COLLECTIVES[source.kind, target.kind]
    copies = kind == "reduce_scatter" or (kind == "all_gather" and model.samples > 1)
    copied = copies and model.reorders(source, target)
    return sum(sizes) + (max(sizes) if copied else 0.0)


def grown(peak: Bytes, at_it: Bytes, gradients: Bytes) -> Bytes:
    """The peak up to an operation, from the peak before it."""
    return max(peak, at_it) + gradients
