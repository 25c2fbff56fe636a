"""Laws of the event simulation, whatever its layers take; and steps that can be added up by hand."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplan.cost.events import Event, Piece, Step, count, events, seconds
from autoplan.cost.streams import Device, Work
from autoplan.errors import UsageError
from autoplan.plan import UnitPrediction
from autoplan.schedule import ScheduleKind, Task, order, timeline
from autoplan.strategy import Zero

COMPUTED = ("forward", "tp_forward", "recompute", "backward", "tp_backward")
SENT = ("gather", "reduce", "all_reduce")

took = st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0.01, 3.0)
zeros = st.sampled_from([1, 2, 3])


def piece(name: str, zero: Zero = 3, outside: bool = False, **unit: float) -> Piece:
    return Piece(name, outside, zero, UnitPrediction(layers=(name,), place="before" if outside else "", **unit))


@st.composite
def steps(draw: st.DrawFn, piped: bool = True) -> Step:
    pp = draw(st.sampled_from([1, 2, 3] if piped else [1]))
    kinds: list[ScheduleKind] = ["1f1b", "gpipe", "interleaved-1f1b"] if pp > 1 else ["1f1b"]
    kind = draw(st.sampled_from(kinds))
    chunks = 2 if kind == "interleaved-1f1b" else 1
    stages = []
    for k in range(pp * chunks):
        outer_zero, found = draw(zeros), []
        for n in range(draw(st.integers(1, 3))):
            outside = n == 0 and draw(st.booleans())
            unit = {name: draw(took) for name in (*COMPUTED, *SENT, "optimizer")}
            unit["forward"], unit["backward"] = unit["forward"] + 0.1, unit["backward"] + 0.1
            found.append(piece(f"{k}.{n}", outer_zero if outside else draw(zeros), outside, **unit))
        stages.append(tuple(found))
    m = draw(st.integers(1, 3)) * (pp if chunks > 1 else 1)
    return Step(tuple(stages), m, kind, chunks, draw(st.sampled_from([0.0, 0.1])), draw(st.sampled_from([0.0, 0.2, 1.0])))


def changed(step: Step, **factors: float) -> Step:
    """With every unit's seconds of these kinds times a factor."""

    def unit(of: UnitPrediction) -> UnitPrediction:
        return replace(of, **{name: getattr(of, name) * factor for name, factor in factors.items()})

    return replace(step, stages=tuple(tuple(p._replace(unit=unit(p.unit)) for p in stage) for stage in step.stages))


def free(step: Step) -> Step:
    return changed(step, **dict.fromkeys(SENT, 0.0))


def by_stream(found: tuple[Event, ...]) -> dict[tuple[int, str], list[Event]]:
    streams = defaultdict(list)
    for event in found:
        streams[event.rank, event.stream].append(event)
    return streams


@given(steps())
@settings(max_examples=150)
def test_slots_never_overlap_on_a_stream(step: Step) -> None:
    for mine in by_stream(events(step)).values():
        assert all(event.start <= event.end for event in mine)
        assert all(a.end <= b.start for a, b in pairwise(mine))


@given(steps())
@settings(max_examples=60)
def test_everything_comes_after_what_it_waits_for(step: Step) -> None:
    spans: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events(step):
        spans[event.name, event.micro_batch].append((event.start, event.end))
    layers = [piece for stage in step.stages for piece in stage if not piece.outside]
    for i in range(step.micro_batches):
        at, before = 0.0, step.stages[0]
        for stage, way in [*((s, "forward") for s in step.stages), *((s, "backward") for s in reversed(step.stages))]:
            at += step.hop if stage is not before else 0.0
            before = stage
            for each in stage if way == "forward" else reversed(stage):
                ((start, end),) = spans[f"{each.name} {way}", i]
                assert start >= at - 1e-9, "the micro-batch walks through all layers and back"
                at = end
    for each in layers:
        for i in range(step.micro_batches):
            ((start, made),) = spans[f"{each.name} backward", i]
            reduced = [*spans[f"{each.name} reduce", i], (made, made)][0]
            assert all(made <= begun for begun, _ in spans[f"{each.name} reduce", i])
            assert all(reduced[1] <= begun for begun, _ in spans[f"{each.name} all_reduce", i])
            used = [
                spans[f"{each.name} forward", i][0][0],
                *(begun for begun, _ in spans[f"{each.name} recompute", i][:1]),
                start,
            ]
            gathered = [end for _, end in spans[f"{each.name} gather", i]]
            assert all(any(end <= begun for begun in used) for end in gathered)
            if each.zero == 3 and each.unit.gather:
                assert len(gathered) == 2, "for each pass"


