"""The collectives that run are those that the plan's borders say, by the table in `strategy.py`, and no others."""

from __future__ import annotations

import pytest

from autoplan.apply import apply
from autoplan.strategy import Mesh
from tests.apply.models import batches, double, gpt_loss
from tests.apply.plans import PLANNERS
from tests.apply.ranks import run
from tests.apply.traffic import Copies, Traffic

pytestmark = pytest.mark.gloo

LAYERS = 2


def counts(name, sequence):
    """(forward, backward) collectives of one step; FSDP over one device has none."""
    plan = PLANNERS[name](Mesh(tp=2), sequence=sequence)
    parallel = apply(double(name), plan, device="cpu", loss_fn=gpt_loss if name == "gpt" else None)
    with Traffic() as forward:
        loss = parallel._loss(batches(name)[0])
    with Traffic() as backward:
        loss.backward()
    return forward.found, backward.found


def test_megatron_sequence_parallel_llama():
    forward, backward = run(2, counts, "llama", True)[0]
    # per layer two all_gathers and two reduce_scatters; the embedding's reduce_scatter, the head's all_gather, two of the loss
    assert forward == {"all_gather": 2 * LAYERS + 1, "reduce_scatter": 2 * LAYERS + 1, "all_reduce": 2}
    # the same backward; the norms' weights are GATHERED: one all_reduce each
    assert backward == {"all_gather": 2 * LAYERS + 1, "reduce_scatter": 2 * LAYERS + 1, "all_reduce": 2 * LAYERS + 1}


def test_megatron_llama():
    forward, backward = run(2, counts, "llama", False)[0]
    assert forward == {"all_reduce": 2 * LAYERS + 1 + 2}
    assert backward == {"all_reduce": 2 * LAYERS + 1}


def test_packed_projections_are_not_gathered():
    forward, backward = run(2, counts, "gpt", False)[0]
    assert forward == {"all_reduce": 2 * LAYERS + 1 + 2}
    assert backward == {"all_reduce": 2 * LAYERS + LAYERS + 1}  # one more a layer: the packed bias is GATHERED


def test_encoder_decoder():
    forward, backward = run(2, counts, "translator", False)[0]
    assert forward == {"all_reduce": 2 * LAYERS + 3 * LAYERS + 2 + 2}
    # borders in: 2 an encoder layer, 4 a decoder layer, the head; packed biases: 1 and 2
    assert backward == {"all_reduce": (2 + 1) * LAYERS + (4 + 2) * LAYERS + 1}


def copied(mesh, zero):
    """Elements that a step of two micro-batches copies, by the number of parameters, all even."""
    plan = PLANNERS["llama"](mesh, zero=zero, micro_batch=8 // mesh.dp // 2)
    parallel = apply(double("llama"), plan, device="cpu")
    with Copies() as found:
        parallel.step(batches("llama", samples=8 // mesh.dp)[0])
    numel = sum(p.numel() for p in double("llama")().parameters())
    return {kind: n / numel for kind, n in found.elements.items()}


@pytest.mark.parametrize(("zero", "unpack", "pack"), [(3, 4, 2), (2, 2, 2), (1, 1, 1)])
def test_fsdp_copies_what_is_priced(zero, unpack, pack):
    """Two micro-batches: under level 3 parameters are put in place in both passes, under 2 in the forward pass, under 1 in the
    first alone, and gradients are reduced once (`cost.step`)."""
    found = run(2, copied, Mesh(dp_shard=2), zero)[0]
    assert (found["unpack"], found["pack"]) == (unpack, pack)
    for mesh in (Mesh(), Mesh(dp_replicate=2)):
        found = run(mesh.size, copied, mesh, zero)[0]
        assert (found["copy"] + found.get("unpack", 0), found["pack"]) == (unpack + pack, pack)
