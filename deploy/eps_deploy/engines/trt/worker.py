"""A long call into TensorRT on a thread of its own, so that Ctrl-C and progress reach the user.

TensorRT reports progress from the thread that builds, and asks at every step whether to go on. Here
that thread only leaves messages; whoever waits for the result handles them, on their own thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
Progress = Callable[[str, int, int], bool]


@dataclass(frozen=True, slots=True)
class Step:
    """`done` of `steps` steps of `phase` are over."""

    phase: str
    done: int
    steps: int


class Worker(Generic[Result]):
    """One piece of work that can be called off.

    Attributes:
        cancelled: set when it was.
    """

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outcome: list[Result | BaseException] = []

    def tell(self, event: object) -> None:
        """Leave something for `handle`, from any thread."""
        self._events.put((event,))

    def run(self, work: Callable[[], Result], handle: Callable[[Any], None]) -> Result:
        """What `work` returns or raises, with `handle` called here for all that is told meanwhile.

        When `handle` raises, or Ctrl-C comes, the work is called off and waited for, and the
        exception goes on; a second Ctrl-C does not wait.
        """

        def target() -> None:
            try:
                self._outcome.append(work())
            except BaseException as error:
                self._outcome.append(error)
            finally:
                self._events.put(None)

        thread = threading.Thread(target=target, name="tensorrt-build", daemon=True)
        try:
            thread.start()
            for event in iter(self._events.get, None):
                handle(event[0])
        except BaseException:
            self.cancelled.set()
            if thread.is_alive():
                thread.join()
            raise
        thread.join()
        outcome = self._outcome[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def monitor_of(trt: Any, worker: Worker[Any]) -> Any:
    """An `IProgressMonitor` that tells `worker` of every step and stops once it is cancelled."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # the bindings insist on this form
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            worker.tell(Step(phase_name, 0, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            worker.tell(Step(phase_name, step + 1, self._steps.get(phase_name, step + 1)))
            return not worker.cancelled.is_set()  # anything but True ends the build

        def phase_finish(self, phase_name: str) -> None:
            steps = self._steps.pop(phase_name, 0)
            worker.tell(Step(phase_name, steps, steps))

    return Monitor()
