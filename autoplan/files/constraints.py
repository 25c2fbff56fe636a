"""A file of constraints -> `Constraints`."""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, with_config

from autoplan.constraints import Constraints
from autoplan.errors import UsageError
from autoplan.files.document import did_you_mean, read_document, validate
from autoplan.files.wishes import CHOICES, check_word
from autoplan.strategy import parse_layout

_ADAPTER = TypeAdapter(with_config(ConfigDict(extra="forbid"))(Constraints))


def load_constraints(path: str | Path) -> Constraints:
    """Raises `UsageError`, naming file and key, when something is unknown or makes no sense."""
    path = Path(path)
    found = validate(_ADAPTER, read_document(path, "file of constraints"), path, "file of constraints")
    for key, values in (*found.only.items(), *found.never.items()):
        if key not in CHOICES:
            raise UsageError(
                f"{path}: there is no choice of '{key}'.", did_you_mean(key, list(CHOICES)) or f"Known: {', '.join(CHOICES)}."
            )
        for value in values:
            check_word(key, value)
    for layout in found.parameters.values():
        parse_layout(layout)
    return found
