"""The command line: stdout is data, stderr is talk, an exit code says how it went.

0 done; 1 nothing fits; 2 bad usage or file; 3 solver or internal failure; 130 interrupted. `main` alone catches errors.
Commands import what they need when they run, so that `--help` loads neither torch nor the solver.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoplan import __version__
from autoplan.errors import AutoplanError, UsageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from autoplan.search.planner import Progress

TRACEBACK = "AUTOPLAN_TRACEBACK"
"""Environment variable that asks for the traceback of an internal error, as `--verbose` does."""

app = typer.Typer(
    name="autoplan",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The automatic parallelism planner for PyTorch Transformers: a model and a number of GPUs in, the fastest plan out.",
    epilog="Start with:\n\nautoplan plan model.py --gpus 8",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. Every error of a user ends here as one sentence and a hint."""
    asked = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=asked, prog_name="autoplan")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    except AutoplanError as error:
        _say("error", error.message)
        if error.hint:
            _say("hint", error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        _say("error", "interrupted; nothing was written")
        return 130
    except Exception as error:
        _say("internal error", f"{type(error).__name__}: {error}")
        _say("hint", f"this is a fault of autoplan: report it with `autoplan --version` and what {TRACEBACK}=1 adds.")
        if os.environ.get(TRACEBACK) or "--verbose" in asked:
            traceback.print_exc()
        return 3
    return 0


def _say(kind: str, message: str) -> None:
    from autoplan.report.words import clean

    lines = [clean(line) for line in message.splitlines()] or [""]
    typer.echo(f"{kind}: " + "\n  ".join(lines), err=True)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    typer.echo(f"autoplan {__version__}\npython {platform.python_version()}")
    for package in ("torch", "pulp", "highspy"):
        try:
            typer.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} is not installed")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Versions of autoplan and what it stands on.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the traceback of an internal error.")] = False,
) -> None:
    pass


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="model.py with build_model() and example_inputs(), model.py:factory, or a Hugging Face config.json or folder.",
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Keyword argument of build_model; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]


