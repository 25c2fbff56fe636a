"""A hardware profile as a YAML file: quantities with units, short curves, and a source for every number.

The file says more plainly what the noun says: `bandwidth: 450 GB/s`, `matmul: [[10 GFLOP, 0.54], ...]`, and under
`source` one line for every number (or one `all`). `load_hardware(dump)` gives back the same profile, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from itertools import pairwise
from math import isfinite, log
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from autoplan.errors import UsageError
from autoplan.files.document import did_you_mean, read_document
from autoplan.hardware import Curve, Device, HardwareProfile, Link
from autoplan.measurement import COLLECTIVES
from autoplan.units import BYTE, BYTE_PER_SECOND, FLOP, FLOP_PER_SECOND, SECOND, Unit, exact, parse
from autoplan.workload import DType

_NUMBER = Unit("", (("", 1.0),))


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("autoplan", "{message}", {"message": message})


def _quantity(unit: Unit, low: float = 0.0, high: float = float("inf"), above: bool = True) -> Callable[[Any], float]:
    """A validator: text to a finite float in [low, high], without `low` itself when `above`."""
    example = "0.5" if unit is _NUMBER else f"'1 {unit.prefixes[0][0]}'"

    def read(value: Any) -> float:
        what = "a number" if unit is _NUMBER else "a quantity"
        try:
            if not isinstance(value, str | int | float) or isinstance(value, bool):
                raise ValueError
            number = float(value) if unit is _NUMBER else parse(value, unit)
        except (UsageError, ValueError, OverflowError):
            raise _wrong(f"'{_short(value)}' is not {what}, such as {example}") from None
        if not isfinite(number) or not low <= number <= high or (above and number == low):
            bound = f"between {low:g} and {high:g}" if isfinite(high) else ("more than 0" if above else "0 or more")
            raise _wrong(f"'{_short(value)}' is not {bound}")
        return number

    return read


def _curve(unit: Unit) -> Callable[[Any], Curve]:
    """A validator: `[[size, fraction], ...]` to a curve along which more work never takes less time."""
    size_of, fraction_of = _quantity(unit), _quantity(_NUMBER, 0.0, 1.0)

    def read(value: Any) -> Curve:
        if not isinstance(value, list) or not value or not all(isinstance(p, list) and len(p) == 2 for p in value):
            raise _wrong(f"is not a curve, such as [[1 {unit.prefixes[0][0]}, 0.5]]")
        points = tuple((size_of(size), fraction_of(fraction)) for size, fraction in value)
        for (x0, y0), (x1, y1) in pairwise(points):
            if x1 <= x0:
                raise _wrong(f"sizes of a curve must grow, {exact(x1, unit)} follows {exact(x0, unit)}")
            if y1 - y0 > y0 * log(x1 / x0):
                raise _wrong(f"between {exact(x0, unit)} and {exact(x1, unit)} more work would take less time")
        return Curve(points)

    return read


def _slowdown(value: Any) -> tuple[tuple[str, float], ...]:
    """A validator: `{all_gather: 2}` to pairs of a collective and a positive factor."""
    factor_of = _quantity(_NUMBER, 0.0, 100.0)
    if not isinstance(value, dict) or not set(value) <= set(COLLECTIVES):
        raise _wrong(f"is not a map from collectives ({', '.join(COLLECTIVES)}) to factors")
    return tuple((kind, factor_of(factor)) for kind, factor in value.items())


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1e9:
        raise _wrong(f"'{_short(value)}' is not a whole number, 0 or more")
    return value


def _short(value: Any) -> str:
    try:
        text = str(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        return "a huge number"
    return text if len(text) <= 40 else f"{text[:40]}..."


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise _wrong("is not text on one line")
    return value


def _date(value: Any) -> str:
    if type(value) is date:  # YAML reads 2026-01-31 as one; a datetime is not
        return value.isoformat()
    try:
        return date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise _wrong(f"'{_short(value)}' is not a date, such as 2026-01-31") from None


_Bytes = Annotated[float, BeforeValidator(_quantity(BYTE))]
_BytesOrNone = Annotated[float, BeforeValidator(_quantity(BYTE, above=False))]
_Rate = Annotated[float, BeforeValidator(_quantity(BYTE_PER_SECOND))]
_Peak = Annotated[float, BeforeValidator(_quantity(FLOP_PER_SECOND))]
_Time = Annotated[float, BeforeValidator(_quantity(SECOND, above=False))]
_Fraction = Annotated[float, BeforeValidator(_quantity(_NUMBER, 0.0, 1.0, above=False))]
_Gain = Annotated[float, BeforeValidator(_quantity(_NUMBER, 1.0, 10.0, above=False))]
_FlopCurve = Annotated[Any, BeforeValidator(_curve(FLOP))]
_ByteCurve = Annotated[Any, BeforeValidator(_curve(BYTE))]
_Text = Annotated[str, BeforeValidator(_text)]
_Sources = dict[_Text, _Text]


class _Table(BaseModel):
    """A map of the file: only the keys it declares, and a source for each number among them."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class _Device(_Table):
    name: _Text
    memory: _Bytes
    reserved: _BytesOrNone
    bandwidth: _Rate
    peak: dict[DType | Literal["float8"], _Peak] = Field(min_length=1)
    matmul: _FlopCurve
    attention: _FlopCurve
    memory_efficiency: _ByteCurve
    launch: _Time
    dispatch: _Time = 0.0
    source: _Sources

    @model_validator(mode="after")
    def _whole(self) -> _Device:
        _require_sources(self)
        if self.reserved >= self.memory:
            raise _wrong("reserved is not less than memory")
        return self


