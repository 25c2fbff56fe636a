from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoplan.cost.collectives import collective_time, late, waiting
from autoplan.errors import UsageError
from autoplan.hardware import Curve
from autoplan.profile.catalog import find_hardware, hardware_names
from tests.hardware import machine, uneven

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
kinds = st.sampled_from(KINDS)
groups = st.sampled_from((2, 3, 4, 6, 8, 12, 16, 32, 64, 512))
strides = st.sampled_from((1, 2, 3, 4, 8, 16))
sizes = st.floats(1.0, 1e12)
profiles = st.sampled_from([find_hardware(name) for name in hardware_names()])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_send_takes_no_time(kind):
    assert collective_time(kind, 1e9, 1, 1, machine()) == 0
    assert collective_time(kind, 0, 8, 1, machine()) == 0


def test_a_ring_within_a_node():
    # 2 * 7/8 of 8 GB at 0.6 * 300 GB/s, 14 steps of 3 us, a launch of 4 us
    assert collective_time("all_reduce", 8e9, 8, 1, machine()) == pytest.approx(14e9 / 180e9 + 14 * 3e-6 + 4e-6)
    assert collective_time("all_gather", 8e9, 8, 1, machine()) == pytest.approx(7e9 / 180e9 + 7 * 3e-6 + 4e-6)


def test_a_ring_over_nodes_shares_every_adapter():
    # 32 ranks on 4 nodes: the network carries 31/32 of the bytes over 8 adapters at 0.8 * 25 GB/s
    measured = collective_time("all_gather", 32e9, 32, 1, machine())
    assert measured == pytest.approx(31e9 / 8 / 20e9 + 28 * 3e-6 + 3 * 10e-6 + 4e-6)


def test_one_rank_a_node_has_its_adapter_alone():
    assert collective_time("all_gather", 4e9, 4, 8, machine()) == pytest.approx(3e9 / 20e9 + 3 * 10e-6 + 4e-6)


def test_an_all_reduce_over_many_nodes_climbs_a_tree():
    # one rank on each of 64 nodes: 2 * 6 tree steps instead of 2 * 63 ring steps
    almost_nothing = collective_time("all_reduce", 1e-6, 64, 8, machine())
    assert almost_nothing == pytest.approx(12 * 10e-6 + 4e-6, rel=1e-3)


def test_neighbouring_stages_use_the_link_between_them():
    inside = collective_time("send_recv", 1e9, 2, 4, machine())
    across = collective_time("send_recv", 1e9, 2, 8, machine())
    assert inside == pytest.approx(1e9 / 180e9 + 3e-6 + 4e-6)
    assert across == pytest.approx(1e9 / 20e9 + 10e-6 + 4e-6)


def test_all_to_all_sends_each_peer_its_piece():
    assert collective_time("all_to_all", 8e9, 8, 1, machine()) == pytest.approx(7e9 / 8 / 180e9 + 7 * 3e-6 + 4e-6)
    # 16 ranks on two nodes: each sends 8 pieces of 1/256 to the other node
    across = collective_time("all_to_all", 256e9, 16, 1, machine())
    assert across == pytest.approx(8e9 / 20e9 + 14 * 3e-6 + 10e-6 + 4e-6)


def test_a_switch_that_adds_up_speeds_all_reduce_alone():
    plain = machine()
    switch = replace(plain, links=(replace(plain.links[0], all_reduce_gain=1.5), plain.links[1]))
    assert collective_time("all_reduce", 1e9, 8, 1, switch) < collective_time("all_reduce", 1e9, 8, 1, plain)
    for kind, group in (("all_gather", 8), ("reduce_scatter", 8), ("all_reduce", 2)):
        assert collective_time(kind, 1e9, group, 1, switch) == collective_time(kind, 1e9, group, 1, plain)