@app.command(
    epilog="Examples:\n\nautoplan plan model.py --gpus 8\n\n"
    "autoplan plan model.py --gpus 64 --hardware h100-sxm-8x --global-batch 512\n\n"
    "autoplan plan model.py --set size=70B --gpus 256 --tp 8 -o plan-70b.yaml --report plan-70b.html"
)
def plan(
    model: Model,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Number of devices.")],
    hardware: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A profile of `autoplan hardware`, or a YAML file.")
    ] = None,
    global_batch: Annotated[int | None, typer.Option(min=1, help="Samples of one optimizer step, over all devices.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Fix this axis of the mesh; 1: no pipeline.")] = None,
    dp_replicate: Annotated[int | None, typer.Option(min=1, help="Fix this axis of the mesh.")] = None,
    dp_shard: Annotated[int | None, typer.Option(min=1, help="Fix this axis of the mesh.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Fix this axis of the mesh.")] = None,
    memory_headroom: Annotated[
        str, typer.Option(metavar="SHARE", help="Share of each device's memory to keep free: 10%.")
    ] = "0%",
    gap: Annotated[float, typer.Option(help="Distance from the optimum at which to stop.")] = 1e-4,
    time_limit: Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="Stop then with the best so far.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes.")] = Path("plan.yaml"),
    report: Annotated[Path, typer.Option("--report", help="Where the HTML report goes.")] = Path("report.html"),
    settings: Settings = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Find the fastest way to train MODEL on so many GPUs; write the plan and its report. Needs no GPU."""
    headroom, model_kwargs = _share(memory_headroom), _settings(settings)
    _check_outputs((output, report), force)
    from autoplan import api

    axes = {"pp": pp, "dp_replicate": dp_replicate, "dp_shard": dp_shard, "tp": tp}
    wishes: dict[str, Any] = {"hardware": hardware} if hardware is not None else {}
    with _progress() as on_progress:
        found = api.plan(
            model,
            gpus=gpus,
            global_batch=global_batch,
            fixed={axis: size for axis, size in axes.items() if size is not None},
            headroom=headroom,
            gap=gap,
            model_kwargs=model_kwargs,
            time_limit=time_limit,
            on_progress=on_progress,
            **wishes,
        )
    with _atomically(output) as plan_file, _atomically(report) as page_file:
        api.save_plan(found, plan_file)
        page_file.write_text(api.report(found), encoding="utf-8")
    if hardware is None:
        _say("hardware", f"{found.hardware} (--hardware names another one)")
    if global_batch is None:
        _say("global batch", f"{found.workload.global_batch} samples (--global-batch sets it)")
    if as_json:
        typer.echo(api.plan_json(found))
    else:
        from autoplan.report.terminal import summary

        _print(summary(found, str(output)))
    _say("wrote", f"{output} and {report}")
    if found.solve.stopped == "interrupted":
        raise typer.Exit(130)


@app.command(
    epilog="Examples:\n\nautoplan inspect model.py\n\nautoplan inspect model.py --set size=70B --dtype float32\n\n"
    "autoplan inspect model.py --json\n\nautoplan inspect 'path/config.json?seq_len=2048' --fx"
)
def inspect(
    model: Model,
    dtype: Annotated[str, typer.Option(help="Number format of the computation.")] = "bfloat16",
    settings: Settings = None,
    as_json: Json = False,
    fx: Annotated[bool, typer.Option("--fx", help="The model as torch.fx graphs instead, as Python code.")] = False,
) -> None:
    """Show what autoplan sees in MODEL: layers, operations, FLOPs, bytes. Nothing is allocated."""
    from autoplan import api
    from autoplan.report.inspect import as_dict, summary

    if fx:
        from autoplan.capture.fx import readable

        typer.echo(readable(api.load_model(model, **_settings(settings)), compute_dtype=dtype))
        return
    graph = api.inspect(api.load_model(model, **_settings(settings)), compute_dtype=dtype)
    if as_json:
        typer.echo(json.dumps(as_dict(graph), indent=2))
    else:
        _print(summary(graph))


class Format(StrEnum):
    """What `report` makes."""

    html = "html"
    terminal = "terminal"


@app.command(
    epilog="Examples:\n\nautoplan report plan.yaml\n\nautoplan report plan.yaml -o plan.html --force\n\n"
    "autoplan report plan.yaml --format terminal"
)
def report(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="A plan that `autoplan plan` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the page goes.")] = Path("report.html"),
    kind: Annotated[Format, typer.Option("--format", help="A page, or text on stdout.")] = Format.html,
    force: Force = False,
) -> None:
    """Show a plan again: as one HTML page that needs no network, or in the terminal."""
    if kind is Format.html:
        _check_outputs((output,), force)
    from autoplan import api

    found = api.load_plan(plan_file)
    if kind is Format.terminal:
        from autoplan.report.terminal import summary

        _print(summary(found, str(plan_file)))
        return
    with _atomically(output) as page_file:
        page_file.write_text(api.report(found), encoding="utf-8")
    _say("wrote", str(output))


@app.command(
    epilog="Examples:\n\nautoplan estimate plan.yaml\n\nautoplan estimate edited.yaml --model examples/llama.py\n\n"
    "autoplan estimate plan.yaml --json"
)
def estimate(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="A plan, perhaps edited by hand.")],
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Default: the model that the plan names.")] = None,
    as_json: Json = False,
) -> None:
    """Price a plan anew, as it is written: after an edit, or to check what it says."""
    from dataclasses import replace

    from autoplan import api

    written = api.load_plan(plan_file)
    priced = replace(written, prediction=api.estimate(written, model))
    if as_json:
        typer.echo(api.plan_json(priced))
    else:
        from autoplan.report.compare import repriced

        _print(repriced(written, priced))


@app.command(
    epilog="Examples:\n\nautoplan explain plan.yaml tp=2\n\nautoplan explain plan.yaml dp_shard=4 tp=2\n\n"
    "autoplan explain plan.yaml tp=3"
)
def explain(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="A plan that `autoplan plan` wrote.")],
    wishes: Annotated[list[str], typer.Argument(metavar="AXIS=SIZE...", help="Axes of the mesh: tp=2 dp_shard=4.")],
) -> None:
    """Answer "why not tp=2?": the best plan with that wish beside the given one, or why there is none."""
    from autoplan import api
    from autoplan.report.compare import answer

    fixed = _settings(wishes)
    for axis, size in fixed.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise UsageError(f"'{axis}={size}' is no size of an axis.", "Write a whole number: tp=2.")
    plan = api.load_plan(plan_file)
    told = api.explain(plan, fixed)
    _print(answer(plan, told.fixed, told.plan, told.reason))


@app.command(epilog="Examples:\n\nautoplan hardware\n\nautoplan hardware h100-sxm-8x\n\nautoplan hardware --json")
def hardware(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One profile, with the source of its numbers.")] = None,
    as_json: Json = False,
) -> None:
    """List the machines that autoplan knows, or show one of them."""
    from autoplan import api
    from autoplan.report import machines

    profiles = [api.load_hardware(each) for each in ([name] if name else api.hardware_names())]
    if as_json:
        typer.echo(json.dumps(machines.as_dicts(profiles), indent=2))
    else:
        _print(machines.details(profiles[0]) if name else machines.catalog(profiles))


def _share(text: str) -> float:
    """ "10%" or "0.1" as a number from 0 to below 1."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", text)
    share = float(match.group(1)) / (100 if match.group(2) else 1) if match else 1.0
    if not 0 <= share < 1:
        raise UsageError(f"'{text}' is no share of the memory.", "Write a percentage such as 10%, or a number below 1.")
    return share


def _settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`["size=70B", "layers=4"]` as keyword arguments; what reads as a Python value becomes one, the rest stays text."""
    settings: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--set '{pair}' is no setting.", "Write --set name=value.")
        try:
            settings[key] = {"true": True, "false": False}[value] if value in ("true", "false") else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return settings


def _check_outputs(paths: Sequence[Path], force: bool) -> None:
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
def _atomically(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its name only when all went well."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None] | None]:
    """A line on stderr that says how far the search is; nothing when nobody is looking."""
    console = _console(stderr=True)
    if not console.is_terminal:
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


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _print(what: RenderableType) -> None:
    _console().print(what)