@given(steps())
@settings(max_examples=100)
def test_a_step_is_no_shorter_than_any_streams_work(step: Step) -> None:
    whole = seconds(step)
    assert whole == pytest.approx(max(event.end for event in events(step)), rel=1e-9)
    work: dict[tuple[int, str], float] = defaultdict(float)
    for event in events(replace(step, overlap=0.0)):
        if event.stream == "compute":
            work[event.rank, event.stream] += event.end - event.start
    asked = [sum(getattr(p.unit, n) for p in stage for n in COMPUTED) for stage in step.stages]
    ranks = [sum(asked[rank :: step.ranks]) * step.micro_batches for rank in range(step.ranks)]
    assert whole >= max(ranks) * (1 - 1e-9)
    assert whole >= max(work.values()) * (1 - 1e-9)
    assert len(events(step)) <= count(step)


@given(steps(piped=False))
def test_without_communication_it_is_the_sum_of_what_is_computed(step: Step) -> None:
    units = [p.unit for p in step.stages[0]]
    each = sum(getattr(unit, name) for unit in units for name in COMPUTED)
    once = sum(unit.optimizer for unit in units)
    assert seconds(free(step)) == pytest.approx(step.micro_batches * each + once, rel=1e-9)


@given(steps())
@settings(max_examples=100)
def test_without_communication_it_is_the_schedules_timeline(step: Step) -> None:
    step = changed(free(step), optimizer=0.0)
    forward = [sum(p.unit.forward + p.unit.tp_forward for p in stage) for stage in step.stages]
    backward = [sum(p.unit.recompute + p.unit.backward + p.unit.tp_backward for p in stage) for stage in step.stages]
    exact = timeline(step.schedule, forward, backward, step.micro_batches, step.hop, step.chunks)
    assert seconds(step) == pytest.approx(exact.seconds, rel=1e-9)


@given(steps(), st.floats(0.1, 1.0))
@settings(max_examples=200)
def test_more_bandwidth_never_takes_longer(step: Step, faster: float) -> None:
    assert seconds(changed(step, **dict.fromkeys(SENT, faster))) <= seconds(step) * (1 + 1e-9)
    assert seconds(replace(step, hop=step.hop * faster)) <= seconds(step) * (1 + 1e-9)


@given(steps(), st.floats(0.1, 1.0))
@settings(max_examples=100)
def test_less_interference_never_takes_longer(step: Step, less: float) -> None:
    assert seconds(replace(step, overlap=step.overlap * less)) <= seconds(step) * (1 + 1e-9)


def layers(number: int, zero: Zero = 3, **unit: float) -> tuple[Piece, ...]:
    return tuple(piece(str(i), zero, **unit) for i in range(number))


@given(
    st.integers(1, 5), zeros, st.tuples(*[st.floats(0.1, 3.0)] * 5), st.integers(1, 3), st.sampled_from([0.0, 0.1, 0.5])
)  # fmt: skip
def test_equal_layers_take_their_price_and_at_most_one_layers_communication(
    number: int, zero: Zero, each: tuple[float, ...], m: int, overlap: float
) -> None:
    f, b, g, r, a = each

    def beside(c: float, q: float) -> float:
        return max(0.0, q - c) + overlap * min(c, q)

    if zero == 1:
        price = m * (f + b) + beside(f, g) + beside(b, r + a)
        apart = g + r + a
    else:
        sent = r + (g if zero == 3 else 0.0)
        price = m * (f + beside(f, g) + b + beside(b, sent)) + beside(b, sent + a) - beside(b, sent)
        apart = m * (g + sent) + a
    found = seconds(Step((layers(number, zero, forward=f, backward=b, gather=g, reduce=r, all_reduce=a),), m, overlap=overlap))
    assert number * price * (1 - 1e-9) <= found <= (number * price + apart) * (1 + 1e-9)


def when(step: Step) -> dict[str, tuple[float, float]]:
    return {f"{e.name}{'' if e.micro_batch < 1 else e.micro_batch}": (e.start, e.end) for e in events(step)}


def test_two_layers_by_hand() -> None:
    step = Step((layers(2, forward=1.0, backward=2.0, gather=0.5, reduce=0.75, optimizer=0.25),), 1)
    found = [(e.stream, e.name, e.start, e.end) for e in events(step)]
    assert found == [
        ("compute", "0 forward", 0.5, 1.5),
        ("compute", "1 forward", 1.5, 2.5),
        ("compute", "1 backward", 2.5, 4.5),
        ("compute", "0 backward", 4.5, 6.5),
        ("compute", "optimizer", 7.25, 7.75),
        ("gather", "0 gather", 0.0, 0.5),
        ("gather", "1 gather", 0.5, 1.0),
        ("gather", "1 gather", 1.5, 2.0),  # when the last layer's forward pass has taken what was gathered for it
        ("gather", "0 gather", 2.5, 3.0),  # one ahead
        ("reduce", "1 reduce", 4.5, 5.25),
        ("reduce", "0 reduce", 6.5, 7.25),
    ]


