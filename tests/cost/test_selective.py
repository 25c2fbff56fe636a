"""What selective recomputation is said to keep, against what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autoplan
from autoplan.apply import selective
from autoplan.apply._torch import TorchDispatchMode, memory_of, tree_leaves
from autoplan.cost.model import CostModel
from autoplan.strategy import UNSHARDED
from autoplan.workload import Workload

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 90, "seq_len": 32, "ffn": 96}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"kv_heads": 2, "size": "125M"}, "layers.0"),
    "gpt": ({"size": "124M"}, "h.0"),
    "hf_llama": ({"kv_heads": 2, "size": "1B"}, "model.layers.0"),
    "transformer": ({"dropout": 0.0}, "transformer.encoder.layers.0"),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_results_are_kept_to_the_byte(name: str) -> None:
    changes, layer = MODELS[name]
    loaded = autoplan.load_model(str(EXAMPLES / f"{name}.py"), **SIZES, **changes)
    graph = autoplan.inspect(loaded, compute_dtype="bfloat16")
    body = next(block.body for block in graph.blocks if block.name == layer)
    costs = CostModel(graph, autoplan.load_hardware("h100-sxm-8x"), Workload(global_batch=3))
    predicted = costs.layer_cost(body, UNSHARDED, 1, 3).kept
    model = loaded.build().to(torch.bfloat16)
    module = model.get_submodule(layer)
    forward, found = module.forward, []

    def keeping(*args: Any, **kwargs: Any) -> Any:
        mode, _ = selective.contexts()
        with mode:
            result = forward(*args, **kwargs)
        found.append({memory_of(t): t.untyped_storage().nbytes() for t in leaves(mode)})
        return result

    module.forward = keeping  # type: ignore[method-assign]
    model(**loaded.example_inputs(3))
    statistics = 3 * SIZES["heads"] * SIZES["seq_len"] * 4
    assert predicted.results == pytest.approx(sum(found[0].values()), abs=statistics)  # of which kernels keep what they like
    assert 0 < predicted.spare < predicted.results


def leaves(mode: TorchDispatchMode) -> list[torch.Tensor]:
    kept = [result.again() for queue in mode._results.values() for result in queue if result.intact]  # type: ignore[attr-defined]
    return [leaf for leaf in tree_leaves(kept) if isinstance(leaf, torch.Tensor)]
