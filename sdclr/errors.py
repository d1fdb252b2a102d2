"""What can go wrong for a user, as exceptions that say what happened, what to do next, and how the program exits.

Exit codes: 0 done, 1 the run failed, 2 the config or the input is wrong, 3 inconclusive, 130/143 interrupted after saving, 141 when
whoever reads the output has gone.
"""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from typing import Any


class SdclrError(Exception):
    """A message for the user: what happened (with the values that clash), and a hint that names the next command."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message, self.hint = message, hint

    def __reduce__(self) -> tuple[Any, ...]:
        """What one process met can be raised in another, whatever a kind of error is made from."""
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class InputError(SdclrError):
    """The config, the images or the model the user named cannot be used; nothing has been changed."""

    exit_code = 2


class ConfigError(InputError):
    """Every problem of one config file, each already located as `file:line:column: what`."""

    def __init__(self, problems: Sequence[str], hint: str | None = None):
        super().__init__("\n".join(problems), hint)
        self.problems = list(problems)


class DataError(InputError):
    """Every problem of an image folder at once, each naming its file."""

    def __init__(self, problems: Sequence[str], hint: str | None = None):
        super().__init__("\n".join(problems), hint)
        self.problems = list(problems)


class CheckpointError(InputError):
    """A checkpoint is missing, broken or belongs to another run."""


class DivergenceError(SdclrError):
    """A loss, gradient or weight stopped being finite; raised before the update, so the weights are still good."""


class StorageError(SdclrError):
    """Something could not be written: disk full, read-only, vanished."""


class Interrupted(SdclrError):
    """The user or the system asked to stop, and the work so far has been saved."""

    def __init__(self, message: str, signal_number: int, hint: str | None = None):
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number


class Terminated(KeyboardInterrupt):
    """A signal that ends the program where it is. It is not an Exception, so that code which takes any Exception for a damaged file lets it
    through."""

    def __init__(self, signal_number: int):
        super().__init__()
        self.signal_number = signal_number


class Inconclusive(SdclrError):
    """The data cannot say; the reasons and their remedies have been reported."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """What an error says first, or its name; with the next line where the first only announces it."""
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return (f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first)[:300]
