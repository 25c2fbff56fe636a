"""What was captured of a model, for people and for programs: pure functions of the `Graph`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoplan.graph import Body, Graph, Op
from autoplan.report import words
from autoplan.report.tables import table, titled


def as_dict(graph: Graph) -> dict[str, Any]:
    """The captured model as plain data, in base units, of one sample."""
    return {
        "model": graph.model,
        "compute_dtype": graph.compute_dtype,
        "fingerprint": graph.fingerprint,
        "parameters": graph.parameters,
        "tokens_per_sample": graph.tokens,
        "forward_flops_per_sample": graph.forward_flops,
        "backward_flops_per_sample": graph.backward_flops,
        "saved_bytes_per_sample": graph.saved_bytes,
        "inputs": [{"name": name, "shape": list(shape), "dtype": dtype} for name, shape, dtype in graph.inputs],
        "blocks": [
            {"name": words.fold(names), "repeats": len(names), "layers": list(names), **_body_dict(body)}
            for names, body in kinds(graph)
        ],
        "outer": _body_dict(graph.outer),
        "tied": [list(group) for group in graph.tied],
        "warnings": list(graph.warnings),
    }


def _body_dict(body: Body) -> dict[str, Any]:
    return {
        "parameters": parameters(body),
        "forward_flops_per_sample": body.total("forward_flops").at(1),
        "backward_flops_per_sample": body.total("backward_flops").at(1),
        "saved_bytes_per_sample": body.saved.at(1),
        "ops": len(list(_work(body))),
    }


def kinds(graph: Graph) -> Iterator[tuple[tuple[str, ...], Body]]:
    """(names of the layers, body) for each kind of layer, in the order of their first layers."""
    for index in dict.fromkeys(block.body for block in graph.blocks):
        yield tuple(block.name for block in graph.blocks if block.body == index), graph.bodies[index]


def parameters(body: Body) -> int:
    """Number of parameters of one body."""
    return sum(parameter.numel for parameter in body.parameters if not parameter.buffer)


def _work(body: Body) -> Iterator[Op]:
    """The operations that a person would call so: no borders, no calls of blocks."""
    return (op for op in body.ops if op.kind not in ("enter", "exit", "call"))


def summary(graph: Graph) -> RenderableType:
    """The captured model in a terminal of 80 columns."""
    parts: list[RenderableType] = [_answer(graph), titled("Layers", _kinds(graph))]
    for names, body in kinds(graph):
        parts.append(titled(f"One layer of {words.fold(names)}, one sample", _ops(body)))
    parts.append(titled("Outside the layers, one sample", _ops(graph.outer)))
    if any(op.kind == "opaque" for body in (*graph.bodies, graph.outer) for op in body.ops):
        parts.append(
            Text("\nopaque: no rule says how it may be split, so each device of a tp group does all of it.", style="dim")
        )
    parts += [Text(f"warning: {words.clean(warning)}", style="yellow") for warning in graph.warnings]
    return Group(*parts)


def _answer(graph: Graph) -> RenderableType:
    size, layers = words.short_count(graph.parameters), words.plural(len(graph.blocks), "layer")
    title = f"{words.clean(graph.model)}: {size} parameters in {layers}."
    costs = (
        f"One sample ({words.plural(graph.tokens, 'token')}, {graph.compute_dtype}): {words.flops(graph.forward_flops)} forward, "
        f"{words.flops(graph.backward_flops)} backward, {words.size(graph.saved_bytes)} saved for the backward pass."
    )
    lines = [Text(title, style="bold"), Text(costs)]
    lines += [Text(f"Tied: {', '.join(words.clean(name) for name in group)}.") for group in graph.tied]
    return Group(*lines)


def _kinds(graph: Graph) -> Table:
    made = table(("<", "layers"), (">", "number"), (">", "parameters"), (">", "forward"), (">", "backward"), (">", "saved"))
    rows = [(words.fold(names), str(len(names)), body) for names, body in kinds(graph)]
    for name, number, body in [*rows, ("outside the layers", "", graph.outer)]:
        costs = (words.flops(body.total(f"{way}_flops").at(1)) for way in ("forward", "backward"))
        made.add_row(Text(name), number, words.short_count(parameters(body)), *costs, words.size(body.saved.at(1)))
    return made


def _ops(body: Body) -> Table:
    made = table(("<", "module"), ("<", "operation"), ("<", "result"), (">", "forward"), (">", "saves"))
    last = None
    for op in _work(body):
        shapes = " ".join(f"[{', '.join(map(str, body.values[i].shape))}]" for i in op.outputs[:2])
        forward = op.forward_flops.at(1)
        module = words.clean(op.module) or "-"
        saves = {body.values[i].storage for i in op.saved}
        saved = sum(body.values[i].bytes_at(1) for i in saves) + op.saved_extra.at(1)
        made.add_row(
            Text("" if module == last else module),
            Text(words.clean(op.name) + ("" if op.kind != "opaque" else " (opaque)")),
            Text(shapes),
            words.flops(forward) if forward else "",
            words.size(saved) if saved else "",
        )
        last = module
    return made
