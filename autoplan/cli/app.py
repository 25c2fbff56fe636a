"""The program itself: its name, its help, the options that stand before a command."""

from __future__ import annotations

from typing import Annotated

import typer

from autoplan.cli.talk import volume

app = typer.Typer(
    name="autoplan",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The automatic parallelism planner for PyTorch Transformers: a model and a number of GPUs in, the fastest plan out.",
    epilog="Start with:\n\nautoplan plan model.py --gpus 8",
)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    from autoplan.cli.doctor import versions

    for name, found in versions():
        typer.echo(f"{name} {found or 'is not installed'}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Versions of autoplan and what it stands on.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but errors.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more: how long it took, the traceback of an internal error.")
    ] = False,
) -> None:
    volume.quiet, volume.verbose = quiet and not verbose, verbose
