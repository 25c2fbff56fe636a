"""Every error that a user can cause: one sentence, a hint, an exit code. The command line is the only place that catches them."""

from __future__ import annotations


class AutoplanError(Exception):
    """An error the user can do something about.

    `message` says what is wrong and where; `hint` says what to do; `exit_code` is the process's.
    """

    exit_code = 3

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class UsageError(AutoplanError):
    """A bad argument or a bad file: exit code 2."""

    exit_code = 2


class NothingFits(AutoplanError):
    """No legal plan fits into the memory of the devices: exit code 1."""

    exit_code = 1


class SolverError(AutoplanError):
    """The solver, or autoplan itself, failed: exit code 3."""

    exit_code = 3
