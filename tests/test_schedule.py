from itertools import pairwise, product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autoplan.errors import UsageError
from autoplan.schedule import (
    Task,
    additive_seconds,
    filling,
    in_flight,
    in_flight_by_chunk,
    order,
    pipeline_seconds,
    shared,
    timeline,
)

stage_counts = st.integers(1, 6)
seconds = st.floats(0.01, 10.0)
kinds = st.sampled_from(("gpipe", "1f1b", "interleaved-1f1b"))


@st.composite
def pipelines(draw):
    kind, stages = draw(kinds), draw(stage_counts)
    chunks = draw(st.integers(1, 3)) if kind == "interleaved-1f1b" else 1
    micro_batches = stages * draw(st.integers(1, 4)) if kind == "interleaved-1f1b" else draw(st.integers(1, 12))
    times = st.lists(seconds, min_size=stages * chunks, max_size=stages * chunks)
    return kind, draw(times), draw(times), micro_batches, draw(st.floats(0.0, 2.0)), chunks


@given(pipelines())
def test_slots_never_overlap_and_nothing_is_lost(pipeline):
    _, forward, _, micro_batches, _, chunks = pipeline
    line = timeline(*pipeline)
    assert len(line.stages) == len(forward) // chunks
    for slots in line.stages:
        assert all(a.end <= b.start for a, b in pairwise(slots))
        assert len({slot.task for slot in slots}) == len(slots) == 2 * micro_batches * chunks


@given(pipelines())
def test_forward_comes_before_backward_and_after_the_stage_before(pipeline):
    _, forward, _, micro_batches, p2p, chunks = pipeline
    stages = len(forward) // chunks
    hop = p2p if stages > 1 else 0.0
    at = {
        (s.task.chunk * stages + s.stage, s.task.micro_batch, s.task.backward): s for x in timeline(*pipeline).stages for s in x
    }
    for k in range(len(forward)):
        for i in range(micro_batches):
            assert at[k, i, False].end <= at[k, i, True].start
            if k:
                assert at[k - 1, i, False].end + hop <= at[k, i, False].start
                assert at[k, i, True].end + hop <= at[k - 1, i, True].start


@given(st.sampled_from(("gpipe", "1f1b")), stage_counts, st.integers(1, 16), seconds, seconds)
def test_equal_stages_take_the_textbook_time(kind, p, m, f, b):
    assert timeline(kind, [f] * p, [b] * p, m).seconds == pytest.approx((m + p - 1) * (f + b))


@given(stage_counts, st.integers(1, 4), st.integers(1, 4), seconds, seconds)
def test_interleaving_divides_the_bubble(p, groups, v, f, b):
    m = p * groups
    line = timeline("interleaved-1f1b", [f / v] * (p * v), [b / v] * (p * v), m, chunks=v)
    assert line.seconds == pytest.approx(m * (f + b) + (p - 1) * (f + b) / v)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=6), st.integers(1, 20))
def test_the_slowest_of_unequal_stages_sets_the_pace(times, m):
    f, b = zip(*times, strict=True)
    longest, line = max(x + y for x, y in times), timeline("1f1b", f, b, m).seconds
    assert m * longest * (1 - 1e-9) <= line <= m * (sum(f) + sum(b)) * (1 + 1e-9)


@given(kinds, stage_counts, st.integers(1, 4), st.integers(1, 4), seconds, seconds, st.floats(0.0, 1.0))
def test_the_sum_is_the_timeline_of_equal_stages(kind, p, groups, chunks, f, b, share):
    v = chunks if kind == "interleaved-1f1b" else 1
    hop = share * min(f, b) / v
    line = timeline(kind, [f / v] * (p * v), [b / v] * (p * v), p * groups, hop, v).seconds
    sums = additive_seconds(kind, [f + b] * p, p * groups, hop, v)
    assert line * (1 - 1e-9) <= sums <= (line + 2 * hop) * (1 + 1e-9)


