"""Lists with one tensor for each sample: a call that takes a batch apart (`images.unbind()`), and one that joins it again.

The number of such tensors grows with the batch, and the graph's operations have a fixed number of inputs and outputs. So
the tensors of all samples become one value, as if they were joined along their first dim: of `n * batch` outputs the
first `n` stay, and stand for all. Only calls that take or make the whole list can be told so; they are opaque.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoplan.capture.scope import Call, Scope


def bundle(scopes: Sequence[Scope], batches: Sequence[int]) -> None:
    """Makes the recordings of one body equally long, where a list of tensors grows with the batch. Changes them in place."""
    rows = zip(*(scope.calls for scope in scopes), strict=False)
    lists = [(row, kept) for row in rows if (kept := _kept([len(call.outputs) for call in row], batches)) is not None]
    if not lists:
        return
    for at, scope in enumerate(scopes):
        dropped: set[int] = set()
        for row, kept in lists:
            call = row[at]
            dropped.update(call.outputs[kept:])
            for index in call.outputs[:kept]:
                scope.items[index].each_sample = True
            _close(call)
        _renumber(scope, dropped)


def _kept(counts: Sequence[int], batches: Sequence[int]) -> int | None:
    """How many of the outputs belong to one sample, if their number is proportional to the batch."""
    each, rest = divmod(counts[0], batches[0])
    grows = len(set(counts)) > 1 and not rest and all(n == each * b for n, b in zip(counts, batches, strict=True))
    return each if grows else None


def _close(call: Call) -> None:
    call.kind, call.dims, call.dim_map = "opaque", (), ()


def _renumber(scope: Scope, dropped: set[int]) -> None:
    kept = [index for index in range(len(scope.items)) if index not in dropped]
    new = {old: index for index, old in enumerate(kept)}
    for call in scope.calls:
        if not dropped.isdisjoint(call.inputs):
            _close(call)
        call.inputs = tuple(new[index] for index in call.inputs if index in new)
        call.outputs = tuple(new[index] for index in call.outputs if index in new)
    scope.items = [scope.items[old] for old in kept]
    for item in scope.items:
        item.storage = new[item.storage]
    scope.renumber(new)
