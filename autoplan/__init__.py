"""autoplan: the automatic parallelism planner for PyTorch Transformers.

`autoplan.plan`, `autoplan.apply`, `autoplan.report` and the rest of `autoplan.api` are here too, loaded when first used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

_FACE = (
    "Timer",
    "apply",
    "calibrate",
    "compare",
    "estimate",
    "explain",
    "export",
    "frame",
    "hardware_names",
    "imported",
    "inspect",
    "load_hardware",
    "load_model",
    "load_plan",
    "plan",
    "plan_json",
    "plans",
    "report",
    "save_plan",
    "verify",
)

__all__ = [*_FACE, "__version__"]


class _Face(ModuleType):
    """The rooms `plan`, `apply`, `report` and `verify` share their names with the verbs of the public face; Python binds a
    submodule on its package when it is imported, which must not hide the verb."""

    def __getattr__(self, name: str) -> Any:
        if name in _FACE:
            from autoplan import api

            return getattr(api, name)
        if name == "__version__":
            from importlib.metadata import version

            return version("autoplan-torch")
        raise AttributeError(f"module 'autoplan' has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FACE and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_FACE]


sys.modules[__name__].__class__ = _Face