@given(st.sampled_from(("gpipe", "1f1b")), st.lists(seconds, min_size=1, max_size=6), st.integers(1, 24), st.floats(1.0, 3.0))
def test_the_sum_is_never_less_than_the_timeline_of_unequal_stages(kind, f, m, ratio):
    b = [ratio * x for x in f]
    sums = additive_seconds(kind, [x + y for x, y in zip(f, b, strict=True)], m)
    assert sums >= timeline(kind, f, b, m).seconds * (1 - 1e-9)


parts = st.tuples(seconds, seconds, seconds)


def split(kind, stages, micro_batches, p2p=0.0):
    f, i, w = zip(*stages, strict=True)
    return timeline(kind, f, [x + y for x, y in zip(i, w, strict=True)], micro_batches, p2p, 1, w)


@pytest.mark.parametrize(("stages", "micro_batches"), list(product((1, 2, 3, 5), (1, 2, 4, 5, 9, 20))))
def test_zero_bubble_is_pytorchs_order(stages, micro_batches):
    from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble

    made = ScheduleInterleavedZeroBubble.__new__(ScheduleInterleavedZeroBubble)
    made.pp_group_size, made.n_local_stages, made._n_microbatches = stages, 1, micro_batches
    made.microbatches_per_round = micro_batches
    for stage in range(stages):
        theirs = [action for action in made._calculate_single_rank_operations(stage) if action is not None]
        ways = {"FORWARD": (False, False), "BACKWARD_INPUT": (True, False), "BACKWARD_WEIGHT": (True, True)}
        expected = [Task(0, action.microbatch_index, *ways[action.computation_type.name]) for action in theirs]
        assert order("zero-bubble", stage, stages, micro_batches) == expected


@given(parts, stage_counts, st.integers(1, 24), st.floats(0.0, 1.0))
def test_the_sum_is_the_zero_bubble_of_equal_stages(times, p, m, share):
    q = filling(*times, m >= p)
    sums, line = additive_seconds("zero-bubble", [sum(times)] * p, m, share=q), split("zero-bubble", [times] * p, m).seconds
    assert sums == pytest.approx(line) if m >= p else sums >= line * (1 - 1e-9)
    hop = share * min(times)
    hopping = additive_seconds("zero-bubble", [sum(times)] * p, m, hop, share=q)
    assert hopping >= split("zero-bubble", [times] * p, m, hop).seconds * (1 - 1e-9)


@given(parts, st.lists(st.floats(0.1, 1.0), min_size=1, max_size=6), st.integers(1, 24))
def test_the_sum_is_never_less_than_the_zero_bubble_of_unequal_stages(times, sizes, m):
    stages = [tuple(size * x for x in times) for size in sizes]
    sums = additive_seconds("zero-bubble", [sum(each) for each in stages], m, share=filling(*times, m >= len(stages)))
    assert sums >= split("zero-bubble", stages, m).seconds * (1 - 1e-9)


@given(st.lists(parts, min_size=1, max_size=6), st.integers(1, 40), st.floats(0.0, 0.5))
def test_zero_bubble_loses_nothing_and_holds_no_more_than_it_says(stages, m, p2p):
    line = split("zero-bubble", stages, m, p2p)
    for s, slots in enumerate(line.stages):
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(slots))
        assert len({slot.task for slot in slots}) == len(slots) == 3 * m
        held = waiting = 0
        for slot in slots:
            held += 0 if slot.task.weights else -1 if slot.task.backward else 1
            waiting += -1 if slot.task.weights else 1 if slot.task.backward else 0
            assert 0 <= held <= min(len(stages) - s, m)
            assert 0 <= waiting <= min(s + 1, m)
    if len(stages) == 1:
        assert line.seconds == pytest.approx(split("1f1b", stages, m, p2p).seconds)
    f, i, w = zip(*stages, strict=True)
    both = tuple(x + y for x, y in zip(i, w, strict=True))
    assert pipeline_seconds("zero-bubble", f, both, m, p2p, 1, w) == pytest.approx(line.seconds, rel=2e-2)


