"""`autoplan doctor`: what is installed here and what is missing, to read or to paste into an issue."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import typer

from autoplan import __version__
from autoplan.cli import talk
from autoplan.cli.app import app
from autoplan.cli.arguments import Json

PACKAGES = ("torch", "pulp", "highspy")


@dataclass(frozen=True)
class Check:
    """One line of the answer. What is not `ok` says what to do."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def versions() -> Iterator[tuple[str, str | None]]:
    """(name, version) of autoplan, Python and what plans stand on, without importing it; None where it is missing."""
    yield "autoplan", __version__
    yield "python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, None


@app.command(epilog="Examples:\n\nautoplan doctor\n\nautoplan doctor --json")
def doctor(as_json: Json = False) -> None:
    """Say what is installed here, whether the solver solves, and which GPUs are seen. Exit code 1 if something is missing."""
    checks = [*_installed(), _solver(), _torch(), _gpus(), _terminal()]
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        from rich.console import Group
        from rich.text import Text

        from autoplan.report.tables import table

        rows = table(("<", "what"), ("<", ""), ("<", "found"))
        for check in checks:
            mark = Text("ok", style="green") if check.ok else Text("missing", style="red")
            rows.add_row(Text(check.name), mark, Text(check.found))
        advice = [Text(f"{check.name}: {check.advice}") for check in checks if not check.ok and check.advice]
        talk.show(Group(rows, *advice))
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _installed() -> Iterator[Check]:
    for name, found in versions():
        if name == "python":
            good = sys.version_info >= (3, 11)
            yield Check(name, good, str(found), "" if good else "autoplan needs Python 3.11 or later.")
        else:
            yield Check(name, found is not None, found or "not installed", f"install it: pip install {name}")


def _solver() -> Check:
    """Whether HiGHS solves the smallest of problems: min x, 1 <= x <= 2."""
    advice = "reinstall it: pip install 'highspy>=1.15,<1.16'"
    try:
        import highspy

        highs = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        highs.setOptionValue("threads", 1)  # of the whole process: see autoplan.search.solver
        highs.addCol(1.0, 1.0, 2.0, 0, [], [])
        highs.run()
        good = highs.getInfo().objective_function_value == 1.0
    except Exception as error:  # whatever is wrong with the solver is the answer here
        return Check("solver", False, f"{type(error).__name__}: {error}", advice)
    return Check("solver", good, "HiGHS solves" if good else "HiGHS gives a wrong answer", advice)


def _torch() -> Check:
    try:
        import torch
    except Exception as error:  # a broken installation raises what it likes
        return Check("torch loads", False, f"{type(error).__name__}: {error}", "reinstall it: see pytorch.org")
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU"
    return Check("torch loads", True, f"{cuda}; plans need no GPU")


def _gpus() -> Check:
    """GPUs that torch sees, or else the driver's own tool; none is no fault."""
    try:
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception:  # told by the check of torch
        names = []
    if names:
        return Check("GPUs", True, _counted(names))
    seen = _driver()
    if seen:
        return Check("GPUs", False, f"torch sees none of {_counted(seen)}", "install a torch that is built for CUDA.")
    return Check("GPUs", True, "none seen")


def _driver() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        asked = [tool, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _counted(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _terminal() -> Check:
    width = shutil.get_terminal_size().columns
    return Check("terminal", True, f"{width} columns, {sys.stdout.encoding}")
