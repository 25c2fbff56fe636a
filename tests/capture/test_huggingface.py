"""A config.json, or a folder with one, is a model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autoplan import cli
from autoplan.capture import capture, load_model
from autoplan.errors import UsageError
from tests.models import ZOO
from tests.models.huggingface import LLAMA_3, small

TINY = {**LLAMA_3, **small()}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50}


def write(folder: Path, fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return path


def test_a_file_and_its_folder_are_the_same_model(tmp_path: Path) -> None:
    path = write(tmp_path, TINY)
    of_file, of_folder = capture(load_model(str(path))), capture(load_model(str(tmp_path)))
    assert of_file.fingerprint == of_folder.fingerprint
    assert len(of_file.blocks) == 3
    assert of_file.tokens == 64
    assert of_file.parameters == sum(p.numel() for p in load_model(str(path)).build().parameters())


def test_the_sequence_length_and_any_field_can_be_set(tmp_path: Path) -> None:
    path = write(tmp_path, TINY)
    loaded = load_model(f"{path}?seq_len=24", {"num_hidden_layers": "2"})
    assert loaded.spec == f"{path}?seq_len=24&num_hidden_layers=2"
    graph = capture(loaded)
    assert (graph.tokens, len(graph.blocks)) == (24, 2)


def test_long_contexts_are_cut(tmp_path: Path) -> None:
    assert (
        load_model(str(write(tmp_path, {**TINY, "max_position_embeddings": 131072}))).example_inputs(1)["input_ids"].shape[1]
        == 4096
    )


def test_a_base_model_becomes_one_with_a_loss(tmp_path: Path) -> None:
    for names in (["LlamaModel"], ["NoSuchClass"], None):
        fields = {key: value for key, value in TINY.items() if key != "architectures"}
        path = write(tmp_path, {**fields, "architectures": names} if names else fields)
        assert type(load_model(str(path)).build()).__name__ == "LlamaForCausalLM"


def test_weights_in_a_compressed_form_are_trained_in_full(tmp_path: Path) -> None:
    path = write(tmp_path, {**TINY, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    assert capture(load_model(str(path))).parameters == capture(load_model(str(write(tmp_path, TINY)))).parameters


@pytest.mark.parametrize("name", ["bert", "vit", "whisper", "t5", "clip", "llava", "mamba-2"])
def test_inputs_fit_the_model(name: str) -> None:
    inputs = ZOO[name].load().example_inputs(3)
    assert all(value.shape[0] == 3 for value in inputs.values() if isinstance(value, torch.Tensor))
    wanted = {
        "bert": {"input_ids", "labels"},
        "vit": {"pixel_values", "labels"},
        "whisper": {"input_features", "labels"},
        "t5": {"input_ids", "labels"},
        "clip": {"input_ids", "pixel_values", "return_loss"},
        "llava": {"input_ids", "pixel_values", "labels"},
        "mamba-2": {"input_ids", "labels"},
    }
    assert set(inputs) == wanted[name]


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_other_heads(tmp_path: Path, task: str) -> None:
    path = write(tmp_path, {"model_type": "bert", "architectures": [f"BertFor{task}"], **small(num_hidden_layers=2)})
    assert capture(load_model(str(path))).backward_flops > 0


@pytest.mark.parametrize(
    ("fields", "query", "says"),
    [
        ("{", "", "not valid JSON"),
        ({"hidden_size": 4}, "", "names no model_type"),
        ({"model_type": "no_such_kind"}, "", "model_type 'no_such_kind'"),
        (TINY, "?seq_len=long", "seq_len=long is no length"),
        (TINY, "?no_such_field=3", "has no field 'no_such_field'"),
        ({"model_type": "sam"}, "", "no model of that kind that computes a loss"),
        ({**ZOO["llava"].sizes["tiny"].args[1]}, "?seq_len=4", "4 tokens on one picture"),
        ({**TINY, "pad_token_id": 10**6}, "", "transformers makes no LlamaForCausalLM"),
        (
            {**TINY, "num_hidden_layers": 10**6},
            "",
            "asks for 1,000,000 in 'num_hidden_layers', and autoplan reads models of up to",
        ),
        ({"model_type": "t5", "decoder_start_token_id": None, **T5}, "", r"raised while it ran: .*modeling_t5\.py:"),
        ({"model_type": "qwen2_vl"}, "", "No inputs could be made up"),
    ],
)
def test_what_can_be_wrong_is_one_sentence(tmp_path: Path, fields: Any, query: str, says: str) -> None:
    path = write(tmp_path, fields)
    with pytest.raises(UsageError, match=says) as error:
        capture(load_model(f"{path}{query}"))
    assert error.value.hint


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        load_model(str(tmp_path / "config.json"))


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, original = write(tmp_path, TINY), importlib.import_module

    def absent(name: str) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return original(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UsageError, match="transformers is not installed") as error:
        load_model(str(path))
    assert "autoplan-torch[hf]" in str(error.value.hint)


def test_plan_and_inspect_take_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, TINY)
    out = [str(tmp_path / name) for name in ("plan.yaml", "report.html")]
    assert cli.main(["plan", f"{path}?seq_len=16", "--gpus", "2", "-o", out[0], "--report", out[1]]) == 0
    assert (tmp_path / "plan.yaml").exists()
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path), "--fx"]) == 0
    assert "scaled_dot_product_attention" in capsys.readouterr().out
    assert cli.main(["inspect", f"{path}?no_such_field=1"]) == 2
    assert "has no field" in capsys.readouterr().err
