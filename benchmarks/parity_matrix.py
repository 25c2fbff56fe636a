"""Trains every model under every kind of plan on real processes beside one process; writes the table docs/parity.md.

python -m benchmarks.parity_matrix [MODEL ...] [--plan WORDS] [--keep FILE]     (all of both: the file is written)

With `--keep` what is found is kept in a file, and the table is written of all that is in it: so some can be run anew.

A cell is three AdamW steps in float64 of a tiny model; its number is the largest relative difference of the losses, of the
gradients of the first step and of the parameters after the last, from those of one process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from autoplan.capture import LoadedModel, capture
from autoplan.cost.context import context_inputs
from autoplan.cost.model import OUTER, CostModel
from autoplan.plan import Plan
from autoplan.profile.catalog import find_hardware
from autoplan.schedule import ScheduleKind
from autoplan.search.columns import Tables
from autoplan.search.space import uncombined, unplaceable, unstageable
from autoplan.strategy import REPLICATE, Layout, Mesh, Recompute, Sharding, Zero, shard
from autoplan.workload import Workload
from benchmarks.parity_ranks import Cell, in_float64, reference, run
from tests.apply.plans import make
from tests.models import ZOO
from tests.models.huggingface import load as load_huggingface
from tests.test_parity import DEEP, EXAMPLES

PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
BATCH = 8
TOLERANCE = 1e-10
SEQUENCE = shard(1)
FAMILIES = ("gpt2", "llama-3", "qwen3", "mistral", "gemma-2", "phi-3", "bert", "vit", "whisper", "t5")
SPARSE = ("mixtral", "qwen3-moe", "deepseek-v3")
"""Those with experts."""
DEPTHS = {
    "n_layer": 4,
    "num_hidden_layers": 4,
    "num_layers": 3,  # of T5, whose first layers are like no others
    "num_decoder_layers": 3,
    "encoder_layers": 2,
    "decoder_layers": 2,
}
"""Few layers, but so many that some repeat and pipelines can be cut."""
_DROPOUTS = ("dropout", "dropout_rate", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout_prob", "attention_dropout",
             "attention_probs_dropout_prob", "activation_dropout")  # fmt: skip
AGAIN: tuple[Recompute, ...] = tuple(way for way in get_args(Recompute) if way != "none")


@dataclass(frozen=True)
class Wish:
    """A kind of plan."""

    mesh: Mesh
    micro_batch: int
    stream: Layout = REPLICATE
    recompute: Recompute = "none"
    zero: Zero = 3
    schedule: ScheduleKind = "1f1b"
    chunks: int = 1


PLANS: dict[str, Wish] = {
    "dp 2": Wish(Mesh(dp_replicate=2), 2),
    "FSDP 2": Wish(Mesh(dp_shard=2), 2),
    "FSDP 2, ZeRO 2": Wish(Mesh(dp_shard=2), 2, zero=2),
    "FSDP 2, ZeRO 1": Wish(Mesh(dp_shard=2), 2, zero=1),
    "tp 2": Wish(Mesh(tp=2), 4),
    "tp + sp 2": Wish(Mesh(tp=2), 4, SEQUENCE),
    "cp 2": Wish(Mesh(cp=2), 4),
    "ring cp 2": Wish(Mesh(cp=2, cp_kind="ring"), 4),
    "pp 2, gpipe": Wish(Mesh(pp=2), 2, schedule="gpipe"),
    "pp 2, 1f1b": Wish(Mesh(pp=2), 2),
    "pp 2, interleaved": Wish(Mesh(pp=2), 2, schedule="interleaved-1f1b", chunks=2),
    "pp 2, zero-bubble": Wish(Mesh(pp=2), 2, schedule="zero-bubble"),
    **{f"FSDP 2, {way} recompute": Wish(Mesh(dp_shard=2), 2, recompute=way) for way in AGAIN},
    **{f"tp 2, {way} recompute": Wish(Mesh(tp=2), 4, recompute=way) for way in AGAIN},
    **{f"pp 2, {way} recompute": Wish(Mesh(pp=2), 2, recompute=way) for way in AGAIN},
    "HSDP 2 x 2": Wish(Mesh(dp_replicate=2, dp_shard=2), 1),
    "tp 2 x FSDP 2": Wish(Mesh(dp_shard=2, tp=2), 2),
    "cp 2 x FSDP 2": Wish(Mesh(dp_shard=2, cp=2), 2),
    "cp 2 x tp 2": Wish(Mesh(cp=2, tp=2), 4),
    "cp 2 x tp + sp 2": Wish(Mesh(cp=2, tp=2), 4, SEQUENCE),
    "ring cp 2 x FSDP 2": Wish(Mesh(dp_shard=2, cp=2, cp_kind="ring"), 2),
    "ring cp 4": Wish(Mesh(cp=4, cp_kind="ring"), 4),
    "pp 2 x FSDP 2": Wish(Mesh(pp=2, dp_shard=2), 1),
    "pp 2 x FSDP 2, zero-bubble": Wish(Mesh(pp=2, dp_shard=2), 1, schedule="zero-bubble"),
    "pp 2 x tp 2": Wish(Mesh(pp=2, tp=2), 2),
    "pp 2 x tp 2, zero-bubble": Wish(Mesh(pp=2, tp=2), 2, schedule="zero-bubble"),
    "pp 2 x cp 2": Wish(Mesh(pp=2, cp=2), 2),
    "pp 2 x FSDP 2 x tp 2": Wish(Mesh(pp=2, dp_shard=2, tp=2), 1),
    "FSDP 2 x cp 2 x tp 2": Wish(Mesh(dp_shard=2, cp=2, tp=2), 2),
}


EXPERT_PLANS: dict[str, Wish] = {
    "ep 2": Wish(Mesh(dp_shard=2, ep=2), 2),
    "ep 2, ZeRO 1": Wish(Mesh(dp_shard=2, ep=2), 2, zero=1),
    **{f"ep 2, {way} recompute": Wish(Mesh(dp_shard=2, ep=2), 2, recompute=way) for way in AGAIN},
    "ep 2 over tp 2": Wish(Mesh(tp=2, ep=2), 4),
    "ep 2 over cp 2": Wish(Mesh(cp=2, ep=2), 4),
    "ep 4": Wish(Mesh(dp_shard=4, ep=4), 1),
    "ep 2 x FSDP 2": Wish(Mesh(dp_shard=4, ep=2), 1),
    "ep 2 x FSDP 2, ZeRO 2": Wish(Mesh(dp_shard=4, ep=2), 1, zero=2),
    "ep 2 x FSDP 2, ZeRO 1": Wish(Mesh(dp_shard=4, ep=2), 1, zero=1),
    "dp 2 x ep 2": Wish(Mesh(dp_replicate=2, dp_shard=2, ep=2), 1),
    "ep 4 over tp 2 x FSDP 2": Wish(Mesh(dp_shard=2, tp=2, ep=4), 2),
    "ep 4 over tp + sp 2 x FSDP 2": Wish(Mesh(dp_shard=2, tp=2, ep=4), 2, SEQUENCE),
    "tp 2 = ep 2, x FSDP 2": Wish(Mesh(dp_shard=2, tp=2, ep=2), 2),
    "pp 2 x ep 2": Wish(Mesh(pp=2, dp_shard=2, ep=2), 1),
    "pp 2, interleaved, x ep 2": Wish(Mesh(pp=2, dp_shard=2, ep=2), 2, schedule="interleaved-1f1b", chunks=2),
    "pp 2, zero-bubble, x ep 2": Wish(Mesh(pp=2, dp_shard=2, ep=2), 1, schedule="zero-bubble"),
    "pp 2 x tp 2 = ep 2": Wish(Mesh(pp=2, tp=2, ep=2), 2),
}
"""For models with experts."""


def models() -> dict[str, Any]:
    """Functions that load the models, by name."""
    found: dict[str, Any] = {}
    for name, sizes in DEEP.items():
        found[f"examples/{name}.py"] = partial(_example, name, sizes)
    found["examples/moe.py"] = partial(_example, "moe", {**DEEP["llama"], "size": "1B", "experts": 8, "chosen": 2})
    for name in (*FAMILIES, *SPARSE):
        title, fields, seq_len = ZOO[name].sizes["tiny"].args  # type: ignore[attr-defined]
        changes = {key: value for key, value in DEPTHS.items() if key in fields} or {"num_hidden_layers": 4}
        found[f"HF {name}"] = partial(load_huggingface, title, {**fields, **changes, **dict.fromkeys(_DROPOUTS, 0.0)}, seq_len)
    return found


def _example(name: str, sizes: dict[str, Any]) -> LoadedModel:
    from autoplan.capture import load_model

    return load_model(str(EXAMPLES / f"{name}.py"), kwargs=sizes)


def tables(loaded: LoadedModel) -> Tables:
    graph = capture(loaded, compute_dtype="bfloat16")  # the format alone for which every kernel has shapes
    workload = Workload(global_batch=BATCH, param_dtype="float64", compute_dtype="float64", reduce_dtype="float64")
    return Tables(CostModel(graph, find_hardware("cpu-gloo"), workload))


def plan_of(known: Tables, wish: Wish) -> Plan | str:
    """A plan of this kind in which every layer takes the planner's sharding that shards most, or why there is none."""
    mesh, graph = wish.mesh, known.graph
    refused = unstageable(mesh, graph, known.costs.outer.order)
    if refused is not None:
        return refused.reason
    context, mixtures = known.costs.context, known.costs.mixtures
    unable = context.refusal(mesh.cp, mesh.tp, mesh.cp_kind) or mixtures.refusal(mesh.ep) or uncombined(context, mixtures, mesh)
    if unable:
        return unable
    if wish.stream not in known.streams(mesh.tp):
        return "the layers do not pass on activations with a sequence that tp divides"
    chosen: dict[int, Sharding] = {}
    for body in known.classes:
        found = known.shardings(body, mesh.within, wish.micro_batch, wish.stream)
        if not found:
            where = "what stands outside the layers" if body == OUTER else f"a layer like {_first(known, body)}"
            return f"no legal sharding over tp {mesh.tp} of {where} with activations {wish.stream} between layers"
        placeable = list(known._placeable(body, mesh, wish.micro_batch, wish.stream))
        if not placeable:
            return unplaceable(mesh, wish.micro_batch).reason
        chosen[body] = max(placeable, key=lambda sharding: sum(layout.sharded for _, layout in sharding.parameters))
    if mesh.tp > 1 and not any(layout.sharded for one in chosen.values() for _, layout in one.parameters):
        return f"nothing of it can be sharded over tp {mesh.tp}"
    layers = {block.name: chosen[block.body] for block in graph.blocks}
    plan = make(
        layers, chosen[OUTER], mesh, micro_batch=wish.micro_batch, batch=BATCH, recompute=wish.recompute, zero=wish.zero,
        schedule=wish.schedule, chunks=wish.chunks,
    )  # fmt: skip
    return replace(plan, tied=graph.tied, context=context_inputs(graph) if mesh.cp > 1 else ())


