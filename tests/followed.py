"""A command of a document, run as a reader would: whole where two cores can, else with two ranks, a small model and few steps.

What is replaced is only how much: ranks, model, steps, and the operations that `autoplan profile` times, as all of them
take minutes and want a machine that does nothing else. Benchmarks say their `--help`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from torch.distributed.run import get_args_parser

from autoplan import cli
from autoplan.profile import measure, session
from tests.apply.ranks import run
from tests.profile.faults import SHORT

ROOT = Path(__file__).parent.parent
SMALL = "examples/gpt.py?layers=2&hidden=64&heads=4&ffn=256&vocab=256&seq_len=32"
FEWER = {"--steps": "5", "--top": "2", "--budget": "1s", "--resume": "out/checkpoint-5"}
RANKS = 2


def follow(command: str) -> None:
    """Raises `AssertionError` where it does not end well."""
    program, *arguments = shlex.split(command)
    if program == "autoplan" and arguments[0] == "profile":
        run(RANKS, command_on_a_rank, fewer(arguments, "--budget"))  # alone it starts ranks that know nothing of SHORT
    elif program == "autoplan":
        ends_well(arguments)
    elif program == "torchrun":
        torchrun(arguments)
    elif program == "make":
        for target in arguments:
            make(target)
    elif program == "python" and arguments[0] == "-m":
        helps(arguments[1], arguments[2:])
    else:
        assert command in ("cd autoplan", "source .venv/bin/activate"), f"nobody runs '{command}'"


def ends_well(arguments: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(arguments)
    assert code == 0, f"autoplan {shlex.join(arguments)}\n{said.getvalue()}"


def fewer(arguments: list[str], option: str = "") -> list[str]:
    """The same command with FEWER of everything, of `option` even where it is left out, and with SMALL for a model."""
    made = [*arguments, *([option, ""] if option and option not in arguments else [])]
    for i, word in enumerate(made):
        if re.fullmatch(r"\S+\.py", word):
            made[i] = SMALL
        elif made[i - 1] in FEWER:
            made[i] = FEWER[made[i - 1]]
    return made


def torchrun(arguments: list[str]) -> None:
    options = get_args_parser().parse_args(arguments)
    many = int(options.nproc_per_node) * int(options.nnodes.rpartition(":")[2]) > RANKS
    rest = options.training_script_args
    if options.module:
        assert options.training_script == "autoplan"
        run(RANKS, command_on_a_rank, fewer(rest, "--budget" if rest[0] == "profile" else "--steps"))
        return
    script = Path(options.training_script)
    assert script.is_file(), script
    if many:
        plan = next(word for word in rest if word.endswith(".yaml"))
        ends_well(["plan", SMALL, "--gpus", str(RANKS), "--hardware", "cpu-gloo", "-o", plan, "--force"])
        rest = fewer(rest, "--steps")
    run(RANKS, script_on_a_rank, script, rest)


def command_on_a_rank(arguments: list[str]) -> None:
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(dist.get_world_size()))
    session.NOISY = session.TOO_NOISY = 1e9  # tests run on busy machines
    with mock.patch.object(measure, "suite", return_value=SHORT):
        ends_well(arguments)


def script_on_a_rank(script: Path, arguments: list[str]) -> None:
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def make(target: str) -> None:
    """What its recipe calls of autoplan and of the benchmarks; the checks of `make test` run this."""
    told = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    calls = [line.partition("/bin/")[2] for line in told.stdout.splitlines()]
    assert any(calls), f"make {target} does nothing"
    for call in calls:
        if call.startswith(("autoplan ", "python -m benchmarks.")):
            follow(call)


def helps(module: str, arguments: list[str]) -> None:
    """`python -m module --help` has all flags of the command; files that it reads are there."""
    said, code = io.StringIO(), None
    known = sys.modules.pop(module, None)  # else runpy warns of running it twice
    with mock.patch.object(sys, "argv", [module, "--help"]), contextlib.redirect_stdout(said):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    if known is not None:
        sys.modules[module] = known
    assert code == 0, f"{module} --help ended with {code}"
    for word in arguments:
        if word.startswith("-"):
            assert re.search(rf"(?<!\S){re.escape(word)}\b", said.getvalue()), f"{module} has no {word}"
        elif word.startswith("benchmarks/"):
            assert any(ROOT.glob(word)), word
