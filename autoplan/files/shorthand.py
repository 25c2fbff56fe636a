"""How plan.yaml writes borders and runs of layers: one line each, and back."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import unquote

from autoplan.errors import UsageError
from autoplan.strategy import Border, parse_layout


def border_text(border: Border) -> str:
    """`attention in 0: Shard(1) -> Replicate|Partial`; the layer itself is written `.`."""
    return f"{border.module or '.'} {border.side} {border.leaf}: {border.source} -> {border.target}"


_PLACE = re.compile(r"(.+) (in|out) (.*)", re.DOTALL)


def parse_border(text: str) -> Border:
    """The border that `border_text` wrote. Names may hold anything, so the last of each separator counts. Raises `UsageError`
    on anything else."""
    before, arrow, target = text.rpartition(" -> ")
    place, colon, source = before.rpartition(": ")
    match = _PLACE.fullmatch(place)
    if match is None or not arrow or not colon:
        raise UsageError(f"'{text}' is no border.", "Write '<module> in|out <leaf>: <layout> -> <layout>'.")
    module, side, leaf = match.groups()
    side_name: Literal["in", "out"] = "in" if side == "in" else "out"
    return Border("" if module == "." else module, side_name, leaf, parse_layout(source), parse_layout(target))


def ranges(names: tuple[str, ...]) -> str:
    """`layers.0-15, layers.20`: runs of consecutive numbers folded. What would be read as something else in a name is
    written as in a URL."""
    parts: list[tuple[str, int, int]] = []
    plain: list[str] = []
    for name in names:
        prefix, dot, last = name.rpartition(".")
        if not dot or not last.isdecimal() or str(int(last)) != last:
            plain.append(_quoted(name))
        elif parts and parts[-1][0] == prefix and parts[-1][2] + 1 == int(last):
            parts[-1] = (prefix, parts[-1][1], int(last))
        else:
            parts.append((prefix, int(last), int(last)))
    folded = [
        f"{_quoted(prefix)}.{first}" if first == last else f"{_quoted(prefix)}.{first}-{last}" for prefix, first, last in parts
    ]
    return ", ".join(folded + plain)


_RANGE = re.compile(r"(.*)\.(\d{1,6})-(\d{1,6})", re.DOTALL)
_SPECIAL = re.compile(r"[%,]|^\s|\s\Z|(?<=\d)-(?=\d+\Z)")


def _quoted(name: str) -> str:
    return _SPECIAL.sub(lambda found: "".join(f"%{byte:02X}" for byte in found.group().encode()), name)


def unfold(text: str) -> tuple[str, ...]:
    """The names that `ranges` folded. Raises `UsageError` when a range runs backwards."""
    names: list[str] = []
    for part in (piece.strip() for piece in text.split(",")):
        match = _RANGE.fullmatch(part)
        if match is None:
            names.append(unquote(part))
            continue
        first, last = int(match.group(2)), int(match.group(3))
        if last < first:
            raise UsageError(f"the range '{part}' runs backwards.")
        names.extend(f"{unquote(match.group(1))}.{i}" for i in range(first, last + 1))
    return tuple(names)