def _first(known: Tables, body: int) -> str:
    return next(block.name for block in known.graph.blocks if block.body == body)


class Task(NamedTuple):
    """What is to be done with a model."""

    name: str
    loaded: LoadedModel
    made: dict[str, Plan | str]
    """By kind of plan: the plan, or why there is none."""


def tasks(wanted: list[str], plans: dict[str, Wish]) -> Iterator[Task]:
    for name, load in models().items():
        if wanted and not any(word in name for word in wanted):
            continue
        loaded = load()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = tables(loaded)
        every = plans if known.costs.mixtures.numbers else {title: plans[title] for title in plans if title in PLANS}
        yield Task(name, loaded, {title: plan_of(known, wish) for title, wish in every.items()})


def cells(task: Task) -> Iterator[Cell]:
    """The cells of a model as they finish."""
    yield from (Cell(task.name, title, refused=reason) for title, reason in task.made.items() if isinstance(reason, str))
    runnable = {title: plan for title, plan in task.made.items() if isinstance(plan, Plan)}
    expected = reference(task.loaded, BATCH)
    for world in sorted({plan.mesh.size for plan in runnable.values()}):
        some = {title: plan for title, plan in runnable.items() if plan.mesh.size == world}
        yield from run(task.name, task.loaded, expected, some, world)


