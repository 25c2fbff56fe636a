"""What the file of another trainer says, in autoplan's words; and its sections, read with errors that name the key.

A file says neither the model nor, mostly, the number of devices: these stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoplan.errors import UsageError
from autoplan.files.document import did_you_mean
from autoplan.schedule import ScheduleKind
from autoplan.strategy import Mesh, Recompute, Zero

_LARGEST = 10**7
"""No count of a training run is larger: what is beyond is a slip."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One trainer's file."""

    path: Path
    trainer: str
    gpus: int | None = None
    """Where the file says it."""
    pp: int = 1
    dp_replicate: int | None = 1
    """None, for one of the two: the devices that the other axes leave."""
    dp_shard: int | None = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    zero: Zero = 3
    micro_batch: int | None = None
    local_batch: int | None = None
    """Samples that one data-parallel group takes in one run of the pipeline; with no `global_batch`, in a step."""
    global_batch: int | None = None
    schedule: ScheduleKind = "1f1b"
    chunks: int | None = 1
    """None: as many as `layers_per_stage` makes."""
    layers_per_stage: int = 1
    weights: tuple[int, int] = (0, 0)
    """As how many layers embedding and head count where the layers are dealt evenly."""
    stage_sizes: tuple[int, ...] = ()
    """Layers of every virtual stage, where the file cuts by hand."""
    recompute_every: int = 0
    """The n-th, 2n-th ... layer; 0: none."""
    recompute_first: int | None = None
    """So many at the beginning of every virtual stage instead."""
    recompute: Recompute = "full"
    """How those are."""
    layers: int | None = None
    tokens: int | None = None
    """Of one sample."""
    workload: Mapping[str, str | bool] = field(default_factory=dict)
    """Number formats and optimizer, by the names of `Workload`."""
    lost: tuple[str, ...] = ()
    """In sentences what of the file autoplan has no words for, and what is priced in its place."""

    def mesh(self, gpus: int | None) -> Mesh:
        """The mesh on so many devices, by default as many as the file says. Raises `UsageError` where they do not go together."""
        size = gpus or self.gpus
        known = self.pp * self.cp * self.tp * (self.dp_replicate or 1) * (self.dp_shard or 1)
        rest = 1
        if self.dp_replicate is None or self.dp_shard is None:
            if size is None:
                raise UsageError(f"{self.path} does not say on how many GPUs it runs.", "Give --gpus N.")
            rest = max(1, size // known)
        if size not in (None, known * rest):
            raise UsageError(
                f"{self.path}: its axes make {'multiples of ' if rest > 1 or known > (size or 0) else ''}{known} devices, "
                f"not {size}.",
                "Change its degrees, or give --gpus as many.",
            )
        return Mesh(
            pp=self.pp,
            dp_replicate=self.dp_replicate or rest,
            dp_shard=self.dp_shard or rest,
            cp=self.cp,
            tp=self.tp,
            ep=self.ep,
        )

    def batch(self, mesh: Mesh) -> int | None:
        """The global batch, None where the file does not say it."""
        return self.global_batch or (self.local_batch * mesh.dp if self.local_batch else None)


class Section:
    """Values by key, some of them perhaps as text. Raises `UsageError` naming key, file and remedy."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def section(self, key: str) -> Section:
        """The mapping under a key; an empty one where there is none."""
        found = self.values.get(key)
        if found is not None and not isinstance(found, dict):
            raise self.wrong(key, "a section of keys and values")
        return Section(self.path, found or {}, f"{self.prefix}{key}.")

    def wrong(self, key: str, wanted: str) -> UsageError:
        """The error that a value is not what it should be."""
        return UsageError(f"{self.path}: '{self.prefix}{key}' is {_shown(self.values[key])}, not {wanted}.", f"Write {wanted}.")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def count(self, key: str, default: int = 1, least: int = 1) -> int:
        """A whole number."""
        found = self._maybe_count(key, least)
        return default if found is None else found

    def maybe(self, key: str) -> int | None:
        """A whole number from 1 on, or None where the file does not say it."""
        return self._maybe_count(key, 1)

    def _maybe_count(self, key: str, least: int) -> int | None:
        found = self.values.get(key)
        if found is None:
            return None
        if isinstance(found, str) and found.strip().lstrip("-").isdecimal() and len(found) < 20:
            found = int(found)
        if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= _LARGEST:
            raise self.wrong(key, f"a whole number from {least} on")
        return found

    def degree(self, key: str) -> int | None:
        """A degree of parallelism, None where it is -1: what the others leave."""
        found = self.count(key, default=-1, least=-1)
        if found == 0:
            raise self.wrong(key, "a whole number from 1 on, or -1 for the devices that are left")
        return None if found == -1 else found

    def flag(self, key: str, default: bool = False) -> bool:
        found = self.values.get(key, default)
        if isinstance(found, str) and found.lower() in ("true", "false"):
            return found.lower() == "true"
        if not isinstance(found, bool):
            raise self.wrong(key, "true or false")
        return found

    def word(self, key: str, default: str, known: Sequence[str] = ()) -> str:
        """A text in lower case; of the `known` ones, if there are any."""
        found = self.values.get(key, default)
        if not isinstance(found, str) or (known and found.lower() not in known):
            meant = did_you_mean(str(found)[:80].lower(), list(known)) if known else ""
            error = self.wrong(key, f"one of {', '.join(known)}" if known else "a text")
            raise UsageError(error.message, meant or error.hint)
        return found.lower()

    def unknown(self, known: Sequence[str]) -> list[str]:
        """What is said of keys that nobody here knows."""
        return [
            f"'{self.prefix}{key}' is no key that autoplan knows. {did_you_mean(str(key)[:80], list(known))}".strip()
            for key in self.values
            if key not in known
        ]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
