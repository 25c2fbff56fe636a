"""What a user asks of a plan in words: `tp=2`, `schedule=zero-bubble`, `recompute=full`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from autoplan.errors import UsageError
from autoplan.files.document import did_you_mean
from autoplan.schedule import ScheduleKind
from autoplan.strategy import CP_KINDS, DEGREES, Recompute, Zero

WORDS: dict[str, tuple[int | str, ...]] = {
    "schedule": get_args(ScheduleKind),
    "cp_kind": CP_KINDS,
    "recompute": get_args(Recompute),
    "zero": get_args(Zero),
}
"""What has a word of its own for every choice; the rest are numbers."""
CHOICES = (*DEGREES, "micro_batch", "schedule", "cp_kind")
"""What is chosen once for a plan."""
ASKED = (*CHOICES, "recompute", "zero")
"""... and for every layer."""


def wishes(pairs: Mapping[str, Any]) -> dict[str, int | str]:
    """Checked, with numbers as numbers. Raises `UsageError` where there is no such thing to ask for, naming those that are."""
    return {what: _value(what, value) for what, value in pairs.items()}


def check_word(what: str, value: Any) -> None:
    """Raises `UsageError` when a choice has words and this is none of them."""
    if what in WORDS and value not in WORDS[what]:
        raise UsageError(
            f"{what} '{value}' is none of {listed(WORDS[what])}.", did_you_mean(str(value), list(map(str, WORDS[what])))
        )


def listed(words: tuple[int | str, ...]) -> str:
    """In a sentence."""
    return ", ".join(map(str, words))


def _value(what: str, value: Any) -> int | str:
    if what not in ASKED:
        raise UsageError(f"'{what}' is none of {listed(ASKED)}.", did_you_mean(what, list(ASKED)))
    if what in WORDS:
        known = {str(word): word for word in WORDS[what]}
        check_word(what, known.get(str(value), value))
        return known[str(value)]
    text = str(value)
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        kind = "number of samples" if what == "micro_batch" else "size of an axis"
        raise UsageError(f"'{what}={value}' is no {kind}.", f"Write a whole number: {what}=2.")
    return int(text)