def told(cell: Cell) -> str:
    if cell.refused:
        return f"refused: {cell.refused}"
    if cell.failed:
        return f"FAILS: {cell.failed}"
    return f"{cell.error:.1e}{'' if cell.error < TOLERANCE else '  TOO MUCH: ' + cell.where}  {cell.seconds:.1f} s"


def page(found: list[Cell]) -> str:
    """The tables, and under them what each refusal and failure is."""
    sparse = {cell.model for cell in found if cell.plan in EXPERT_PLANS}
    groups = {
        "The examples": [c for c in found if c.model not in sparse and c.model.startswith("examples/")],
        "Families of Hugging Face": [c for c in found if c.model not in sparse and not c.model.startswith("examples/")],
        "Models with experts": [c for c in found if c.model in sparse],
    }
    notes: list[str] = []
    parts = [HEAD.format(torch=torch.__version__) + _counts(found)]
    parts += [f"## {title}\n\n{_table(some, notes)}" for title, some in groups.items() if some]
    if notes:
        listed = "\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1))
        parts.append(f"## What is refused, and what fails\n\n{listed}")
    return "\n\n".join(parts) + "\n"


def _counts(found: list[Cell]) -> str:
    good = sum(not c.refused and not c.failed and c.error < TOLERANCE for c in found)
    refused = sum(bool(c.refused) for c in found)
    bad = len(found) - good - refused
    return (
        f"Of {len(found)} cells {good} equal one process to {TOLERANCE:.0e}, {refused} are refused by the planner and "
        f"{bad or 'none'} fail{'s' if bad == 1 else ''}."
    )


