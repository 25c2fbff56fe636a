"""The recorder: runs a model once on fake tensors, forward and backward, and writes down what its code calls.

Two modes see two levels. A function mode sees the calls of the user's code (`F.linear`, `Tensor.view`, `+`): the
level at which sharding rules work, and at which `apply` can act; what runs inside one of them is that one call. A
dispatch mode below autograd sees the kernels, and adds their costs to the call that is running. In the backward pass
the call is found by autograd's sequence number: the nodes made while a call ran belong to it.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autoplan.capture import private, semantics
from autoplan.capture.blocks import Twin, call_key, ownership, remember, repeat
from autoplan.capture.normalise import classify, name_of, tensors
from autoplan.capture.scope import Call, Meter, Scope, argument_leaves, leaves, merged

aten = torch.ops.aten
_READS_ROWS = {aten.embedding.default, aten.index_select.default, aten.gather.default, aten.index.Tensor}
_READS_TARGET_ONLY = {aten.nll_loss_forward.default, aten.nll_loss_backward.default}
_SAYS_YES = {aten.all.default, aten._is_all_true.default}
_HOUSE = (str(Path(torch.__file__).parent), str(Path(__file__).parent), str(Path(__file__).parent.parent / "adapt.py"))


class NoBlockError(Exception):
    """What looked like layers are none: `names` run twice or never, or pass tensors past their results."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        super().__init__(", ".join(sorted(self.names)))