class _Link(_Table):
    name: _Text
    span: Annotated[int, BeforeValidator(_count)]
    bandwidth: _Rate
    latency: _Time
    efficiency: _ByteCurve
    all_reduce_gain: _Gain = 1.0
    slowdown: Annotated[Any, BeforeValidator(_slowdown)] = ()
    source: _Sources

    @model_validator(mode="after")
    def _whole(self) -> _Link:
        _require_sources(self)
        return self


class _Profile(_Table):
    name: _Text
    backend: Literal["nccl", "gloo"]
    measured: Annotated[str, BeforeValidator(_date)] | None = None
    overlap: _Fraction
    jitter: _Time = 0.0
    sharing: Annotated[float, BeforeValidator(_quantity(_NUMBER, 1.0, 1000.0, above=False))] = 1.0
    device: _Device
    links: list[_Link] = Field(min_length=1)
    source: _Sources

    @model_validator(mode="after")
    def _whole(self) -> _Profile:
        _require_sources(self)
        spans = [link.span for link in self.links]
        inner = spans[:-1] if spans[-1] == 0 else spans
        if any(span < 2 for span in inner) or inner != sorted(set(inner)):
            raise _wrong("links: spans must grow from 2 on; only the last may be 0, which joins any number")
        return self


_TEXTS = ("name", "source", "backend", "measured", "device", "links", "span")


def _require_sources(table: _Device | _Link | _Profile) -> None:
    numbers = [key for key in type(table).model_fields if key not in _TEXTS]
    unknown = [key for key in table.source if key not in (*numbers, "all")]
    if unknown:
        raise _wrong(f"source names no number: {', '.join(unknown)}")
    left_out = {"all_reduce_gain": 1.0, "slowdown": (), "dispatch": 0.0, "jitter": 0.0, "sharing": 1.0}
    needed = [key for key in numbers if key not in left_out or getattr(table, key) != left_out[key]]
    missing = [] if "all" in table.source else [key for key in needed if key not in table.source]
    if missing:
        raise _wrong(f"source is missing for {', '.join(missing)}")


def load_hardware(path: Path) -> HardwareProfile:
    """The profile in the file `path`. Raises `UsageError` that names the file and everything wrong in it."""
    try:
        document = read_document(path, "hardware profile")
    except (AttributeError, LookupError, TypeError):  # what PyYAML raises on `!!timestamp x` and its like
        raise UsageError(f"{path} is not valid YAML: a tag does not fit its text.") from None
    try:
        file = _Profile.model_validate(document)
    except ValidationError as error:
        complaints = "; ".join(_complaint(e) for e in error.errors(include_url=False))
        raise UsageError(f"{path} is not a valid hardware profile: {complaints}.") from None
    device = Device(
        **{k: getattr(file.device, k) for k in type(file.device).model_fields if k not in ("peak", "source")},
        peak=tuple(file.device.peak.items()),
        source=_join(file.device.source),
    )
    links = tuple(
        Link(**{k: getattr(link, k) for k in type(link).model_fields if k != "source"}, source=_join(link.source))
        for link in file.links
    )
    return HardwareProfile(
        name=file.name,
        backend=file.backend,
        measured=file.measured,
        overlap=file.overlap,
        jitter=file.jitter,
        sharing=file.sharing,
        device=device,
        links=links,
        source=_join(file.source),
    )