def _table(found: list[Cell], notes: list[str]) -> str:
    names = list(dict.fromkeys(cell.model for cell in found))
    by_place = {(cell.model, cell.plan): cell for cell in found}
    lines = ["| plan | " + " | ".join(name.removeprefix("HF ") for name in names) + " |", "|---|" + "--:|" * len(names)]
    for title in (*PLANS, *EXPERT_PLANS):
        if any((name, title) in by_place for name in names):
            lines.append(f"| {title} | " + " | ".join(_entry(by_place.get((name, title)), notes) for name in names) + " |")
    return "\n".join(lines)


HEAD = """# Parity: the parallel model computes the same

Made by `make parity` with torch {torch}, on processes that talk through gloo. Every cell trains a tiny model for three AdamW
steps in float64 under a plan of that kind, with the planner's own shardings, and compares with one process: the number is the
largest relative difference of the losses, of all gradients of the first step and of all parameters after the last. Dropout is
off. What is refused, the planner never proposes; why, is told below by number.

The names of plans are those of the axes of a mesh, with numbers of ranks: `dp` replicates the model, FSDP shards it (ZeRO 3
unless told), HSDP is both; `tp` shards layers, `+ sp` also the activations between them, along the sequence; `cp` cuts the
sequence everywhere, and attention exchanges it for heads, or passes keys and values round (`ring`); `pp` cuts the model into
stages; `ep` deals experts over the ranks of FSDP, or of what is told.

"""


def _entry(cell: Cell | None, notes: list[str]) -> str:
    if cell is None:
        return ""
    if cell.refused or cell.failed or cell.error >= TOLERANCE:
        word, why = ("refused", cell.refused) if cell.refused else ("**fails**", cell.failed or f"{cell.where}: {cell.error:.1e}")
        note = f"{'Refused' if cell.refused else 'Fails'}: {why}."
        if note not in notes:
            notes.append(note)
        return f"{word} ({notes.index(note) + 1})"
    return f"{cell.error:.0e}" if cell.error else "0"


def kept(file: Path, found: list[Cell]) -> list[Cell]:
    """The cells of the file with those that were found in their places, in the order of the table; the file holds them then."""
    known = [Cell(**each) for each in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []
    cells = {(cell.model, cell.plan): cell for cell in (*known, *found)}
    order = {title: number for number, title in enumerate((*models(), *PLANS, *EXPERT_PLANS))}
    every = sorted(cells.values(), key=lambda cell: (order[cell.model], order[cell.plan]))
    file.write_text(json.dumps([asdict(cell) for cell in every], indent=0), encoding="utf-8")
    return every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="words of models' names; default: all")
    parser.add_argument("--plan", help="words of plans' names; default: all")
    parser.add_argument("--keep", type=Path, help="a file of cells, to which these are added")
    arguments = parser.parse_args()
    plans = {t: wish for t, wish in {**PLANS, **EXPERT_PLANS}.items() if not arguments.plan or arguments.plan in t}
    start, found = time.perf_counter(), []
    todo = list(tasks(arguments.models, plans))
    in_float64()  # after the models are captured: capture knows operations by their names
    for cell in (cell for task in todo for cell in cells(task)):
        print(f"{cell.model:24} {cell.plan:28} {told(cell)}", flush=True)
        found.append(cell)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    every = kept(arguments.keep, found) if arguments.keep else found
    if arguments.keep or (not arguments.models and not arguments.plan):
        PAGE.write_text(page(every), encoding="utf-8")
    if any(cell.failed or (not cell.refused and cell.error >= TOLERANCE) for cell in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
