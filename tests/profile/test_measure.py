import pytest

from autoplan.errors import UsageError
from autoplan.files.hardware import dump_hardware, load_hardware
from autoplan.profile import measure
from autoplan.profile.measure import Message


def test_a_busy_machine_is_refused():
    with pytest.raises(UsageError, match="too busy"):
        measure.steady([1.0, 1.0, 1.0, 9.0, 9.0, 9.0])
    assert measure.steady([1.0, 1.1, 1.2, 50.0, 1.1, 1.0]) < 1.2


def test_processor_time_is_counted():
    assert measure.median_time(lambda: sum(range(20000)), budget=0.05) > 0


def test_links_are_recovered_from_their_own_times():
    def seconds(kind, group, size):
        trips = 2 if kind == "all_reduce" else 1
        sent = trips * (group - 1) / group * size
        hops = trips * (group - 1)
        return (
            2e-6 + (hops * 50e-6 if group == 2 else trips * 2 * 50e-6 + trips * 100e-6) + sent / 1e9 / (1 if group == 2 else 0.5)
        )

    timed = [
        Message(kind, group, float(size), seconds(kind, group, size))
        for group in (2, 4)
        for kind in ("all_reduce", "all_gather", "reduce_scatter")
        for size in (64, 2**12, 2**16, 2**20, 2**24, 2**26)
    ]
    inner, outer = measure._links(timed, 2e-6)
    assert (inner.span, outer.span) == (2, 0)
    assert inner.latency == pytest.approx(50e-6, rel=0.1)
    assert inner.bandwidth == pytest.approx(1e9, rel=0.1)
    assert outer.latency == pytest.approx(100e-6, rel=0.1)
    assert outer.bandwidth == pytest.approx(0.25e9, rel=0.1)  # each of two members of a domain sends half


@pytest.mark.gloo
def test_a_measured_profile_is_a_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_GEMM", (32, 64, 128, 192))
    monkeypatch.setattr(measure, "_ATTENTION", (64, 128))
    monkeypatch.setattr(measure, "_MOVED", (48 * 1024, 3 * 2**20))
    try:
        profile = measure.measure("here", ranks=(2,), messages=(4096, 65536, 2**20))
    except UsageError as error:
        pytest.skip(str(error))
    path = tmp_path / "here.yaml"
    path.write_text(dump_hardware(profile))
    assert load_hardware(path) == profile
    assert profile.links[0].span == 0


def test_the_command_overwrites_nothing(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("precious")
    assert measure.main(["-o", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert path.read_text() == "precious"
