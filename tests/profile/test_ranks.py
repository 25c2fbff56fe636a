"""Ranks started on this machine: what they did is there when they end, and what ended them is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoplan.errors import UsageError
from autoplan.profile.ranks import start
from tests.profile import faults


def test_a_rank_that_is_done_does_not_fail_any_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start(2, faults.aborts_at_exit, str(tmp_path))
    assert [(tmp_path / name).read_text() for name in "01"] == ["rank 0 of 2\n", "rank 1 of 2\n"]
    said = capfd.readouterr()
    assert said.out == "donedone"
    assert said.err.count("a library's greeting") == 2


def test_what_a_rank_raised_is_told_in_a_line() -> None:
    with pytest.raises(UsageError, match=r"^a rank failed: RuntimeError: shapes differ\.$"):
        start(2, faults.raises)
