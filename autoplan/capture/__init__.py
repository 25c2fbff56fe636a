"""A user's model.py -> Graph."""

from __future__ import annotations

from autoplan.capture.load import LoadedModel, load_model
from autoplan.capture.model import capture, capture_module

__all__ = ["LoadedModel", "capture", "capture_module", "load_model"]
