"""Arguments that several commands take, and how their text is read."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from autoplan.cli.talk import say
from autoplan.errors import UsageError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="model.py with build_model() and example_inputs(), model.py:factory, or a Hugging Face config.json or folder.",
    ),
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="A plan that `autoplan plan` wrote.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Keyword argument of build_model; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
Open = Annotated[bool, typer.Option("--open", help="Show the page in a browser.")]


def hardware_completions(incomplete: str) -> list[str]:
    """Names of profiles that begin so, for the shell."""
    from autoplan.profile.catalog import hardware_names

    return [name for name in hardware_names() if name.startswith(incomplete)]


def hardware_here(name: str | None) -> str | None:
    """The name that --hardware gives; for "auto" that of what is found on this machine, which is said."""
    from autoplan.profile.catalog import AUTO, detected

    if name != AUTO:
        return name
    choice = detected()
    say("hardware", f"{choice.name} ({choice.reason})")
    return choice.name


def share(text: str) -> float:
    """ "10%" or "0.1" as a number from 0 to below 1."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", text)
    number = float(match.group(1)) / (100 if match.group(2) else 1) if match else 1.0
    if not 0 <= number < 1:
        raise UsageError(f"'{text}' is no share of the memory.", "Write a percentage such as 10%, or a number below 1.")
    return number


def numbers(text: str) -> tuple[int, int]:
    """ "8" or "8..64" as (first, last)."""
    match = re.fullmatch(r"\s*(\d{1,7})\s*(?:\.\.\s*(\d{1,7})\s*)?", text)
    if match is None or int(match.group(1)) < 1:
        raise UsageError(f"--gpus '{text}' is no number of devices.", "Write a number such as 8, or a range such as 8..64.")
    return int(match.group(1)), int(match.group(2) or match.group(1))


def objective(text: str) -> tuple[str, float | None]:
    """ "fewest", "speed", "cost" or "cost=2.5" as (objective, price of a GPU-hour)."""
    name, equals, price = text.partition("=")
    known = ("fewest", "speed", "cost")
    if name not in known or (equals and (name != "cost" or not re.fullmatch(r"\d*\.?\d+", price) or not float(price))):
        raise UsageError(
            f"--objective '{text}' is none.", "Write fewest, speed, cost, or cost=2.50 with the price of a GPU-hour."
        )
    return name, float(price) if equals else None


def numbered(path: Path, number: int) -> Path:
    """plan.yaml as plan-2.yaml."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def wishes(pairs: Sequence[str]) -> dict[str, int | str]:
    """`["tp=2", "schedule=1f1b"]` by name, checked before any work."""
    from autoplan.files.wishes import ASKED, listed
    from autoplan.files.wishes import wishes as checked

    found: dict[str, str] = {}
    for pair in pairs:
        what, equals, value = pair.partition("=")
        if not equals or not value:
            raise UsageError(f"'{pair}' is no wish.", f"Write WHAT=VALUE, such as tp=2; WHAT is one of {listed(ASKED)}.")
        if what in found:
            raise UsageError(f"{what} is asked for twice.", "Ask for one of them at a time.")
        found[what] = value
    return checked(found)


def settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`["size=70B", "layers=4"]` as keyword arguments; what reads as a Python value becomes one, the rest stays text."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--set '{pair}' is no setting.", "Write --set name=value.")
        try:
            found[key] = {"true": True, "false": False}[value] if value in ("true", "false") else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found
