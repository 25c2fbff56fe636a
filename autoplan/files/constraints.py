"""A file of constraints -> `Constraints`."""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, with_config

from autoplan.constraints import Constraints
from autoplan.errors import UsageError
from autoplan.files.document import did_you_mean, read_document, validate
from autoplan.strategy import DEGREES, parse_layout

_ADAPTER = TypeAdapter(with_config(ConfigDict(extra="forbid"))(Constraints))
_CHOSEN = [*DEGREES, "micro_batch", "schedule", "cp_kind"]


def load_constraints(path: str | Path) -> Constraints:
    """Raises `UsageError`, naming file and key, when something is unknown or makes no sense."""
    path = Path(path)
    found = validate(_ADAPTER, read_document(path, "file of constraints"), path, "file of constraints")
    for key in (*found.only, *found.never):
        if key not in _CHOSEN:
            raise UsageError(
                f"{path}: there is no choice of '{key}'.", did_you_mean(key, _CHOSEN) or f"Known: {', '.join(_CHOSEN)}."
            )
    for layout in found.parameters.values():
        parse_layout(layout)
    return found
