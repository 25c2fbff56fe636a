"""Which hardware profiles there are, and the one that a name or a path means. No torch in here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from autoplan.errors import UsageError
from autoplan.files.document import did_you_mean
from autoplan.files.hardware import load_hardware
from autoplan.hardware import HardwareProfile
from autoplan.profile.detect import Choice, choose, gpus

DEFAULT_HARDWARE = "h100-sxm-8x"
"""What is planned for when nothing is said."""

AUTO = "auto"
"""The name that stands for what this machine has."""

_SUFFIXES = (".yaml", ".yml")
_PACKAGE = Path(__file__).resolve().parent.parent


def hardware_names() -> list[str]:
    """Names of all profiles that are found without a path, sorted."""
    return sorted({path.stem for folder in _folders() for path in folder.iterdir() if path.suffix in _SUFFIXES})


def find_hardware(name_or_path: str) -> HardwareProfile:
    """The profile of that name, or in that file. Raises `UsageError` when there is none, or it is broken.

    A file wins over a name; the user's own `./hwprofiles` wins over the profiles that autoplan brings. "auto" is the profile
    of this machine.
    """
    path = Path(name_or_path)
    if path.suffix in _SUFFIXES or _is_file(path):
        return load_hardware(path)
    for folder in _folders():
        for suffix in _SUFFIXES:
            candidate = folder / f"{name_or_path}{suffix}"
            if candidate.parent == folder and _is_file(candidate):
                return load_hardware(candidate)
    if name_or_path == AUTO:
        return find_hardware(detected().name)
    names = hardware_names()
    device = sorted((name for name in names if name.split("-")[0] == name_or_path.lower().split("-")[0]), key=len)
    close = f"Did you mean {' or '.join(device)}?" if device else did_you_mean(name_or_path, names)
    hint = close or f"There are {', '.join(names) or 'none'}; or give a path to a .yaml file."
    raise UsageError(f"no hardware profile '{name_or_path[:80]}'.", hint)


def detected() -> Choice:
    """The profile that fits this machine's GPUs, or its CPU when it has none. Raises `UsageError` when none fits."""
    return choose(gpus(), [find_hardware(name) for name in hardware_names()])


def _folders() -> Iterator[Path]:
    """The user's folder, the repository's in an editable install, the installed package's: those that exist, each once."""
    seen = set()
    for folder in (Path("hwprofiles"), _PACKAGE.parent / "hwprofiles", _PACKAGE / "hwprofiles"):
        resolved = folder.resolve()
        if folder.is_dir() and resolved not in seen:
            seen.add(resolved)
            yield folder


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name with a NUL byte, or too long for the file system
        return False
