"""The recording is the program: run on real tensors it gives the same loss and gradients."""

from __future__ import annotations

import pytest
import torch

from autoplan.capture.fx import capture_fx
from tests.capture.models import TINY, loss_of, real, tiny


@pytest.mark.parametrize("name", list(TINY))
def test_the_recorded_calls_compute_the_same_loss_and_gradients(name: str) -> None:
    loaded = tiny(name)
    module = real(loaded)
    inputs = loaded.example_inputs(2)
    recorded = capture_fx(module, lambda batch: inputs, compute_dtype="float32")

    eager = loss_of(module, inputs)
    eager.backward()
    wanted = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    places = [node.target for node in recorded.graph.nodes if node.op == "placeholder"]
    loss = recorded(**{str(place): inputs[str(place)] for place in places})
    loss.backward()

    assert torch.allclose(loss, eager, rtol=1e-6)
    for n, p in module.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, wanted[n], rtol=1e-4, atol=1e-6), n


def test_nodes_tell_module_flops_and_saved_bytes() -> None:
    loaded = tiny("gpt")
    recorded = capture_fx(real(loaded), loaded.example_inputs, compute_dtype="float32")
    linears = [n for n in recorded.graph.nodes if n.meta.get("fqn", "").endswith("c_fc")]
    assert len(linears) == 3
    assert linears[0].meta["flops"] == (2 * 2 * 16 * 32 * 64, 2 * 2 * 2 * 16 * 32 * 64)
    assert linears[0].meta["saved"] == 2 * 16 * 32 * 4
    assert tuple(linears[0].meta["val"].shape) == (2, 16, 64)
