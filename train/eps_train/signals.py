"""Ctrl-C and SIGTERM as a request: finish the step, save, go."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from eps_train.distributed import Group
from eps_train.launcher import launched


class StopRequest:
    """While active, the first SIGINT or SIGTERM is noted; a second one acts as it always does.

    Under torchrun that one is noted too: it hands on a Ctrl-C that the terminal has already sent to
    all. A process that takes more than 30 s to go it kills.

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
        if not launched():
            self.__exit__()


class AgreedStop:
    """A request that reaches any process of a group, answered by all of them at the same step.

    The question of one step is answered with the next: what the processes have to say travels
    while they compute, so that nobody waits for it. Then `request.signal` is set in all of them.
    """

    def __init__(self, request: StopRequest, group: Group) -> None:
        self._request, self._group = request, group
        self._answer: Callable[[], int] | None = None
        self._agreed = False

    def __call__(self) -> bool:
        """Whether to stop now; every process has to ask, and equally often."""
        if self._group.world is None:
            return self._request()
        if self._agreed:
            return True
        asked = 0 if self._answer is None else self._answer()
        if asked:
            self._request.signal, self._agreed = asked, True
        else:
            self._answer = self._group.post_largest(self._request.signal or 0)
        return self._agreed

    def at_last(self) -> bool:
        """The same, at a point where the processes may wait for each other."""
        return self() or self()
