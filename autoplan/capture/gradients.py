"""Where gradients of one tensor meet, and what adding them up costs.

A tensor with n uses gets n gradients, and autograd's engine adds them up, n - 1 times, at moments that are no operation's:
whenever the next gradient arrives. So the same layer would cost more or less with its place in the model (the encoder's
output gets a gradient from every layer of the decoder; the last one, which arrives first, adds nothing), and a stub and
the layer that it stands for would differ.

Here the adds are taken off the kernels that happened to run before them, and given back by a rule that sees structure only:

    gradients of uses inside one block meet inside that block;  what each block makes of them meets outside.

Two equal blocks thus have equal costs wherever they stand, and the sum over the model is what the engine really does.
The edges are those of the autograd graph itself, so that views, casts and custom functions are counted as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

from torch import Tensor

from autoplan.capture import private
from autoplan.capture.scope import Call, Scope

Edge = tuple[Any, int]
"""A node of the autograd graph and the number of one of its outputs in the forward pass."""


def edges(loss: Tensor, visit: Callable[[Any], None]) -> dict[Edge, list[int]]:
    """Every tensor that gets gradients -> the sequence numbers of the nodes that make them. `visit` sees every node."""
    found: defaultdict[Edge, list[int]] = defaultdict(list)
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        visit(node)
        number = private.sequence_of(node)
        for target, slot in private.next_edges(node):
            if target is None:
                continue
            found[target, slot].append(number)
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return found


def forget_unused(found: Mapping[Edge, list[int]], owner: Mapping[int, Call], scopes: Iterable[Scope]) -> None:
    """What autograd keeps for results that the loss does not need (LLaVA's last vision layer) goes with them, before the
    backward pass begins."""
    needed = {id(owner[number]) for numbers in found.values() for number in numbers if number in owner}
    for call in (call for scope in scopes for call in scope.calls):
        if id(call) not in needed:
            call.packed.clear()


def charge_meetings(found: Mapping[Edge, list[int]], owner: Mapping[int, Call], blocks: Mapping[str, Call]) -> float:
    """Adds the costs of all meetings to the calls. Returns the bytes moved by them, to be compared with the engine's.

    `owner`: which call made the node of a sequence number. `blocks`: the call of each block in the outer scope.
    """
    total = 0.0
    for (target, slot), numbers in found.items():
        if len(numbers) < 2:
            continue
        shape, dtype = private.gradient_of(target, slot)
        moved = 3.0 * prod(shape) * dtype.itemsize
        last: dict[str, Call] = {}
        for number in sorted(numbers):
            call = owner.get(number)
            if call is None:
                continue
            if call.block_name in last:
                _add(last[call.block_name], moved)
                total += moved
            last[call.block_name] = call
        for name in list(last)[:-1]:
            _add(blocks.get(name, last[name]), moved)
            total += moved
    return total


def _add(call: Call, moved: float) -> None:
    call.backward.bytes += moved
    call.backward.kernels += 1
