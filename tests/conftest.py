"""Of every test: how long an example takes is no part of its answer (timings are benchmarks); and the order on several workers.

Who starts processes goes first, so that no worker is left alone with a long one at the end, and as many of them at once as keep
the cores busy: four ranks take two."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

settings.register_profile("autoplan", deadline=None)
settings.load_profile("autoplan")

AT_ONCE = max(1, (os.cpu_count() or 1) // 2)
"""Tests that start processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("gloo") is None)
    for number, item in enumerate(items):
        if item.get_closest_marker("gloo"):
            item.add_marker(pytest.mark.xdist_group(f"gloo{number % AT_ONCE}"))


def pytest_collection_finish() -> None:
    """What is there by now stays: no use in looking through it at every collection, here and in every fork."""
    gc.collect()
    gc.freeze()
