"""The command line: stdout is data, stderr is talk, an exit code says how it went.

0 done; 1 nothing fits; 2 bad usage or file; 3 solver or internal failure; 130 interrupted. `main` alone catches errors.
Commands import what they need when they run, so that `--help` loads neither torch nor the solver.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from autoplan.cli import (  # noqa: F401  (each adds its commands to `app`)
    applying,
    calibrating,
    doctor,
    exporting,
    planning,
    pricing,
    profiling,
    showing,
    tuning,
    verifying,
)
from autoplan.cli.app import app
from autoplan.cli.talk import fail, volume
from autoplan.errors import AutoplanError

__all__ = ["app", "main"]

TRACEBACK = "AUTOPLAN_TRACEBACK"
"""Environment variable that asks for the traceback of an internal error, as `--verbose` does."""

_EVERYWHERE = ("-q", "--quiet", "-v", "--verbose")
"""Options of the program itself that may also stand behind the command, where people write them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. Every error of a user ends here as one sentence and a hint."""
    asked = _in_front(list(sys.argv[1:] if arguments is None else arguments))
    volume.quiet = volume.verbose = False
    try:
        app(args=asked, prog_name="autoplan")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    except AutoplanError as error:
        fail("error", error.message)
        if error.hint:
            fail("hint", error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        fail("error", "interrupted; nothing was written")
        return 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        fail("internal error", f"{type(error).__name__}: {error}")
        fail("hint", f"this is a fault of autoplan: report it with `autoplan doctor` and what {TRACEBACK}=1 adds.")
        if os.environ.get(TRACEBACK) or volume.verbose:
            traceback.print_exc()
        return 3
    return 0


def _in_front(asked: list[str]) -> list[str]:
    end = asked.index("--") if "--" in asked else len(asked)
    moved = [word for word in asked[:end] if word in _EVERYWHERE]
    return moved + [word for word in asked[:end] if word not in _EVERYWHERE] + asked[end:]
