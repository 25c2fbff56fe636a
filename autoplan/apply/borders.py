"""Hooks that redistribute a tensor where it passes a module's border, forward and backward, as the plan says."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from autoplan.apply import two_axes
from autoplan.apply.outside import running
from autoplan.errors import UsageError
from autoplan.plan import Plan
from autoplan.strategy import Border, Layout


def value_placement(layout: Layout) -> Placement:
    """Placement of a tensor's value. A border never makes a packed tensor: those live between a linear and its split."""
    if layout.kind == "partial":
        return Partial()
    return Shard(layout.dim) if layout.sharded else Replicate()


def gradient_placement(layout: Layout) -> Placement:
    """Placement of a tensor's gradient."""
    if layout.kind == "gathered":
        return Partial()
    return Shard(layout.dim) if layout.sharded else Replicate()


class _Redistribute(torch.autograd.Function):
    """Value to one placement in the forward pass, gradient to another in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, value: Placement, gradient: Placement) -> torch.Tensor:
        ctx.gradient = gradient
        moved = tensor.redistribute(placements=[value])
        return moved.view_as(moved) if moved is tensor else moved

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> tuple[DTensor, None, None]:
        return gradient.redistribute(placements=[ctx.gradient]), None, None


def redistribute(tensor: torch.Tensor, source: Layout, target: Layout, mesh: DeviceMesh) -> torch.Tensor:
    """`tensor` with the layout `target`; a plain tensor counts as replicated."""
    mode = running()
    arguments = tensor, source, target, mesh
    found: torch.Tensor = _redistribute(*arguments) if mode is None or mode.paused else mode.one_call(_redistribute, *arguments)
    return found


def _redistribute(tensor: torch.Tensor, source: Layout, target: Layout, mesh: DeviceMesh) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)

    def move(part: DTensor) -> DTensor:
        moved: DTensor = _Redistribute.apply(part, value_placement(target), gradient_placement(source))
        return moved

    return two_axes.on_one_axis(tensor, two_axes.TP, move) if two_axes.over_both(tensor) else move(tensor)


def install(model: nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
    """Hook every border of `plan`. Inwards the outer strategy's hooks come first, outwards last: they are farther outside."""
    for side in ("in", "out"):
        for name, borders in _by_module(plan, side).items():
            module = model.get_submodule(name)
            if side == "in":
                module.register_forward_pre_hook(_entering(name, borders, mesh), with_kwargs=True)
            else:
                module.register_forward_hook(_leaving(name, borders, mesh))


def _by_module(plan: Plan, side: Literal["in", "out"]) -> dict[str, list[Border]]:
    outer = [("", plan.outer_strategy)]
    layers = list(plan.layers())
    found: dict[str, list[Border]] = defaultdict(list)
    for prefix, strategy in outer + layers if side == "in" else layers + outer:
        for border in strategy.sharding.borders:
            if border.side == side:
                found[".".join(filter(None, (prefix, border.module)))].append(border)
    return found


def _entering(name: str, borders: list[Border], mesh: DeviceMesh) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tree: dict[str, Any] = {str(i): arg for i, arg in enumerate(args)} | kwargs
        for border in borders:
            _convert(tree, border, mesh, lambda leaf: _alias(module, leaf, tree), name)
        return tuple(tree[str(i)] for i in range(len(args))), {key: tree[key] for key in kwargs}

    return hook


def _leaving(name: str, borders: list[Border], mesh: DeviceMesh) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            bare: dict[str, Any] = {"0": output}
            for border in borders:
                _convert(bare, border, mesh, lambda leaf: "0", name)
            return bare["0"]
        root = {"output": output}
        for border in borders:
            leaves = ",".join(f"output.{leaf}" for leaf in border.leaf.split(","))
            _convert(root, Border(border.module, "out", leaves, border.source, border.target), mesh, lambda leaf: leaf, name)
        return root["output"]

    return hook


def _convert(tree: dict[str, Any], border: Border, mesh: DeviceMesh, alias: Callable[[str], str], name: str) -> None:
    """Redistribute the tensor at the border's leaves: once, however often it is passed."""
    paths = [_path(leaf, alias) for leaf in border.leaf.split(",")]
    try:
        tensor = _get(tree, paths[0])
    except (KeyError, IndexError, AttributeError, TypeError):
        tensor = None
    if not isinstance(tensor, torch.Tensor):
        where = "is not called with" if border.side == "in" else "does not return"
        raise UsageError(f"the plan redistributes tensor '{border.leaf}' of module '{name}', but '{name}' {where} it.", _CHANGED)
    moved = redistribute(tensor, border.source, border.target, mesh)
    for path in paths:
        _set(tree, path, moved)


_CHANGED = "Call the model as it was called when the plan was made, or plan again."


def _path(leaf: str, alias: Callable[[str], str]) -> list[str]:
    head, *rest = leaf.split(".")
    return [alias(head), *rest]


def _alias(module: nn.Module, leaf: str, tree: dict[str, Any]) -> str:
    """The key under which argument `leaf` was passed: the plan may know it by position and the caller by name, or the reverse."""
    if leaf in tree:
        return leaf
    names = list(inspect.signature(module.forward).parameters)
    if leaf.isdigit():
        return names[int(leaf)] if int(leaf) < len(names) else leaf
    return str(names.index(leaf)) if leaf in names else leaf


def _get(tree: Any, path: Iterable[str]) -> Any:
    for key in path:
        tree = tree[int(key)] if isinstance(tree, tuple | list) else tree[key]
    return tree


def _set(tree: Any, path: list[str], value: torch.Tensor) -> Any:
    """`tree` with `value` at `path`; tuples are rebuilt, dicts and lists changed in place."""
    key, *rest = path
    index: Any = int(key) if isinstance(tree, tuple | list) else key
    new = _set(tree[index], rest, value) if rest else value
    if isinstance(tree, tuple):
        items = [*tree[:index], new, *tree[index + 1 :]]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    tree[index] = new
    return tree
