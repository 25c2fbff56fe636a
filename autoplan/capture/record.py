"""The recorder: runs a model once on fake tensors, forward and backward, and writes down what its code calls.

Two modes see two levels. A function mode sees the calls of the user's code (`F.linear`, `Tensor.view`, `+`): the
level at which sharding rules work, and at which `apply` can act; what runs inside one of them is that one call. A
dispatch mode below autograd sees the kernels, and adds their costs to the call that is running. In the backward pass
the call is found by autograd's sequence number: the nodes made while a call ran belong to it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoplan.capture import private, semantics
from autoplan.capture.blocks import Twin, block_of, call_key, difference, ownership, remember, repeat
from autoplan.capture.failures import NoBlockError, TwinsDifferError
from autoplan.capture.gradients import charge_meetings, edges, forget_unused
from autoplan.capture.kernels import Kernels
from autoplan.capture.normalise import classify, name_of, tensors
from autoplan.capture.scope import Call, Meter, Scope, argument_leaves, leaves, merged, place


@dataclass(frozen=True)
class Options:
    """How to record."""

    stubs: bool = True
    """Whether a layer that equals two earlier ones is left out."""
    alone: frozenset[str] = frozenset()
    """Layers that are traced in any case."""
    compare: bool = True
    """Whether the first two of equal layers are both traced, and compared; else the first one is trusted."""
    kernels: Literal["cuda", "cpu"] = "cuda"
    """Whose kernels to count."""


class Recorder(TorchFunctionMode):
    """One recording of `root` at one batch size. `blocks` are the names and signatures of its layers."""

    def __init__(self, root: nn.Module, blocks: Mapping[str, Hashable], options: Options) -> None:
        super().__init__()
        self.root = root
        self.blocks = blocks
        self.options = options
        self.owned, self.tied = ownership(root, blocks)
        self.outer = Scope("", None, self.owned)
        self.layers: dict[str, Scope] = {}
        """Full name of each block -> the scope that was recorded for it or for its twin."""
        self.warnings: dict[str, None] = {}
        self._names = {id(module): name for name, module in root.named_modules()}
        self._scope = self.outer
        self._stack: list[str] = [""]
        self._current: Call | None = None
        self._stopped: tuple[BaseException, str] | None = None
        """The last error of the model's code, and where it was raised."""
        self._last: Call | None = None
        self._by_sequence: dict[int, Call] = {}
        self._twins: dict[Hashable, list[Twin | None]] = {}
        self._members: dict[Hashable, list[str]] = {}
        self._replaced = semantics.replaced(options.kernels)
        self._calls: dict[str, Call] = {}
        self._results: dict[str, list[Tensor]] = {}
        self._done: int | None = None
        self.added = Meter()
        """What the engine's adding up of gradients really cost."""
        self.meetings = 0.0
        """Bytes that it costs by the rule of `gradients`."""
        self._external: set[int] = set()
        self._alive: list[Any] = [*root.modules()]  # so that what takes their place has another id
        self._module_call = private.module_call()

    # --- the run ---------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Any], loss_of: Callable[[Any], Tensor]) -> Tensor:
        """Forward, loss and backward. The fake mode is already on."""
        for group in self.tied:
            homes = {block_of(name, self.blocks) for name in group}
            if len(homes) > 1:  # a layer that shares a parameter with the rest of the model can't be priced alone
                raise NoBlockError(homes - {""})
        for name, tensor in merged(list(leaves(inputs))):
            self.outer.take(tensor, name)
        given = (*self.root.parameters(), *self.root.buffers(), *(item.tensor for item in self.outer.items))
        self._external = {private.storage_key(tensor) for tensor in given}
        with warnings.catch_warnings(), Kernels(self._meter, self._warn):
            warnings.simplefilter("ignore")
            with self._patches(), torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor), self:
                output = self.root(**inputs)
                loss = loss_of(output)
            self.outer.outputs.append(self.outer.find(loss))
            self._check_blocks()
            self._last = None
            self._meetings = edges(loss, self._watch)
            forget_unused(self._meetings, self._by_sequence, (self.outer, *self.layers.values()))
            wanted = [p for p in self.root.parameters() if p.requires_grad]
            self._stack[:] = ["its backward pass"]
            torch.autograd.grad(loss, wanted, allow_unused=True)
        self.meetings = charge_meetings(self._meetings, self._by_sequence, self._calls)
        self._compare_gradients()
        self._compare_twins()
        return loss

    def _compare_gradients(self) -> None:
        """A layer whose results get no gradients, where those of its equals do, costs less: nobody stands for it."""
        used = {
            name: tuple((tensor.grad_fn, tensor.output_nr) in self._meetings for tensor in results)
            for name, results in self._results.items()
        }
        for first, *others in self._members.values():
            odd = [name for name in others if used[name] != used[first] and name not in self.options.alone]
            if odd and self.options.stubs:
                raise TwinsDifferError(odd)

    def _compare_twins(self) -> None:
        """The first two of every group of equal layers ran the same operations, or the group is no group."""
        for key, (first, *others) in self._twins.items():
            for other in others:
                if first is None or other is None or other.scope.name in self.options.alone:
                    continue
                found = difference(first, other)
                if found:
                    pair = f"{first.scope.name} and {other.scope.name}"
                    raise TwinsDifferError(
                        self._members[key], f"{pair} look equal but differ at {found}: each such layer was traced by itself"
                    )
                self.layers[other.scope.name] = first.scope

    def _watch(self, node: Any) -> None:
        """Tells when a node of the autograd graph is done: what runs then, before the next one, adds up gradients."""
        number = private.sequence_of(node)

        def done(*_: Any) -> None:
            self._done = number

        node.register_hook(done)

    def _check_blocks(self) -> None:
        """All blocks ran, and none let a tensor out by a side door (`self.aux_loss = ...`): a constant with a gradient."""
        if len(self.layers) < len(self.blocks):
            raise NoBlockError(self.blocks.keys() - self.layers.keys())
        for scope in (self.outer, *self.layers.values()):
            if any(constant.grad_fn is not None for constant in scope.constants) and self.blocks:
                raise NoBlockError(self.blocks)

    @contextlib.contextmanager
    def _patches(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            recorder, original = self, self._module_call
            stack.enter_context(
                private.patched(nn.Module, "__call__", lambda module, *a, **k: recorder._called(original, module, a, k))
            )
            for name, function in semantics.PATCHED.items():
                routed = self._routed(function, self._replaced.get(function, function))
                stack.enter_context(private.patched(F, name, routed))
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would run on memory that is not there
            stack.enter_context(private.patched(torch.autocast, "__init__", semantics.autocast_init))
            apply = torch.autograd.Function.__dict__["apply"]
            stack.enter_context(private.patched(torch.autograd.Function, "apply", classmethod(self._custom(apply))))
            for owner, name, decided in semantics.decisions():
                stack.enter_context(private.patched(owner, name, decided))
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
        self._warn("the model's own activation checkpointing is left out: the plan decides what is recomputed")
        yield

    def _warn(self, text: str) -> None:
        self.warnings[text] = None

    def where(self, error: BaseException) -> str:
        """The module that raised `error`, with the operation if it was one: "layers.0.up (linear)"."""
        return self._stopped[1] if self._stopped is not None and self._stopped[0] is error else self._here()

    def _here(self) -> str:
        return ".".join(part for part in (self._scope.name, self._stack[-1]) if part)

    # --- calls of the user's code ------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._current is not None:
            return func(*args, **kwargs)
        name = name_of(func)
        if name == "is_cuda":
            return True
        if name == "format":  # a line of a log, with a number in it that nobody knows
            return format(0.0 if args[0].is_floating_point() else 0, args[1]) if args[0].dim() == 0 else repr(args[0])
        args, kwargs = semantics.on_device(func, args, kwargs)
        return self._record(func, name, args, kwargs)

    def _record(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call("opaque", name, self._stack[-1], "", block_name=self._scope.name, func=func, args=args, kwargs=kwargs)
        versions = [(tensor, private.version(tensor)) for tensor in tensors((args, kwargs))]
        first = private.sequence()
        self._current = call
        try:
            cast, cast_kwargs = semantics.autocast_arguments(name, args, kwargs)
            call.result = result = self._replaced.get(func, func)(*cast, **cast_kwargs)
            changed = [tensor for tensor, version in versions if private.version(tensor) != version]
            outputs = list(tensors(result)) or changed
            if not outputs or name == "requires_grad_" or (not changed and _same(outputs, versions)):
                return result
            call.place = place()
            self._emit(call, outputs)
        except Exception as error:
            self._stopped = error, f"{self._here()} ({name})"
            raise
        finally:
            self._current = None
        self._claim(first, call)
        return result

    def _emit(self, call: Call, outputs: list[Tensor]) -> None:
        form = classify(call.func, call.args, call.kwargs, outputs)
        scope = self._scope
        call.kind, call.dims, call.dim_map = form.kind, form.dims, form.dim_map
        call.linear, call.causal, call.dropout = form.linear, form.causal, form.dropout
        call.inputs = tuple(scope.find(tensor) for tensor in form.inputs)
        call.outputs = tuple(scope.value(tensor) for tensor in outputs)
        self._alive.append(outputs)
        scope.calls.append(call)
        self._last = call

    # --- modules and blocks --------------------------------------------------------------------------------------------

    def _called(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self._names.get(id(module))
        if not name or self._current is not None:
            return original(module, *args, **kwargs)
        depth, scope, frames = len(self._stack), self._scope, self._scope.depth
        try:
            if name in self.blocks and not scope.name:
                return self._block(original, module, name, args, kwargs)
            local = name.removeprefix(f"{scope.name}.") if scope.name else name
            return self._within(original, module, local, args, kwargs)
        except BaseException as error:  # the model may catch it, and go on
            self._stopped = error, self.where(error)
            self._scope = scope
            del self._stack[depth:]
            scope.depth = frames
            raise

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
        call = Call("call", "block", self._stack[-1], place(), block=len(self.layers))
        passed = argument_leaves(args, kwargs)
        key = call_key(self.blocks[name], module, args, kwargs)
        twins = self._twins.setdefault(key, [])
        self._members.setdefault(key, []).append(name)
        twin = self._twin(name, twins)
        if twin is None:
            scope, result = self._trace(original, module, Scope(name, outer, self.owned), args, kwargs)
            given = {id(tensor) for _, tensor in passed}
            unseen = [scope.items[i].tensor for i in scope.inputs if id(scope.items[i].tensor) not in given]
            if len(twins) < 2:
                twins.append(remember(scope, [tensor for _, tensor in passed], unseen, result))
        else:
            scope, unseen, result = twin.scope, twin.unseen, self._stub(original, module, twin, args, kwargs, call)
        self.layers[name] = scope
        self._calls[name] = call
        call.inputs = tuple(outer.find(tensor) for tensor in (*(tensor for _, tensor in passed), *unseen))
        outputs = [tensor for _, tensor in merged(list(leaves(result)))]
        call.outputs = tuple(outer.value(tensor) for tensor in outputs)
        self._results[name] = outputs
        self._alive.append((args, kwargs, outputs))
        outer.calls.append(call)
        self._last = call
        return result

    def _twin(self, name: str, twins: list[Twin | None]) -> Twin | None:
        """The earlier layer that stands for this one, or None when this one has to run."""
        enough = len(twins) >= (2 if self.options.compare else 1)
        return twins[0] if enough and self.options.stubs and name not in self.options.alone else None

    def _trace(
        self, original: Callable[..., Any], module: nn.Module, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Scope, Any]:
        """Runs a block and records it in a scope of its own."""
        outer, self._scope = self._scope, scope
        for leaf, tensor in argument_leaves(args, kwargs):
            scope.take(tensor, leaf)
        self._stack.append("")
        result = self._within(original, module, "", args, kwargs)
        self._stack.pop()
        self._scope = outer
        scope.outputs = [scope.find(tensor) for _, tensor in merged(list(leaves(result)))]
        return scope, result

    def _stub(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        twin: Twin,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call,
    ) -> Any:
        """Does not run a block, but its hooks: some models collect hidden states with them."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            passed = [tensor for _, tensor in argument_leaves(args, kwargs)]
            return repeat(twin, passed, [t for t in twin.unseen if t.requires_grad], anchor)

        first = private.sequence()
        self._current = call  # the stub's own calls are nobody's
        try:
            anchor = next((p for p in module.parameters() if p.requires_grad), None)
            with private.instance_patched(module, "forward", forward):
                return original(module, *args, **kwargs)
        finally:
            self._current = None
            self._claim(first, call)

    def _claim(self, first: int, call: Call) -> None:
        """The autograd nodes made since `first` belong to `call`."""
        for number in range(first, private.sequence()):
            self._by_sequence[number] = call

    # --- costs ---------------------------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Tensor:
        if self._current is not None and private.storage_key(tensor) not in self._external:
            self._current.packed.append(tensor)
        return tensor

    def _meter(self, kernel: Any) -> Meter | None:
        """Where the costs of the kernel that runs now belong."""
        number = private.node_sequence()
        if number is not None and number == self._done and kernel in private.ADDS:
            return self.added
        if number is None and self._current is not None:
            return self._current.forward
        if number is not None:
            self._last = self._by_sequence.get(number, self._last)
            return None if self._last is None else self._last.backward
        return None if self._last is None else self._last.forward


def _same(outputs: list[Tensor], versions: list[tuple[Tensor, int]]) -> bool:
    given = {id(tensor) for tensor, _ in versions}
    return all(id(tensor) in given for tensor in outputs)
