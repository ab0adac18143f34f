"""grpcio's asyncio server, which one request of any client could end.

Its loop that accepts calls decodes the method's name as UTF-8 and stops for good when it is none
(seen in grpcio 1.85; any HTTP/2 client can send such a path). Calls of methods that are registered
by name never come there, and all others are refused without a look at their names.
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

Refuse = Callable[[Any], Awaitable[Any]]


class _Acceptor(cygrpc.AioServer):  # type: ignore[misc]
    """Hands on calls of registered methods only."""

    def __init__(self, refuse: Refuse, loop: asyncio.AbstractEventLoop, *args: Any) -> None:
        super().__init__(loop, *args)
        self._made_on = loop
        self._refuse = refuse
        self._refusing: set[asyncio.Task[None]] = set()

    async def _request_call(self) -> Any:
        """The next call of a method that is not registered; there is never one."""
        while True:
            call = await super()._request_call()
            task = asyncio.create_task(self._end(call))
            self._refusing.add(task)
            task.add_done_callback(self._refusing.discard)

    async def _end(self, call: Any) -> None:
        context = cygrpc._ServicerContext(call, None, None, self._made_on)
        # The first is how a refusal ends, the second how it ends when the client is gone.
        with contextlib.suppress(aio.AbortError, cygrpc.ExecuteBatchError):
            await self._refuse(context)


class Server(_server.Server):  # type: ignore[misc]
    """As `grpc.aio.server()` makes one, for registered methods.

    Args:
        service: full name of the gRPC service.
        methods: handlers by their methods' names.
        refuse: ends all other calls.
        options: channel arguments.
    """

    def __init__(
        self,
        service: str,
        methods: Mapping[str, grpc.RpcMethodHandler],
        refuse: Refuse,
        options: Sequence[tuple[str, int]],
    ) -> None:
        self._loop = cygrpc.get_working_loop()
        self._server = _Acceptor(refuse, self._loop, None, (), (), tuple(options), None)
        self.add_registered_method_handlers(service, dict(methods))
