"""How the report says things: numbers in people's units, layouts and redistributions in the words of the field.

Every function here is total: a report of a strange plan is still a report, so unknown kinds fall back to plain words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from autoplan.strategy import Border, CpKind, Experts, Layout, Mesh, Sharding
from autoplan.units import BYTE, FLOP, SECOND, show

TIME_WORDS = {
    "forward": ("Forward", "the layers' forward pass"),
    "backward": ("Backward", "the layers' backward pass"),
    "recompute": ("Recompute", "forward passes, or parts of them, run again to save memory"),
    "tp_communication": ("Communication inside layers", "collectives of tp, cp and ep, never hidden"),
    "dp_communication": ("Data-parallel communication", "gathers and reductions that computation does not hide"),
    "pp_communication": ("Pipeline communication", "activations on their way to the next stage, where it waits for them"),
    "bubble": ("Bubble", "the slowest stage waits while the others fill and drain"),
    "optimizer": ("Optimizer", "the update of the parameters"),
}
"""Label and note of each part of a `TimeBreakdown`."""

MEMORY_WORDS = {
    "parameters": ("Parameters", "this device's shards"),
    "gradients": ("Gradients", "this device's shards"),
    "awaited": ("Awaited gradients", "come after the peak, on a stream of their own, for which PyTorch reserves memory apart"),
    "optimizer": ("Optimizer states", "this device's shards"),
    "buffers": ("Buffers", "whole on every device"),
    "activations": ("Activations", "saved for the backward pass of the micro-batches in flight"),
    "pipeline": ("Pipeline buffers", "for what the neighbouring stages send"),
    "recompute": ("Recomputed layer", "what one layer holds besides while its forward runs again"),
    "unsharded": ("Gathered parameters", "whole parameters and gradients of the layers in flight"),
    "temporary": ("Temporary", "the largest tensors inside one operation"),
}
"""Label and note of each part of a `MemoryBreakdown`."""


def clean(text: str) -> str:
    """`text` without characters that command a terminal or turn the reading direction: names come from strangers."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)


def seconds(value: float) -> str:
    """ "7.92 s"."""
    return show(value, SECOND)


def size(value: float) -> str:
    """ "70.3 GiB"."""
    return show(value, BYTE)


def flops(value: float) -> str:
    """ "1.2 PFLOP"."""
    return show(value, FLOP)


def count(value: float) -> str:
    """A whole number with thousands apart: "66,200"."""
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """A large number as it is spoken: "8.03 B" parameters."""
    for name, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale * 0.9995:
            return f"{value / scale:.3g} {name}"
    return f"{value:.0f}"


def percent(value: float) -> str:
    """A share of one: "46.2 %", "0.003 %"."""
    points = value * 100
    return f"{points:.1f} %" if abs(points) >= 0.05 or points == 0 else f"{points:.1g} %"


def factor(value: float) -> str:
    """ "1.12x"."""
    return f"{value:.2f}x"


def plural(number: int, noun: str) -> str:
    """ "1 layer", "12 layers"; a noun that ends in "batch" takes "es"."""
    if number == 1:
        return f"1 {noun}"
    return f"{count(number)} {noun}{'es' if noun.endswith(('ch', 'sh')) else 's'}"


CP_WORDS: dict[CpKind, str] = {
    "ulysses": "attention exchanges it for heads (Ulysses)",
    "ring": "attention passes keys and values round (ring)",
}


def mesh_meaning(mesh: Mesh) -> tuple[tuple[str, int, str], ...]:
    """(axis, size, what it does) of every axis that is used, outermost first."""
    meaning = (
        ("pp", mesh.pp, "stages, each with some of the layers; micro-batches pass from one to the next"),
        ("dp_replicate", mesh.dp_replicate, "copies of the model, each on its own samples (HSDP when there are shards too)"),
        ("dp_shard", mesh.dp_shard, "groups with their own samples; parameters, gradients and optimizer states are split (FSDP)"),
        ("cp", mesh.cp, f"devices that share every sample and split its sequence; {CP_WORDS[mesh.cp_kind]}"),
        ("tp", mesh.tp, "devices that share every sample and split the matrices inside a layer"),
        ("ep", mesh.ep, _dealing(mesh)),
    )
    return tuple(row for row in meaning if row[1] > 1)


def _dealing(mesh: Mesh) -> str:
    axes = " x ".join(axis for axis in ("dp_shard", "cp", "tp") if getattr(mesh, axis) > 1)
    held = f"; FSDP splits each over the {mesh.efsdp} that hold the same ones" if mesh.efsdp > 1 else ""
    return f"of the devices of {axes} that hold a layer's experts between them; tokens travel to them and back (all-to-all){held}"


def experts_words(experts: Sequence[Experts], ep: int) -> str:
    """ "8 of mlp.experts, 1 a device"; "-" where a layer has none that are dealt."""
    return "; ".join(f"{each.number} of {clean(each.module)}, {each.number // ep} a device" for each in experts) or "-"


