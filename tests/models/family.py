"""What one entry of the zoo is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autoplan.capture import LoadedModel


@dataclass(frozen=True)
class Family:
    """A kind of model in sizes: "tiny", "full", and for some "70B" and the like."""

    name: str
    sizes: dict[str, Callable[[], LoadedModel]]
    blocks: int
    """How many blocks the tiny one has."""
    bodies: int
    """How many different ones."""
    meets: bool = False
    """Whether samples meet each other, so that costs are not linear in the batch."""

    def load(self, size: str = "tiny") -> LoadedModel:
        return self.sizes[size]()