def _complaint(error: Any) -> str:
    path = ".".join(str(part)[:60] for part in error["loc"] if part != "[key]")
    kind, message = error["type"], str(error["msg"])
    if kind == "missing":
        message = "is missing"
    elif kind == "extra_forbidden":
        tables: list[type[_Table]] = [_Profile, _Device, _Link]
        known = tables[0] if len(error["loc"]) == 1 else tables[1] if error["loc"][0] == "device" else tables[2]
        hint = did_you_mean(str(error["loc"][-1]), list(known.model_fields)).rstrip("?")
        message = "is not a known key" + (f" ({hint}?)" if hint else "")
    elif kind == "literal_error":
        known_texts = get_args(DType) if "peak" in error["loc"] else ("nccl", "gloo")
        message = f"is not one of {', '.join(known_texts)}"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "is not a map"
    elif kind == "list_type":
        message = "is not a list"
    elif kind == "too_short":
        message = "is empty"
    return f"{path}: {message}" if path else message


def _join(sources: dict[str, str]) -> str:
    return "\n".join(f"{key}: {text}" for key, text in sources.items())


def dump_hardware(profile: HardwareProfile) -> str:
    """The profile as the text of a file."""
    device = profile.device
    lines = [f"name: {_scalar(profile.name)}", f"backend: {profile.backend}"]
    if profile.measured:
        lines.append(f"measured: {profile.measured}")
    lines.append(f"overlap: {profile.overlap!r}")
    if profile.jitter:
        lines.append(f"jitter: {exact(profile.jitter, SECOND)}")
    if profile.sharing != 1.0:
        lines.append(f"sharing: {profile.sharing!r}")
    lines += [*_dump_sources(profile.source, "", _Profile), "", "device:"]
    lines += [
        f"  name: {_scalar(device.name)}",
        f"  memory: {exact(device.memory, BYTE)}",
        f"  reserved: {exact(device.reserved, BYTE)}",
        f"  bandwidth: {exact(device.bandwidth, BYTE_PER_SECOND)}",
        "  peak:",
        *(f"    {dtype}: {exact(peak, FLOP_PER_SECOND)}" for dtype, peak in device.peak),
        f"  matmul: {_dump_curve(device.matmul, FLOP)}",
        f"  attention: {_dump_curve(device.attention, FLOP)}",
        f"  memory_efficiency: {_dump_curve(device.memory_efficiency, BYTE)}",
        f"  launch: {exact(device.launch, SECOND)}",
        *([f"  dispatch: {exact(device.dispatch, SECOND)}"] if device.dispatch else []),
        *_dump_sources(device.source, "  ", _Device),
        "",
        "links:",
    ]
    for link in profile.links:
        lines += [
            f"  - name: {_scalar(link.name)}",
            f"    span: {link.span}",
            f"    bandwidth: {exact(link.bandwidth, BYTE_PER_SECOND)}",
            f"    latency: {exact(link.latency, SECOND)}",
            f"    efficiency: {_dump_curve(link.efficiency, BYTE)}",
        ]
        if link.all_reduce_gain != 1.0:
            lines.append(f"    all_reduce_gain: {link.all_reduce_gain!r}")
        if link.slowdown:
            lines.append("    slowdown: {" + ", ".join(f"{kind}: {factor!r}" for kind, factor in link.slowdown) + "}")
        lines += _dump_sources(link.source, "    ", _Link)
    return "\n".join(lines) + "\n"


def _scalar(text: str) -> str:
    """`text` as a YAML scalar on one line, quoted where it must be."""
    return yaml.safe_dump(text, width=2**31, allow_unicode=True).removesuffix("\n").removesuffix("\n...")


def _dump_curve(curve: Curve, unit: Unit) -> str:
    return "[" + ", ".join(f"[{exact(size, unit)}, {fraction!r}]" for size, fraction in curve.points) + "]"


def _dump_sources(source: str, indent: str, table: type[_Table]) -> list[str]:
    """A source written in code may be free text: it then stands for `all`."""
    told = dict(line.split(": ", 1) for line in source.splitlines() if ": " in line)
    if not told or not all(key in table.model_fields or key == "all" for key in told):
        told = {"all": " ".join(source.split()) or "not told"}
    return [f"{indent}source:", *(f"{indent}  {key}: {_scalar(text)}" for key, text in told.items())]
