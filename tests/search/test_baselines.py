"""Plans by hand: what is passed over because a bound says so would not have been the best."""

from __future__ import annotations

import pytest

from autoplan.cost.model import CostModel
from autoplan.search import baselines as by_hand
from autoplan.search.baselines import baselines
from autoplan.search.columns import Tables
from autoplan.workload import Workload
from tests.bodies import model
from tests.hardware import machine


@pytest.mark.parametrize("share", [1.0, 0.3, 0.12, 0.05, 1e-4])
@pytest.mark.parametrize("gpus", [4, 16])
def test_bounds_leave_out_nothing_that_matters(gpus: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, load = model(layers=8, hidden=1024, ffn=4096, seq=512, vocab=8192), Workload(global_batch=64)
    costs = CostModel(graph, machine(), load)
    limit = share * max(b.memory or 0.0 for b in baselines(Tables(costs), gpus, costs.memory_limit(0.0)))
    found = baselines(Tables(costs), gpus, limit)
    monkeypatch.setattr(by_hand, "_no_sooner", lambda *_: 0.0)
    for one, other in zip(found, baselines(Tables(costs), gpus, limit), strict=True):
        if one.step_time is not None:
            assert one == other
        else:
            assert (one.name, one.mesh, other.step_time) == (other.name, other.mesh, None)
            assert one.memory is not None
            assert other.memory is not None
            assert one.memory >= other.memory, "of those that can't fit the smallest micro-batch tells how much is missing"
    if share == 1.0:
        assert all(b.step_time is not None for b in found)
    if share == 1e-4:
        assert all("needs at least" in b.note for b in found)
