"""The program itself: its name, its help, the options that stand before a command."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from autoplan.cli.talk import volume

JOURNEY = (
    *("plan", "explain", "report", "compare", "apply", "verify", "export", "estimate", "inspect"),
    *("hardware", "profile", "tune", "calibrate", "doctor", "schema"),
)


class _Journey(TyperGroup):
    """Commands in the order in which people meet them; flags, which take no value, show none in the help."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=JOURNEY.index)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        return command and _without_types(command, command.get_params(ctx))

    def get_params(self, ctx: Any) -> list[Any]:
        found = super().get_params(ctx)
        _without_types(self, found)
        return found


def _without_types(command: Any, parameters: list[Any]) -> Any:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return command


app = typer.Typer(
    name="autoplan",
    cls=_Journey,
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