def test_three_levels():
    plain = machine()
    rack = replace(plain.links[1], name="rack", span=64, bandwidth=100e9)
    deep = replace(plain, links=(plain.links[0], rack, plain.links[1]))
    within = collective_time("all_gather", 64e9, 64, 1, deep)
    beyond = collective_time("all_gather", 128e9, 128, 1, deep)
    assert within == pytest.approx(63e9 / 180e9 + 56 * 3e-6 + 7 * 10e-6 + 4e-6)
    assert beyond == pytest.approx(127e9 / 180e9 + 112 * 3e-6 + 14 * 10e-6 + 10e-6 + 4e-6)


def test_more_devices_than_any_link_joins():
    plain = machine()
    with pytest.raises(UsageError, match="at most 8 devices, 16"):
        collective_time("all_gather", 1e6, 16, 1, replace(plain, links=plain.links[:1]))


def test_an_unknown_collective():
    with pytest.raises(UsageError, match="broadcast"):
        collective_time("broadcast", 1e6, 2, 1, machine())


@given(kinds, groups, strides, sizes, st.floats(1.0, 100.0), profiles)
def test_more_bytes_are_never_faster(kind, group, stride, size, factor, hardware):
    less = collective_time(kind, size, group, stride, hardware)
    assert less <= collective_time(kind, size * factor, group, stride, hardware) * (1 + 1e-9)


@given(kinds, groups, strides, sizes, st.floats(1.0, 100.0), profiles, st.booleans())
def test_more_bandwidth_is_never_slower(kind, group, stride, size, factor, hardware, inner):
    index = 0 if inner else len(hardware.links) - 1
    links = list(hardware.links)
    links[index] = replace(links[index], bandwidth=links[index].bandwidth * factor)
    faster = replace(hardware, links=tuple(links))
    assert collective_time(kind, size, group, stride, faster) <= collective_time(kind, size, group, stride, hardware)


@given(groups, strides, sizes, profiles)
def test_an_all_reduce_costs_no_more_than_its_halves(group, stride, size, hardware):
    halves = [collective_time(kind, size, group, stride, hardware) for kind in ("reduce_scatter", "all_gather")]
    assert collective_time("all_reduce", size, group, stride, hardware) <= sum(halves) * (1 + 1e-9)


@given(sizes, st.sampled_from((2, 4, 8, 16)))
def test_ranks_farther_apart_are_never_faster_on_a_node_based_machine(size, group):
    hardware = find_hardware("h100-sxm-8x")
    near = collective_time("all_gather", size, group, 1, hardware)
    assert near <= collective_time("all_gather", size, group, 8, hardware) * (1 + 1e-9)


def test_the_efficiency_is_looked_up_by_what_one_rank_sends():
    plain = machine()
    curve = Curve(((1e6, 0.1), (1e9, 0.6)))
    sized = replace(plain, links=(replace(plain.links[0], efficiency=curve), plain.links[1]))
    assert collective_time("all_gather", 2e6, 2, 1, sized) == pytest.approx(1e6 / (300e9 * 0.1) + 3e-6 + 4e-6)


@pytest.mark.parametrize(("ranks", "last"), [(1, 0.0), (2, 0.5642), (4, 1.0294), (8, 1.4236), (16, 1.7660), (100, 2.5076)])
def test_the_last_of_some_ranks(ranks, last):
    """Expected largest of normal numbers: Tippett, Biometrika 17 (1925)."""
    assert late(ranks) == pytest.approx(last, rel=0.05)


@given(st.floats(1e-6, 10.0), st.integers(1, 100), st.integers(2, 512))
def test_who_meets_more_often_waits_longer_but_not_in_proportion(work, meetings, ranks):
    once = waiting(work, meetings, ranks, uneven(machine()))
    assert 0 < once < waiting(work, 2 * meetings, ranks, uneven(machine())) < 2 * once
    assert once < waiting(work, meetings, ranks + 1, uneven(machine()))
    assert waiting(work, meetings, ranks, machine()) == 0
