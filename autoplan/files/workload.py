"""A model file's `workload = {...}` -> `Workload`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from autoplan.errors import UsageError
from autoplan.files.document import did_you_mean
from autoplan.workload import Workload

_ADAPTER = TypeAdapter(Workload)

SAMPLES_PER_GPU = 4
"""The global batch, in samples a GPU, when neither the user nor the model's file says one."""


def workload(from_file: Mapping[str, Any], wishes: Mapping[str, Any], gpus: int) -> Workload:
    """The workload: wishes over the model file's own over the defaults. Raises `UsageError` on what makes no sense."""
    said = {**from_file, **{name: value for name, value in wishes.items() if value is not None}}
    said.setdefault("global_batch", SAMPLES_PER_GPU * gpus)
    return read_workload(said)


def read_workload(data: Mapping[str, Any]) -> Workload:
    """Raises `UsageError`, naming the key, when something is unknown or makes no sense."""
    known = list(Workload.__dataclass_fields__)
    for key in data:
        if key not in known:
            raise UsageError(f"'{key}' is no part of a workload.", did_you_mean(str(key), known) or f"Known: {', '.join(known)}.")
    try:
        load = _ADAPTER.validate_python(dict(data))
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        raise UsageError(f"workload '{'.'.join(map(str, item['loc']))}': {item['msg'].lower()}.") from None
    if load.global_batch < 1:
        raise UsageError(f"a global batch of {load.global_batch} is too small.", "Ask for at least one sample a step.")
    return load
