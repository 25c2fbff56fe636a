"""The recorded calls as an executable `torch.fx` graph: the cross-check that the recording is the program, and a door for tools.

Node `meta`: `fqn` (the module), `val` (the fake result), `flops` (forward, backward), `saved` (bytes kept for backward).
"""

from __future__ import annotations

import operator
from typing import Any, Literal

from torch import Tensor, fx, nn

from autoplan.capture.model import ExampleInputs, LossFunction, record
from autoplan.capture.normalise import tensors
from autoplan.capture.record import Options, Recorder
from autoplan.capture.scope import Call


def capture_fx(
    module: nn.Module,
    example_inputs: ExampleInputs,
    loss_fn: LossFunction | None = None,
    *,
    compute_dtype: str = "bfloat16",
    batch: int = 2,
    kernels: Literal["cuda", "cpu"] = "cuda",
) -> fx.GraphModule:
    """A `GraphModule` over the user's own parameters that takes the model's inputs and returns the loss, for `batch` samples."""
    title = type(module).__name__
    options = Options(stubs=False, kernels=kernels)
    _, (recorder,) = record(module, example_inputs, loss_fn, title, compute_dtype, (batch,), options)
    return fx.GraphModule(module, build(recorder))


def build(recorder: Recorder) -> fx.Graph:
    """The graph of one recording without stubs."""
    graph = fx.Graph()
    nodes: dict[int, fx.Node] = {}
    outer = recorder.outer
    for leaf, i in zip(outer.input_leaves, outer.inputs, strict=True):
        nodes[id(outer.items[i].tensor)] = graph.placeholder(leaf.split(",")[0].replace(".", "_"))

    def lift(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return _node(graph, nodes, recorder, tree)
        if isinstance(tree, list | tuple):
            return type(tree)(lift(item) for item in tree)
        if isinstance(tree, dict):
            return {key: lift(item) for key, item in tree.items()}
        return tree

    for call in recorder.order:
        node = graph.call_function(call.func, lift(call.args), lift(call.kwargs))
        node.meta.update(
            fqn=call.module,
            val=call.result,
            flops=(call.forward.flops, call.backward.flops),
            saved=sum(tensor.untyped_storage().nbytes() for tensor in call.packed),
        )
        _bind(graph, nodes, node, call)
    graph.output(nodes[id(outer.items[outer.outputs[0]].tensor)])
    graph.lint()
    return graph


def _node(graph: fx.Graph, nodes: dict[int, fx.Node], recorder: Recorder, tensor: Tensor) -> fx.Node:
    if id(tensor) not in nodes:
        owned = recorder.owned[id(tensor)]
        nodes[id(tensor)] = graph.get_attr(owned.name)
    return nodes[id(tensor)]


def _bind(graph: fx.Graph, nodes: dict[int, fx.Node], node: fx.Node, call: Call) -> None:
    if isinstance(call.result, Tensor):
        nodes[id(call.result)] = node
    elif call.result is None:  # in place: the tensor keeps its name
        return
    elif isinstance(call.result, list | tuple):
        for i, item in enumerate(call.result):
            if isinstance(item, Tensor):
                nodes[id(item)] = graph.call_function(operator.getitem, (node, i))
    for tensor in tensors(call.result):
        assert id(tensor) in nodes, f"{call.name} returns a nested structure"
