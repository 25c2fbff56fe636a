"""Every family: what capture says is what a real run does, and no short cut changes it."""

from __future__ import annotations

import functools

import pytest
import torch

from autoplan.capture import capture, merge
from autoplan.capture.fake import build_on_meta
from autoplan.graph import Body, Graph
from tests.models import ZOO
from tests.models.oracle import capture_of, check, tracked

NAMES = list(ZOO)
GROUPED = ("moe", "mixtral", "qwen3-moe", "deepseek-v3")


@functools.cache
def graph(name: str) -> Graph:
    return capture(ZOO[name].load())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_capture_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ZOO[name].meets:  # then the graph's line crosses the real costs' parabola at MEETING
        monkeypatch.setattr(merge, "MEETING", 4)
    captured = capture(ZOO[name].load()) if ZOO[name].meets else graph(name)
    found = check(ZOO[name].load(), captured, 4)
    assert found.executed
    assert found.exact
    assert abs(found.flops) < 1e-9
    assert abs(found.saved) < 1e-9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_saved_bytes_are_what_stays_alive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against MemTracker. What is kept for results that the loss does not need is gone by then: LLaVA's last vision layer."""
    if ZOO[name].meets:
        monkeypatch.setattr(merge, "MEETING", 4)
    saved = capture_of(ZOO[name].load(), kernels="cpu").saved.at(4)
    assert saved == pytest.approx(tracked(ZOO[name].load(), 4), rel=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_costs_of_samples_that_meet_are_never_too_low() -> None:
    found = check(ZOO["clip"].load(), graph("clip"), 4)
    assert 0 < found.flops < 0.05
    assert 0 < found.saved < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_structure(name: str) -> None:
    g, family = graph(name), ZOO[name]
    module = build_on_meta(family.load().build)
    assert (len(g.blocks), len(g.bodies)) == (family.blocks, family.bodies)
    assert g.parameters == sum(p.numel() for p in module.parameters())
    named = dict(module.named_parameters(remove_duplicate=False))
    for prefix, body in g.members():
        for parameter in body.parameters:
            if not parameter.buffer:
                assert parameter.trainable == named[prefix + parameter.name].requires_grad
        assert all(module.get_submodule(prefix + op.module if op.module else prefix.rstrip(".")) for op in body.ops)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_made_once_and_before_its_use(name: str) -> None:
    for body in (graph(name).outer, *graph(name).bodies):
        known = set(body.inputs) | {v.id for v in body.values if v.parameter is not None}
        for op in body.ops:
            assert known.issuperset(op.inputs), op
            assert known.isdisjoint(op.outputs), op
            known.update(op.outputs)
            assert known.issuperset(op.saved), op
        assert known.issuperset(body.outputs)


@pytest.mark.parametrize("name", NAMES)
def test_what_needs_a_gradient_costs_a_backward(name: str) -> None:
    g = graph(name)
    assert g.backward_flops > 0
    if name not in ("lora", "llava", "clip", "t5"):
        assert g.backward_flops == pytest.approx(2 * g.forward_flops, rel=0.12)
    for what in ("forward_flops", "backward_flops", "forward_bytes", "backward_bytes"):
        assert all(getattr(op, what).at(1) >= 0 for body in (g.outer, *g.bodies) for op in body.ops)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_products_by_formula(name: str) -> None:
    products = [op for body in graph(name).bodies for op in body.ops if "grouped_mm" in op.name]
    assert products
    for body in graph(name).bodies:
        for op in body.ops:
            if "grouped_mm" in op.name:
                rows, weight = body.values[op.inputs[0]], body.values[op.inputs[1]]
                assert op.forward_flops.per_sample == 2 * rows.shape[0] * weight.shape[-1] * weight.shape[-2]
                assert op.backward_flops.per_sample == 2 * op.forward_flops.per_sample


def test_samples_that_meet_are_said() -> None:
    (warning,) = graph("clip").warnings
    assert "samples meet each other at matmul" in warning
    assert "modeling_clip.py:" in warning
    wide = [op for op in graph("clip").outer.ops if op.name == "matmul"]
    assert [op.kind for op in wide] == ["opaque"]


def test_frozen_parameters_keep_nothing_and_get_no_gradient() -> None:
    g = graph("lora")
    later: Body = g.bodies[1]
    trainable = {p.name for p in later.parameters if p.trainable}
    assert trainable == {"qkv.down.weight", "qkv.up.weight", "out.down.weight", "out.up.weight"}
    frozen = [op for op in later.ops if op.kind == "linear" and op.module in ("up", "down")]
    assert [op.backward_flops == op.forward_flops for op in frozen] == [True, True]  # of the input alone


def test_guesses_are_said_with_their_place() -> None:
    assert all("import_utils.py:" in warning or "modeling_llava.py:" in warning for warning in graph("llava").warnings)


def test_sizes_differ_only_in_numbers() -> None:
    assert torch.get_default_dtype() == torch.float32  # a configuration's dtype does not leak
    assert capture_of(ZOO["llama-3"].load()).bodies == graph("llama-3").bodies
