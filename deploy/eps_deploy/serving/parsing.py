"""Parsing requests without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from eps_deploy.serving.contract import Request
from eps_deploy.serving.refusals import too_large

_INLINE = 256 << 10  # bytes that are parsed at once; more would hold up everybody


class Parser:
    """Parses small requests at once and large ones on a thread.

    Args:
        workers: for the large ones.
        limit: bytes to be parsed, beside raw tensors: a parsed number takes far more memory.
        form: what is parsed, and where the tensor goes instead, for those who send too much.
    """

    def __init__(self, workers: Executor, limit: int, form: tuple[str, str]) -> None:
        self._workers = workers
        self._limit = limit
        self._form = form

    async def parse(self, size: int, work: Callable[[], Request]) -> Request:
        """What `work` makes of `size` bytes. Raises Refusal: too many, or what `work` raises."""
        if size > self._limit:
            what, instead = self._form
            raise too_large(
                f"{size} bytes {what}; at most {self._limit} are accepted:"
                f" send the tensor {instead}"
            )
        if size <= _INLINE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)
