"""A Hugging Face `config.json`, or a folder with one, as a model: nothing is downloaded, no Python is asked of the user.

    path/config.json                                 the class that `architectures` names
    path/to/folder?seq_len=8192                      sequences of 8192 tokens, not of min(max_position_embeddings, 4096)
    path/config.json?num_hidden_layers=4             any field of the configuration, changed

Inputs are made up from the configuration and from the names of `forward`'s arguments: ids and labels, pictures, spectra.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoplan.capture.failures import said
from autoplan.errors import UsageError

LONGEST = 4096
"""Tokens of a sequence when the user asks for none: long contexts are for the user to ask for."""

MOST = 5000
"""Layers or experts of a configuration: several times as many as any model has."""

_TASKS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "IMAGE_CLASSIFICATION")
"""Tasks whose model is taken, in this order, when the configuration names none that has a loss."""


def is_config(path: Path) -> bool:
    """Whether `path` names a model of Hugging Face: a JSON file, or a folder with a config.json."""
    return path.suffix == ".json" or (path / "config.json").is_file()


def read_config(path: Path, changes: Mapping[str, Any]) -> Any:
    """The configuration in a file or folder, with some fields changed. Raises `UsageError` for what can be wrong with it."""
    transformers = _transformers(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"There is no file {file}.", "Check the path; relative ones start at the current folder.")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is not valid JSON: {error}.", "Name the config.json of a Hugging Face model.") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise UsageError(f"{file} names no model_type.", "Name the config.json of a Hugging Face model.")
    unknown = [key for key in changes if key not in fields]
    try:
        config = transformers.AutoConfig.for_model(**{**fields, **changes})
    except ValueError as error:
        raise UsageError(
            f"{file} is of model_type '{fields['model_type']}', which transformers {transformers.__version__} does not know.",
            "Install a newer one, or give a model.py whose build_model makes the model.",
        ) from error
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UsageError(f"{file} makes no configuration: {type(error).__name__}: {text}.", "Correct the field.") from error
    unknown = [
        key for key in unknown if key not in inspect.signature(type(config).__init__).parameters and key not in _fields(config)
    ]
    if unknown:
        raise UsageError(f"{file} has no field '{unknown[0]}'.", "Besides the fields of the file, only seq_len can be set.")
    return config


def _fields(config: Any) -> set[str]:
    return {*type(config)().to_dict()} if not getattr(config, "sub_configs", None) else {*config.to_dict()}


def _transformers(path: Path) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(
            f"{path} is a Hugging Face model, and transformers is not installed.", "Run pip install 'autoplan-torch[hf]'."
        ) from error


def model_class(config: Any, title: str) -> type[nn.Module]:
    """The class that the configuration names, or the one for its kind of model that computes a loss."""
    transformers = importlib.import_module("transformers")
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None and _has_loss(found):
            return found  # type: ignore[no-any-return]
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    for task in _TASKS:
        table = getattr(auto, f"MODEL_FOR_{task}_MAPPING")
        if type(config) in table:
            found = table[type(config)]
            return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]
    raise UsageError(
        f"{title} is a {getattr(config, 'model_type', '?')}, and transformers has no model of that kind that computes a loss.",
        "Give a model.py with build_model, example_inputs and loss_fn.",
    )


def _has_loss(cls: type[nn.Module]) -> bool:
    return not {"labels", "return_loss", "start_positions"}.isdisjoint(inspect.signature(cls.forward).parameters)


def build(config: Any, title: str) -> nn.Module:
    """The model of a configuration, for training. Weights in a compressed form are left out of account."""
    cls = model_class(config, title)
    try:
        for part in (config, config.get_text_config(), config.get_text_config(decoder=True)):
            _check_numbers(part, title)
            part.use_cache = False
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        return cls(config)
    except UsageError:
        raise
    except Exception as error:
        if "meta" in str(error) and isinstance(error, RuntimeError | TypeError):
            raise  # a value was asked for on meta: the caller tries another way
        raise UsageError(
            f"transformers makes no {cls.__name__} of {title}: {said(error)}.",
            "Correct the configuration, or install what it needs.",
        ) from error


def _check_numbers(config: Any, title: str) -> None:
    """Layers and experts are built one by one: a number with a zero too many would take hours."""
    for name, value in config.to_dict().items():
        if isinstance(value, int) and value > MOST and ("layer" in name or "experts" in name):
            raise UsageError(
                f"{title} asks for {value:,} in '{name}', and autoplan reads models of up to {MOST}.",
                "Correct the configuration.",
            )


def example_inputs(config: Any, title: str, seq_len: int | None, batch_size: int) -> dict[str, Any]:
    """One batch of made-up inputs, with what the loss needs."""
    try:
        return _inputs(config, title, seq_len, batch_size)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"No inputs could be made up for {title}: {said(error)}.", "Give a model.py with build_model and example_inputs."
        ) from error


def _inputs(config: Any, title: str, seq_len: int | None, batch_size: int) -> dict[str, Any]:
    arguments = inspect.signature(model_class(config, title).forward).parameters
    text, vision = config.get_text_config(decoder=True), getattr(config, "vision_config", None)
    length = seq_len or min(longest(config), LONGEST)
    name = model_class(config, title).__name__
    inputs: dict[str, Any] = {}
    if "input_features" in arguments:
        width = getattr(config, "num_mel_bins", 80)
        inputs["input_features"] = torch.randn(batch_size, width, 2 * getattr(config, "max_source_positions", 1500))
    elif "input_ids" in arguments:
        inputs["input_ids"] = _ids(batch_size, length, text.vocab_size)
    if "pixel_values" in arguments and (vision is not None or "input_ids" not in inputs):
        inputs["pixel_values"] = _pictures(vision or config, batch_size)
    if "input_ids" in inputs and "pixel_values" in inputs and "labels" in arguments:
        _place_pictures(inputs, config, title)
    if "start_positions" in arguments:
        inputs.update(start_positions=_ids(batch_size, 1, length)[:, 0], end_positions=_ids(batch_size, 1, length)[:, 0])
    elif "labels" in arguments:
        whole = "SequenceClassification" in name or "ImageClassification" in name
        classes = config.num_labels if "Classification" in name else text.vocab_size
        inputs["labels"] = _ids(batch_size, 1, classes)[:, 0] if whole else _ids(batch_size, length, classes)
    else:
        inputs["return_loss"] = True
    return inputs


def longest(config: Any) -> int:
    """How many positions the text side of a model has."""
    text = config.get_text_config(decoder=True)
    for part, names in (
        (text, ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")),
        (config, ("max_length",)),
    ):
        for name in names:
            found = getattr(part, name, None)
            if isinstance(found, int) and found > 1:
                return found
    return 512 if getattr(config, "is_encoder_decoder", False) else LONGEST


def _ids(batch_size: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch_size, length))


def _pictures(vision: Any, batch_size: int) -> torch.Tensor:
    height, width = _pair(vision.image_size)
    return torch.randn(batch_size, getattr(vision, "num_channels", 3), height, width)


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)


def _place_pictures(inputs: dict[str, Any], config: Any, title: str) -> None:
    """Puts the marks of one picture at the start of every text."""
    vision = config.vision_config
    height, width = _pair(vision.image_size)
    rows, columns = _pair(vision.patch_size)
    marks = getattr(config, "mm_tokens_per_image", None) or (height // rows) * (width // columns)
    token = getattr(config, "image_token_id", None)
    token = getattr(config, "image_token_index", None) if token is None else token
    ids = inputs["input_ids"]
    if ids.shape[1] <= marks:
        raise UsageError(
            f"{title} spends {marks} tokens on one picture, and the sequence has {ids.shape[1]}.", "Ask for a longer ?seq_len=."
        )
    ids[ids == token] = 0
    ids[:, :marks] = token


def loaders(path: Path, said: Mapping[str, Any]) -> tuple[Any, Any]:
    """`build` and `example_inputs` of the model at `path`."""
    changes = dict(said)
    seq_len = changes.pop("seq_len", None)
    if seq_len is not None and (not isinstance(seq_len, int) or seq_len < 1):
        raise UsageError(f"seq_len={seq_len} is no length.", "Write ?seq_len=2048.")
    config = read_config(path, changes)
    model_class(config, str(path))
    return partial(build, config, str(path)), partial(example_inputs, config, str(path), seq_len)
