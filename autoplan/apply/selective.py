"""Selective recomputation: of a layer that runs again in the backward pass, results that are dear to make are kept.

Kept are the results of matrix products, attention kernels and collectives (`_torch.KEPT`); everything else runs again: norms,
activations, rotary embeddings, dropout, sums, casts. In the layer's forward pass a dispatch mode keeps these results, in the
order in which each operation made them; when the layer runs again, a second mode hands them out instead of running the operation.
On DTensors an operation is seen as a whole, with the collectives that DTensor puts around it.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` does the same, and is what torchtitan uses. It ends in an error,
or in wrong gradients, where a model writes into a result in place, as `F.linear` itself may with a bias; and where attention's
kernel that drops out doesn't run again, the dropouts after it draw other numbers than they had. Here an operation whose result
was written into runs again, and random numbers go on where they had gone on.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from autoplan.apply._torch import KEPT, TorchDispatchMode, memory_of, tree_leaves, tree_map_only, written


def run(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, recomputed selectively. (The compiler knows PyTorch's way alone, and warns of writes in place.)"""
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False, context_fn=_IN_COMPILED_CODE)
    forward, again = contexts()
    result = checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (forward, again))
    forward.spoil(result)  # nobody hears what will be written into it
    return result


_IN_COMPILED_CODE = partial(create_selective_checkpoint_contexts, list(KEPT))


def contexts() -> tuple[Keeping, HandingOut]:
    """Of one call of a layer: what its forward pass and its second run are put in."""
    results: Results = defaultdict(deque)
    return Keeping(results), HandingOut(results)


class _Result:
    """What an operation returned, until somebody writes into it, and the random numbers' state after it."""

    def __init__(self, result: Any, randomness: Callable[[], None] | None) -> None:
        self.intact = True
        self._result = tree_map_only(torch.Tensor, torch.Tensor.detach, result)  # no part of the graph, which it would keep
        self._randomness = randomness

    def spoil(self) -> None:
        self.intact, self._result = False, None

    def again(self) -> Any:
        if self._randomness is not None:
            self._randomness()
        return self._result


Results = dict[Any, deque[_Result]]
"""By operation, those that were made first on the left."""


class Keeping(TorchDispatchMode):
    """The forward pass."""

    def __init__(self, results: Results) -> None:
        super().__init__()
        self._results = results
        self._by_memory: dict[int, _Result] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in KEPT:
            kept = _Result(result, _after(func, args, kwargs))
            self._results[func].append(kept)
            for tensor in _tensors(result):
                self._by_memory[memory_of(tensor)] = kept
        elif self._by_memory:
            self.spoil(list(written(func, args, kwargs)))
        return result

    def spoil(self, tensors: Any) -> None:
        """Something is, or may be, written into these: what was kept in the same memory is no longer."""
        for tensor in _tensors(tensors):
            kept = self._by_memory.pop(memory_of(tensor), None)
            if kept is not None:
                kept.spoil()


class HandingOut(TorchDispatchMode):
    """The second run."""

    def __init__(self, results: Results) -> None:
        super().__init__()
        self._results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self._results.get(func):
            kept = self._results[func].popleft()
            if kept.intact:
                return kept.again()
        return func(*args, **kwargs or {})

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
