"""Does a plan run as it says? A dry run of any world in one process, and real ranks beside the single process."""

from __future__ import annotations

from autoplan.verify.compare import DryRun
from autoplan.verify.dry import dry_run

__all__ = ["DryRun", "dry_run"]
