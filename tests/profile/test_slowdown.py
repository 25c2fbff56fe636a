"""Kinds of collective that a library does worse than others: in a profile's file, in prices, and in what identifies it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autoplan.cost.collectives import collective_time
from autoplan.errors import UsageError
from autoplan.files.hardware import dump_hardware, load_hardware
from autoplan.hardware import HardwareProfile
from autoplan.measurement import COLLECTIVES
from tests.profile.simulated import truth


def slow(factor: float) -> HardwareProfile:
    profile = truth(1)
    return replace(profile, links=(replace(profile.links[0], slowdown=(("all_gather", factor),)),))


def test_a_kind_takes_so_many_times_as_long_and_the_others_as_long_as_before() -> None:
    for kind in COLLECTIVES:
        for size in (1e3, 1e6, 1e9):
            plain, now = (collective_time(kind, size, 4, 1, p) - p.device.launch for p in (slow(1.0), slow(2.5)))
            assert now == pytest.approx(plain * (2.5 if kind == "all_gather" else 1.0))


def test_it_is_part_of_what_identifies_a_profile() -> None:
    assert slow(2.5).fingerprint != slow(2.0).fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [("{all_gathr: 2}", "is not a map from collectives"), ("{all_gather: 0}", "more than 0|between"), ("2", "is not a map from")],
)
def test_what_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "slow.yaml"
    path.write_text(dump_hardware(slow(2.5)))
    assert load_hardware(path) == slow(2.5)
    path.write_text(dump_hardware(slow(2.5)).replace("{all_gather: 2.5}", text))
    with pytest.raises(UsageError, match=message):
        load_hardware(path)


def test_it_needs_a_source(tmp_path: Path) -> None:
    path = tmp_path / "slow.yaml"
    keys = "".join(f"      {key}: told\n" for key in ("bandwidth", "latency", "efficiency"))
    text = dump_hardware(slow(2.5))
    path.write_text(text[: text.rindex("      all:")] + keys)
    with pytest.raises(UsageError, match="source is missing for slowdown"):
        load_hardware(path)
