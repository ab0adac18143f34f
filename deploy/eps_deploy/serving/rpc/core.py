"""asyncio gRPC server that accepts calls of registered methods only. Uses grpcio's private API.

The loop in which grpcio accepts calls decodes the method's name as UTF-8, and ends for good when it
is invalid (seen in grpcio 1.85; any HTTP/2 client can send such a path). Calls of methods that are
registered by name never come there, and all others are rejected without a look at their names.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
from grpc import aio
from grpc._cython import cygrpc
from grpc.aio import _server

Reject = Callable[[Any], Awaitable[Any]]


class _CoreServer(cygrpc.AioServer):  # type: ignore[misc]
    def __init__(self, reject: Reject, loop: asyncio.AbstractEventLoop, *args: Any) -> None:
        super().__init__(loop, *args)
        self._made_on = loop
        self._reject = reject
        self._rejecting: set[asyncio.Task[None]] = set()

    async def _request_call(self) -> Any:
        """The next call of a method that is not registered; it never returns one."""
        while True:
            call = await super()._request_call()
            task = asyncio.create_task(self._end(call))
            self._rejecting.add(task)
            task.add_done_callback(self._rejecting.discard)

    async def _end(self, call: Any) -> None:
        context = cygrpc._ServicerContext(call, None, None, self._made_on)
        # The first is how a rejected call ends, the second how it ends when the client is gone.
        with contextlib.suppress(aio.AbortError, cygrpc.ExecuteBatchError):
            await self._reject(context)


class RegisteredServer(_server.Server):  # type: ignore[misc]
    """A server like that of `grpc.aio.server()`, for registered methods.

    Args:
        service: full name of the gRPC service.
        methods: handlers by their methods' names.
        reject: ends all other calls.
        options: channel arguments.
    """

    def __init__(
        self,
        service: str,
        methods: Mapping[str, grpc.RpcMethodHandler],
        reject: Reject,
        options: Sequence[tuple[str, int]],
    ) -> None:
        self._loop = cygrpc.get_working_loop()
        self._server = _CoreServer(reject, self._loop, None, (), (), tuple(options), None)
        self.add_registered_method_handlers(service, dict(methods))
