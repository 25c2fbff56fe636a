"""Plans that someone damaged: every command that shows one ends with 0 or with one sentence, and writes whole files or none."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoplan import cli
from autoplan.export.targets import TARGETS
from autoplan.files.plan import dump_plan
from tests.report.plans import llama, piped

TOKENS = (
    *("0", "-1", "1e309", "nan", "null", "[]", "{}", '""', "1", "2", "8", "1000000", "true", '"\\u202e"', "9" * 30),
    *("0 s", "1 GiB", "gpipe", "interleaved-1f1b", "layers.0", "x" * 300),
)
COMMANDS = (
    ["report", "p.yaml", "-o", "p.html", "--force"],
    ["report", "p.yaml", "--format", "terminal"],
    ["report", "p.yaml", "--format", "csv"],
    ["report", "p.yaml", "--format", "trace"],
    ["compare", "p.yaml", "whole.yaml", "-o", "c.html", "--force"],
    ["compare", "whole.yaml", "p.yaml", "--json"],
    *(["export", "p.yaml", "--to", to] for to in TARGETS),
)


def damaged(text: str, chance: random.Random) -> str:
    """The plan with a value replaced, or a line lost or doubled."""
    lines = text.splitlines()
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(lines))
        kind = chance.random()
        values = list(re.finditer(r"(?<=[:\[{, ])([\w.\- ]+)(?=[,}\]]|$)", lines[at]))
        if kind < 0.6 and values:
            value = chance.choice(values)
            lines[at] = f"{lines[at][: value.start()]} {chance.choice(TOKENS)}{lines[at][value.end() :]}"
        elif kind < 0.8:
            lines.pop(at)
        else:
            lines.insert(at, lines[at])
    return "\n".join(lines)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole.yaml").write_text(dump_plan(llama()), encoding="utf-8")
    yield tmp_path
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no draft is left"


@pytest.mark.parametrize(
    "make", [piped, lambda: piped("interleaved-1f1b", chunks=2), lambda: piped("gpipe", 2, batch=8), llama], ids="piga"
)
def test_a_damaged_plan(make: Callable[..., object], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, chance = dump_plan(make()), random.Random(0)  # type: ignore[arg-type]
    for _ in range(25):
        (folder / "p.yaml").write_text(damaged(text, chance), encoding="utf-8")
        for command in chance.sample(COMMANDS, 4):
            code = cli.main(command)
            err = capsys.readouterr().err
            assert code in (0, 2), f"{command}\n{(folder / 'p.yaml').read_text()}\n{err}"
            assert code == 0 or re.match(r"error: .+\n(hint: .+\n)?$", err), err


def test_damaged_command_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(0)
    words = [
        "report",
        "compare",
        "export",
        "hardware",
        "schema",
        "whole.yaml",
        "nowhere.yaml",
        "--to",
        "megatron",
        "--format",
        "csv",
    ]
    words += [
        "-o",
        "x.html",
        "--json",
        "--force",
        "-q",
        "-v",
        "--",
        "",
        "-",
        "--open=1",
        "\x1b[31m",
        "h100",
        "--help",
        "--gpus",
        "-1",
    ]
    for _ in range(300):
        command = [chance.choice(words) for _ in range(chance.randrange(1, 6))]
        assert cli.main(command) in (0, 1, 2), command
        assert "Traceback" not in capsys.readouterr().err
