"""Files that commands write: refused before the work starts, whole or not at all, opened when asked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from autoplan.cli.talk import say
from autoplan.errors import UsageError


def check(paths: Sequence[Path], force: bool) -> None:
    """Refuse before the long work starts what could not be written after it."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError(
            f"'{paths[0]}' is asked to hold both the plan and the report.", "Give --output and --report different names."
        )
    for path in paths:
        if path.is_dir():
            raise UsageError(f"'{path}' is a folder.", "Name a file.")
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder '{path.parent}'.", "Make it first, or name another file.")
        if path.exists() and not force:
            raise UsageError(f"'{path}' exists.", "Use --force to overwrite it, or name another file.")


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its name only when all went well."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Write a text whole or not at all, and say so."""
    with atomically(path) as draft:
        draft.write_text(text, encoding="utf-8")
    say("wrote", str(path))


def open_in_browser(path: Path) -> None:
    """Show a page that was written, if this machine has a browser."""
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        say("open", f"no browser was found here: open {path} yourself")
