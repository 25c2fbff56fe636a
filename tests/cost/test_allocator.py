"""PyTorch's allocator as the exam models it, and what it reserves for runs that were measured."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.allocator import MIB, Allocator, Block
from benchmarks.nanotron import Rank
from benchmarks.pricing import Pricer, dealt, frameworks
from benchmarks.rows import read
from benchmarks.runs import Run, run_of

ROWS = {row.text("id"): row for row in read(Path(__file__).parents[2] / "benchmarks" / "published" / "nanotron.csv")}


def a_run(name: str) -> Run:
    return run_of(ROWS[f"nanotron-{name}"])


@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.integers(0, 5)), max_size=60))
def test_reserved_holds_all_that_is_taken_and_is_used_again(steps: list[tuple[int, int]]) -> None:
    memory = Allocator()
    taken = []
    for _ in range(2):
        for size, place in steps:
            taken.append(memory.take(size))
            if place < len(taken):
                memory.give(taken.pop(place))
            assert sum(block.size for block in taken) <= memory.reserved <= memory.peak
        memory.give(*taken)
        taken = []
    memory.limit = 0
    memory.take(41 * MIB)
    assert memory.reserved == 42 * MIB, "all segments are whole again, and given back before another is reserved"


def test_requests_take_the_smallest_block_and_split_it() -> None:
    memory = Allocator()
    large, small = memory.take(64 * MIB), memory.take(32 * MIB)
    memory.give(large, small)
    first = memory.take(20 * MIB)
    assert first.address == small.address
    memory.take(11 * MIB)
    memory.take(60 * MIB)
    assert memory.reserved == 96 * MIB
    memory.take(100)
    assert memory.reserved == 98 * MIB, "small requests have segments of their own"


@pytest.mark.parametrize(
    "name",
    ["1.34B-n128-dp128tp1pp1-mbs2ga1-z1", "1.34B-n64-dp64tp1pp1-mbs1ga4-z1", "3.57B-n64-dp4tp1pp16-mbs1ga64-z0"],
)
def test_a_run_without_tp_reserves_what_was_measured(name: str) -> None:
    run = a_run(name)
    assert run.memory
    assert Pricer(frameworks()).memory(run) == pytest.approx(run.memory, rel=0.01)


def test_sharded_states_and_smaller_micro_batches_take_less() -> None:
    run, pricer = a_run("1.34B-n64-dp64tp1pp1-mbs2ga2-z1"), Pricer(frameworks())
    assert pricer.memory(run) < pricer.memory(replace(run, zero=0))
    assert pricer.memory(replace(run, micro_batch=1)) < pricer.memory(run)


def test_what_was_sent_waits_while_the_host_is_ahead() -> None:
    run = a_run("3.57B-n16-dp2tp8pp1-mbs16ga8-z1")

    def reserved(host: float, device: float, ahead: float) -> float:
        return Rank(run, run.layers, float("inf"), host, device, ahead).reserved()

    nothing_waits = reserved(host=1.0, device=0.1, ahead=8.0)
    assert nothing_waits == reserved(host=0.1, device=1.0, ahead=0.1)
    assert nothing_waits < reserved(host=0.1, device=1.0, ahead=2.0) < reserved(host=0.1, device=1.0, ahead=8.0)
    assert reserved(host=0.9, device=1.0, ahead=30.0) < reserved(host=0.1, device=1.0, ahead=30.0)


class Early(Rank):
    """What tp has received, and sends again, is free at once."""

    def _give_after(self, *blocks: Block) -> None:
        self.memory.give(*blocks)


def test_what_was_received_waits_too() -> None:
    """At tp 2 half as much again as what was sent; for tp 1 NCCL has nothing of a layer, and the host's lead changes little."""

    def reserved(kind: type[Rank], name: str, host: float) -> float:
        run = a_run(name)
        return kind(run, dealt(run)[0], float("inf"), host, 1.0, 6.0).reserved()

    sharded, alone = "8.86B-n128-dp4tp2pp16-mbs2ga32-z1", "3.57B-n64-dp32tp1pp2-mbs2ga4-z1"
    assert reserved(Early, sharded, 1e-3) < reserved(Rank, sharded, 1e-3)
    assert reserved(Early, alone, 1e-3) == reserved(Rank, alone, 1e-3) == pytest.approx(reserved(Rank, alone, 1e3), rel=0.01)


def test_a_gather_of_large_pieces_does_not_fit_its_old_room() -> None:
    """Runs of the fit half without tp, whose pieces are the largest blocks: 5.4, 3.6 and 2.8 GiB too little without `LEFT`."""
    for name in ("8.86B-n32-dp8tp1pp4-mbs1ga32-z1", "8.86B-n32-dp4tp1pp8-mbs1ga64-z1", "8.86B-n64-dp4tp1pp16-mbs1ga64-z1"):
        run = a_run(name)
        assert run.memory
        assert not run.held_out
        assert Pricer(frameworks()).memory(run) == pytest.approx(run.memory, rel=0.015)


def test_a_device_without_room_has_free_blocks_given_back() -> None:
    """A run of the fit half that had free blocks enough: 61.1 GiB were measured, 75.6 are reserved if the allocator may."""
    run, own = a_run("8.86B-n32-dp16tp1pp2-mbs1ga16-z1"), frameworks()
    assert run.memory
    assert not run.held_out
    roomy = Pricer({run.source: replace(own["nanotron"], room=80)})
    assert Pricer(own).memory(run) == pytest.approx(run.memory, rel=0.02)
    assert roomy.memory(run) > 1.2 * run.memory
    large = replace(run, micro_batch=4, dp=4, gpus=8)
    assert [Pricer(own).fits(each) for each in (run, large)] == [True, False]


def test_a_block_that_fills_a_stage_is_its_last() -> None:
    assert dealt(a_run("1.34B-n64-dp32tp1pp2-mbs1ga8-z1")) == (10, 6), "the head counts as four layers"
