"""How plan.yaml writes borders and runs of layers: one line each, and back."""

from __future__ import annotations

import re
from typing import Literal

from autoplan.errors import UsageError
from autoplan.strategy import Border, parse_layout


def border_text(border: Border) -> str:
    """`attention in 0: Shard(1) -> Replicate|Partial`; the layer itself is written `.`."""
    return f"{border.module or '.'} {border.side} {border.leaf}: {border.source} -> {border.target}"


_BORDER = re.compile(r"^(\S+) (in|out) (.*?): (.+) -> (.+)$")


def parse_border(text: str) -> Border:
    """The border that `border_text` wrote. Raises `UsageError` on anything else."""
    match = _BORDER.match(text)
    if match is None:
        raise UsageError(f"'{text}' is no border.", "Write '<module> in|out <leaf>: <layout> -> <layout>'.")
    module, side, leaf, source, target = match.groups()
    side_name: Literal["in", "out"] = "in" if side == "in" else "out"
    return Border("" if module == "." else module, side_name, leaf, parse_layout(source), parse_layout(target))


def ranges(names: tuple[str, ...]) -> str:
    """`layers.0-15, layers.20`: runs of consecutive numbers folded."""
    parts: list[tuple[str, int, int]] = []
    plain: list[str] = []
    for name in names:
        prefix, dot, last = name.rpartition(".")
        if not dot or not last.isdecimal() or str(int(last)) != last:
            plain.append(name)
        elif parts and parts[-1][0] == prefix and parts[-1][2] + 1 == int(last):
            parts[-1] = (prefix, parts[-1][1], int(last))
        else:
            parts.append((prefix, int(last), int(last)))
    folded = [f"{prefix}.{first}" if first == last else f"{prefix}.{first}-{last}" for prefix, first, last in parts]
    return ", ".join(folded + plain)


_RANGE = re.compile(r"^(.*)\.(\d{1,6})-(\d{1,6})$")


def unfold(text: str) -> tuple[str, ...]:
    """The names that `ranges` folded. Raises `UsageError` when a range runs backwards."""
    names: list[str] = []
    for part in (piece.strip() for piece in text.split(",")):
        match = _RANGE.match(part)
        if match is None:
            names.append(part)
            continue
        first, last = int(match.group(2)), int(match.group(3))
        if last < first:
            raise UsageError(f"the range '{part}' runs backwards.")
        names.extend(f"{match.group(1)}.{i}" for i in range(first, last + 1))
    return tuple(names)
