"""The user's file: `build_model()` and `example_inputs(batch_size)`, and what can be wrong with them, said in one sentence.

    path/model.py            build_model builds the model
    path/model.py:factory    factory does
    path/model.py?size=8B    build_model(size="8B") does
    path/config.json         a Hugging Face model, also as the folder with its config.json (see `huggingface`)

The file may also define `loss_fn(output, batch) -> scalar` and `workload = {...}`.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlencode

from torch import Tensor, nn

from autoplan.capture import huggingface
from autoplan.capture.failures import line_of, remedy, said
from autoplan.errors import UsageError

EXAMPLE = "def example_inputs(batch_size): return {'input_ids': torch.randint(0, 1000, (batch_size, 128))}"


@dataclass(frozen=True)
class LoadedModel:
    """A user's model file, ready to build."""

    spec: str
    build: Callable[[], nn.Module]
    example_inputs: Callable[[int], dict[str, Any]]
    loss_fn: Callable[[Any, Mapping[str, Any]], Tensor] | None = None
    workload: Mapping[str, Any] = field(default_factory=dict)


def load_model(spec: str, kwargs: Mapping[str, Any] | None = None) -> LoadedModel:
    """The model file that `spec` names, `model.py`, `model.py:factory` or `model.py?size=8B&layers=2`.

    What stands behind the question mark and `kwargs` are arguments of the factory, and of `example_inputs` as far as it
    takes them; the loaded model's `spec` holds them all, so that a plan says which model it is for.
    Raises `UsageError` for everything that can be wrong with the file; `build` and `example_inputs` of the result do too.
    """
    spec, _, query = spec.partition("?")
    said = {**dict(parse_qsl(query, keep_blank_values=True)), **(kwargs or {})}
    given = {key: convert(value) for key, value in said.items()}
    named = f"{spec}?{urlencode(said)}" if said else spec
    if huggingface.is_config(Path(spec)):
        return LoadedModel(named, *huggingface.loaders(Path(spec), given))
    path_text, _, factory = spec.partition(".py:")
    path = Path(path_text + ".py" if factory or spec.endswith(".py:") else spec)
    factory = factory or "build_model"
    _check_path(path)
    module = _import(path)
    build = _function(module, path, factory, "def build_model(): return MyModel()")
    inputs = _function(module, path, "example_inputs", EXAMPLE)
    loss_fn = getattr(module, "loss_fn", None)
    if loss_fn is not None and not callable(loss_fn):
        raise UsageError(f"loss_fn in {path} is no function.", "Write 'def loss_fn(output, batch): ...' that returns a scalar.")
    workload = getattr(module, "workload", {})
    if not isinstance(workload, Mapping):
        raise UsageError(f"workload in {path} is a {type(workload).__name__}.", "Write 'workload = {\"global_batch\": 256}'.")
    unknown = [key for key in given if not _accepts(build, key)]
    if unknown:
        known = ", ".join(inspect.signature(build).parameters) or "none"
        raise UsageError(f"{factory} in {path} takes no argument '{unknown[0]}'.", f"It takes {known}.")
    return LoadedModel(
        named,
        partial(_build, build, path, factory, given),
        partial(_inputs, inputs, path, {key: value for key, value in given.items() if _accepts(inputs, key)}),
        loss_fn,
        dict(workload),
    )


def convert(text: Any) -> Any:
    """The int, float or bool that a command-line value looks like, else the text; what is no text stays as it is."""
    if not isinstance(text, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _check_path(path: Path) -> None:
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder.",
            "Name the Python file in it that defines build_model; a Hugging Face folder has a config.json.",
        )
    if not path.exists():
        raise UsageError(f"There is no file {path}.", "Check the path; relative ones start at the current folder.")
    if path.suffix != ".py":
        raise UsageError(f"{path} is no Python file.", "Name a .py file with build_model and example_inputs, or a config.json.")


def _import(path: Path) -> ModuleType:
    name = f"autoplan_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up by its name
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        with redirect_stdout(sys.stderr):  # stdout is for autoplan's own output
            spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UsageError(f"{error.filename}:{error.lineno} is not valid Python: {error.msg}.", "Correct the line.") from error
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{path} could not be imported: {error}{line_of(error, path)}.", "Install it, or use the right environment."
        ) from error
    except (Exception, SystemExit) as error:
        _fail(f"{path} could not be imported", error, path)
    finally:
        sys.path.pop(0)
    return module


def _function(module: ModuleType, path: Path, name: str, example: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if function is None:
        raise UsageError(f"{path} defines no {name}.", f"Add one: '{example}'.")
    if not callable(function):
        raise UsageError(f"{name} in {path} is a {type(function).__name__}, not a function.", f"Write '{example}'.")
    return function  # type: ignore[no-any-return]


def _accepts(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _build(function: Callable[..., Any], path: Path, name: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        with redirect_stdout(sys.stderr):
            module = function(**kwargs)
    except (Exception, SystemExit) as error:
        if "meta" in str(error) and isinstance(error, RuntimeError | TypeError):
            raise  # a value was asked for on meta: the caller tries another way
        _fail(f"{name} in {path} raised", error, path)
    if not isinstance(module, nn.Module):
        raise UsageError(f"{name} in {path} returns a {type(module).__name__}.", "It must return an nn.Module.")
    return module


def _inputs(function: Callable[..., Any], path: Path, kwargs: dict[str, Any], batch_size: int) -> dict[str, Any]:
    try:
        with redirect_stdout(sys.stderr):
            inputs = function(batch_size, **kwargs)
    except (Exception, SystemExit) as error:
        _fail(f"example_inputs in {path} raised", error, path)
    if not isinstance(inputs, Mapping):
        raise UsageError(
            f"example_inputs in {path} returns a {type(inputs).__name__}.", f"Return forward's arguments: '{EXAMPLE}'."
        )
    strange = [name for name in inputs if not isinstance(name, str)]
    if strange:
        raise UsageError(f"example_inputs in {path} names an argument {strange[0]!r}.", f"Names are text: '{EXAMPLE}'.")
    return dict(inputs)


def _fail(what: str, error: BaseException, path: Path) -> NoReturn:
    if isinstance(error, UsageError):
        raise error
    raise UsageError(f"{what}: {said(error)}{line_of(error, path)}.", remedy(error, "autoplan runs it as it is.")) from error
