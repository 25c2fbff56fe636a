"""Selective recomputation: of a layer that runs again in the backward pass, results that are dear to make are kept.

Kept are the results of matrix products, attention kernels and collectives (`_torch.KEPT`); everything else runs again: norms,
activations, rotary embeddings, dropout, sums, casts. In the layer's forward pass a dispatch mode keeps these results, in the
order in which each operation made them; when the layer runs again, a second mode hands them out instead of running the operation.
On DTensors an operation is seen as a whole, with the collectives that DTensor puts around it.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` does the same, and is what torchtitan uses. It ends in an error,
or in wrong gradients, where a model writes into a result in place, as `F.linear` itself may with a bias; and where attention's
kernel that drops out doesn't run again, the dropouts after it draw other numbers than they had. Here an operation whose result
was written into runs again, and random numbers go on where they had gone on. A product's partial sums that only pass into a
reduction, whose result is kept, are not kept (`_Result.hollow`).
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from autoplan.apply._torch import JOIN, KEPT, REDUCTIONS, TorchDispatchMode, blank, memory_of, written
from autoplan.apply.trees import tree_leaves, tree_map_only


def run(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, recomputed selectively. (The compiler knows PyTorch's way alone, and warns of writes in place.)"""
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False, context_fn=_IN_COMPILED_CODE)
    forward, again = contexts()
    result = checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (forward, again))
    forward.end(result)
    return result


_IN_COMPILED_CODE = partial(create_selective_checkpoint_contexts, list(KEPT))


def contexts() -> tuple[Keeping, HandingOut]:
    """Of one call of a layer: what its forward pass and its second run are put in."""
    results: Results = defaultdict(deque)
    return Keeping(results), HandingOut(results)


T = TypeVar("T")
_at_work = threading.local()


def as_one(key: Any, compute: Callable[[], T]) -> T:
    """What `compute` returns, kept as the result of one operation: of those within nothing is. `key` says of which."""
    mode: Keeping | HandingOut | None = getattr(_at_work, "mode", None)
    return compute() if mode is None else mode.as_one(key, compute)


class _Mode(TorchDispatchMode):
    """What both have in common: they are known while they are on, and off within what counts as one operation."""

    def __init__(self, results: Results) -> None:
        super().__init__()
        self._results = results
        self._off = False

    def __enter__(self) -> Self:
        self._before, _at_work.mode = getattr(_at_work, "mode", None), self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _at_work.mode = self._before

    def _uncut(self, compute: Callable[[], T]) -> T:
        before, self._off = self._off, True
        try:
            return compute()
        finally:
            self._off = before


class _Result:
    """What an operation returned, until somebody writes into it, and the random numbers' state after it."""

    def __init__(self, result: Any, randomness: Callable[[], None] | None) -> None:
        self.intact = True
        self.read = self.reduced = False
        """By an operation; by a collective that adds it up."""
        self._result = tree_map_only(torch.Tensor, torch.Tensor.detach, result)  # no part of the graph, which it would keep
        self._randomness = randomness
        self._make: Any = None

    def spoil(self) -> None:
        self.intact, self._result = False, None

    def hollow(self) -> None:
        """Nothing but a reduction has use for it, whose result is kept: what is handed out in its place has no values."""
        if isinstance(self._result, torch.Tensor):
            self._make, self._result = blank(self._result), None

    def again(self) -> Any:
        if self._randomness is not None:
            self._randomness()
        return self._result if self._make is None else self._make()


Results = dict[Any, deque[_Result]]
"""By operation, those that were made first on the left."""


class Keeping(_Mode):
    """The forward pass."""

    def __init__(self, results: Results) -> None:
        super().__init__(results)
        self._by_memory: dict[int, _Result] = {}
        self._joined: tuple[int, _Result] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._off:
            return result
        if func in KEPT:
            self._keep(func, result, _after(func, args, kwargs))
        if self._by_memory:
            self._heed(func, args, kwargs, result)
        return result

    def as_one(self, key: Any, compute: Callable[[], T]) -> T:
        result = self._uncut(compute)
        self._keep(key, result, None)
        return result

    def _keep(self, key: Any, result: Any, randomness: Callable[[], None] | None) -> None:
        kept = _Result(result, randomness)
        self._results[key].append(kept)
        for tensor in _tensors(result):
            self._by_memory[memory_of(tensor)] = kept

    def _heed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """What becomes of what is kept."""
        if func.namespace == "prim":  # asks of tensors, but for their values
            return
        self.spoil(list(written(func, args, kwargs)))
        made = {memory_of(tensor) for tensor in _tensors(result)}
        given = {memory_of(tensor) for tensor in _tensors((args, kwargs))} - made  # else it is a view
        if self._joined is not None:
            memory, kept = self._joined
            self._joined = None
            self._taken(kept, func in REDUCTIONS and memory in given)
        for memory in given & self._by_memory.keys():
            if func is JOIN:  # the parts that a reduction scatters, one after another; it comes at once
                self._joined = next(iter(made)), self._by_memory[memory]
            else:
                self._taken(self._by_memory[memory], func in REDUCTIONS)

    def _taken(self, kept: _Result, to_reduce: bool) -> None:
        kept.reduced, kept.read = kept.reduced or to_reduce, kept.read or not to_reduce

    def end(self, returned: Any) -> None:
        """The layer has run. Nobody hears what will be written into what it returns."""
        self.spoil(returned)
        for kept in self._by_memory.values():
            if kept.reduced and not kept.read and self._joined is None:
                kept.hollow()
        self._by_memory.clear()

    def spoil(self, tensors: Any) -> None:
        """Something is, or may be, written into these: what was kept in the same memory is no longer."""
        for tensor in _tensors(tensors):
            kept = self._by_memory.pop(memory_of(tensor), None)
            if kept is not None:
                kept.spoil()


class HandingOut(_Mode):
    """The second run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not self._off and self._results.get(func):
            kept = self._results[func].popleft()
            if kept.intact:
                return kept.again()
        return func(*args, **kwargs or {})

    def as_one(self, key: Any, compute: Callable[[], T]) -> T:
        kept = self._results[key].popleft() if self._results.get(key) else None
        if kept is not None and kept.intact:
            found: T = kept.again()
            return found
        return self._uncut(compute)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._results.clear()  # what was made after the last tensor that the backward pass needs


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _after(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None] | None:
    """Brings an accelerator's random numbers to where they are now, if the operation may have drawn some: attention with
    dropout."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names or not {**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p"):
        return None
    device = args[0].device
    if device.type == "cpu":  # there attention with dropout is made of several operations
        return None
    module = torch.get_device_module(device)
    state = module.get_rng_state(device)
    return lambda: module.set_rng_state(state, device)