def test_computation_waits_for_the_reduction_before_the_last() -> None:
    found = when(Step((layers(3, forward=1.0, backward=1.0, reduce=3.0),), 1))
    assert found["2 reduce"] == (4.0, 7.0)
    assert found["0 backward"] == (7.0, 8.0), "two layers' gradients are the most there are"
    assert found["0 reduce"] == (10.0, 13.0)


def test_interference_by_hand() -> None:
    """1 s of gather under the first layer's 1 s of forward pass take 1.5 s together."""
    step = Step((layers(2, 2, forward=1.0, backward=1.0, gather=1.0),), 1, overlap=0.5)
    assert when(step)["0 forward"] == (1.0, 2.5)
    assert seconds(step) == pytest.approx(5.5)


def test_levels_of_zero_by_hand() -> None:
    unit = {"forward": 1.0, "backward": 1.0, "gather": 0.25, "reduce": 0.5}
    names = {zero: [e.name for e in events(Step((layers(1, zero, **unit),), 2))] for zero in (1, 2, 3)}
    assert [sum(name.endswith(" gather") for name in names[zero]) for zero in (1, 2, 3)] == [1, 2, 4]
    assert [sum(name.endswith(" reduce") for name in names[zero]) for zero in (1, 2, 3)] == [1, 2, 2]
    assert [seconds(Step((layers(1, zero, **unit),), 2)) for zero in (1, 2)] == [4.75, 5.5]


def test_replicas_reduce_once_a_step() -> None:
    found = when(Step((layers(2, forward=1.0, backward=1.0, reduce=0.5, all_reduce=4.0, optimizer=1.0),), 2))
    assert found["0 reduce1"] == (8.5, 9.5), "it shares the network"
    assert found["1 all_reduce1"] == (8.0, 12.5)
    assert found["0 all_reduce1"] == (12.5, 16.5)
    assert found["optimizer"] == (16.5, 18.5)
    assert "0 all_reduce" not in found


def test_what_stands_outside_is_gathered_first_and_reduced_last() -> None:
    head = piece("head", 2, outside=True, forward=1.0, backward=1.0, gather=2.0, reduce=3.0)
    found = when(Step(((*layers(1, forward=1.0, backward=1.0, gather=0.5), head),), 1))
    assert (found["head gather"], found["0 forward"]) == ((0.0, 2.0), (2.5, 3.5))
    assert found["head reduce"] == (6.5, 9.5)


def test_a_pipeline_by_hand() -> None:
    """A rank's first gather waits for what it receives, the one for the backward pass for a buffer alone."""
    stage = layers(1, forward=1.0, backward=1.0, gather=0.5)
    found = events(Step((stage, stage), 1, hop=0.25))
    rank = [(e.stream, e.start, e.end) for e in found if e.rank == 1]
    assert rank == [
        ("compute", 2.25, 3.25),
        ("compute", 3.25, 4.25),
        ("gather", 1.75, 2.25),
        ("gather", 2.25, 2.75),
        ("send back", 4.25, 4.5),
    ]
    first = [(e.stream, e.start, e.end) for e in found if e.rank == 0]
    assert ("compute", 4.5, 5.5) in first, "its gather for the backward pass was done while it waited"


@pytest.mark.parametrize(("kind", "pp", "m"), [("1f1b", 2, 40), ("gpipe", 2, 37), ("interleaved-1f1b", 2, 40), ("1f1b", 1, 9)])
def test_many_micro_batches_are_continued(kind: ScheduleKind, pp: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = 2 if kind == "interleaved-1f1b" else 1
    unit = {"forward": 1.0, "backward": 2.0, "gather": 0.4, "reduce": 0.7}
    stages = tuple(layers(2 + k, zero, **unit) for k, zero in zip(range(pp * chunks), (3, 1, 2, 3), strict=False))
    step = Step(stages, m, kind, chunks, 0.1, 0.2)
    whole = max(e.end for e in events(step))
    assert seconds(step) == pytest.approx(whole, rel=1e-12)
    monkeypatch.setattr("autoplan.cost.events.WORKS", 1)
    assert seconds(step) == pytest.approx(whole, rel=1e-3)


def test_a_device_alone() -> None:
    """3 s of computation, and 2 s of communication on two streams: longer of both, and half of the shorter."""
    device = Device(0.5, lambda message, now: None)
    works = [Work("compute", 3.0), Work("gather", 1.0), Work("reduce", 1.0)]
    for queue, work in zip(device.queues, works, strict=False):
        queue.append(work)
    assert device.run({})
    assert device.ended
    assert [work.end for work in works] == pytest.approx([4.0, 3.0, 3.0])
    assert not device.run({})


def test_an_order_that_waits_for_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(kind: ScheduleKind, stage: int, *sizes: int) -> list[Task]:
        tasks = order(kind, stage, *sizes)
        return tasks if stage else tasks[::-1]

    monkeypatch.setattr("autoplan.cost.events.order", odd)
    with pytest.raises(UsageError, match="waits for itself"):
        seconds(Step((layers(1, forward=1.0), layers(1, forward=1.0)), 1))
