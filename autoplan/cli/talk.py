"""What is said while a command runs: on stderr, so that stdout stays data. `--quiet` silences all but errors."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from autoplan.search.planner import Progress


class _Volume:
    """How much is said in this run of the program."""

    quiet = False
    verbose = False


volume = _Volume()


def fail(kind: str, message: str) -> None:
    """An error, a hint, or a warning that what was asked for is not all there: said however quiet the run is."""
    from autoplan.report.words import clean

    first, *more = [clean(line) for line in message.splitlines()] or [""]
    lines = [f"{kind}: {first}", *(f"  {line}" for line in more)]
    if sys.stderr.isatty():
        lines = [_wrapped(line) for line in lines]
    typer.echo("\n".join(lines), err=True)


def _wrapped(line: str) -> str:
    """Broken between words, as the tables on stdout are; a file or a pipe gets whole lines."""
    width = max(shutil.get_terminal_size().columns, 20)
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def say(kind: str, message: str) -> None:
    """What happened, unless nobody wants to hear it."""
    if not volume.quiet:
        fail(kind, message)


def add(kind: str, message: str) -> None:
    """What only `--verbose` says."""
    if volume.verbose:
        fail(kind, message)


@contextmanager
def progress() -> Iterator[Callable[[Progress], None] | None]:
    """A line on stderr that says how far the search is; nothing when nobody is looking."""
    console = _console(stderr=True)
    if volume.quiet or not console.is_terminal:
        yield None
        return
    from rich.text import Text

    from autoplan.report.words import clean, seconds

    with console.status(Text("reading the model")) as status:

        def tell(progress: Progress) -> None:
            parts = [f"{progress.looked_at}/{progress.total} meshes"]
            parts += [
                f"{name} {seconds(value)}"
                for name, value in (("best", progress.best), ("bound", progress.bound))
                if value is not None
            ]
            status.update(Text(", ".join([*parts, *([clean(progress.note)] if progress.note else [])])))

        yield tell


def show(what: RenderableType) -> None:
    """Print tables and text on stdout."""
    _console().print(what)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)
