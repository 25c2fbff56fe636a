"""Every private name of PyTorch that `apply` needs, with the reason: the one file to look at when PyTorch is upgraded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# Stores: of a process group of one, and of a launch. `torch.distributed` has them, but does not export them to type checkers.
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

# The stages and schedules of a pipeline, of which `LeanStage` and `AnyCount` change a little.
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleavedZeroBubble
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.distributed.tensor import DTensor

# The placement of a packed weight (q, k and v in one): every rank holds its share of each part. It has no public name.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
from torch.nn import init

# What sees every operation below autograd; its documentation is public, its module isn't.
from torch.utils._python_dispatch import TorchDispatchMode

# Tensors in Python containers (arguments, outputs); torch keeps its pytree private although everybody uses it.
from torch.utils._pytree import tree_leaves, tree_map_only


def replace_call(module: nn.Module, call: Callable[..., Any]) -> None:
    """Have `module(...)` call `call`, before any hook: the place that `Module.compile` uses. A class has its `__call__`,
    an object has nothing public."""
    module._compiled_call_impl = call


_aten, _sent = torch.ops.aten, torch.ops._c10d_functional
KEPT = frozenset(
    found.default
    for space, names in (
        (_aten, "mm addmm bmm baddbmm _grouped_mm _scaled_mm _scaled_grouped_mm"),
        (_aten, "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu"),
        (_aten, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
        (_aten, "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps"),
        (_sent, "all_reduce all_gather_into_tensor reduce_scatter_tensor all_to_all_single"),
    )
    for name in names.split()
    if (found := getattr(space, name, None)) is not None
)
"""Operations whose results selective recomputation keeps: products of matrices, attention, what is received from others."""


REDUCTIONS = frozenset((_sent.all_reduce.default, _sent.reduce_scatter_tensor.default))
"""Of these, collectives that add up."""
JOIN = _aten.cat.default


def blank(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Makes a tensor like this one, whatever is in it; holds no memory until then."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    make = partial(torch.empty_strided, local.shape, local.stride(), dtype=local.dtype, device=local.device)
    if not isinstance(tensor, DTensor):
        return make
    mesh, placements, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()

    def spread() -> torch.Tensor:
        with torch.no_grad():
            return DTensor.from_local(make(), mesh, placements, run_check=False, shape=shape, stride=stride)

    return spread


def memory_of(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory, as long as one of them lives."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return int(local.untyped_storage()._cdata)


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that an operation writes into."""
    schema = getattr(func, "_schema", None)
    if schema is not None and schema.is_mutable:
        for position, argument in enumerate(schema.arguments):
            if argument.is_write:
                given = args[position] if position < len(args) else kwargs.get(argument.name)
                yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))


def all_to_all(
    sent: torch.Tensor, received: list[int] | None, lengths: list[int] | None, group: dist.ProcessGroup
) -> torch.Tensor:
    """`dist.all_to_all_single` with a result: rows to every rank, of the given lengths or as many to each. (The one that writes
    into a tensor leaves nothing that selective recomputation could keep.)"""
    found: torch.Tensor = all_to_all_single(sent, received, lengths, group)
    return found.wait() if isinstance(found, AsyncCollectiveTensor) else found


def passed_on(tensor: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], torch.Tensor]:
    """Begin to send `tensor` to the next rank of a ring; what is called for gives that of the rank before. It is an all_to_all in
    which one rank alone gets something, as in torch's own ring attention: of NCCL a send and a receive."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sent = tensor.contiguous().view(-1)
    lengths, received = ([sent.numel() * (other == (rank + way) % size) for other in range(size)] for way in (1, -1))
    found = all_to_all_single(sent, received, lengths, group)

    def arrived() -> torch.Tensor:
        whole: torch.Tensor = found.wait() if isinstance(found, AsyncCollectiveTensor) else found
        return whole.view(tensor.shape)

    return arrived


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the log-sum-exp of every row, by a kernel that `has_flash`. (The public one keeps the latter to itself.)"""
    if query.device.type == "cuda":
        found = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    else:
        found = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return found[0], found[1]


