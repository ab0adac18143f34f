"""The one logger of the process, and the places where its messages go.

TensorRT takes the first logger that it is given for the whole process and ignores every later one,
and a failed call says why only there. So there is one, it lives for ever, and whoever wants to know
listens for a while.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_LEVELS = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")  # VERBOSE is thousands of lines a build


@dataclass(frozen=True, slots=True)
class Message:
    """What TensorRT said, in one line.

    Attributes:
        level: `INTERNAL_ERROR`, `ERROR`, `WARNING` or `INFO`.
        text: without line breaks.
    """

    level: str
    text: str

    @property
    def is_error(self) -> bool:
        return self.level in ("INTERNAL_ERROR", "ERROR")

    def __str__(self) -> str:
        return f"{self.level.lower().replace('_', ' ')}: {self.text}"


@dataclass(slots=True)
class Log:
    """The messages of a while, in their order."""

    messages: list[Message] = field(default_factory=list)

    def why(self) -> str:
        """The first error, which is mostly the cause of those after it."""
        for message in self.messages:
            if message.is_error:
                return message.text
        return "TensorRT gave no reason"

    def tail(self, count: int) -> list[str]:
        return [str(message) for message in self.messages[-count:]]


_loggers: dict[str, Any] = {}
_lock = threading.Lock()


def logger_of(trt: Any) -> Any:
    """The process's `ILogger` for the module `trt`, made at the first call."""
    with _lock:
        key = f"{trt.__name__} {id(trt)}"  # the logger's class keeps the module, so ids stay unique
        if key not in _loggers:
            _loggers[key] = _make(trt)
        return _loggers[key]


@contextmanager
def listening(trt: Any, say: Callable[[Message], None] | None = None) -> Iterator[Log]:
    """Collect what TensorRT says during a block, whichever of its threads and objects says it.

    `say` is called with each message as it comes, on whatever thread it comes, and must not raise.
    """
    log = Log()

    def sink(message: Message) -> None:
        log.messages.append(message)
        if say is not None:
            say(message)

    logger = logger_of(trt)
    logger.sinks.append(sink)
    try:
        yield log
    finally:
        logger.sinks.remove(sink)


def _make(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the bindings insist on this form
            self.sinks: list[Callable[[Message], None]] = []

        def log(self, severity: Any, msg: str) -> None:
            """Called from C++ on any thread: nothing may be raised here."""
            if severity.name in _LEVELS:
                message = Message(severity.name, " ".join(msg.split()))
                for sink in tuple(self.sinks):
                    sink(message)

    return Logger()
