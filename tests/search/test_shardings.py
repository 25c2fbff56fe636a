"""The Pareto set of one layer's shardings: equal to brute force, and the classic plans come out of the rules."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from autoplan.cost.compute import memory_time
from autoplan.cost.layer import layer_cost
from autoplan.cost.prices import LayerModel
from autoplan.cost.rules import Outcome, conversions, divided, outcomes
from autoplan.cost.walk import borders_of, stream_layout
from autoplan.graph import Body
from autoplan.search.lattice import Lattice
from autoplan.search.shardings import Ways, pareto_shardings
from autoplan.strategy import GATHERED, PARTIAL, REPLICATE, Border, Layout, Sharding, shard
from tests.bodies import expert_block, mlp_block
from tests.hardware import machine


def layer(body: Body, tp: int = 2, micro_batch: int = 4, **options: bool) -> LayerModel:
    return LayerModel(body, (body,), (), tp=tp, micro_batch=micro_batch, hardware=machine(), dtype="bfloat16", **options)


def every_sharding(model: LayerModel, stream: Layout) -> Iterator[Sharding]:
    """All decisions at all operations, one after another, with nothing pruned."""
    body = model.body

    def follow(index: int, layouts: dict[int, Layout], chain: list[tuple[int, Outcome]]) -> Iterator[Sharding]:
        if index == len(body.ops):
            if all(layouts[i] == stream_layout(body.values[i], stream) for i in body.outputs):
                yield finished(chain)
            return
        op = body.ops[index]
        arriving = [layouts.get(i) if body.values[i].parameter else layouts.get(i, REPLICATE) for i in op.inputs]
        if op.kind in ("enter", "exit"):
            source = arriving[0] or REPLICATE
            choices = [
                Outcome((source,), (target,), False) for target in conversions(body.values[op.inputs[0]], source, model.tp)
            ]
        else:
            choices = list(outcomes(op, body, arriving, model.tp))
        for choice in choices:
            after = {
                **layouts,
                **dict(zip(op.inputs, choice.inputs, strict=True)),
                **dict(zip(op.outputs, choice.outputs, strict=True)),
            }
            yield from follow(index + 1, after, [*chain, (index, choice)])

    def finished(chain: list[tuple[int, Outcome]]) -> Sharding:
        parameters: list[tuple[str, Layout]] = []
        borders: list[Border] = []
        for index, outcome in chain:
            borders.extend(borders_of(index, model, outcome, stream))
            for i, layout in zip(body.ops[index].inputs, outcome.inputs, strict=True):
                name = body.values[i].parameter
                if name and layout != REPLICATE:
                    parameters.append((name, layout))
        return Sharding(tuple(parameters), tuple(borders), stream)

    yield from follow(0, {i: stream_layout(body.values[i], stream) for i in body.inputs}, [])


def price(model: LayerModel, sharding: Sharding) -> tuple[float, ...]:
    cost = layer_cost(model, sharding)
    numel = float(sum(p.numel(1) for p in cost.parameters))
    return (cost.forward + cost.tp_forward, cost.backward + cost.tp_backward, cost.saved, numel, cost.rerun, cost.peak)


def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y * (1 + 1e-12) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("stream", [REPLICATE, shard(1)], ids=str)
@pytest.mark.parametrize(
    "sizes", [{}, {"hidden": 512, "ffn": 64}, {"hidden": 2048, "ffn": 8192, "seq": 512}, {"norm": False}], ids=str
)
def test_equals_brute_force(stream: Layout, sizes: dict[str, int]) -> None:
    model = layer(mlp_block(**sizes))  # type: ignore[arg-type]
    everything = {price(model, sharding) for sharding in every_sharding(model, stream)}
    found = [price(model, sharding) for sharding in pareto_shardings(model, stream)]
    assert len(everything) > 20
    for cost in everything:
        assert any(beats(other, cost) for other in found), "a sharding that nothing found beats"
    for cost in found:
        assert not any(beats(other, cost) and not beats(cost, other) for other in everything), "a found sharding that is beaten"


@pytest.mark.parametrize("stream", [REPLICATE, shard(1)], ids=str)
@pytest.mark.parametrize("body", [mlp_block(), expert_block()], ids=["dense", "experts"])
def test_recomputed_selectively_a_sharding_costs_what_its_layer_does(body: Body, stream: Layout) -> None:
    model = layer(body)
    ways = Ways(model, Lattice(model, stream))
    found = ways.unbeaten
    assert found.number > 1
    least = ways.corner.cost
    for i in range(found.number):
        cost = layer_cost(model, found.sharding(i))
        assert [float(numbers[i]) for numbers in found.cost.kept] == pytest.approx(list(cost.kept), rel=1e-12)
        assert least.kept.results <= cost.kept.results * (1 + 1e-12)
        assert least.kept.again <= cost.kept.again * (1 + 1e-12)
        bound, there = (each.kept.spare - each.kept.results for each in (least, cost))
        assert bound <= there + 1e-6
        assert least.saved <= cost.saved * (1 + 1e-12)
        assert least.peak - least.saved <= (cost.peak - cost.saved) * (1 + 1e-12)
        assert (float(found.peak[i]), float(found.beneath[i])) == pytest.approx((cost.peak, 0.0), rel=1e-12)


@pytest.mark.parametrize("stream", [REPLICATE, shard(1)], ids=str)
def test_degrees_that_divide_the_same_sizes_share_a_lattice(stream: Layout) -> None:
    body = mlp_block(hidden=512, ffn=1536, seq=64)
    two, four, six = (layer(body, tp) for tp in (2, 4, 6))
    assert divided(body, 2) == divided(body, 4) != divided(body, 6)
    shared = Lattice(two, stream)
    own, borrowed = Ways(four, Lattice(four, stream)).unbeaten, Ways(four, shared).unbeaten
    found = [{s: price(four, s) for s in map(each.sharding, range(each.number))} for each in (own, borrowed)]
    assert found[0] == found[1]
    assert len(found[0]) > 1
    costs = [(each.forward, each.backward, each.saved, each.peak, each.beneath) for each in (own, borrowed)]
    np.testing.assert_allclose(costs[0], costs[1], rtol=1e-12)
    assert len(pareto_shardings(six, stream)) != len(found[0]), "6 divides the hidden layer alone"


def fastest(model: LayerModel, stream: Layout) -> Sharding:
    return min(pareto_shardings(model, stream), key=lambda s: sum(price(model, s)[:2]))


def test_column_then_row_comes_out_of_the_rules() -> None:
    model = layer(mlp_block(hidden=4096, ffn=16384, seq=2048), tp=8, micro_batch=1)
    best = fastest(model, REPLICATE)
    assert best.layout("up.weight") == shard(0)
    assert best.layout("down.weight") == shard(1)
    assert {(b.source, b.target) for b in best.borders} == {(REPLICATE, GATHERED), (PARTIAL, REPLICATE)}


def test_sequence_parallelism_comes_out_of_the_rules() -> None:
    model = layer(mlp_block(hidden=4096, ffn=16384, seq=2048), tp=8, micro_batch=1, copies=False)
    best = fastest(model, shard(1))
    assert best.layout("up.weight") == shard(0)
    assert best.layout("down.weight") == shard(1)
    assert best.layout("norm.weight") == GATHERED
    assert {(b.source, b.target) for b in best.borders} == {(shard(1), GATHERED), (PARTIAL, shard(1))}
    replicated, sequence = (sum(price(model, fastest(model, s))[:2]) for s in (REPLICATE, shard(1)))
    assert sequence < replicated, "sequence parallelism saves the norms' work at equal traffic"


@pytest.mark.parametrize(("dim", "copied"), [(0, 0), (1, 1)])
def test_what_is_scattered_along_another_dim_than_the_first_is_copied_before(dim: int, copied: int) -> None:
    body = mlp_block(hidden=4096, ffn=16384, seq=2048)
    bare, model = (layer(body, tp=8, copies=copies) for copies in (False, True))
    value = body.values[body.inputs[0]]
    copy = copied * memory_time(2 * value.bytes_at(4), model.hardware.device)
    for source, target, scatters in (
        (PARTIAL, shard(dim), (1, 0)),
        (shard(dim), GATHERED, (0, 1)),
        (shard(dim), REPLICATE, (0, 0)),
    ):
        before, after = (each.border(value, source, target) for each in (bare, model))
        assert after == pytest.approx([t + n * copy for t, n in zip(before, scatters, strict=True)])


def test_one_device_shards_nothing() -> None:
    model = layer(mlp_block(), tp=1)
    assert pareto_shardings(model, REPLICATE) == [Sharding()]
