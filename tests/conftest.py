"""Of every test: how long an example takes is no part of its answer (timings are benchmarks); and which worker runs what.

Who starts processes goes first, so that no worker is left alone with a long one at the end, and as many of them at once as keep
the cores busy, two for each, beside the tests that don't."""

from __future__ import annotations

import gc
import os
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

settings.register_profile("autoplan", deadline=None)
settings.load_profile("autoplan")

AT_ONCE = max(1, (os.cpu_count() or 1) // 2)
"""Files whose tests start processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("gloo") is None)


def pytest_collection_finish() -> None:
    """What is there by now stays: no use in looking through it at every collection, here and in every fork."""
    gc.collect()
    gc.freeze()


class Scheduling(LoadScopeScheduling):
    """Tests one by one, but those of files that start processes on one worker."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return f"processes {crc32(file.encode()) % AT_ONCE}" if starts_processes(file) else nodeid


@cache
def starts_processes(file: str) -> bool:
    return "pytest.mark.gloo" in Path(__file__).parents[1].joinpath(file).read_text(encoding="utf-8")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Scheduling(config, log)
