"""Measurements on disk: the side file of a profile that is being measured, and the steps.json of a training run.

The side file has a line of JSON for what machine it is, then one for every measurement, written as soon as it is there: what
an interrupted run has measured is not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Len
from pydantic import TypeAdapter, ValidationError

from autoplan.errors import UsageError
from autoplan.files.document import read_document, validate, write_text
from autoplan.measurement import MeasuredSteps, Measurement, Phases

_MEASUREMENT = TypeAdapter(Measurement)
_STEPS = TypeAdapter(MeasuredSteps)
_POSITIVE: TypeAdapter[tuple[float, ...]] = TypeAdapter(
    Annotated[tuple[Annotated[float, Gt(0.0)], ...], Len(1)], config={"allow_inf_nan": False}
)
_AMOUNT: TypeAdapter[float] = TypeAdapter(Annotated[float, Ge(0.0)], config={"allow_inf_nan": False})


class SideFile:
    """What was measured so far for the profile `output`, of the machine that `facts` describe."""

    def __init__(self, output: Path, facts: Mapping[str, str]) -> None:
        self.path = output.with_name(f".{output.name}.partial")
        self._facts = dict(facts)

    def read(self) -> list[Measurement]:
        """All measurements that are there; none when they are another machine's. A last line cut off is left out."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            if json.loads(lines[0]) != self._facts:
                return []
        except (OSError, ValueError, IndexError):
            return []
        found = []
        for line in lines[1:]:
            try:
                found.append(_MEASUREMENT.validate_json(line))
            except ValidationError:
                break
        return found

    def start(self, known: Sequence[Measurement]) -> None:
        """Begin the file anew with what is known. Raises `UsageError` when it cannot be written."""
        lines = [json.dumps(self._facts), *(json.dumps(asdict(each)) for each in known)]
        write_text(self.path, "".join(f"{line}\n" for line in lines), force=True)

    def add(self, measurement: Measurement) -> None:
        """Keep one more. Raises `UsageError` when it cannot be written."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(measurement)) + "\n")
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror or error}.") from None

    def remove(self) -> None:
        """The profile is written: nothing is left to resume."""
        self.path.unlink(missing_ok=True)


def load_steps(path: str | Path) -> MeasuredSteps:
    """Read a steps.json that `autoplan.Timer` wrote. Raises `UsageError` when it is not one."""
    path = Path(path)
    data = read_document(path, "file of measured steps")
    phases = data.setdefault("phases", {})
    known = {*MeasuredSteps.__dataclass_fields__, *(f"phases.{name}" for name in Phases.__dataclass_fields__)}
    unknown = sorted({*data, *(f"phases.{name}" for name in phases if isinstance(phases, dict))} - known)
    if unknown:
        raise UsageError(f"{path} is not a valid file of measured steps: '{unknown[0]}' is not a known key.")
    steps = validate(_STEPS, data, path, "file of measured steps")
    try:
        _POSITIVE.validate_python(steps.seconds)
        for value in (steps.peak_memory or 0.0, *(seconds for _, seconds in steps.phases.items())):
            _AMOUNT.validate_python(value)
    except ValidationError:
        raise UsageError(f"{path} holds a time or a size that is none, or no step at all.", "Measure it again.") from None
    return steps


def dump_steps(steps: MeasuredSteps) -> str:
    """The text of steps.json."""
    data: dict[str, Any] = asdict(steps)
    if steps.phases == Phases():
        del data["phases"]
    return json.dumps(data, indent=1) + "\n"