def flash_backward(
    gradient: torch.Tensor, query: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    causal: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of query, key and value: what these keys and values have to do with `out` and `lse`, which may be of more."""
    if query.device.type == "cuda":
        numbers = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of a dropout that there isn't
        found = _aten._scaled_dot_product_flash_attention_backward(
            gradient, query, key, value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, causal,
            numbers, numbers[:0], scale=scale,
        )  # fmt: skip
    else:
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, out, lse, 0.0, causal, scale=scale
        )
    return found[0], found[1], found[2]


def has_flash(query: torch.Tensor) -> bool:
    """Whether the kernel of its device takes queries of this format, and keys and values of the same."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type != "cuda" or (half and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0)


def flattened(mesh: DeviceMesh, *axes: str) -> DeviceMesh:
    """One axis that runs over several neighbouring ones of `mesh`: what FSDP shards over dp_shard and cp."""
    return mesh[axes]._flatten("_".join(axes)) if len(axes) > 1 else mesh[axes[0]]


def beside(first: DeviceMesh, second: DeviceMesh) -> DeviceMesh:
    """The mesh of the axes of both, which must be of one mesh."""
    return DeviceMesh._concatenate([first, second])


_BY_VALUE = ("_no_grad_trunc_normal_", "orthogonal_", "sparse_", "dirac_")
"""Of `torch.nn.init`: they look at values, draw until they like them, or do nothing at all on meta. The first is private; public
is its front `trunc_normal_`, of which libraries keep copies."""


@contextmanager
def replaced_inits(call: Callable[..., torch.Tensor]) -> Iterator[None]:
    """While it lasts, these functions call `call(original, tensor, *arguments)`."""
    originals = {name: getattr(init, name) for name in _BY_VALUE}
    for name, original in originals.items():
        setattr(init, name, partial(call, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(init, name, original)


def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What `module(...)` does without `replace_call`: hooks and forward."""
    return module._call_impl(*args, **kwargs)


class LeanStage(PipelineStage):
    """A stage of `torch.distributed.pipelining` that holds buffers only for the micro-batches in flight.

    PyTorch allocates a buffer for every tensor of every micro-batch, forward and backward, before the first step. Here
    they are on meta until a receive is due, and let go of when the pass that uses them has run.
    """

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._on_meta():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._on_meta():
            return super()._prepare_backward_infra(*args, **kwargs)

    @contextmanager
    def _on_meta(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        if self.has_backward and not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        if not hasattr(self, "_stage_meta") and not self.is_first:
            # before 2.13 a received tensor that gets no gradient ends in an error; since then zeros are sent
            infos: Any = self.args_recv_info[bwd_chunk_id]
            found = zip(self.bwd_cache[bwd_chunk_id], infos, strict=True)
            self.bwd_cache[bwd_chunk_id] = tuple(
                torch.zeros_like(info.buffer, device=self.device) if gradient is None else gradient for gradient, info in found
            )
        return super().get_bwd_send_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._release(self.args_recv_info[fwd_chunk_id])  # what the backward pass needs, the forward cache has
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.submod.backward_pass(bwd_chunk_id):  # type: ignore[operator]
            result = super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if not self.is_last:
            self._release(self.grad_recv_info[bwd_chunk_id])
        return result

    def _validate_fwd_outputs(self, outputs: Any) -> None:
        """Before 2.13 strides are compared too, those of dims of length one with them, which say nothing: `runner.leave`
        has looked at what counts."""

    def _allocate(self, infos: Any) -> None:
        for info in infos:
            if getattr(info, "buffer", None) is not None:
                needed = info.buffer.requires_grad  # set once and for all before 2.13
                info.buffer = torch.empty_like(info.buffer, device=self.device).requires_grad_(needed)

    def _release(self, infos: Any) -> None:
        for info in infos:
            if getattr(info, "buffer", None) is not None:
                info.buffer = torch.empty_like(info.buffer, device="meta").requires_grad_(info.buffer.requires_grad)


def end_backward(module: FSDPModule, whole: bool, reduced: set[int]) -> None:
    """What FSDP does when a module's gradients have come: for those that come outside a backward pass.

    FSDP has brought those of the backward passes before it into the format in which it reduces, and wants one for all: under
    ZeRO 1 (`whole`) that one, in which it adds them up; else that of the gradients, which takes less room. `reduced` are the
    parameters that had gradients before in this step: these are reduced each time, for FSDP adds up what it has reduced over
    dp_shard before it goes over dp_replicate.
    """
    for group in _groups(module):
        for parameter in group.fsdp_params:
            gathered = getattr(parameter, "_unsharded_param", None)
            if gathered is None:
                continue
            parameter.accumulate_unsharded_grad_if_needed()
            if whole:
                parameter.to_accumulated_grad_if_needed()
            elif parameter.unsharded_accumulated_grad is not None:
                gathered.grad = parameter.unsharded_accumulated_grad.to(gathered.dtype)
                parameter.unsharded_accumulated_grad = None
            if gathered.grad is not None or whole:
                reduced.add(id(parameter))
            elif id(parameter) in reduced:
                gathered.grad = torch.zeros_like(gathered)
        group.post_backward()


def end_step(root: FSDPModule) -> None:
    """What FSDP does at the end of a backward pass, for one that it has not seen; `root` has been told that it is the last."""
    root._get_fsdp_state()._root_post_backward_final_callback()


def gathered_ids(module: FSDPModule) -> set[int]:
    """Ids of the module's own parameters as they are when they are gathered; FSDP uses the same objects again."""
    found = (parameter for group in _groups(module) for parameter in group.fsdp_params)
    return {id(parameter._unsharded_param) for parameter in found if hasattr(parameter, "_unsharded_param")}


def _groups(module: FSDPModule) -> list[Any]:
    """Since 2.13 there may be several."""
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    return [state._fsdp_param_group] if several is None and state._fsdp_param_group else list(several or ())


class AnyCount(PipelineScheduleSingle):
    """A schedule of any number of micro-batches. PyTorch's constructors refuse fewer than stages (all of them before
    2.13, 1F1B's since), the loops run them: they read `_n_microbatches` when a step begins."""

    def __init__(self, stage: PipelineStage, n_microbatches: int, **options: Any) -> None:
        super().__init__(stage, max(n_microbatches, stage.num_stages), **options)
        self._n_microbatches = n_microbatches

    def _get_pipeline_order(self) -> None:
        return None  # for pictures alone, and of the number that the constructor was told


class AnyGPipe(AnyCount, ScheduleGPipe):
    """GPipe of any number of micro-batches."""


class Any1F1B(AnyCount, Schedule1F1B):
    """1F1B of any number of micro-batches."""


class AnyZeroBubble(ScheduleInterleavedZeroBubble):
    """Zero-bubble, one stage a rank, of any number of micro-batches. PyTorch's constructor wants rounds of as many in each, which
    mean something to several stages a rank alone; the order of actions that it makes is made anew for the other number."""

    def __init__(self, stages: list[Any], n_microbatches: int, **options: Any) -> None:
        super().__init__(stages, stages[0].num_stages, **options)
        self._n_microbatches = self.microbatches_per_round = n_microbatches
        orders = {rank: self._calculate_single_rank_operations(rank) for rank in range(self.pp_group_size)}
        self.pipeline_order = orders
        self._prepare_schedule_with_comms(self.pipeline_order)


__all__ = [
    "JOIN",
    "KEPT",
    "REDUCTIONS",
    "Any1F1B",
    "AnyGPipe",
    "AnyZeroBubble",
    "HashStore",
    "LeanStage",
    "PrefixStore",
    "StridedShard",
    "TCPStore",
    "TorchDispatchMode",
    "all_to_all",
    "beside",
    "blank",
    "call_module",
    "end_backward",
    "end_step",
    "flash",
    "flash_backward",
    "flattened",
    "gathered_ids",
    "has_flash",
    "memory_of",
    "passed_on",
    "replace_call",
    "replaced_inits",
    "tree_leaves",
    "tree_map_only",
    "written",
]
