"""The plan's layers as data: runs of equal layers, and for each way to shard one its parameters and redistributions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from autoplan.plan import Plan, needs_fsdp
from autoplan.report import words
from autoplan.strategy import Border, Sharding, Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """A run of equal layers, or ("" as `layers[0]`) everything outside the blocks."""

    layers: str
    names: tuple[str, ...]
    strategy: str
    index: int
    """The place of its strategy in the plan: the page gives each one its colour."""
    recompute: str
    reshard: str
    sharding: str
    experts: str
    """Where they are dealt over ep."""
    dealt: str
    """The same in short: "1 of 8"."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer in the strip."""

    name: str
    strategy: str
    index: int
    recompute: str


@dataclass(frozen=True, slots=True)
class Strip:
    """Consecutive layers that stand together: a pipeline stage, or a run of equal layers."""

    title: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class WeightRow:
    """Parameters of one module that are placed the same way."""

    names: str
    full_names: str
    layout: str
    style: str
    """ "columns", "rows", "experts" or "whole"."""
    words: str


@dataclass(frozen=True, slots=True)
class BorderRow:
    """A redistribution of one tensor and what it costs on the wire."""

    leaf: str
    source: str
    target: str
    forward: str
    backward: str
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRow:
    """What happens at one module: redistributions on the way in, its parameters, redistributions on the way out."""

    name: str
    enter: tuple[BorderRow, ...]
    weights: tuple[WeightRow, ...]
    leave: tuple[BorderRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingCard:
    """One way to shard a layer over tp and ep; strategies that differ only in recompute share it."""

    names: tuple[str, ...]
    indices: tuple[int, ...]
    used_by: str
    over: str
    """ "split over tp 2"."""
    words: str
    modules: tuple[ModuleRow, ...]


def runs(plan: Plan) -> tuple[RunRow, ...]:
    """The layers in the order of the model, equal neighbours folded, and at last everything outside them."""
    rows = [_run(plan, words.fold(run.layers), run.layers, run.strategy) for run in plan.runs if run.layers]
    return (*rows, _run(plan, "outside the layers", (), plan.outer))


def _run(plan: Plan, label: str, names: tuple[str, ...], name: str) -> RunRow:
    strategy = plan.by_name[name]
    return RunRow(
        layers=label,
        names=tuple(words.clean(layer) for layer in names),
        strategy=words.clean(name),
        index=list(plan.by_name).index(name),
        recompute=strategy.recompute,
        reshard=reshard_words(plan, strategy),
        sharding=words.sharding_words(strategy.sharding) if plan.mesh.tp > 1 else "-",
        experts=words.experts_words(strategy.sharding.experts, plan.mesh.ep),
        dealt="; ".join(f"{each.number // plan.mesh.ep} of {each.number}" for each in strategy.sharding.experts) or "-",
    )


def strip(plan: Plan) -> tuple[Strip, ...]:
    """The layers in the order of the model: by pipeline stage, or without a pipeline by run."""
    order = list(plan.by_name)
    index = {layer: order.index(run.strategy) for run in plan.runs for layer in run.layers}
    parts = plan.stages if plan.pipeline else tuple(run.layers for run in plan.runs if run.layers)
    return tuple(
        Strip(
            _stage_title(plan, k) if plan.pipeline else "",
            tuple(
                Cell(words.clean(name), words.clean(order[index[name]]), index[name], plan.by_name[order[index[name]]].recompute)
                for name in names
            ),
        )
        for k, names in enumerate(parts)
    )


def _stage_title(plan: Plan, k: int) -> str:
    chunk, rank = divmod(k, plan.mesh.pp)
    return f"pp {rank}" + (f", chunk {chunk}" if plan.pipeline and plan.pipeline.chunks > 1 else "")


def reshard_words(plan: Plan, strategy: Strategy) -> str:
    """What FSDP does with the layer's gathered parameters after its forward pass: ZeRO-3 frees them, ZeRO-2 keeps them. "-" where
    there is no FSDP."""
    return f"ZeRO-{strategy.zero}" if needs_fsdp(plan.mesh, plan.workload) else "-"


def cards(plan: Plan) -> tuple[ShardingCard, ...]:
    """One card for each sharding that is used, with everything that `apply` will do over tp and ep."""
    groups: dict[Sharding, list[tuple[int, str]]] = {}
    for index, (name, strategy) in enumerate(plan.by_name.items()):
        used = name == plan.outer or any(run.strategy == name for run in plan.runs)
        if used and (plan.mesh.tp > 1 or strategy.sharding.experts):
            groups.setdefault(strategy.sharding, []).append((index, name))
    return tuple(
        ShardingCard(
            names=tuple(words.clean(name) for _, name in group),
            indices=tuple(index for index, _ in group),
            used_by=_used_by(plan, {name for _, name in group}),
            over=_over(plan, sharding),
            words=words.sharding_words(sharding),
            modules=(*modules(sharding), *_dealt(sharding, plan.mesh.ep)),
        )
        for sharding, group in groups.items()
    )


def _over(plan: Plan, sharding: Sharding) -> str:
    said = [f"split over tp {plan.mesh.tp}"] if plan.mesh.tp > 1 else []
    return " and ".join([*said, *([f"dealt over ep {plan.mesh.ep}"] if sharding.experts else [])])


def _dealt(sharding: Sharding, ep: int) -> Iterator[ModuleRow]:
    """The modules whose experts are dealt: which rows travel, and what a device holds."""
    for each in sharding.experts:
        there = BorderRow(
            "rows", "own tokens", "own experts", "all-to-all", "all-to-all", "send each row to its experts' devices"
        )
        back = BorderRow("rows", "own experts", "own tokens", "all-to-all", "all-to-all", "send the results back")
        held = WeightRow(
            "every parameter", f"all parameters of {words.clean(each.module)}", f"Shard(0) over ep {ep}", "experts",
            f"{each.number // ep} of {each.number} experts, each whole",
        )  # fmt: skip
        yield ModuleRow(name=words.clean(each.module), enter=(there,), weights=(held,), leave=(back,))


def _used_by(plan: Plan, names: set[str]) -> str:
    layers = sum(len(run.layers) for run in plan.runs if run.strategy in names)
    parts = [words.plural(layers, "layer")] if layers else []
    if plan.outer in names:
        parts.append("everything outside the layers")
    return " and ".join(parts)


def modules(sharding: Sharding) -> tuple[ModuleRow, ...]:
    """The modules of a layer that a strategy touches, each with its borders and parameters."""
    borders = {border.module for border in sharding.borders}
    places = {name: _place(name, borders) for name, _ in sharding.parameters}
    order = dict.fromkeys([*places.values(), *(border.module for border in sharding.borders)])
    return tuple(
        ModuleRow(
            name=words.clean(module) or "the layer itself",
            enter=_borders(border for border in sharding.borders if border.module == module and border.side == "in"),
            weights=_weights(module, [name for name, place in places.items() if place == module], sharding),
            leave=_borders(border for border in sharding.borders if border.module == module and border.side == "out"),
        )
        for module in order
    )


def _place(parameter: str, borders: set[str]) -> str:
    """The module under which a parameter is shown: the innermost one with a border, else the outermost one."""
    parts = parameter.split(".")[:-1]
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in borders:
            return ".".join(parts[:length])
    return parts[0] if parts else ""


def _borders(borders: Iterable[Border]) -> tuple[BorderRow, ...]:
    return tuple(
        BorderRow(
            words.clean(border.leaf),
            str(border.source),
            str(border.target),
            *words.collectives(border.source, border.target),
            words.border_words(border),
        )
        for border in borders
    )


def _weights(module: str, names: list[str], sharding: Sharding) -> tuple[WeightRow, ...]:
    """Parameters of one module, those that are placed alike in one row."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        style, said = words.parameter_style(name, sharding)
        groups.setdefault((str(sharding.layout(name)), style, said), []).append(name)
    return tuple(
        WeightRow(_short(module, group), ", ".join(words.clean(name) for name in group), layout, style, said)
        for (layout, style, said), group in groups.items()
    )


def _short(module: str, names: list[str]) -> str:
    """Names relative to their module: "wq, wk, wv" when each is a weight, else with the parameter's own name."""
    relative = [words.clean(name.removeprefix(f"{module}.") if module else name) for name in names]
    if all(name.endswith(".weight") for name in relative):
        relative = [name.removesuffix(".weight") for name in relative]
    return ", ".join(relative)
