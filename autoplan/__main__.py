"""`python -m autoplan`."""

from __future__ import annotations

import sys

from autoplan.cli import main

if __name__ == "__main__":
    sys.exit(main())
