"""Compiled layers compute what they compute uncompiled, under FSDP, recomputation and a pipeline; and they are compiled."""

from __future__ import annotations

import traceback
import warnings

import pytest
import torch

from autoplan.strategy import Mesh
from tests.apply.ranks import run
from tests.apply.test_parity import one, reference

pytestmark = pytest.mark.gloo

CASES = {
    "llama": {
        "fsdp, accumulation": {"mesh": Mesh(dp_shard=2), "micro_batch": 2},
        "zero 1, recompute": {"mesh": Mesh(dp_shard=2), "micro_batch": 2, "zero": 1, "recompute": "full"},
        "selective": {"mesh": Mesh(dp_shard=2), "recompute": "selective"},
    },
    "gpt": {
        "replicate, recompute": {"mesh": Mesh(dp_replicate=2), "recompute": "full"},
        "pipeline": {"mesh": Mesh(pp=2), "micro_batch": 2},
    },
}


def all_cases(name):
    failures = []
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at every input
    for title, options in CASES[name].items():
        torch._dynamo.utils.counters.clear()
        try:
            one(name, {**options, "compile": True})
            compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert 0 < compiled <= 2, f"{compiled} graphs of two equal layers"
            assert not torch._dynamo.utils.counters["graph_break"], "a layer is compiled in pieces"
        except Exception:
            failures.append(f"{title}: {traceback.format_exc()}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", list(CASES))
def test_compiled_layers_are_the_same(name):
    reference(name)
    run(2, all_cases, name)
