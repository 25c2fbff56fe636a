"""Damaged files and command lines, a few of each: `python -m benchmarks.fuzz` has thousands."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz
from tests.report.plans import llama, piped

PLANS = (llama(), piped(), piped("interleaved-1f1b", chunks=2), piped("gpipe", 2, batch=8))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_damaged_is_refused_in_a_sentence(folder: Path) -> None:
    with fuzz.captured_once():
        outcome = fuzz.fuzz(PLANS, files=60, lines=60, each=4)
    assert not outcome.misses, outcome.misses[0]
    assert {code for _, code in outcome.codes} <= {0, 1, 2}
    assert {name for name, _ in outcome.codes} == {*fuzz.SHARES, "command line"}


@pytest.mark.parametrize(
    ("code", "told", "found"),
    [
        (3, "", "exit code 3"),
        (2, "Traceback (most recent call last)", "a traceback"),
        (2, "hm", "no sentence"),
        (2, "error: x\nhint: y\n", ""),
        (0, "", ""),
    ],
)
def test_a_miss_would_be_seen(folder: Path, code: int, told: str, found: str) -> None:
    assert fuzz.complaint(code, told) == found


def test_a_damaged_output_would_be_seen(folder: Path) -> None:
    (folder / "out.html").write_text("<html>", encoding="utf-8")
    assert "not whole" in fuzz.complaint(0, "")
    assert "failed" in fuzz.complaint(2, "error: x\n")
    (folder / "out.html").unlink()
    (folder / ".p.1.html").write_text("", encoding="utf-8")
    assert "draft" in fuzz.complaint(0, "")
