"""A GPU made of host memory, for `fake_pycuda` and `fake_bindings` to stand on.

It does what is queued when somebody waits for it, and not before: until then a copy from it reads
as NaN. It holds its user to the rules that a real one leaves to luck: copies between page-locked
and device memory alone, nothing freed or changed while it is still to be read, a context current in
the calling thread, nothing in the default stream. Whoever breaks one gets a `Violation`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 256
POISON = 0xFF  # four of them are a NaN

Bytes = npt.NDArray[np.uint8]
Work = Callable[[], None]


class Violation(AssertionError):
    """Something that a real GPU would have answered with wrong numbers, some day."""


@dataclass(eq=False, slots=True)
class Block:
    """Memory: `kind` is `device` or `page-locked`."""

    kind: str
    content: Bytes
    alive: bool = True
    stream: int | None = None  # whose work uses it

    @property
    def address(self) -> int:
        return int(self.content.ctypes.data)


@dataclass(eq=False, slots=True)
class Queue:
    """What a stream is: work that waits, or that is being recorded."""

    handle: int
    waiting: list[Work] = field(default_factory=list)
    recorded: list[Callable[[], Work]] | None = None
    spoilt: bool = False  # the capture

    def add(self, start: Callable[[], Work]) -> None:
        """Queue work, or record it. `start` is called at each launch and returns what is done when
        somebody waits: of recorded work nothing has happened before its graph is launched."""
        if self.recorded is None:
            self.waiting.append(start())
        else:
            self.recorded.append(start)

    def launch(self, recorded: Iterable[Callable[[], Work]]) -> None:
        for start in recorded:
            self.add(start)


class FakeGpu:
    """The GPU itself.

    Attributes:
        refuse: how often the function of this name is yet to fail.
        clock: GPU time in milliseconds; work moves it on.
        order: what was freed or destroyed, in its order.
        leaks: what was given up in a way that frees nothing.
        live: how many of each kind of thing there are.
        entered: ordinals of the devices whose context was made current.

    Args:
        devices: how many alike the machine has; they share this one's memory and clock.
    """

    def __init__(
        self, *, capability: tuple[int, int] = (9, 0), memory: int = 2**30, devices: int = 1
    ) -> None:
        self.capability, self.memory, self.devices = capability, memory, devices
        self.entered: set[int] = set()
        self.lock = threading.RLock()
        self.refuse: Counter[str] = Counter()
        self.clock = 0.0
        self.order: list[str] = []
        self.leaks: list[str] = []
        self.blocks: list[Block] = []
        self.queues: dict[int, Queue] = {}
        self.live: Counter[str] = Counter()
        self._local = threading.local()
        self._stacks: list[list[Any]] = []
        self._handles = 0x1000

    @property
    def stack(self) -> list[Any]:
        """The contexts of this thread."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
            self._stacks.append(self._local.stack)
        stack: list[Any] = self._local.stack
        return stack

    def require_context(self, who: str) -> None:
        if not self.stack:
            raise Violation(f"{who} without a context current in this thread")

    def refused(self, name: str) -> bool:
        """Whether this call of `name` is one that is to fail."""
        with self.lock:
            if self.refuse[name] > 0:
                self.refuse[name] -= 1
                return True
            return False

    def handle(self) -> int:
        self._handles += 0x10
        return self._handles

    def allocate(self, kind: str, nbytes: int) -> Block:
        self.require_context(f"{kind} memory")
        whole = np.full(nbytes + _ALIGNMENT, POISON, np.uint8)
        start = -whole.ctypes.data % _ALIGNMENT
        block = Block(kind, whole[start : start + nbytes])
        self.blocks.append(block)
        self.live[kind] += 1
        return block

    def free(self, block: Block) -> None:
        self.require_context(f"free of {block.kind} memory")
        if not block.alive:
            raise Violation(f"{block.kind} memory freed twice")
        block.alive = False
        self.live[block.kind] -= 1
        self.order.append(block.kind)

    def at(self, address: int, nbytes: int, kind: str) -> Bytes:
        """`nbytes` of living memory of this kind at `address`."""
        for block in self.blocks:
            offset = address - block.address
            if block.kind == kind and 0 <= offset <= len(block.content) - nbytes:
                if not block.alive:
                    raise Violation(f"{kind} memory is used after it was freed")
                return block.content[offset : offset + nbytes]
        raise Violation(f"{nbytes} bytes at {address:#x} are not in one piece of {kind} memory")

    def claim(self, address: int, stream: int) -> None:
        """Work in `stream` uses this device memory; work in another one would race with it."""
        for block in self.blocks:
            if block.alive and 0 <= address - block.address < len(block.content):
                if block.stream not in (None, stream):
                    raise Violation("two streams use the same memory")
                block.stream = stream

    def host(self, array: npt.NDArray[Any]) -> Bytes:
        """The page-locked memory below an array."""
        if not array.flags.c_contiguous:
            raise ValueError("ndarray is not contiguous")
        return self.at(int(array.ctypes.data), array.nbytes, "page-locked")

    def queue(self, handle: int) -> Queue:
        if handle not in self.queues:
            raise Violation(f"{handle:#x} is the default stream, or none that lives")
        return self.queues[handle]

    def wait(self, queue: Queue) -> None:
        while queue.waiting:
            queue.waiting.pop(0)()

    def check_clean(self) -> None:
        """Everything freed, every context popped, nothing left to the garbage collector."""
        assert not self.leaks, self.leaks
        left = {kind: count for kind, count in self.live.items() if count}
        retained = left.pop("retained primary context", 0)
        assert not left, left
        assert 1 <= retained <= self.devices
        assert not any(self._stacks), "a context was pushed and not popped"
