"""Of every test: how long an example takes is no part of its answer (timings are benchmarks), and who starts processes goes
first, so that no worker is left alone with a long one at the end."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("autoplan", deadline=None)
settings.load_profile("autoplan")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("gloo") is None)
