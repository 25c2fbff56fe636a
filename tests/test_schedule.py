from itertools import pairwise, product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autoplan.errors import UsageError
from autoplan.schedule import additive_seconds, in_flight, in_flight_by_chunk, order, pipeline_seconds, timeline

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
    assert [in_flight("interleaved-1f1b", s, 4, 16, 2) for s in range(4)] == [11, 9, 7, 5]


@pytest.mark.parametrize(("kind", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 5)])
def test_what_every_chunk_holds_follows_from_the_order(kind, chunks):
    for p, m, s in product((2, 3, 4), (12, 24, 96), range(4)):
        held, most = [0] * chunks, [0] * chunks
        for task in order(kind, min(s, p - 1), p, m, chunks):
            held[task.chunk] += -1 if task.backward else 1
            most[task.chunk] = max(most[task.chunk], held[task.chunk])
        assert in_flight_by_chunk(kind, min(s, p - 1), p, m, chunks) == tuple(most)


def test_what_no_schedule_is_defined_for_is_refused():
    with pytest.raises(UsageError, match="multiples of its 4 stages"):
        order("interleaved-1f1b", 0, 4, 6, 2)
    with pytest.raises(UsageError, match="one chunk"):
        timeline("1f1b", [1.0] * 4, [1.0] * 4, 4, chunks=2)
    with pytest.raises(UsageError, match="do not make stages"):
        timeline("1f1b", [1.0] * 4, [1.0] * 3, 4)
