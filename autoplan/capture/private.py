"""Every use of PyTorch's private interfaces in capture, in one place, so that a new release breaks one file.

Checked with torch 2.10, 2.13 and 2.14: the autograd sequence numbers, the current autograd node, the identity of a storage,
`FakeTensorMode`, the FLOP formulas, and the two classmethods and methods that are replaced while a model is recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch._dynamo  # fake tensors load it on their first use, a second later
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

__all__ = [
    "ADDS",
    "CHECKPOINT",
    "DEVICE",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "device_of",
    "fake_mode",
    "fake_of",
    "flops",
    "gradient_of",
    "instance_patched",
    "is_view",
    "module_call",
    "next_edges",
    "no_log_of_fakes",
    "no_torch_function",
    "node_sequence",
    "patched",
    "pytree",
    "sequence",
    "sequence_of",
    "storage_key",
    "version",
]

aten = torch.ops.aten


class _Mode(FakeTensorMode):
    """Asks the kernels of common operations themselves what comes out, and of pointwise ones not even these. Torch's own rules,
    for symbolic sizes, constants and several devices, take ten times as long; what has any of these is left to them."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _POINTWISE:
            return self._like_the_first(args) if self._even(args, kwargs) else super().dispatch(func, types, args, kwargs)
        if func not in _COMMON or not all(map(self._plain, args)) or not all(map(self._plain, kwargs.values())):
            return super().dispatch(func, types, args, kwargs)
        if func in _DEVICED:
            kwargs = {**kwargs, "device": _META}
        with in_kernel_invocation_manager(self):
            made = func(*args, **kwargs)
        return FakeTensor(self, made, _CPU)

    def _even(self, args: Any, kwargs: Any) -> bool:
        """Whether the result is like the first argument: a dense tensor of floats, to which numbers and smaller tensors of the
        same format are joined."""
        first, *others = args
        if kwargs or not (isinstance(first, FakeTensor) and self._plain(first)):
            return False
        if not (first.dtype.is_floating_point and first.is_contiguous()):
            return False
        for other in others:
            if isinstance(other, Tensor):
                fits = self._plain(other) and other.dtype == first.dtype and _fits(other.shape, first.shape)
                if not fits or (other.shape == first.shape and not other.is_contiguous()):
                    return False
            elif type(other) not in (int, float):
                return False
        return True

    def _like_the_first(self, args: Any) -> FakeTensor:
        return FakeTensor(self, torch.empty(args[0].shape, dtype=args[0].dtype, device=_META), _CPU)

    def _plain(self, arg: Any) -> bool:
        """Whether an argument is a number, one of this mode's tensors with no known value, or a list of these."""
        if isinstance(arg, FakeTensor):
            return arg.fake_mode is self and arg.constant is None and arg.fake_device == _CPU
        if isinstance(arg, list | tuple):
            return all(map(self._plain, arg))
        return not isinstance(arg, Tensor | torch.SymInt | torch.SymFloat) and (not isinstance(arg, torch.device) or arg == _CPU)


def _fits(small: torch.Size, large: torch.Size) -> bool:
    """Whether the smaller shape is broadcast to the larger."""
    return len(small) <= len(large) and all(s in (1, n) for s, n in zip(reversed(small), reversed(large), strict=False))


_CPU, _META = torch.device("cpu"), torch.device("meta")
_DEVICED = frozenset((aten.empty.memory_format, aten.empty_strided.default, aten._to_copy.default))
_COMMON = _DEVICED | frozenset(
    (
        *(aten.view.default, aten._unsafe_view.default, aten.detach.default, aten.t.default, aten.transpose.int),
        *(aten.slice.Tensor, aten.select.int, aten.expand.default, aten.unsqueeze.default, aten.permute.default),
        *(aten.as_strided.default, aten.alias.default),
        *(aten.mm.default, aten.bmm.default, aten.sum.dim_IntList, aten.mean.dim),
    )
)
"""Operations that make one tensor, most of what Transformers run; and those of them that are told a device."""
_POINTWISE = frozenset(
    (
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar),
        *(aten.neg.default, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.silu.default, aten.silu_backward.default),
        *(aten.gelu.default, aten.gelu_backward.default, aten.sigmoid.default),
    )
)
"""Operations that make a tensor like the larger one they are given, of the same floats."""


def fake_of(tensor: Tensor, mode: FakeTensorMode, dtype: torch.dtype) -> Tensor:
    """A fake tensor like `tensor` but for its dtype; of a parameter, a parameter. A tenth of what torch's own way takes."""
    on_meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")
    made = FakeTensor(mode, on_meta, torch.device("cpu"))
    if isinstance(tensor, nn.Parameter):
        made.requires_grad_(tensor.requires_grad)
        made._is_param = True  # what `nn.Parameter` does for a subclass, after a detach
    return made


def fake_mode() -> FakeTensorMode:
    """A mode whose tensors refuse to give the address of their memory. Kernels that ask for it would crash the process."""
    # The first backward pass of a process starts a thread for every device, which no fork survives; in a fake mode a build
    # with CUDA has eight where there are none.
    torch.ones((), requires_grad=True).backward()
    with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        return _Mode(allow_non_fake_inputs=True)


