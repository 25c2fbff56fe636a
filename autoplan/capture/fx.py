"""The recording as executable `torch.fx` graphs: the cross-check that it is the program, and a door for tools.

The outer graph calls one module per block, each with a graph of its own; equal blocks have equal graphs over different
parameters. Names of modules and parameters are those of the user's model, and the parameters are the user's own.
Node `meta`: `fqn` (the module), `val` (the fake result), `flops` (forward, backward), `saved` (bytes kept for backward).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from autoplan.capture.fake import build_on_meta
from autoplan.capture.load import LoadedModel
from autoplan.capture.model import ExampleInputs, LossFunction, record
from autoplan.capture.record import Options, Recorder
from autoplan.capture.scope import Call, Scope
from autoplan.errors import UsageError


def capture_fx(
    module: nn.Module,
    example_inputs: ExampleInputs,
    loss_fn: LossFunction | None = None,
    *,
    compute_dtype: str = "bfloat16",
    batch: int = 2,
    kernels: Literal["cuda", "cpu"] = "cuda",
) -> fx.GraphModule:
    """A `GraphModule` over the user's own parameters that takes the model's inputs and returns the loss, for `batch` samples.

    Its arguments are the tensors among the inputs, by their places: `input_ids`, `batch_labels` for `batch["labels"]`.
    """
    title = type(module).__name__
    root, (recorder,) = record(module, example_inputs, loss_fn, title, compute_dtype, (batch,), Options(kernels=kernels))
    writer = _Writer(module, recorder, _attributes(root), title)
    return writer.graph_module(recorder.outer, module)


def readable(loaded: LoadedModel, *, compute_dtype: str = "bfloat16") -> str:
    """The graphs of a user's model as Python code: the outer one, then each different block once."""
    module = build_on_meta(loaded.build)
    graph = capture_fx(module, loaded.example_inputs, loaded.loss_fn, compute_dtype=compute_dtype)
    parts = [f"# {type(module).__name__}, 2 samples\n{graph.code.strip()}\n"]
    blocks: dict[str, list[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            block = graph.get_submodule(node.target)
            assert isinstance(block, fx.GraphModule)
            blocks.setdefault(block.code.strip(), []).append(node.target)
    parts += [
        f"# {names[0]}{f' and {len(names) - 1} like it' if len(names) > 1 else ''}\n{code}\n" for code, names in blocks.items()
    ]
    return "\n".join(parts)


def _attributes(root: nn.Module) -> dict[int, str]:
    """Full names of the tensors that are plain attributes of modules, neither parameters nor buffers."""
    return {
        id(value): f"{name}.{key}" if name else key
        for name, part in root.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, Tensor)
    }


class _Writer:
    """Writes the graphs of one recording."""

    def __init__(self, module: nn.Module, recorder: Recorder, attributes: dict[int, str], title: str) -> None:
        self._module = module
        self._layers = list(recorder.layers.items())
        self._attributes = attributes
        self._title = title

    def graph_module(self, scope: Scope, module: nn.Module) -> fx.GraphModule:
        """`scope` over the parameters of `module`."""
        graph = fx.Graph()
        nodes: dict[int, fx.Node] = {}
        held: dict[str, Any] = {}
        for number, index in enumerate(scope.inputs):
            leaf = scope.input_leaves[number].split(",")[0].replace(".", "_")
            name = leaf if leaf.isidentifier() else f"input_{leaf or number}"
            nodes[id(scope.items[index].tensor)] = graph.placeholder(name)
        for call in scope.calls:
            if call.kind == "call":
                name, body = self._layers[call.block]
                held[name] = self.graph_module(body, self._module.get_submodule(name))
                args = tuple(self._node(graph, nodes, scope, held, module, scope.items[i].tensor) for i in call.inputs)
                node = graph.call_module(name, args)
                for at, index in enumerate(call.outputs):
                    nodes[id(scope.items[index].tensor)] = graph.call_function(operator.getitem, (node, at))
            elif call.func is not None:
                lifted = self._lift(graph, nodes, scope, held, module, (call.args, call.kwargs))
                _bind(graph, nodes, self._described(_called(graph, call, *lifted), call, scope), call.result)
        results = [self._node(graph, nodes, scope, held, module, scope.items[i].tensor) for i in scope.outputs]
        graph.output(tuple(results) if scope.name else results[0])
        graph.lint()
        return fx.GraphModule(held, graph, class_name="Block" if scope.name else self._title)

    def _described(self, node: fx.Node, call: Call, scope: Scope) -> fx.Node:
        node.meta.update(
            fqn=".".join(part for part in (scope.name, call.module) if part),
            val=call.result,
            flops=(call.forward.flops, call.backward.flops),
            saved=sum(tensor.untyped_storage().nbytes() for tensor in call.packed),
        )
        return node

    def _lift(
        self, graph: fx.Graph, nodes: dict[int, fx.Node], scope: Scope, held: dict[str, Any], module: nn.Module, tree: Any
    ) -> Any:
        if isinstance(tree, Tensor):
            return self._node(graph, nodes, scope, held, module, tree)
        if isinstance(tree, torch.Size):
            return tuple(tree)
        if isinstance(tree, list | tuple):
            return type(tree)(self._lift(graph, nodes, scope, held, module, item) for item in tree)
        if isinstance(tree, dict):
            return {key: self._lift(graph, nodes, scope, held, module, item) for key, item in tree.items()}
        return tree

    def _node(
        self, graph: fx.Graph, nodes: dict[int, fx.Node], scope: Scope, held: dict[str, Any], module: nn.Module, tensor: Tensor
    ) -> fx.Node:
        """The node of a tensor: made before, or a parameter, buffer or attribute that is met for the first time."""
        if id(tensor) not in nodes:
            index = scope.known(tensor)
            name = None if index is None else scope.items[index].parameter
            owner = module if name is not None else self._module
            name = name if name is not None else self._attributes.get(id(tensor))
            if name is None:
                raise UsageError(
                    f"{self._title} uses a tensor that is no input, parameter, buffer or attribute of a module.",
                    "Make it a buffer; the graph of `autoplan plan` needs no such thing, only the executable one does.",
                )
            held[name] = operator.attrgetter(name)(owner)
            nodes[id(tensor)] = graph.get_attr(name)
        return nodes[id(tensor)]


def _called(graph: fx.Graph, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    if getattr(call.func, "__name__", "") == "__get__":  # a property, such as `x.T`
        return graph.call_function(getattr, (args[0], call.name))
    return graph.call_function(call.func, args, kwargs)


def _bind(graph: fx.Graph, nodes: dict[int, fx.Node], node: fx.Node, result: Any) -> None:
    """Says which nodes are the tensors of a result. A call in place returns none: its tensor keeps its node."""
    for path, tensor in _paths(result):
        found = node
        for key in path:
            found = graph.call_function(operator.getitem, (found, key))
        nodes[id(tensor)] = found


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, list | tuple):
        for i, item in enumerate(tree):
            yield from _paths(item, (*path, i))
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from _paths(item, (*path, key))
