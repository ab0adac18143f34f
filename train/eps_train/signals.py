"""Ctrl-C and SIGTERM as a request: finish the step, save, go."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """While active, the first SIGINT or SIGTERM is noted; a second one acts as it always does.

    Only the main thread may enter it, as the signal module demands.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
