from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoplan.cost.compute import MULTIPLIES, kernel_time, optimizer_time, spread_time
from autoplan.errors import UsageError
from autoplan.profile.catalog import find_hardware, hardware_names
from tests.hardware import machine, uneven

DEVICE = machine().device
devices = st.sampled_from([find_hardware(name).device for name in hardware_names()])
kinds = st.sampled_from(("linear", "matmul", "attention", "norm", "pointwise", "cross_entropy", "opaque"))
amounts = st.one_of(st.just(0.0), st.floats(1.0, 1e17))
factors = st.floats(1.0, 64.0)
kernels = st.integers(1, 12)


def test_a_view_takes_no_time():
    assert kernel_time("view", 0, 0, 0, "bfloat16", DEVICE) == 0


def test_a_multiplication_is_bound_by_its_flops():
    assert kernel_time("linear", 4e12, 1e6, 1, "bfloat16", DEVICE) == pytest.approx(4e12 / (400e12 * 0.5))
    assert kernel_time("linear", 4e12, 1e6, 1, "float32", DEVICE) == pytest.approx(4e12 / (100e12 * 0.5))


def test_a_thin_multiplication_is_bound_by_its_bytes():
    assert kernel_time("linear", 1e9, 8e9, 1, "bfloat16", DEVICE) == pytest.approx(8e9 / (2e12 * 0.8))


def test_elsewhere_flops_are_free():
    assert "norm" not in MULTIPLIES
    assert kernel_time("norm", 1e15, 1.6e9, 1, "bfloat16", DEVICE) == pytest.approx(1e-3)


def test_every_kernel_is_launched():
    assert kernel_time("pointwise", 0, 10, 3, "bfloat16", DEVICE) == 3 * DEVICE.launch


def test_the_curve_is_that_of_one_kernel():
    device = find_hardware("a100-80g-sxm-8x").device
    one = kernel_time("linear", 1e10, 0, 1, "bfloat16", device)
    assert kernel_time("linear", 4e10, 0, 4, "bfloat16", device) == pytest.approx(4 * one)
    assert kernel_time("linear", 4e10, 0, 1, "bfloat16", device) < 4 * one


def test_an_unknown_number_format_is_told_only_where_it_matters():
    with pytest.raises(UsageError, match="no peak for float16"):
        kernel_time("linear", 1e9, 1e6, 1, "float16", DEVICE)
    assert kernel_time("norm", 1e9, 1e6, 1, "float16", DEVICE) > 0


@given(kinds, amounts, amounts, factors, factors, kernels, devices)
def test_more_work_never_takes_less_time(kind, flops, moved, more_flops, more_bytes, count, device):
    less = kernel_time(kind, flops, moved, count, "bfloat16", device)
    assert less <= kernel_time(kind, flops * more_flops, moved * more_bytes, count, "bfloat16", device) * (1 + 1e-9)


@given(kinds, amounts, amounts, st.sampled_from((2, 4, 8, 16)), kernels, devices)
def test_a_piece_takes_no_longer_than_the_whole_and_no_less_than_its_share(kind, flops, moved, tp, count, device):
    whole = kernel_time(kind, flops, moved, count, "bfloat16", device)
    piece = kernel_time(kind, flops / tp, moved / tp, count, "bfloat16", device)
    assert piece <= whole * (1 + 1e-9)
    fractions = [fraction for _, fraction in device.memory_efficiency.points]
    if fractions == sorted(fractions):  # a processor's caches do make small pieces faster than their share
        assert piece * tp >= whole * (1 - 1e-9)


@given(kinds, amounts, amounts, kernels, devices)
def test_a_faster_device_is_never_slower(kind, flops, moved, count, device):
    peaks = tuple((dtype, peak * 2) for dtype, peak in device.peak)
    faster = replace(device, peak=peaks, bandwidth=device.bandwidth * 2)
    slow = kernel_time(kind, flops, moved, count, "bfloat16", device)
    assert kernel_time(kind, flops, moved, count, "bfloat16", faster) <= slow


def test_an_optimizer_step_moves_parameters_gradients_and_states():
    # AdamW: reads four tensors, writes three
    assert optimizer_time(1e9, 2, DEVICE) == pytest.approx(7e9 / (2e12 * 0.8))
    assert optimizer_time(1e9, 0, DEVICE) == pytest.approx(3e9 / (2e12 * 0.8))
    assert optimizer_time(0, 2, DEVICE) == 0
    assert optimizer_time(1, 2, DEVICE) == DEVICE.launch


def test_the_host_takes_its_time_beside_a_device_and_after_itself():
    on_host, beside = uneven(machine()), replace(uneven(machine()), backend="nccl")
    # a product: one kernel and three views
    assert spread_time(1e-3, "linear", 1, 1, 1, on_host) == pytest.approx(1e-3 + 4 * 2e-5)
    assert spread_time(1e-3, "linear", 1, 1, 1, beside) == 1e-3
    assert spread_time(1e-6, "linear", 1, 1, 1, beside) == pytest.approx(4e-6 + 4 * 2e-5)
    assert spread_time(1e-3, "pointwise", 2, 1, 2, on_host) == pytest.approx(1e-3 + 2 * 2 * 2e-5)
    assert spread_time(0.0, "view", 0, 1, 1, on_host) == pytest.approx(2e-5)
