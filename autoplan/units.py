"""Quantities: SI base units inside (byte, second, FLOP), people's units only in files and on screens.

The annotated floats say the unit to a reader; `parse` and `show` are the only places where text like `450 GB/s`, `9 us`
or `80 GiB` is read and written. (YAML 1.1 reads `1e-6` as a string: a quantity with its unit closes that trap.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from autoplan.errors import UsageError


@dataclass(frozen=True, slots=True)
class Unit:
    """The base unit of an annotated float, and the text units in which people read and write it."""

    base: str
    prefixes: tuple[tuple[str, float], ...]


_BINARY = (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))
_DECIMAL_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_RATE = (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3), ("B/s", 1.0))
_TIME = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))
_FLOP = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("FLOP", 1.0))
_FLOP_RATE = tuple((f"{name}/s", scale) for name, scale in _FLOP)

BYTE = Unit("B", (*_BINARY, *_DECIMAL_BYTES, ("B", 1.0)))
SECOND = Unit("s", _TIME)
FLOP = Unit("FLOP", _FLOP)
BYTE_PER_SECOND = Unit("B/s", _RATE)
FLOP_PER_SECOND = Unit("FLOP/s", _FLOP_RATE)

Bytes = Annotated[float, BYTE]
Seconds = Annotated[float, SECOND]
Flops = Annotated[float, FLOP]
BytesPerSecond = Annotated[float, BYTE_PER_SECOND]
FlopsPerSecond = Annotated[float, FLOP_PER_SECOND]

_QUANTITY = re.compile(r"^\s*([+-]?[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/]*)\s*$")


def parse(text: str | float | int, unit: Unit) -> float:
    """The quantity `text` ("80 GiB") in base units of `unit`. A bare number is already in base units.

    Raises `UsageError` when the text is no number or its unit is not one of `unit`.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        return float(text)
    match = _QUANTITY.match(str(text))
    if match is None:
        raise UsageError(f"'{text}' is not a quantity.", f"Write a number and a unit, such as '1 {unit.prefixes[0][0]}'.")
    number, name = float(match.group(1).replace("_", "")), match.group(2)
    if not name:
        return number
    scales = dict(unit.prefixes)
    if name not in scales:
        raise UsageError(f"'{text}' has the unit '{name}'.", f"Use one of {', '.join(scales)}.")
    return number * scales[name]


def show(value: float, unit: Unit, digits: int = 3) -> str:
    """`value` (base units) as people read it: `show(8.59e10, BYTE) == "80 GiB"`."""
    if value == 0:
        return f"0 {unit.base}"
    choices = [(name, scale) for name, scale in unit.prefixes if name not in dict(_DECIMAL_BYTES)]
    choices.sort(key=lambda item: -item[1])
    for name, scale in choices:
        if abs(value) >= scale * 0.9995:
            return f"{_digits(value / scale, digits)} {name}"
    name, scale = choices[-1]
    return f"{_digits(value / scale, digits)} {name}"


def exact(value: float, unit: Unit) -> str:
    """`value` as text that `parse` reads back to the same float: in a unit that makes it short, else in the base unit."""
    for name, scale in sorted(unit.prefixes, key=lambda item: -item[1]):
        text = f"{value / scale:.12g}"
        if scale <= abs(value) < 10_000 * scale and "e" not in text and parse(f"{text} {name}", unit) == value:
            return f"{text} {name}"
    return f"{int(value) if value == int(value) else repr(value)} {unit.base}"


def _digits(value: float, digits: int) -> str:
    text = f"{value:.{digits}g}"
    return f"{float(text):g}" if "e" not in text else f"{value:.0f}"
