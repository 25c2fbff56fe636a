from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoplan.errors import UsageError
from autoplan.files.hardware import dump_hardware, load_hardware
from autoplan.hardware import Curve, Device, HardwareProfile, Link
from autoplan.profile.catalog import find_hardware, hardware_names
from autoplan.units import BYTE, exact

FILE = """\
name: tiny
backend: nccl
overlap: 0.2
source: {overlap: guess}
device:
  name: T1
  memory: 80 GiB
  reserved: 4 GiB
  bandwidth: 2 TB/s
  peak: {bfloat16: 300 TFLOP/s}
  matmul: [[1 GFLOP, 0.5], [10 GFLOP, 0.8]]
  attention: [[1 GFLOP, 0.4]]
  memory_efficiency: [[1 MB, 0.6], [100 MB, 0.9]]
  launch: 7 us
  source: {all: made up}
links:
  - name: inner
    span: 8
    bandwidth: 300 GB/s
    latency: 2 us
    efficiency: [[1 MiB, 0.3], [1 GiB, 0.8]]
    source: {all: made up}
  - name: outer
    span: 0
    bandwidth: 25 GB/s
    latency: 9 us
    efficiency: [[1 MiB, 0.3]]
    source: {all: made up}
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text):
        path = tmp_path / "tiny.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_hardware(path)

    return load_text


def test_quantities_arrive_in_base_units(load):
    profile = load(FILE)
    assert profile.device.memory == 80 * 2**30
    assert profile.device.launch == 7e-6
    assert profile.device.peak_of("bfloat16") == 3e14
    assert [link.span for link in profile.links] == [8, 0]
    assert profile.device.matmul.at(1e9) == 0.5


@pytest.mark.parametrize("name", hardware_names())
def test_shipped_profiles_round_trip(load, name):
    profile = find_hardware(name)
    assert profile.name == name
    assert load(dump_hardware(profile)) == profile


def curves():
    fraction = st.floats(0.01, 1.0)
    sizes = st.lists(st.floats(1.0, 1e14), min_size=1, max_size=5, unique=True).map(sorted)
    return st.builds(lambda s, f: Curve(tuple((x, f) for x in s)), sizes, fraction)


positive = st.floats(1e-9, 1e15)
# what a source may hold: one line of printable text
line = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=30)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_profile_round_trips(load, data):
    draw = data.draw
    device = Device(
        name=draw(line),
        memory=draw(st.floats(1e9, 1e13)),
        reserved=draw(st.floats(0, 1e8)),
        bandwidth=draw(positive),
        peak=tuple((d, draw(positive)) for d in ("float32", "bfloat16")),
        matmul=draw(curves()),
        attention=draw(curves()),
        memory_efficiency=draw(curves()),
        launch=draw(st.floats(0, 1)),
        dispatch=draw(st.floats(0, 1)),
        source=f"memory: {draw(line)}\nall: {draw(line)}",
    )
    links = tuple(
        Link(
            name=draw(line),
            span=span,
            bandwidth=draw(positive),
            latency=draw(st.floats(0, 1)),
            efficiency=draw(curves()),
            all_reduce_gain=draw(st.floats(1, 2)),
            source=f"all: {draw(line)}",
        )
        for span in (4, 0)
    )
    profile = HardwareProfile(
        name=draw(line), device=device, links=links, overlap=draw(st.floats(0, 1)), jitter=draw(st.floats(0, 1)),
        sharing=draw(st.floats(1, 100)), backend="gloo",
        source="all: x",
    )  # fmt: skip
    assert load(dump_hardware(profile)) == profile


def test_a_free_text_source_stands_for_all(load):
    profile = load(FILE)
    device = profile.device.__class__(**{**profile.device.__dict__, "source": "from\nmemory"})
    changed = profile.__class__(**{**profile.__dict__, "device": device})
    assert load(dump_hardware(changed)).device.source == "all: from memory"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("300 GB/s", "abc", r"links\.0\.bandwidth: 'abc' is not a quantity"),
        ("300 GB/s", "-3 GB/s", r"links\.0\.bandwidth: '-3 GB/s' is not more than 0"),
        ("300 GB/s", "3 us", r"links\.0\.bandwidth: '3 us' is not a quantity"),
        ("300 GB/s", ".nan", r"links\.0\.bandwidth: 'nan' is not"),
        ("300 GB/s", ".inf", r"links\.0\.bandwidth: 'inf' is not"),
        ("300 GB/s", "1e999", r"links\.0\.bandwidth: '1e999' is not"),
        ("300 GB/s", "[1]", r"links\.0\.bandwidth: '\[1\]' is not a quantity"),
        ("300 GB/s", "yes", r"links\.0\.bandwidth: 'True' is not a quantity"),
        ("300 GB/s", "9" * 400, r"links\.0\.bandwidth: '9999"),
        ("  memory:", "  memroy:", r"device\.memory: is missing.*device\.memroy: is not a known key \(Did you mean memory\?\)"),
        ("span: 8", "span: 8.5", r"links\.0\.span: '8\.5' is not a whole number"),
        ("span: 8", "span: -1", r"links\.0\.span: '-1' is not a whole number"),
        ("span: 8", "span: 0", "spans must grow"),
        ("reserved: 4 GiB", "reserved: 90 GiB", "reserved is not less than memory"),
        ("overlap: 0.2", "overlap: 2", r"overlap: '2' is not between 0 and 1"),
        ("backend: nccl", "backend: mpi", "backend: is not one of nccl, gloo"),
        ("{bfloat16: 300 TFLOP/s}", "{int3: 300 TFLOP/s}", "is not one of float64, float32"),
        ("{bfloat16: 300 TFLOP/s}", "{}", "peak: is empty"),
        ("[[1 GFLOP, 0.4]]", "[]", "attention: is not a curve"),
        ("[[1 GFLOP, 0.4]]", "[[1 GFLOP, 1.4]]", "'1.4' is not between 0 and 1"),
        ("[[1 GFLOP, 0.4]]", "[[1 GFLOP]]", "attention: is not a curve"),
        ("[[1 GFLOP, 0.4]]", "[[2 GFLOP, 0.4], [1 GFLOP, 0.4]]", "sizes of a curve must grow"),
        ("[[1 GFLOP, 0.5], [10 GFLOP, 0.8]]", "[[1 GFLOP, 0.1], [2 GFLOP, 0.8]]", "more work would take less time"),
        ("{all: made up}", "{}", "source is missing for memory, reserved"),
        ("{all: made up}", "{all: made up, color: x}", "source names no number: color"),
        ("{overlap: guess}", "guess", "source: is not a map"),
        ("name: tiny", "name: [a]", "name: is not text"),
        ("name: tiny", "name: tiny\nname: other", "given twice"),
        ("name: tiny", "name: tiny\nmeasured: 2026-13-45", "measured|month"),
        ("name: tiny", "name: tiny\nmeasured: soon", "'soon' is not a date"),
        ("name: tiny", "name: &a tiny\nother: *a", "alias"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(load, old, new, message):
    assert old in FILE
    with pytest.raises(UsageError, match=f"(?s)tiny.yaml.*{message}"):
        load(FILE.replace(old, new, 1))


def test_everything_wrong_is_told_at_once(load):
    with pytest.raises(UsageError) as error:
        load(FILE.replace("300 GB/s", "abc").replace("7 us", "soon").replace("80 GiB", "80 us"))
    for place in ("links.0.bandwidth", "device.launch", "device.memory"):
        assert place in error.value.message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "- 1",
        "{",
        b"\x00\x01",
        b"\xff\xfe\x00",
        "[" * 2000,
        "a: !!python/object/apply:os.system [x]",
        "a: !!binary zzz",
        "a: !!timestamp x",
        "a: !!int x",
        "a: !!float ''",
        "? [1]\n: 2",
        "--- a\n--- b",
        "a: " + "9" * 5000,
        "<<: 3",
        FILE + "x" * (1 << 10),
        FILE.replace("links:", "links: 3\nrest:"),
        FILE.replace("device:", "device: 3\nrest:"),
    ],
)
def test_a_hostile_file_is_a_usage_error(load, text):
    with pytest.raises(UsageError):
        load(text)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(FILE)), st.text(max_size=8), st.integers(0, 12))
def test_no_edit_brings_a_traceback(load, at, text, cut):
    with suppress(UsageError):
        load(FILE[:at] + text + FILE[at + cut :])


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError):
            load_hardware(path)


def test_exact_sizes_in_curves():
    assert exact(64 * 1024.0, BYTE) == "64 KiB"
