"""Commands that measure: profile, calibrate, tune."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoplan.cli import outputs, talk
from autoplan.cli.app import app
from autoplan.cli.arguments import Force, Open
from autoplan.errors import UsageError
from autoplan.units import SECOND, parse

if TYPE_CHECKING:
    from autoplan.hardware import HardwareProfile
    from autoplan.profile.session import Step, Tell


@app.command(
    epilog="Examples:\n\nautoplan profile -o my.yaml\n\nautoplan profile -o my.yaml --budget 30s --ranks 4\n\n"
    "torchrun --nnodes 2 --nproc-per-node 8 -m autoplan profile -o my.yaml"
)
def profile(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes.")],
    budget: Annotated[str, typer.Option(metavar="TIME", help="About how long it may take.")] = "60s",
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Processes to start here: as many as a plan will use. Default: all GPUs, or one a core."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Number format; may be repeated, the first is measured in full.")
    ] = None,
    links: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Of one device alone: whose links the profile takes.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", help="Where the page with the curves goes. Default: beside the profile.")
    ] = None,
    force: Force = False,
    open_page: Open = False,
) -> None:
    """Measure this machine: products, attention, memory, collectives; write a profile for --hardware, and a page.

    Alone it starts its own processes; under torchrun it uses those, and tells links inside hosts from links between them.
    Interrupted, it goes on where it was.
    """
    page = page or output.with_suffix(".html")
    seconds = parse(budget, SECOND)
    if not seconds > 0:
        raise UsageError(f"--budget '{budget}' is no time.", "Write 60s.")
    if output.suffix not in (".yaml", ".yml"):
        raise UsageError(f"'{output}' is no name for a profile.", "Let it end in .yaml.")
    if os.environ.get("RANK", "0") == "0":
        outputs.check((output, page), force)
    from autoplan.profile.measure import AGAIN
    from autoplan.profile.ranks import ranks_here, start

    wanted = (str(output), str(page), seconds, tuple(dtype or ()), links, talk.volume.quiet)
    try:
        if "WORLD_SIZE" in os.environ or (ranks or ranks_here()) == 1:
            _profile(*wanted)
        else:
            start(ranks or ranks_here(), _profile, *wanted, hint=AGAIN)
    except KeyboardInterrupt:
        talk.say("interrupted", AGAIN)
        raise
    if open_page and os.environ.get("RANK", "0") == "0":
        outputs.open_in_browser(page)


def _profile(output: str, page_path: str, seconds: float, dtypes: tuple[str, ...], links: str | None, quiet: bool) -> None:
    """On every rank: measure; the first one writes."""
    talk.volume.quiet = quiet
    from autoplan.files.hardware import dump_hardware
    from autoplan.profile.measure import finished, measure
    from autoplan.report import measured

    path, page = Path(output), Path(page_path)
    with _bar() as tell:
        found = measure(path, seconds, dtypes, _borrowed(links), tell)
    if os.environ.get("RANK", "0") != "0":
        return
    with outputs.atomically(path) as profile_file, outputs.atomically(page) as page_file:
        profile_file.write_text(dump_hardware(found.profile), encoding="utf-8")
        page_file.write_text(measured.page(found.profile, found.residuals, found.measurements), encoding="utf-8")
    finished(path)
    talk.show(measured.summary(found.profile, found.residuals))
    talk.say("wrote", f"{path} and {page}")


def _borrowed(links: str | None) -> HardwareProfile | None:
    """Whose links one GPU alone takes: by default the shipped profile's of the same card, if there is one."""
    from autoplan.profile.catalog import find_hardware
    from autoplan.profile.detect import choose, gpus

    if links is not None:
        return find_hardware(links)
    found = gpus() if os.environ.get("WORLD_SIZE", "1") == "1" else None
    if found is None or found.count > 1:
        return None
    from autoplan import api

    try:
        return find_hardware(choose(found, [find_hardware(name) for name in api.hardware_names()]).name)
    except UsageError:
        return None


@contextmanager
def _bar() -> Iterator[Tell | None]:
    """A bar on stderr that says what is timed; nothing when nobody is looking."""
    if talk.volume.quiet or os.environ.get("RANK", "0") != "0":
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def tell(step: Step) -> None:
            progress.update(task, completed=step.done, total=step.total, description=str(step.operation))

        yield tell
