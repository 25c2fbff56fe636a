"""Weights as safetensors: what Hugging Face writes is read piece by piece under any plan, and what is written it reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autoplan.apply import apply, weights
from autoplan.errors import UsageError
from autoplan.strategy import UNSHARDED, Mesh
from tests.apply.models import FACTORIES
from tests.apply.plans import PLANNERS, make
from tests.apply.ranks import run

pytestmark = pytest.mark.gloo

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "use_cache": False,
}  # fmt: skip
LAYERS = [f"model.layers.{i}" for i in range(4)]


def llama(tied: bool) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def inputs(samples: int) -> dict[str, torch.Tensor]:
    tokens = torch.arange(samples * 8).reshape(samples, 8) % 64
    return {"input_ids": tokens, "labels": tokens}


def there_and_back(folder: Path, mesh: Mesh, tied: bool) -> None:
    plan = make(dict.fromkeys(LAYERS, UNSHARDED), UNSHARDED, mesh, micro_batch=2)
    if tied:
        plan = replace(plan, tied=(("model.embed_tokens.weight", "lm_head.weight"),))
    parallel = apply(lambda: llama(tied), plan, device="cpu", seed=1, inputs=inputs)
    parallel.load_weights(folder / "theirs")
    parallel.save_weights(folder / "ours")
    torch.manual_seed(7)
    for name, value in llama(tied).state_dict().items():
        assert torch.equal(parallel.full_state_dict()[name], value), name


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "tied"])
@pytest.mark.parametrize("mesh", [Mesh(dp_shard=4), Mesh(pp=2, dp_shard=2)], ids=str)
def test_a_folder_of_hugging_face(tmp_path: Path, mesh: Mesh, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(7)
    model = llama(tied)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / weights.INDEX).exists()
    monkeypatch.setattr(weights, "LARGEST", 30e3)
    run(4, there_and_back, tmp_path, mesh, tied)
    model.config.save_pretrained(tmp_path / "ours")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert len(set(json.loads((tmp_path / "ours" / weights.INDEX).read_text())["weight_map"].values())) > 1
    assert not list((tmp_path / "ours").glob(".*"))


def packed(folder: Path) -> None:
    """Fused weights are cut into several pieces each; what is no model of this kind is refused on every rank."""
    plan = PLANNERS["gpt"](mesh=Mesh(dp_shard=2, tp=2))
    first = apply(FACTORIES["gpt"], plan, device="cpu", seed=1)
    first.save_weights(folder / "one")
    second = apply(FACTORIES["gpt"], plan, device="cpu", seed=2)
    second.load_weights(folder / "one" / weights.WHOLE)
    want, have = first.full_state_dict(), second.full_state_dict()
    assert all(torch.equal(want[name], have[name]) for name in want)
    other = apply(FACTORIES["llama"], PLANNERS["llama"](mesh=Mesh(dp_shard=4)), device="cpu", seed=1)
    with pytest.raises(UsageError, match=r"has no '.*', nor \d+ more of the model's tensors"):
        other.load_weights(folder / "one")


def test_fused_weights_and_what_is_another_models(tmp_path: Path) -> None:
    run(4, packed, tmp_path)


def alone(folder: Path) -> None:
    model = apply(FACTORIES["gpt"], PLANNERS["gpt"](mesh=Mesh()), device="cpu", seed=1)
    with pytest.raises(UsageError, match="holds no weights"):
        model.load_weights(folder)
    (folder / weights.WHOLE).write_bytes(b"no weights")
    with pytest.raises(UsageError, match="is no safetensors file"):
        model.load_weights(folder)
    for text, told in (("{", "is no index"), ('{"weight_map": {"a": "gone.safetensors"}}', "which is not there")):
        (folder / weights.INDEX).write_text(text)
        with pytest.raises(UsageError, match=told):
            model.load_weights(folder)


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    run(1, alone, tmp_path)
