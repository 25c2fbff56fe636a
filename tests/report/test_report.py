"""The report says what the plan says, harms nobody, and looks as it looked (the golden texts)."""

from __future__ import annotations

import io
import itertools
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from autoplan.plan import Plan
from autoplan.report import charts, facts, layers, sure, words
from autoplan.report.page import page, scatter
from autoplan.report.terminal import summary
from autoplan.strategy import GATHERED, PARTIAL, Mesh, Sharding, shard
from autoplan.units import SECOND, parse

from .plans import EVIL, frontier, hostile, llama, piped, single

GOLDEN = Path(__file__).parent / "golden"
PLANS = {"llama": llama, "single": single, "piped": piped, "hostile": hostile}


def plain(what: RenderableType, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, no_color=True).print(what)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


class Reader(HTMLParser):
    """What a browser without JavaScript makes of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._silent = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._silent += tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.mark.parametrize("name", ["llama", "single", "piped"])
def test_the_terminal_shows_what_it_showed(name: str) -> None:
    """Set AUTOPLAN_UPDATE_GOLDEN=1 to accept a new look."""
    text, golden = plain(summary(PLANS[name]())), GOLDEN / f"{name}.txt"
    if os.environ.get("AUTOPLAN_UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PLANS)
def test_the_terminal_keeps_to_80_columns_and_obeys_no_name(name: str) -> None:
    text = plain(summary(PLANS[name]()))
    wide = [line for line in text.splitlines() if len(line) > 80 and "torchrun" not in line]
    assert not wide
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize("name", PLANS)
def test_the_page_is_small_and_asks_no_network(name: str) -> None:
    text = page(PLANS[name]())
    assert len(text.encode()) < 300_000
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    sources = [value for key, value in Reader(text).attributes if key in ("src", "href", "srcset", "action", "data")]
    assert all(value == "data:," or (value or "").startswith("#") for value in sources)


def test_the_page_of_a_long_search_stays_small() -> None:
    plan = llama()
    text = page(replace(plan, candidates=plan.candidates * 100))
    assert len(text.encode()) < 300_000
    assert "more are left out here" in text


def test_a_hostile_name_makes_no_element_and_no_attribute() -> None:
    tame = page(hostile())
    reader = Reader(tame)
    assert "img" not in reader.tags
    assert reader.tags.count("script") == 1
    assert not [key for key, _ in reader.attributes if key.startswith("on")]
    assert "</script><img src=x onerror=alert(1)>" in reader.text
    assert EVIL not in tame


@pytest.mark.parametrize("name", PLANS)
def test_without_javascript_everything_is_there(name: str) -> None:
    plan = PLANS[name]()
    text = Reader(page(plan)).text.replace("\N{MULTIPLICATION SIGN}", "x")
    for row in facts.candidates(plan):
        schedule = f"{row.schedule or '-'} " if plan.pipeline else ""
        assert f"{row.mesh} {schedule}{row.micro_batch} {row.step_time} {row.memory}" in re.sub(r"\s+", " ", text)
    for part in (*facts.time_parts(plan), *facts.memory_parts(plan)):
        assert part.label in text
        assert part.text in text
    for row in (*facts.workload(plan), *facts.hardware(plan)):
        assert row.text in text
    for baseline in facts.baselines(plan):
        assert baseline.name in text
        assert baseline.note in text
    for warning in facts.warnings(plan):
        assert warning in text
    assert facts.headline(plan).answer in text
    assert facts.proof(plan) in text


@pytest.mark.parametrize("name", PLANS)
def test_parts_add_up(name: str) -> None:
    plan = PLANS[name]()
    assert sum(part.value for part in facts.time_parts(plan)) == pytest.approx(plan.prediction.step_time)
    assert sum(part.value for part in facts.memory_parts(plan)) == pytest.approx(plan.prediction.memory.total)
    for parts in (facts.time_parts(plan), facts.memory_parts(plan)):
        assert sum(part.share for part in parts) == pytest.approx(1)


def test_every_part_of_a_prediction_has_words() -> None:
    """A category that is added to the plan must be named (and coloured) here."""
    style = (Path(words.__file__).parent / "page.css").read_text(encoding="utf-8")
    for key, _ in llama().prediction.time.items():
        assert key in words.TIME_WORDS
        assert f".k-{key}" in style
    for key, _ in llama().prediction.memory.items():
        assert key in words.MEMORY_WORDS
        assert f".k-{key}" in style


def test_the_page_is_deterministic() -> None:
    assert page(llama()) == page(llama())


def test_speed_ups_are_over_what_can_run() -> None:
    assert facts.headline(llama()).speedup == "1.12x"
    assert facts.headline(llama()).speedup_over == "the best baseline, FSDP"
    assert [row.verdict for row in facts.baselines(llama())] == ["cannot run", "1.12x", "1.25x", "1.53x"]
    assert facts.headline(single()).speedup == "-"


def test_candidates_come_best_first_and_bounds_are_marked() -> None:
    rows = facts.candidates(llama())
    assert rows[0].status == "chosen"
    assert [row.status for row in rows] == sorted(
        (row.status for row in rows), key=["chosen", "slower", "out of memory", "illegal"].index
    )
    assert all(row.step_time.startswith("\N{GREATER-THAN OR EQUAL TO}") == row.bound for row in rows)


def test_layers_fold_into_runs() -> None:
    assert [row.layers for row in layers.runs(llama())] == ["layers.0-11", "layers.12-31", "outside the layers"]
    assert words.fold(["a.1", "a.3"]) == "a.1 ... a.3"
    assert words.fold(["a"]) == "a"


def test_strategies_that_shard_alike_share_a_card() -> None:
    cards = layers.cards(llama())
    assert [card.names for card in cards] == [("tp+sp", "tp+sp, recompute"), ("outer",)]
    attention = next(module for module in cards[0].modules if module.name == "attention")
    assert [weight.words for weight in attention.weights] == ["column parallel", "row parallel"]
    assert (attention.enter[0].forward, attention.enter[0].backward) == ("all-gather", "reduce-scatter")
    assert (attention.leave[0].forward, attention.leave[0].backward) == ("reduce-scatter", "all-gather")


def test_a_bias_tells_conv1d_from_linear() -> None:
    conv = Sharding(
        (("c_attn.weight", shard(1, 3)), ("c_attn.bias", shard(0, 3)), ("c_proj.weight", shard(0)), ("c_proj.bias", PARTIAL))
    )
    said = {name: words.parameter_style(name, conv)[1] for name, _ in conv.parameters}
    assert said["c_attn.weight"] == "column parallel, 3 packed parts"
    assert said["c_proj.weight"] == "row parallel"
    assert words.parameter_style("norm.weight", Sharding((("norm.weight", GATHERED),)))[0] == "whole"


def test_a_plan_over_its_limit_says_so() -> None:
    plan: Plan = hostile()
    assert facts.headline(plan).headroom == "10.3 GiB over the limit"


def test_labels_of_the_scatter_keep_apart() -> None:
    """Even where every mark is at one place, and beside the limit; the chosen plan is always named."""
    for x in (0.5, 40.0, 79.0, 81.0):
        points = [charts.Point(x, 8.0 + 0.01 * n, "baseline", "", f"written by hand {n}") for n in range(12)]
        drawn = charts.scatter([*points, charts.Point(x, 8.0, "chosen", "", "this plan")], "", "", "", 80.0, "limit 80 GiB")
        found = re.findall(r'class="label" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]*)<', drawn)
        assert "this plan" in {text for *_, text in found}
        boxes = [(float(a) - 150 * (anchor == "end"), float(y), anchor) for a, y, anchor, _ in found]
        for one, other in itertools.combinations(boxes, 2):
            assert one[2] != other[2] or abs(one[1] - other[1]) >= 19


def test_plans_on_less_memory_are_a_line_and_a_table() -> None:
    plan = frontier(llama())
    text = Reader(page(plan)).text
    assert "With less memory" in text
    for said in ("12 full, 20 none", "90.0 %", "81.25%", "pp 2 \N{MULTIPLICATION SIGN} tp 4", "14 GiB", "1f1b"):
        assert said in text
    stair = re.search(r'<polyline class="stair" points="([^"]*)"', page(plan))
    assert stair is not None
    places = [tuple(map(float, place.split(","))) for place in stair.group(1).split()]
    assert len(places) == 5
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in itertools.pairwise(places)), "steps, up or along"
    assert [x for x, _ in places] == sorted((x for x, _ in places), reverse=True)
    assert "With less memory" in plain(summary(plan))
    assert "With less memory" not in page(llama())
    assert "With less memory" not in plain(summary(llama()))


def test_short_steps_are_drawn_in_milliseconds() -> None:
    plan = llama()
    fast = replace(
        plan, candidates=tuple(replace(c, step_time=c.step_time and c.step_time / 1e3) for c in plan.candidates), baselines=()
    )
    assert "seconds a step" in scatter(plan)
    assert "milliseconds a step" not in scatter(plan)
    assert "milliseconds a step" in scatter(fast)


def test_a_faster_baseline_outside_of_the_search_is_explained() -> None:
    plan = llama()
    assert "outside of what was asked for" not in facts.proof(plan)
    rival = replace(plan.baselines[0], name="DDP", mesh=Mesh(cp=8), step_time=plan.solve.bound / 2)
    told = facts.proof(replace(plan, baselines=(rival,)))
    assert told.endswith("DDP would be faster: its mesh, cp 8, is outside of what was asked for.")


def test_how_sure_is_told_by_runs_on_such_devices() -> None:
    plan = replace(llama(), hardware="h100-sxm-8x")
    rows = sure.errors(plan)
    assert [row.number for row in rows] == sorted((row.number for row in rows), reverse=True)
    assert all("H100" in row.runs for row in rows)
    fastest, slowest = rows[0].step.split(" to ")
    assert parse(fastest, SECOND) < plan.prediction.step_time < parse(slowest, SECOND)
    dealt = sure.errors(replace(plan, mesh=Mesh(dp_shard=8, ep=8)))
    assert dealt
    assert all("experts" in row.runs for row in dealt)
    other = replace(plan, hardware="my-cluster")
    assert sure.errors(other) == ()
    assert "No published runs on such devices" in page(other)