@given(pipelines(), seconds)
def test_more_work_never_ends_sooner(pipeline, more):
    kind, forward, backward, m, p2p, chunks = pipeline
    slower = [forward[0] + more, *forward[1:]]
    assert timeline(kind, forward, backward, m, p2p, chunks).seconds <= timeline(kind, slower, backward, m, p2p, chunks).seconds


@example(3, 33, [(1.0, 0.5), *[(1.0, 1.0)] * 5], 0.25)
@given(stage_counts, st.integers(1, 60), st.lists(st.tuples(seconds, seconds), min_size=6, max_size=6), st.floats(0.0, 0.5))
def test_the_shortcut_for_many_micro_batches_is_the_timeline(p, m, times, p2p):
    f, b = tuple(x for x, _ in times[:p]), tuple(y for _, y in times[:p])
    assert pipeline_seconds("1f1b", f, b, m, p2p) == pytest.approx(timeline("1f1b", f, b, m, p2p).seconds, rel=1e-2)


@given(stage_counts, st.integers(1, 24), st.lists(st.tuples(seconds, seconds), min_size=6, max_size=6), st.floats(0.0, 2.0))
def test_the_quick_sum_of_1f1b_is_its_timeline(p, m, times, p2p):
    f, b = tuple(x for x, _ in times[:p]), tuple(y for _, y in times[:p])
    assert pipeline_seconds("1f1b", f, b, min(m, 4 * p), p2p) == pytest.approx(timeline("1f1b", f, b, min(m, 4 * p), p2p).seconds)


def test_1f1b_holds_no_more_than_it_has_stages_ahead():
    assert [in_flight("1f1b", s, 4, 16) for s in range(4)] == [4, 3, 2, 1]
    assert in_flight("gpipe", 0, 4, 16) == 16
    assert [in_flight("zero-bubble", s, 4, 16) for s in range(4)] == [4, 3, 2, 1]
    assert [in_flight("interleaved-1f1b", s, 4, 16, 2) for s in range(4)] == [11, 9, 7, 5]


@pytest.mark.parametrize(
    ("kind", "chunks"), [("gpipe", 1), ("1f1b", 1), ("zero-bubble", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 5)]
)
def test_what_every_chunk_holds_follows_from_the_order(kind, chunks):
    for p, m, s in product((2, 3, 4), (12, 24, 96), range(4)):
        held, most = [0] * chunks, [0] * chunks
        for task in order(kind, min(s, p - 1), p, m, chunks):
            held[task.chunk] += 0 if task.weights else -1 if task.backward else 1
            most[task.chunk] = max(most[task.chunk], held[task.chunk])
        assert in_flight_by_chunk(kind, min(s, p - 1), p, m, chunks) == tuple(most)


def test_what_no_schedule_is_defined_for_is_refused():
    with pytest.raises(UsageError, match="multiples of its 4 stages"):
        order("interleaved-1f1b", 0, 4, 6, 2)
    with pytest.raises(UsageError, match="one chunk"):
        timeline("1f1b", [1.0] * 4, [1.0] * 4, 4, chunks=2)
    with pytest.raises(UsageError, match="do not make stages"):
        timeline("1f1b", [1.0] * 4, [1.0] * 3, 4)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "sharing", "slots_left"),
    [
        (2, 1, 1.0, 2.0),
        (2, 1, 2.0, 1.0),
        (2, 4, 2.0, 4.0),
        (4, 1, 2.0, 2.0),
        (4, 2, 2.0, 2.5),
        (4, 4, 2.0, 4.0),
        (4, 1, 4.0, 1.0),
    ],
)
def test_who_waits_leaves_a_shared_device_to_the_others(stages, micro_batches, sharing, slots_left):
    """One stage after another has a device for itself, or all have it all the time."""
    assert micro_batches + (stages - 1) * shared(1.0, micro_batches, stages, sharing) == pytest.approx(slots_left)
