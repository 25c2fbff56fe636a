"""plan.yaml: exact round trip, readable, deterministic, and a bad file is one sentence with its place."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoplan.errors import UsageError
from autoplan.files.plan import document, dump_plan, load_plan, plan_json, save_plan
from autoplan.files.shorthand import border_text, parse_border, ranges, unfold
from autoplan.plan import Plan
from autoplan.search.planner import search
from autoplan.strategy import GATHERED, PARTIAL, Border, shard
from autoplan.workload import Workload
from tests.bodies import model
from tests.hardware import machine
from tests.report.plans import piped


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan with tensor parallelism, several strategies, baselines and candidates of every kind."""
    graph = model(layers=12, hidden=4096, ffn=16384, seq=2048, vocab=32000)
    return search(graph, machine(memory=6.6e9), Workload(global_batch=24), gpus=8)


@pytest.fixture
def path(plan: Plan, tmp_path: Path) -> Path:
    save_plan(plan, tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def test_round_trip_is_exact(plan: Plan, path: Path) -> None:
    assert plan.mesh.tp > 1
    again = load_plan(path)
    assert again == plan
    assert dump_plan(again) == dump_plan(plan)


def test_the_file_is_readable(path: Path) -> None:
    text = path.read_text()
    assert "layers.0-" in text, "equal layers are run-length coded"
    assert "Shard(1) -> Replicate|Partial" in text
    assert max(map(len, text.splitlines())) <= 125


def test_json_is_the_same_document(plan: Plan) -> None:
    assert yaml.safe_load(plan_json(plan)) == document(plan)


def test_an_existing_file_is_not_overwritten(plan: Plan, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        save_plan(plan, path)
    assert path.read_bytes() == before
    save_plan(plan, path, force=True)
    assert [p.name for p in path.parent.iterdir()] == ["plan.yaml"], "no temporary file is left behind"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version: 1", "version: 7", "'version'"),
        ("\nmicro_batch: ", "\nmicro_batch: 5", "does not divide"),
        ("recompute: none", "recompute: some", "strategies"),
        ("Shard(0)", "Shard(minus)", "no layout"),
        ("outer: outer", "outer: inner", "there is no strategy"),
        ("solve:", "solved:", "'solve' is missing"),
        ("tokens: 2048", "tokens: many", "'tokens'"),
        (" in 0: ", " at 0: ", "is no border"),
        ("dp_replicate: 1,", "dp_replicate: 1, sp: 2,", "'mesh.sp' is not a known key"),
        ("    forward: ", "    forward: 5 s #", "do not add up"),
        ("mesh:", "micro_batch: 2\nmesh:", "given twice"),
    ],
)
def test_a_tampered_plan_is_one_sentence_with_the_place(path: Path, old: str, new: str, message: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError, match=message) as caught:
        load_plan(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_layers_placed_twice_are_refused(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace("layers:\n", "layers:\n- layers.3: " + yaml.safe_load(text)["outer"] + "\n", 1))
    with pytest.raises(UsageError, match=r"'layers\.3' is placed twice"):
        load_plan(path)


def test_times_of_stages_fit_the_pipeline(tmp_path: Path) -> None:
    """The picture of the pipeline is made of them."""
    text = dump_plan(piped("interleaved-1f1b", chunks=2))
    once = text.index("\n    - 10 ms")
    (tmp_path / "plan.yaml").write_text(text[:once] + text[once:].replace("\n    - 10 ms", "", 1))
    with pytest.raises(UsageError, match="2 chunks of layers for each of 4 ranks"):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no mapping"),
        (b"- a\n- b\n", "holds no mapping"),
        (b"a: [1, 2", "not valid YAML"),
        (b"\xff\xfe\x00binary", "cannot be read"),
        (b"a: &x [1]\nb: *x\n", "aliases are not allowed"),
        (b"? [1, 2]\n: 3\n", "plain text"),
        (b"x: 1\nx: 2\n", "given twice"),
        (b"a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_plan(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        load_plan(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        load_plan(tmp_path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_load_or_are_refused(path: Path, plan: Plan, data: st.DataObject) -> None:
    """Any edit gives a plan or a `UsageError`, never another exception."""
    lines = dump_plan(plan).splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(lines) - 1))
        kind = data.draw(st.sampled_from(["drop", "twice", "text", "number", "indent"]))
        junk = data.draw(st.text(max_size=12))
        line = lines[i]
        lines[i : i + 1] = {
            "drop": [],
            "twice": [line, line],
            "text": [line.split(":")[0] + ": " + junk],
            "number": [
                line.split(":")[0]
                + f": {data.draw(st.sampled_from(['-1', '1e400', '.nan', '0', 'null', '[]', '{}', '99999999999']))}"
            ],
            "indent": ["  " + line],
        }[kind]
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    with suppress(UsageError):
        load_plan(path)


names = st.lists(
    st.sampled_from(["layers.0", "layers.1", "layers.2", "layers.10", "enc.0", "enc.1", "head", "a.b", "x.01"]), unique=True
)


@given(names)
def test_ranges_fold_and_unfold(layers: list[str]) -> None:
    if layers:
        assert set(unfold(ranges(tuple(layers)))) == set(layers)


def test_ranges_text() -> None:
    assert ranges(("layers.0", "layers.1", "layers.2", "layers.5")) == "layers.0-2, layers.5"
    assert unfold("layers.0-2, head") == ("layers.0", "layers.1", "layers.2", "head")
    with pytest.raises(UsageError, match="runs backwards"):
        unfold("layers.5-2")


def test_border_text() -> None:
    assert parse_border(". in 0: Shard(1) -> Replicate|Partial") == Border("", "in", "0", shard(1), GATHERED)
    assert parse_border("attn.qkv out 0,1: Partial -> Shard(2, blocks=3)").target == shard(2, 3)


STRANGE = ["a, b", "layers, 2.0", "layers, 2.1", "x.3-5", " y ", "50%.0", "%2C", "</script> in 0: Partial -> Shard(0)", "a\nb"]


def test_a_name_may_hold_anything() -> None:
    """PyTorch allows every character but the dot in the name of a module."""
    assert sorted(unfold(ranges(tuple(STRANGE)))) == sorted(STRANGE)
    for name in STRANGE:
        border = Border(name, "in", "0", PARTIAL, shard(0))
        assert parse_border(border_text(border)) == border
