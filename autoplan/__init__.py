"""autoplan: the automatic parallelism planner for PyTorch Transformers."""

from __future__ import annotations

__version__ = "0.1.0"
