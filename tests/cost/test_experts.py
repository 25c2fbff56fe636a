"""Experts are found by what they compute; dealing them moves rows, not work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autoplan.cost.data_parallel import data_parallel
from autoplan.cost.experts import Mixtures, whole_rows
from autoplan.cost.layer import layer_cost
from autoplan.cost.model import CostModel
from autoplan.errors import UsageError
from autoplan.graph import Body, Parameter
from autoplan.strategy import UNSHARDED, Experts, Mesh, Sharding
from autoplan.workload import Workload
from tests.bodies import expert_block, mlp_block, model
from tests.hardware import machine

FORMS = ("chosen", "sorted")


def costs(body: Body, **load: float) -> CostModel:
    return CostModel(model(block=body), machine(), Workload(global_batch=8, **load))  # type: ignore[arg-type]


def of_experts(number: int, form: str, module: str = "moe") -> Sharding:
    return Sharding(experts=(Experts(module, form, number),))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_a_module_of_experts_is_found(form: str) -> None:
    mixtures = Mixtures(model(block=expert_block(experts=6, form=form, holder="ff.experts")))
    (dealt,) = mixtures.dealt[0]
    assert dealt.experts == Experts("ff.experts", form, 6)  # type: ignore[arg-type]
    assert [mixtures.refusal(ep) for ep in (1, 2, 3, 6)] == [""] * 4
    assert mixtures.refusal(4) == "6 experts do not divide over ep 4"


def test_a_model_without_experts_has_nothing_to_deal() -> None:
    assert "no grouped matrix product" in Mixtures(model(block=mlp_block())).refusal(2)


def test_a_module_with_other_parameters_is_refused_by_name() -> None:
    body = expert_block(experts=4)
    other = Parameter("moe.scale", (64,), "bfloat16")
    assert "'moe'" in Mixtures(model(block=replace(body, parameters=(*body.parameters, other)))).refusal(2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ep", [2, 4])
def test_dealing_moves_rows_and_not_work(form: str, ep: int) -> None:
    """Balanced: as much to compute and to keep, with what is sent besides; the parameters are dealt."""
    model_ = costs(expert_block(512, 256, 1024, 4, form=form))
    whole = model_.layer_cost(0, UNSHARDED, 1, 2)
    dealt = model_.layer_cost(0, of_experts(4, form), 1, 2, ep=ep)
    assert whole.saved <= dealt.saved <= whole.saved * (1.35 if form == "sorted" else 1.01)  # rows that come are new tensors
    assert dealt.forward <= whole.forward  # fewer weights are read
    assert dealt.tp_forward > 0
    assert dealt.tp_backward > 0
    sizes = {p.name: p.numel(1) for p in whole.parameters}
    assert {p.name: p.numel(1) * (ep if p.dealt else 1) for p in dealt.parameters} == sizes
    assert {p.name for p in dealt.parameters if p.dealt} == {"moe.up", "moe.down"}


def test_an_uneven_router_costs_time_and_memory() -> None:
    body = expert_block(512, 256, 1024, 4)
    even, uneven = (costs(body, expert_imbalance=x).layer_cost(0, of_experts(4, "chosen"), 1, 2, ep=4) for x in (1.0, 1.5))
    assert uneven.forward > even.forward
    assert uneven.tp_forward > even.tp_forward
    assert even.saved < uneven.saved < 1.5 * even.saved


def test_under_tp_every_device_takes_its_part_of_the_rows() -> None:
    body = expert_block(512, 256, 1024, 4)
    one, two = (costs(body).layer_cost(0, of_experts(4, "chosen"), tp, 2, ep=4) for tp in (1, 2))
    assert two.forward < one.forward
    assert two.saved < one.saved


def test_experts_are_gathered_over_the_devices_that_hold_the_same() -> None:
    model_ = costs(expert_block(512, 256, 1024, 4))
    hardware, load = model_.hardware, model_.workload
    cost = model_.layer_cost(0, of_experts(4, "chosen"), 1, 1, ep=4)
    apart, together = (data_parallel(cost, Mesh(dp_shard=n, ep=4), hardware, load) for n in (4, 8))
    assert apart.gather < together.gather
    dealt = sum(p.numel(1) for p in cost.parameters if p.dealt)
    dense = sum(p.numel(1) for p in cost.parameters if not p.dealt)
    assert apart.numel == dealt + dense / 4
    assert together.numel == dealt / 2 + dense / 8


def test_a_sharding_names_the_experts_that_the_layer_has() -> None:
    model_ = costs(expert_block())
    with pytest.raises(UsageError, match="it has 'moe'"):
        layer_cost(model_.layer_model(0, 1, 1, ep=2), UNSHARDED)


def test_rows_that_do_not_divide_are_sent_as_if_they_did() -> None:
    """Every rank of a tp group has as many as `torch.chunk` gives the first."""
    for rows, tp in ((30, 4), (15, 2), (32, 4), (7, 8)):
        assert whole_rows(rows, tp) * rows == pytest.approx(len(torch.arange(rows).chunk(tp)[0]) * tp)
