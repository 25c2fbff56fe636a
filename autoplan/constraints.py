"""What a plan must keep to: the sizes of axes to choose from, and what some layers or parameters have to do.

Names may hold `*` and `?`. Where several patterns match a layer or a parameter the last one counts, key by key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWish:
    """What a layer must do; None: it is free."""

    recompute: Literal["none", "selective", "full"] | None = None
    zero: Literal[1, 2, 3] | None = None
    """Means nothing where nothing is sharded."""


Choices = dict[str, list[int | str]]
"""By axis of the mesh, "micro_batch" or "schedule"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """See the module."""

    only: Choices = field(default_factory=dict)
    never: Choices = field(default_factory=dict)
    layers: dict[str, LayerWish] = field(default_factory=dict)
    """By name of a layer."""
    parameters: dict[str, str] = field(default_factory=dict)
    """By full name of a parameter: its layout over tp, as a plan writes it."""

    def allows(self, what: str, value: int | str) -> bool:
        """Whether `what` may be `value`."""
        return value in self.only.get(what, [value]) and value not in self.never.get(what, [])

    @property
    def placing(self) -> bool:
        """Whether they say anything of layers or parameters."""
        return bool(self.layers or self.parameters)
