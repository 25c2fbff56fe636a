"""Which trainer a file is of: by its ending, and by what it holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

from autoplan.errors import UsageError
from autoplan.files.document import read_document
from autoplan.importing import accelerate, megatron, torchtitan
from autoplan.importing.configuration import Configuration

_LARGEST = 2**20
_KNOWN = "It reads torchtitan's TOML, Megatron-LM's arguments as text, and accelerate's YAML."
_SECTIONS = frozenset(("job", "model", "training", "parallelism", "activation_checkpoint"))


def read_configuration(path: str | Path) -> Configuration:
    """Raises `UsageError`, naming file and key, for a file of no trainer that is known, or one that makes no sense."""
    path = Path(path)
    if path.suffix == ".toml":
        return _torchtitan(path)
    if path.suffix in (".yaml", ".yml"):
        return _accelerate(path)
    if path.suffix in (".py", ".json"):
        raise UsageError(f"{path} is no configuration that autoplan reads.", _KNOWN)
    text = _text(path)
    if not megatron.looks_like(text):
        raise UsageError(f"{path} is no configuration that autoplan reads.", _KNOWN)
    return megatron.configuration(path, text)


def _torchtitan(path: Path) -> Configuration:
    try:
        document = tomllib.loads(_text(path))
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        reason = str(error)[:120]
        raise UsageError(f"{path} is not valid TOML: {reason[:1].lower()}{reason[1:]}.", "Mend it there.") from None
    if not _SECTIONS & set(document):
        raise UsageError(f"{path} is no job file of torchtitan: it has no section [parallelism] or [training].", _KNOWN)
    return torchtitan.configuration(path, document)


def _accelerate(path: Path) -> Configuration:
    document = read_document(path, "configuration")
    if "strategies" in document and "mesh" in document:
        raise UsageError(f"{path} is a plan of autoplan's own.", f"Price it with `autoplan estimate {path}`.")
    if not {"distributed_type", "num_processes", "parallelism_config", "fsdp_config"} & set(document):
        raise UsageError(f"{path} is no configuration of accelerate: it has no key 'distributed_type'.", _KNOWN)
    return accelerate.configuration(path, document)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"{path} is larger than any configuration.", _KNOWN)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}.", "Check the path.") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, not a configuration.", _KNOWN) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {str(error).splitlines()[0][:120]}.", _KNOWN) from None
