"""Ctrl-C and SIGTERM as a request to stop after the current step; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from sdclr.engine import processes
from sdclr.errors import Interrupted, Terminated


class StopRequest:
    """While the block runs, the first SIGINT or SIGTERM only sets `requested`; the second raises Terminated."""

    def __init__(self) -> None:
        self.requested: int = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if exc[1] and self._before and processes.count() > 1:
            # The launcher ends what is left when one process has failed; this one is ending, and has yet to tell why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def heard_by_any(self, together: processes.Processes) -> bool:
        """Whether to stop now: told alike to all processes, whichever heard the signal; all must ask after the same step."""
        self.requested = together.agree(self.requested)
        return bool(self.requested)

    def interrupted(self, message: str, hint: str | None = None) -> Interrupted:
        """The error that ends the program with 128 + the signal's number."""
        return Interrupted(message, self.requested, hint)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Terminated(number)
        self.requested = number
