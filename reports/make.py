"""The sample reports of this folder: `make reports` plans them anew, and copies the README's output from a real run.

Run from the root of the repository, so that the plans name their models as a reader would.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

from autoplan import cli

HERE = Path(__file__).parent
README = HERE.parent / "README.md"

CASES = {
    "transformer-4": ["examples/transformer.py", "--gpus", "4"],
    "llama-8b-8": ["examples/llama.py", "--gpus", "8"],
    "llama-70b-64": ["examples/llama.py", "--set", "size=70B", "--gpus", "64"],
    "llama-405b-1024": ["examples/llama.py", "--set", "size=405B", "--gpus", "1024", "--global-batch", "1024"],
}
"""Name of the report -> what `autoplan plan` is asked."""

SHOWN = "Against plans written by hand"
"""The README shows the output up to this section."""


def make(name: str, folder: Path) -> str:
    """Plan one case into `folder`; what the command prints."""
    printed = io.StringIO()
    files = ["--output", str(folder / f"{name}.yaml"), "--report", str(folder / f"{name}.html"), "--force"]
    with contextlib.redirect_stdout(printed):
        code = cli.main(["plan", *CASES[name], *files])
    if code:
        sys.exit(code)
    return printed.getvalue()


def excerpt(printed: str) -> str:
    """The part of the output that the README shows, without trailing blanks."""
    return "\n".join(line.rstrip() for line in printed.partition(SHOWN)[0].strip().splitlines())


def readme_output(readme: str) -> tuple[int, int]:
    """Where in the README the output of `autoplan plan` stands: the ```text block behind the command."""
    start = readme.index("```text\n", readme.index("autoplan plan examples/llama.py --gpus 8")) + len("```text\n")
    return start, readme.index("\n```", start)


def main() -> None:
    """Make every report, and the README's output with the one it shows."""
    for name in CASES:
        printed = make(name, HERE)
        if name == "llama-8b-8":
            readme = README.read_text(encoding="utf-8")
            start, end = readme_output(readme)
            README.write_text(readme[:start] + excerpt(printed) + readme[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
