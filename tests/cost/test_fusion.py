"""Compiled layers: what fuses, what it saves, and PyTorch's own partitioner as the judge of what is kept."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import autoplan
from autoplan.apply.check import check_compiled
from autoplan.cost.fusion import Fusion, fused
from autoplan.cost.model import CostModel
from autoplan.errors import UsageError
from autoplan.graph import Body, Graph
from autoplan.search.explaining import answer
from autoplan.search.planner import search
from autoplan.strategy import Mesh
from autoplan.workload import Workload
from tests.apply import plans
from tests.hardware import machine
from tests.models import ZOO

MIB = 2**20
BIG = {"layers": 2, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 1024, "seq_len": 8192}
NAMES = ["gpt", "llama", "llama-3", "gemma-2", "qwen3-moe", "t5", "whisper"]


@cache
def tiny(name: str) -> Graph:
    return autoplan.inspect(ZOO[name].load("tiny"))


@cache
def llama() -> Graph:
    return autoplan.inspect("examples/llama.py", **BIG)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_gets_dearer_and_nothing_else_changes(name: str) -> None:
    graph = tiny(name)
    compiled = fused(graph)
    assert compiled.outer is graph.outer
    lighter = False
    for before, after in zip(graph.bodies, compiled.bodies, strict=True):
        for what in ("forward_bytes", "backward_bytes"):
            for batch in (1, 7):
                assert after.total(what).at(batch) <= before.total(what).at(batch) * (1 + 1e-12)
        for which in ("forward_kernels", "backward_kernels"):
            assert sum(getattr(op, which) for op in after.ops) <= sum(getattr(op, which) for op in before.ops)
        assert after.saved.at(1) <= before.saved.at(1)
        lighter |= after.total("forward_bytes").at(1) < before.total("forward_bytes").at(1)
        for op, other in zip(before.ops, after.ops, strict=True):
            same = ("kind", "name", "module", "inputs", "outputs", "forward_flops", "backward_flops", "saved_extra")
            assert all(getattr(op, field) == getattr(other, field) for field in same)
            assert min(other.forward_bytes.at(1), other.backward_bytes.at(1)) >= 0
            assert set(other.saved) <= set(op.saved)
    assert lighter


@given(data=st.data())
def test_a_chain_never_waits_for_itself(data: st.DataObject) -> None:
    """No path leaves a chain and comes back: it could not run as one kernel."""
    name = data.draw(st.sampled_from(NAMES))
    body = data.draw(st.sampled_from(tiny(name).bodies))
    chain = set(data.draw(st.sampled_from(list(Fusion(body).chains()))))
    outside: set[int] = set()  # operations behind the chain that are not of it
    makers = {i: index for index, op in enumerate(body.ops) for i in op.outputs}
    for index, op in enumerate(body.ops):
        before = {makers[i] for i in op.inputs if i in makers}
        if index in chain:
            assert not before & outside
        elif before & (chain | outside):
            outside.add(index)


def test_a_llama_layer_by_hand() -> None:
    """64 MiB a stream, 224 MiB inside the MLP."""
    body = fused(llama()).bodies[0]
    by_name: dict[str, list[tuple[float, float]]] = {}
    for op in body.ops:
        if op.kind in ("pointwise", "norm") and op.forward_kernels:
            moved = op.forward_bytes.at(1) / MIB, op.backward_bytes.at(1) / MIB
            by_name.setdefault(op.name, []).append(moved)
    # silu(gate) * up reads two and writes one; backward it reads these and a gradient and writes two
    assert by_name["silu"] == [(3 * 224, 5 * 224)]
    # the sum of the residual stream and the norm after it: two read, both written; four and what the norm kept, one written
    assert by_name["add"][0] == pytest.approx((4 * 64, 5 * 64), rel=1e-3)
    # the first norm adds up three gradients, and that of the residual stream, on the way
    assert by_name["rms_norm"] == [pytest.approx((2 * 64, 6 * 64), rel=1e-3)]
    assert llama().bodies[0].saved.at(1) - body.saved.at(1) == 224 * MIB  # silu(gate) is made again


def kept_by_pytorch(layer: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes that the compiled layer keeps for its backward pass, besides parameters and what it is given without gradient."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers(), *inputs[1:])}
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = compiled(*inputs)
    del outputs
    return sum(held.values())


@pytest.mark.parametrize(
    ("spec", "layers"),
    [("examples/llama.py?layers=2&hidden=256&heads=4&kv_heads=2&ffn=704&vocab=512&seq_len=256", "layers"),
     ("examples/gpt.py?layers=2&hidden=256&heads=4&ffn=1024&vocab=512&seq_len=256", "h")],
)  # fmt: skip
def test_no_less_is_kept_than_by_the_partitioner(spec: str, layers: str) -> None:
    loaded = autoplan.load_model(spec)
    graph = fused(autoplan.inspect(loaded, compute_dtype="float32"))
    model = loaded.build()
    inputs: list[tuple[torch.Tensor, ...]] = []
    layer = model.get_submodule(f"{layers}.1")
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args))
    model(**loaded.example_inputs(2))
    layer._forward_pre_hooks.clear()
    given_ = tuple(x.detach().requires_grad_() if x.dtype.is_floating_point and i == 0 else x for i, x in enumerate(inputs[0]))
    body = graph.bodies[0]
    kept, predicted = kept_by_pytorch(layer, *given_), body.saved.at(2)
    assert kept <= predicted * 1.001
    assert predicted <= kept * 1.15


def test_the_planner_uses_it() -> None:
    plain = search(llama(), machine(), Workload(global_batch=16), gpus=8)
    compiled = search(llama(), machine(), Workload(global_batch=16, compile=True), gpus=8)
    assert compiled.mesh.tp == compiled.mesh.cp == 1
    assert compiled.graph == plain.graph
    fixed = {"pp": 1, "tp": 1, "cp": 1}
    without = search(llama(), machine(), Workload(global_batch=16), gpus=8, fixed=fixed)
    assert compiled.prediction.step_time < without.prediction.step_time
    assert any("can't be compiled" in c.reason for c in compiled.candidates if c.mesh.tp > 1)


def test_a_compiled_layer_is_priced_from_the_fused_body() -> None:
    plain, compiled = (CostModel(llama(), machine(), Workload(global_batch=8, compile=c)) for c in (False, True))
    assert compiled.given is plain.graph
    body: Body = compiled.graph.bodies[0]
    assert body.total("forward_bytes").at(1) < plain.graph.bodies[0].total("forward_bytes").at(1)


def test_wishes_that_compiling_rules_out_are_told() -> None:
    plan = search(llama(), machine(), Workload(global_batch=16, compile=True), gpus=8)
    for wishes, told in (({"tp": 2}, "spread over tp"), ({"pp": 2, "schedule": "zero-bubble"}, "compiled layers are whole")):
        assert told in answer(llama(), machine(), plan, wishes, 1e-4).reason


def test_a_plan_by_hand_that_compiles_what_it_cannot_is_refused() -> None:
    check_compiled(plans.llama(Mesh(dp_shard=2), compile=True))
    with pytest.raises(UsageError, match="spread over tp"):
        check_compiled(plans.llama(Mesh(tp=2), compile=True))
    with pytest.raises(UsageError, match="zero-bubble"):
        check_compiled(plans.llama(Mesh(pp=2), compile=True, schedule="zero-bubble", micro_batch=1))
