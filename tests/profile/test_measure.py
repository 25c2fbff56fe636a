"""`autoplan profile` on this machine: what it writes, and what it does when something goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoplan.cli import main
from autoplan.errors import UsageError
from autoplan.files.hardware import load_hardware
from autoplan.files.measurements import SideFile
from autoplan.profile import measure, session
from autoplan.profile.ranks import start
from tests.profile import faults


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "TOO_NOISY", 1e9)  # tests run on busy machines
    monkeypatch.setattr(measure, "suite", lambda machine, dtypes: [op for op in faults.SHORT if op.group <= machine.ranks])


def profile(output: Path, *more: str) -> int:
    return main(["profile", "-o", str(output), "--budget", "1s", "--ranks", "1", "--links", "cpu-gloo", *more])


@pytest.mark.usefixtures("short")
def test_the_command_writes_a_profile_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "my.yaml"
    assert profile(output) == 0
    found = load_hardware(output)
    assert found.name == "my"
    assert found.measured
    assert "measured: " in found.device.source
    assert found.links == load_hardware(Path(__file__).parents[2] / "hwprofiles" / "cpu-gloo.yaml").links
    page = (tmp_path / "my.html").read_text()
    assert "Roofline" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "matmul, float32" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.html", "my.yaml"], "nothing is left beside them"
    assert profile(output) == 2
    assert "exists" in capsys.readouterr().err
    assert load_hardware(output) == found


@pytest.mark.usefixtures("short")
def test_what_cannot_be_written_is_said_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile(Path("/proc/my.yaml")) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert profile(Path("nowhere/my.yaml")) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert profile(Path("my.txt")) == 2
    assert main(["profile", "-o", "my.yaml", "--budget", "0s"]) == 2


@pytest.mark.usefixtures("short")
def test_one_device_needs_somebodys_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "-o", str(tmp_path / "my.yaml"), "--ranks", "1"]) == 2
    assert "--links" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("short")
def test_a_nan_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "my.yaml"
    output.write_text("precious")
    monkeypatch.setattr(measure.TorchBench, "times", lambda self, op, seconds: [float("nan")] * 5)
    assert profile(output, "--force") == 2
    assert "which is no time" in capsys.readouterr().err
    assert output.read_text() == "precious"


@pytest.mark.gloo
def test_a_rank_dies_and_the_next_run_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "my.yaml"
    output.write_text("precious")
    with pytest.raises(UsageError, match=r"a rank ended before its time|one of the others ended"):
        start(2, faults.run, str(output), 9)
    assert output.read_text() == "precious"
    [side] = [path for path in tmp_path.iterdir() if path != output]
    kept = side.read_text().splitlines()[1:]
    assert len(kept) == 9
    start(2, faults.run, str(output), None)
    assert output.read_text().splitlines() == [str(op) for op in faults.SHORT]
    assert not side.exists()


def test_a_side_file_of_another_machine_is_not_believed(tmp_path: Path) -> None:
    side = SideFile(tmp_path / "my.yaml", {"device": "one"})
    side.start([])
    side.path.write_text("not json\n")
    assert side.read() == []