@contextmanager
def no_log_of_fakes() -> Iterator[None]:
    """Fake tensors log a traceback of every operation that fails; the error itself is enough."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def sequence() -> int:
    """The sequence number that the next autograd node of this thread gets."""
    return int(torch._C._autograd._get_sequence_nr())


def node_sequence() -> int | None:
    """The sequence number of the autograd node that is running its backward, if one is."""
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def sequence_of(node: Any) -> int:
    """The sequence number of an autograd node."""
    return int(node._sequence_nr())


def next_edges(node: Any) -> tuple[tuple[Any, int], ...]:
    """(node, output number) that each gradient which `node` computes goes to; (None, 0) for none."""
    return node.next_functions  # type: ignore[no-any-return]


def gradient_of(node: Any, slot: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the gradient that an autograd node takes for one of its outputs."""
    data = node._input_metadata[slot]
    return tuple(data.shape), data.dtype


def storage_key(tensor: Tensor) -> int:
    """The identity of the memory of a tensor that is alive."""
    return int(tensor.untyped_storage()._cdata)


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return int(tensor._version)


def no_torch_function() -> AbstractContextManager[Any]:
    """Hides torch calls from every TorchFunctionMode."""
    return torch._C.DisableTorchFunction()


@contextmanager
def patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """`owner.name` is `replacement` inside the context."""
    original = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def instance_patched(instance: Any, name: str, replacement: Any) -> Iterator[None]:
    """`instance.name` is `replacement` inside the context, whatever its class says."""
    own = vars(instance)
    kept = {name: own[name]} if name in own else {}
    own[name] = replacement
    try:
        yield
    finally:
        del own[name]
        own.update(kept)


_GENERATORS = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
CHECKPOINT = (torch.utils.checkpoint, next(name for name in _GENERATORS if hasattr(torch.utils.checkpoint, name)))
"""Where `checkpoint` looks up what runs around the checkpointed call, however it was imported. From 2.14 on: the first name."""

CallModule = Callable[..., Any]


def module_call() -> CallModule:
    """`nn.Module.__call__` as it is now."""
    return nn.Module.__call__


def flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """FLOPs of one kernel by the formulas of `torch.utils.flop_counter`; 0 when it has none."""
    packet = getattr(func, "_overloadpacket", None)
    if packet is aten.convolution_backward and args[9] > 1 and not args[7]:
        # torch's formula counts the weight's gradient of a depthwise convolution `channels` times too high
        return float(2 * args[0].numel() * args[2][0].numel() * sum(args[10][:2]))
    if packet in _ATTENTION:
        return _attention_flops(args, backward=_ATTENTION[packet])
    formula = flop_registry.get(packet)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))


_ATTENTION = {
    aten._scaled_dot_product_flash_attention: False,
    aten._scaled_dot_product_efficient_attention: False,
    aten._scaled_dot_product_flash_attention_backward: True,
    aten._scaled_dot_product_efficient_attention_backward: True,
}
"""Attention kernels, and whether they are a backward pass: before torch 2.13 its formulas refuse fewer KV heads than heads."""


def _attention_flops(args: tuple[Any, ...], backward: bool) -> float:
    """Two products forward; five backward, which makes the scores again. Each multiplies `heads x queries x keys` rows."""
    query, key, value = args[1:4] if backward else args[:3]
    rows = 2.0 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    width: float = 3 * query.shape[3] + 2 * value.shape[3] if backward else query.shape[3] + value.shape[3]
    return float(rows * width)


DEVICE = torch.ops.prim.device.default


def device_of(tensor: Tensor) -> torch.device:
    """The device that a fake tensor says it is on."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


ADDS = frozenset((aten.add.Tensor, aten.add_.Tensor))
"""The kernels with which autograd's engine adds up gradients."""

_VIEWS = {aten._unsafe_view.default, aten._reshape_alias.default, aten.lift_fresh.default, aten.lift.default}
_NO_KERNEL = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._local_scalar_dense.default,
}
_is_view: dict[Any, bool] = dict.fromkeys(_VIEWS | _NO_KERNEL, True)


def is_view(func: Any) -> bool:
    """Whether an aten overload launches no kernel: it returns an alias of its input, or memory that nobody writes."""
    known = _is_view.get(func)
    if known is None:
        aliases = [result.alias_info for result in func._schema.returns]
        known = func.namespace == "prim" or any(alias is not None and not alias.is_write for alias in aliases)
        _is_view[func] = known
    return known


if aten._grouped_mm not in flop_registry:

    @register_flop_formula(aten._grouped_mm, get_raw=True)
    def _grouped_mm_flops(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
        """Torch has none, and a mixture's experts would cost nothing. 2-D operands are ragged over the groups."""
        groups = 1 if a.dim() == 2 or b.dim() == 2 else a.shape[0]
        return int(2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1])