def place() -> str:
    """file:line of the innermost frame of the user's code."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_HOUSE):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Recorder(TorchFunctionMode):
    """One recording of `root` at one batch size. `blocks` are the names and signatures of its layers."""

    def __init__(self, root: nn.Module, blocks: Mapping[str, Hashable], stubs: bool) -> None:
        super().__init__()
        self.root = root
        self.blocks = blocks
        self.stubs = stubs
        self.owned, self.tied = ownership(root, blocks)
        self.outer = Scope("", None, self.owned)
        self.order: list[Call] = []
        """All calls of the user's code in the order in which they ran, of every scope."""
        self.layers: dict[str, Scope] = {}
        """Full name of each block -> the scope that was recorded for it or for its twin."""
        self.warnings: dict[str, None] = {}
        self._names = {id(module): name for name, module in root.named_modules()}
        self._scope = self.outer
        self._stack: list[str] = [""]
        self._current: Call | None = None
        self._last: Call | None = None
        self._by_sequence: dict[int, Call] = {}
        self._twins: dict[Hashable, Twin | None] = {}
        self._external: set[int] = set()
        self._alive: list[Any] = []
        self._module_call = private.module_call()

    # --- the run ---------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Any], loss_of: Callable[[Any], Tensor]) -> Tensor:
        """Forward, loss and backward. The fake mode is already on."""
        self._external = {private.storage_key(t) for t in (*self.root.parameters(), *self.root.buffers(), *tensors(inputs))}
        for name, tensor in merged(list(leaves(inputs))):
            self.outer.take(tensor, name)
        with warnings.catch_warnings(), _Kernels(self):
            warnings.simplefilter("ignore")
            with self._patches(), torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor), self:
                output = self.root(**inputs)
                loss = loss_of(output)
            self.outer.outputs.append(self.outer.find(loss))
            self._check_blocks()
            self._last = None
            wanted = [p for p in self.root.parameters() if p.requires_grad]
            torch.autograd.grad(loss, wanted, allow_unused=True)
        return loss

    def _check_blocks(self) -> None:
        """All blocks ran, and none let a tensor out by a side door (`self.aux_loss = ...`): a constant with a gradient."""
        if len(self.layers) < len(self.blocks):
            raise NoBlockError(self.blocks.keys() - self.layers.keys())
        for scope in (self.outer, *self.layers.values()):
            if any(constant.grad_fn is not None for constant in scope.constants):
                raise NoBlockError(self.blocks)

    @contextlib.contextmanager
    def _patches(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            recorder, original = self, self._module_call
            stack.enter_context(
                private.patched(nn.Module, "__call__", lambda module, *a, **k: recorder._called(original, module, a, k))
            )
            for name, (function, replacement) in semantics.PATCHED.items():
                stack.enter_context(private.patched(F, name, self._routed(function, replacement)))
            apply = torch.autograd.Function.__dict__["apply"]
            stack.enter_context(private.patched(torch.autograd.Function, "apply", classmethod(self._custom(apply))))
            masks = sys.modules.get("transformers.masking_utils")
            if hasattr(masks, "find_packed_sequence_indices"):  # decides by tensor values; under fake tensors, wrongly
                stack.enter_context(private.patched(masks, "find_packed_sequence_indices", lambda *a, **k: None))
            stack.enter_context(private.patched(*private.CHECKPOINT, self._no_checkpoint))
            yield

    def _routed(self, function: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._current is not None:
                return replacement(*args, **kwargs)
            return self.__torch_function__(function, (), args, kwargs)

        return call

    def _custom(self, apply: Any) -> Callable[..., Any]:
        def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
            bound = apply.__get__(None, cls)
            if cls is torch.utils.checkpoint.CheckpointFunction:
                next(self._no_checkpoint())
                return args[0](*args[2:])
            if self._current is not None or cls.__module__.startswith("autoplan.capture"):
                return bound(*args, **kwargs)
            with private.no_torch_function():
                return self._record(bound, cls.__name__, args, kwargs)

        return call

    def _no_checkpoint(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        """In the place of the generator around a checkpointed call: does nothing before and after it."""
        self.warnings["the model's own activation checkpointing is left out: the plan decides what is recomputed"] = None
        yield

    # --- calls of the user's code ------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._current is not None:
            return func(*args, **kwargs)
        name = name_of(func)
        if name == "is_cuda":
            return True
        args, kwargs = semantics.on_device(func, args, kwargs)
        return self._record(func, name, args, kwargs)

    def _record(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call("opaque", name, self._stack[-1], "", func=func, args=args, kwargs=kwargs)
        versions = [(tensor, tensor._version) for tensor in tensors((args, kwargs))]
        first = private.sequence()
        self._current = call
        try:
            call.result = result = semantics.REPLACED.get(func, func)(*args, **kwargs)
            changed = [tensor for tensor, version in versions if tensor._version != version]
            outputs = list(tensors(result)) or changed
            if not outputs or name == "requires_grad_" or (not changed and _same(outputs, versions)):
                return result
            call.place = place()
            self._emit(call, outputs)
        finally:
            self._current = None
        for number in range(first, private.sequence()):
            self._by_sequence[number] = call
        return result

    def _emit(self, call: Call, outputs: list[Tensor]) -> None:
        form = classify(call.func, call.args, call.kwargs, outputs)
        scope = self._scope
        call.kind, call.dims, call.dim_map, call.linear = form.kind, form.dims, form.dim_map, form.linear
        call.inputs = tuple(scope.find(tensor) for tensor in form.inputs)
        call.outputs = tuple(scope.value(tensor) for tensor in outputs)
        self._alive.append(outputs)
        scope.calls.append(call)
        self.order.append(call)
        self._last = call

    # --- modules and blocks --------------------------------------------------------------------------------------------

    def _called(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self._names.get(id(module))
        if not name or self._current is not None:
            return original(module, *args, **kwargs)
        if name in self.blocks and not self._scope.name:
            return self._block(original, module, name, args, kwargs)
        local = name.removeprefix(f"{self._scope.name}.") if self._scope.name else name
        return self._within(original, module, local, args, kwargs)

    def _within(
        self, original: Callable[..., Any], module: nn.Module, local: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs a module between its borders."""
        scope = self._scope
        entering = [(leaf, tensor, scope.find(tensor)) for leaf, tensor in argument_leaves(args, kwargs)]
        scope.push()
        self._stack.append(local)
        for leaf, tensor, value in entering:
            self._border("enter", local, leaf, tensor, value)
        result = original(module, *args, **kwargs)
        leaving = [(leaf, tensor, scope.find(tensor)) for leaf, tensor in merged(list(leaves(result)))]
        self._stack.pop()
        scope.pop()
        for leaf, tensor, value in leaving:
            self._border("exit", local, leaf, tensor, value)
        return result

    def _border(self, kind: Any, module: str, leaf: str, tensor: Tensor, value: int) -> None:
        scope = self._scope
        call = Call(kind, kind, module, "", inputs=(value,), leaf=leaf)
        call.outputs = (scope.value(tensor),)
        scope.calls.append(call)

    def _block(
        self, original: Callable[..., Any], module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in self.layers:
            raise NoBlockError([name])
        outer = self._scope
        passed = argument_leaves(args, kwargs)
        arguments = [tensor for _, tensor in passed]
        key = call_key(self.blocks[name], module, args, kwargs)
        twin = self._twins.get(key) if self.stubs else None
        call = Call("call", "block", self._stack[-1], place(), block=len(self.layers))
        first = private.sequence()
        if twin is not None:
            scope, unseen = twin.scope, twin.unseen
            self._current = call  # the stub's own calls are nobody's
            try:
                result = repeat(twin, arguments, next((p for p in module.parameters() if p.requires_grad), None))
            finally:
                self._current = None
            for number in range(first, private.sequence()):
                self._by_sequence[number] = call
        else:
            scope = self._scope = Scope(name, outer, self.owned)
            for leaf, tensor in passed:
                scope.take(tensor, leaf)
            self._stack.append("")
            result = self._within(original, module, "", args, kwargs)
            self._stack.pop()
            self._scope = outer
            given = set(map(id, arguments))
            unseen = [scope.items[i].tensor for i in scope.inputs if id(scope.items[i].tensor) not in given]
            scope.outputs = [scope.find(tensor) for _, tensor in merged(list(leaves(result)))]
            self._twins[key] = remember(scope, arguments, unseen, result)
        self.layers[name] = scope
        call.inputs = tuple(outer.find(tensor) for tensor in (*arguments, *unseen))
        outputs = [tensor for _, tensor in merged(list(leaves(result)))]
        call.outputs = tuple(outer.value(tensor) for tensor in outputs)
        self._alive.append((args, kwargs, outputs))
        outer.calls.append(call)
        self._last = call
        return result

    # --- costs ---------------------------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Tensor:
        if self._current is not None and private.storage_key(tensor) not in self._external:
            self._current.packed.append(tensor)
        return tensor

    def meter(self) -> Meter | None:
        """Where the costs of the kernel that runs now belong."""
        number = private.node_sequence()
        if number is None and self._current is not None:
            return self._current.forward
        if number is not None:
            self._last = self._by_sequence.get(number, self._last)
            return None if self._last is None else self._last.backward
        return None if self._last is None else self._last.forward


def _same(outputs: list[Tensor], versions: list[tuple[Tensor, int]]) -> bool:
    given = {id(tensor) for tensor, _ in versions}
    return all(id(tensor) in given for tensor in outputs)


class _Kernels(TorchDispatchMode):
    """Adds FLOPs, bytes and the number of kernels to the call that is running."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._yes: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._scalar(func, args)
        out = func(*args, **kwargs)
        if private.is_view(func):
            return out
        if func in _SAYS_YES:
            self._yes[id(out)] = out
        meter = self._recorder.meter()
        if meter is not None:
            meter.flops += private.flops(func, args, kwargs, out)
            meter.bytes += _moved(func, args, kwargs, out)
            meter.kernels += 1
        return out

    def _scalar(self, func: Any, args: Any) -> Any:
        """A tensor's value decides what the Python code does. A fake tensor has none: guess (`all` is true), and say so."""
        try:
            return func(*args)
        except private.DataDependentOutputException:
            dtype = args[0].dtype
            guess: Any = id(args[0]) in self._yes if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
            self._recorder.warnings[f"{place()} asks for the value of a tensor; capture went on with {guess}"] = None
            return guess


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Bytes that a kernel reads and writes, each tensor once; a gather reads the rows that it returns, not the table."""
    written = {id(tensor): tensor for tensor in tensors(out)}
    read = {id(tensor): tensor for tensor in tensors((args, kwargs))}
    total = sum(_size(tensor) for tensor in written.values())
    if func in _READS_ROWS:
        read.pop(id(next(tensors(args))), None)
        total *= 2
    elif func in _READS_TARGET_ONLY:
        read.pop(id(args[0] if func is aten.nll_loss_forward.default else args[1]), None)
    return total + sum(_size(tensor) for tensor in read.values())


def _size(tensor: Tensor) -> float:
    """Bytes of a tensor; of one that is expanded, those that exist."""
    return float(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))