_NUMBERED = re.compile(r"^(.*?)(\d+)(\D*)$", re.DOTALL)


def fold(names: Sequence[str]) -> str:
    """`layers.0`, `layers.1`, `layers.2` as "layers.0-2"; names that do not count up as "first ... last"."""
    cleaned = [clean(name) for name in names]
    if len(cleaned) == 1:
        return cleaned[0]
    matches = [_NUMBERED.match(name) for name in cleaned]
    if all(matches):
        parts = [match.groups() for match in matches if match]
        numbers = [int(number) for _, number, _ in parts]
        if len({(before, after) for before, _, after in parts}) == 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{parts[0][0]}{numbers[0]}-{numbers[-1]}{parts[0][2]}"
    return f"{cleaned[0]} ... {cleaned[-1]}"


def parameter_style(name: str, sharding: Sharding) -> tuple[str, str]:
    """(key, words) of how a parameter is placed on the tp axis; the key is one of the pictures that the page can draw.

    `nn.Linear` keeps its weight as [out, in], so Shard(0) is column parallel; Hugging Face's Conv1D keeps [in, out].
    A plan has no shapes, but a bias tells them apart: it is split in a column-parallel layer and in no row-parallel one.
    """
    layout = sharding.layout(name)
    owner, _, own = name.rpartition(".")
    if layout.kind == "gathered":
        return "whole", "whole; its gradient is summed over tp"
    if layout.kind == "partial":
        return "whole", "whole; added once, after the sum"
    if layout.kind == "replicate":
        return "whole", "whole on every tp device"
    if re.search(r"emb|wte|wpe|tok", owner.rpartition(".")[2], re.IGNORECASE) and own == "weight":
        return ("rows", "vocabulary parallel") if layout.dim == 0 else ("columns", "embedding split by features")
    if own == "bias":
        return "columns", "split with its column-parallel weight"
    if own != "weight" or layout.dim > 1:
        return "columns", f"split on dim {layout.dim}"
    bias = sharding.layout(f"{owner}.bias" if owner else "bias")
    column = bias.sharded or (bias.kind != "partial" and layout.dim == 0)
    packed = f", {layout.blocks} packed parts" if layout.blocks > 1 else ""
    return ("columns", f"column parallel{packed}") if column else ("rows", f"row parallel{packed}")


def collectives(source: Layout, target: Layout) -> tuple[str, str]:
    """What a redistribution costs on the tp axis, (forward, backward); the table of `autoplan.strategy`."""
    if source == target:
        return "none", "none"
    return {
        ("replicate", "gathered"): ("none", "all-reduce"),
        ("replicate", "shard"): ("none (slice)", "all-gather"),
        ("shard", "replicate"): ("all-gather", "none (slice)"),
        ("shard", "gathered"): ("all-gather", "reduce-scatter"),
        ("shard", "shard"): ("all-to-all", "all-to-all"),
        ("partial", "replicate"): ("all-reduce", "none"),
        ("partial", "gathered"): ("all-reduce", "all-reduce"),
        ("partial", "shard"): ("reduce-scatter", "all-gather"),
    }.get((source.kind, target.kind), ("redistribute", "redistribute"))


def border_words(border: Border) -> str:
    """What a redistribution is called in the field."""
    kinds = (border.source.kind, border.target.kind)
    if kinds == ("shard", "gathered") and border.source.dim < 2:
        return "gather the sequence"
    if kinds == ("partial", "shard") and border.target.dim < 2:
        return "sum, keep own part of the sequence"
    return {
        ("replicate", "gathered"): "enters tensor parallel; gradients are summed",
        ("partial", "replicate"): "leaves tensor parallel: sum the parts",
        ("partial", "gathered"): "sum the parts, enter the next tensor-parallel module",
        ("partial", "shard"): "sum the parts and keep own slice",
        ("replicate", "shard"): "keep own slice",
        ("shard", "replicate"): "gather the slices",
        ("shard", "gathered"): "gather the slices",
        ("shard", "shard"): "slice along another dim",
    }.get(kinds, "redistribute")


def sequence_parallel(sharding: Sharding) -> bool:
    """Whether activations between the tensor-parallel modules are split too (Megatron's sequence parallelism)."""
    if sharding.stream.sharded:
        return True
    return any(border.source.kind == "partial" and border.target.sharded and border.target.dim < 2 for border in sharding.borders)


def sharding_words(sharding: Sharding) -> str:
    """A whole layer in a few words: "tensor + sequence"."""
    split = any(layout.sharded for _, layout in sharding.parameters)
    names = [name for name, used in (("tensor", split), ("sequence", sequence_parallel(sharding))) if used]
    return " + ".join(names) if names else "whole on every tp device"


def pass_of(backward: bool, weights: bool, split: bool) -> str:
    """What a stage does with a micro-batch; `split`: its schedule parts the backward pass."""
    if not backward:
        return "forward"
    return f"backward, {'weights' if weights else 'inputs'}" if split else "backward"
