"""What a real training step of a tiny model does, by means that are not ours: FlopCounterMode, saved tensors, eager's loss."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autoplan.adapt import adapt
from autoplan.capture import LoadedModel
from autoplan.capture.fake import build_on_meta
from autoplan.capture.fx import capture_fx
from autoplan.capture.model import capture_module, loss_of
from autoplan.graph import Graph
from autoplan.verify._torch import Peak

DTYPE = torch.bfloat16


def _convolution_backward(gradient: Any, x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """As much as the forward pass for each gradient; torch's own formula counts a depthwise weight `channels` times."""
    return 2 * math.prod(gradient) * math.prod(weight[1:]) * sum(args[-1][:2])


FORMULAS = {torch.ops.aten.convolution_backward: _convolution_backward}


def real(loaded: LoadedModel) -> nn.Module:
    """The model with weights, parameters in bfloat16 as capture has them, buffers as they are."""
    torch.manual_seed(0)
    module = loaded.build().train()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(DTYPE)
    adapt(module)
    return module


def real_inputs(loaded: LoadedModel, batch: int) -> dict[str, Any]:
    inputs: dict[str, Any] = cast(loaded.example_inputs(batch))
    return inputs


def cast(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(DTYPE) if tree.is_floating_point() else tree
    if isinstance(tree, Mapping):
        return {key: cast(item) for key, item in tree.items()}
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{entry.name: cast(getattr(tree, entry.name)) for entry in fields(tree)})
    return tree


def named(tree: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors in inputs by their places, as the executable graph calls them: "batch_labels"."""
    if isinstance(tree, Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, Mapping) else vars(tree).items() if is_dataclass(tree) else ()
    found: dict[str, Tensor] = {}
    for key, item in items:
        found |= named(item, f"{path}_{key}" if path else key)
    return found


class Kept:
    """A tensor that autograd keeps: alive for as long as the node that keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its own node, which may keep it, it would never go

    def unpack(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Step:
    loss: float
    flops: int
    saved: int


def step(module: nn.Module, inputs: dict[str, Any], loaded: LoadedModel) -> Step:
    """One forward and backward pass."""
    saved = kept(module, inputs, loaded)
    torch.manual_seed(1)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        loss = loss_of(module(**inputs), inputs, loaded.loss_fn, loaded.spec)
        loss.backward()
    return Step(loss.item(), counter.get_total_flops(), saved)


def kept(module: nn.Module, inputs: dict[str, Any], loaded: LoadedModel) -> int:
    """Bytes of all storages that autograd keeps when a forward pass is over, but for weights and inputs."""
    found: list[weakref.ref[Kept]] = []

    def pack(tensor: Tensor) -> Kept:
        packed = Kept(tensor)
        found.append(weakref.ref(packed))
        return packed

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, Kept.unpack):
        loss = loss_of(module(**inputs), inputs, loaded.loss_fn, loaded.spec)
    assert loss.requires_grad  # what it needs is alive
    given = (*module.parameters(), *module.buffers(), *named(inputs).values())
    fixed = {tensor.untyped_storage().data_ptr() for tensor in given}
    alive = [packed.tensor.untyped_storage() for packed in (reference() for reference in found) if packed is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive if storage.data_ptr() not in fixed}.values())


def tracked(loaded: LoadedModel, batch: int) -> int:
    """Bytes of activations that a dry run finds alive when the forward pass of a real step is over, the loss apart."""
    module, inputs = real(loaded), real_inputs(loaded, batch)
    torch.manual_seed(1)
    tracker = Peak()
    tracker.track(*module.parameters(), *module.buffers(), *named(inputs).values())
    before = tracker.held
    with tracker:
        loss = loss_of(module(**inputs), inputs, loaded.loss_fn, loaded.spec)
        return tracker.held - before - loss.untyped_storage().nbytes()


@dataclass(frozen=True)
class Check:
    """How far capture is from a real run of the same model, tiny. Everything zero and true is perfect."""

    flops: float
    saved: float
    executed: bool
    """The executable graph gives eager's loss and gradients, to the bit, and its FLOPs."""
    exact: bool
    """All layers traced, at other batch sizes, give the same graph."""


def check(loaded: LoadedModel, graph: Graph, batch: int = 4) -> Check:
    """The checks of one captured model. The CPU's kernels are compared, because it is the CPU that runs here."""
    module, inputs = real(loaded), real_inputs(loaded, batch)
    here = capture_of(loaded, kernels="cpu")
    eager = step(module, inputs, loaded)
    flops = (here.total("forward_flops") + here.total("backward_flops")).at(batch)
    return Check(
        flops / eager.flops - 1,
        here.saved.at(batch) / eager.saved - 1,
        _executed(module, inputs, loaded, eager),
        capture_of(loaded, name=graph.model, stubs=False, batches=(3, 5)) == graph,
    )


def capture_of(loaded: LoadedModel, **options: Any) -> Graph:
    return capture_module(build_on_meta(loaded.build), loaded.example_inputs, loaded.loss_fn, **options)


def _executed(module: nn.Module, inputs: dict[str, Any], loaded: LoadedModel, eager: Step) -> bool:
    """Runs the executable graph after eager, whose gradients are on the module."""
    recorded = capture_fx(module, lambda batch: inputs, loaded.loss_fn)
    wanted = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    places = [str(node.target) for node in recorded.graph.nodes if node.op == "placeholder"]
    given = named(inputs)
    torch.manual_seed(1)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        loss = recorded(**{place: given[place] for place in places})
        loss.backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    equal = found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
    return loss.item() == eager.loss and counter.get_total_flops() == eager.flops and equal
