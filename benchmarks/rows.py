"""Reading the published tables: files that may be odd, and fields that may be empty, misspelt or out of all bounds."""

from __future__ import annotations

import csv
from math import isfinite
from pathlib import Path

from autoplan.errors import UsageError

EMPTY = frozenset(("", "nan", "null", "n/a", "na", "-", "?"))
"""Ways of writing nothing; "none" is an answer to what is recomputed."""
LARGEST = 1e9
"""No count of a training run is larger: what is beyond is a slip of the table."""


class Refused(Exception):
    """Why a row is not priced."""


class Row:
    """One row of a table: every field by name, "" where there is none."""

    def __init__(self, fields: dict[str, str]) -> None:
        self.fields = fields

    def text(self, name: str) -> str:
        found = self.fields.get(name, "").strip()
        return "" if found.lower() in EMPTY else found

    def number(self, name: str) -> float | None:
        """The field as a number, None where it is empty. Raises `Refused` where it is no number, negative or absurd."""
        told = self.text(name)
        if not told or told == "None":
            return None
        try:
            value = float(told.replace(",", "") if told.count(",") and "." not in told.rpartition(",")[0] else told)
        except ValueError:
            raise Refused(f"{name} is not a number") from None
        if not isfinite(value) or value < 0:
            raise Refused(f"{name} is not a number that can be")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """The field as a whole number from 1 on. Raises `Refused` where it is empty without a `default`, or is none."""
        value = self.number(name)
        if value is None:
            if default is None:
                raise Refused(f"{name} is not told")
            return default
        if value != int(value) or not 1 <= value <= LARGEST:
            raise Refused(f"{name} is not a whole number from 1 on")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        told = self.text(name).lower()
        return told in ("true", "1", "1.0", "yes", "y", "on") if told else default


def read(path: Path) -> list[Row]:
    """The rows of a CSV file. Raises `UsageError` when it cannot be read as one."""
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            table = csv.DictReader(file)
            return [Row({k.strip(): v for k, v in row.items() if k and isinstance(v, str)}) for row in table]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except csv.Error as error:
        raise UsageError(f"{path} is not a table of comma-separated values: {error}.") from None
