"""A YAML document on disk: read it strictly, say in one sentence what is wrong with it, write it whole or not at all."""

from __future__ import annotations

import os
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from autoplan.errors import UsageError

T = TypeVar("T")

_LARGEST = 32 * 2**20


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _StrictLoader(_Loader):  # type: ignore[misc]
    """Safe loading that refuses a key given twice, where YAML would silently keep the last."""


def _mapping(loader: Any, node: Any) -> dict[Any, Any]:
    pairs = [(loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value]
    seen: set[Any] = set()
    for key, _ in pairs:
        if not isinstance(key, str | int | float | bool):
            raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key '{key}' is given twice", problem_mark=node.start_mark)
        seen.add(key)
    return dict(pairs)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_document(path: Path, what: str) -> dict[str, Any]:
    """The mapping in the file at `path`, a "plan" or "hardware profile" (`what`). Raises `UsageError` naming file and line."""
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"{path} is larger than any {what}.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}.", "Check the path.") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, not a {what}.") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a {what}: {_first_line(error)}.") from None
    try:
        _refuse_aliases(text)
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {_yaml_problem(error)}.") from None
    except (RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:  # PyYAML lets them out
        raise UsageError(f"{path} is not valid YAML: {_first_line(error)}.") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} is not a {what}: it holds no mapping of keys.")
    return data


def _refuse_aliases(text: str) -> None:
    """With aliases a small file can grow without end."""
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.events.AliasEvent):
            line = event.start_mark.line + 1 if event.start_mark is not None else 0
            raise ValueError(f"aliases are not allowed, line {line}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _yaml_problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or _first_line(error)
    mark = getattr(error, "problem_mark", None)
    return f"{problem}, line {mark.line + 1}" if mark is not None else str(problem)


def validate(adapter: TypeAdapter[T], data: dict[str, Any], path: Path, what: str) -> T:
    """`data` as the adapter's type. Raises `UsageError`: one sentence with every place that is wrong."""
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors(include_url=False)]
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UsageError(f"{path} is not a valid {what}: {shown}.") from None
    except RecursionError:
        raise UsageError(f"{path} is not a valid {what}: it is nested too deeply.") from None


def _problem(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"]) or "the document"
    if item["type"] == "extra_forbidden" or item["type"] == "unexpected_keyword_argument":
        return f"'{place}' is not a known key"
    if item["type"] in ("missing", "missing_argument"):
        return f"'{place}' is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"'{place}': {message[:1].lower()}{message[1:]}".rstrip(".")


def did_you_mean(word: str, known: list[str]) -> str:
    """ " Did you mean x?", or nothing."""
    close = get_close_matches(word, known, n=1, cutoff=0.4)
    return f"Did you mean {close[0]}?" if close else ""


def write_text(path: Path, text: str, *, force: bool) -> None:
    """Write the file whole or not at all. Raises `UsageError` when it exists and `force` is not set, or cannot be written."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists already.", "Use --force to overwrite it, or -o to write elsewhere.")
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent or Path(), prefix=f".{path.name}.", delete=False
        ) as handle:
            temporary = handle.name
            handle.write(text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
