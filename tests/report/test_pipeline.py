"""The picture of a pipeline is its timeline: nothing is drawn twice, nothing moved, and what is folded is said."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest

from autoplan.plan import Plan
from autoplan.report import pipeline
from autoplan.report.gantt import gantt
from autoplan.report.page import mesh_stages, page
from autoplan.schedule import ScheduleKind, timeline

from .plans import llama, piped
from .test_report import Reader

KINDS: list[tuple[ScheduleKind, int, int]] = [
    *(("1f1b", 4, 1), ("gpipe", 4, 1), ("interleaved-1f1b", 4, 2), ("1f1b", 2, 1), ("zero-bubble", 4, 1))
]


def whole(plan: Plan) -> dict[tuple[int, int, int, bool, bool], tuple[float, float]]:
    """(rank, chunk, micro-batch, backward, weights) -> (start, end) of the whole schedule."""
    assert plan.pipeline is not None
    stages, chunks = plan.prediction.stages, plan.pipeline.chunks
    forward = [stage.forward[c] for c in range(chunks) for stage in stages]
    backward = [stage.backward[c] for c in range(chunks) for stage in stages]
    weights = [second for stage in stages for second in stage.weights]
    made = timeline(plan.pipeline.schedule, forward, backward, plan.micro_batches, plan.prediction.hop, chunks, weights)
    return {
        (slot.stage, slot.task.chunk, slot.task.micro_batch, slot.task.backward, slot.task.weights): (slot.start, slot.end)
        for slots in made.stages
        for slot in slots
    }


@pytest.mark.parametrize(("kind", "pp", "chunks"), KINDS)
def test_a_short_step_is_drawn_whole(kind: ScheduleKind, pp: int, chunks: int) -> None:
    plan = piped(kind, pp, chunks, batch=8)
    film, slots = pipeline.film(plan), whole(plan)
    assert film is not None
    assert film.folds == ()
    assert film.seconds == pytest.approx(max(end for _, end in slots.values()))
    drawn = [
        (s, shot.chunk, shot.micro_batch, shot.backward, shot.weights) for s, shots in enumerate(film.shots) for shot in shots
    ]
    assert sorted(drawn) == sorted(slots)
    for s, shots in enumerate(film.shots):
        for shot in shots:
            start, end = slots[s, shot.chunk, shot.micro_batch, shot.backward, shot.weights]
            assert shot.start * film.seconds == pytest.approx(start, abs=1e-9)
            assert shot.end * film.seconds == pytest.approx(end, abs=1e-9)


@pytest.mark.parametrize(("kind", "pp", "chunks"), KINDS)
def test_a_folded_step_shows_the_true_times_of_what_it_shows(kind: ScheduleKind, pp: int, chunks: int) -> None:
    plan = piped(kind, pp, chunks, batch=64)
    film, slots = pipeline.film(plan), whole(plan)
    assert film is not None
    assert len(film.folds) == (2 if kind == "gpipe" else 1)
    assert film.folds[0].skipped % pp == 0
    slowest = max(second for stage in plan.prediction.stages for second in (*stage.forward, *stage.backward))
    for s, shots in enumerate(film.shots):
        assert {shot.micro_batch for shot in shots} >= {0, 63}
        for one, two in pairwise(sorted(shots, key=lambda shot: shot.start)):
            assert one.end <= two.start + 1e-9
        for shot in shots:
            start, end = slots[s, shot.chunk, shot.micro_batch, shot.backward, shot.weights]
            assert kind == "gpipe" or shot.when is not None
            if shot.when is not None:
                assert shot.when == pytest.approx((start, end), abs=slowest)
    assert max(shot.end for shots in film.shots for shot in shots) == pytest.approx(1)
    assert not [shot for shots in film.shots for shot in shots for f in film.folds if f.start + 1e-9 < shot.start < f.end - 1e-9]


def test_idle_shares_are_those_of_the_timeline() -> None:
    plan = piped(batch=32)
    film = pipeline.film(plan)
    assert film is not None
    last = plan.prediction.stages[-1]
    share = 1 - 32 * (last.forward[0] + last.backward[0]) / film.seconds
    assert pipeline.ranks(plan)[-1].idle == f"{share:.1%}".replace("%", " %")


def test_a_split_backward_pass_is_drawn_in_two_tints() -> None:
    plan = piped("zero-bubble", batch=8)
    film, text = pipeline.film(plan), Reader(page(plan)).text
    assert film is not None
    drawn = gantt(film, "a label")
    assert "micro-batch 3 backward, weights" in drawn
    assert "micro-batch 3 backward, inputs" in drawn
    assert drawn.count('<g class="w q0">') == 4
    assert "backward, inputs backward, weights" in text
    assert "41 ms, 18 ms of it later" in text
    other = pipeline.film(piped(batch=8))
    assert other is not None
    assert 'class="w' not in gantt(other, "a label")


def test_the_stages_in_one_line() -> None:
    assert pipeline.stages_line(piped()) == "pp 4: layers.0-7 | 8-15 | 16-23 | 24-31, 1f1b, 3.3 % bubble"
    assert "interleaved-1f1b with 2 chunks a rank" in pipeline.stages_line(piped("interleaved-1f1b", chunks=2))
    assert pipeline.stages_line(llama()) == ""


@pytest.mark.parametrize(("kind", "pp", "chunks"), [*KINDS, ("1f1b", 16, 1), ("1f1b", 32, 1), ("interleaved-1f1b", 8, 4)])
def test_the_page_of_any_pipeline_stays_small(kind: ScheduleKind, pp: int, chunks: int) -> None:
    text = page(piped(kind, pp, chunks, batch=1024))
    assert len(text.encode()) < 300_000
    assert 'id="timeline"' in text


def test_numbers_stand_where_they_have_room() -> None:
    film = pipeline.film(piped(pp=16, batch=256))
    assert film is not None
    assert {"z1", "z2"} <= set(re.findall(r'class="(z\d)"', gantt(film, "a label")))


def test_a_plan_that_does_not_say_its_stages_is_still_shown() -> None:
    plan = piped()
    silent = replace(plan, prediction=replace(plan.prediction, stages=(), simulated=None))
    assert pipeline.film(silent) is None
    assert 'id="timeline"' not in page(silent)
    crooked = piped("interleaved-1f1b", chunks=2, batch=6)
    assert pipeline.film(crooked) is None
    assert 'id="pipeline"' in page(crooked)
    assert pipeline.film(replace(plan, prediction=replace(plan.prediction, stages=plan.prediction.stages[:1]))) is None


def test_every_rank_tells_its_memory_by_category() -> None:
    plan = piped()
    text = Reader(page(plan)).text
    row = " ".join(part.text for rank in pipeline.ranks(plan) for part in rank.parts if part.key == "activations")
    assert f"micro-batches in flight {row}" in text
    assert "Category, fullest rank" in page(piped(pp=16))


def test_ranks_count_up_along_the_mesh() -> None:
    stages = mesh_stages(replace(piped(), mesh=replace(piped().mesh, dp_shard=2)))
    assert [stage.groups[0].ranks for stage in stages] == [(0, 1), (4, 5), (8, 9), (12, 13)]
    assert [stage.layers for stage in stages][:2] == ["layers.0-7", "layers.8-15"]
