"""gRPC server of registered methods, with authentication, status codes, access log and metrics.

Uses grpcio's private API: the loop in which grpcio accepts calls decodes the method's name as
UTF-8, and ends for good when it is invalid (seen in grpcio 1.85; any HTTP/2 client can send such a
path). Calls of methods that are registered by name never come there, and all others are rejected
without a look at their names.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
from grpc import aio
from grpc._cython import cygrpc
from grpc.aio import _server

from eps_deploy.serving.middleware import Access, as_api_error, trace_headers
from eps_deploy.serving.protocol import ApiError, busy

SERVICE = "inference.GRPCInferenceService"
RpcMethod = Callable[[Any], Awaitable[bytes]]

_STATUS_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,  # as grpcio itself says of a large message
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


class RpcInterceptor:
    """Wrap the gRPC methods; at most `max_calls` are in progress, beside those of open methods.

    While `released` is cleared, all answers are held back.
    """

    def __init__(self, access: Access, *, max_calls: int) -> None:
        self.released = asyncio.Event()
        self.released.set()
        self._access = access
        self._calls = asyncio.Semaphore(max_calls)

    def handler(self, name: str, method: RpcMethod, *, open: bool = False) -> grpc.RpcMethodHandler:
        """Return grpcio's handler of a method.

        To grpcio it takes a stream: then `method` reads the message itself, once there is memory
        for it. On the wire a single message looks the same.

        Args:
            name: of the method.
            method: receives grpcio's context, returns the encoded answer.
            open: whether it needs no token and is answered at any time.
        """

        async def handle(_: Any, context: Any) -> bytes:
            return await self._handle(name, method, open, context)

        return grpc.stream_unary_rpc_method_handler(handle)

    async def reject_unknown(self, context: Any) -> None:
        """End a call of a method that does not exist."""
        await self._handle("none", _unknown_method, False, context)

    async def _handle(self, name: str, method: RpcMethod, open: bool, context: Any) -> bytes:
        began = time.perf_counter()
        metadata = dict(context.invocation_metadata())
        trace = trace_headers(_header(metadata, "x-request-id"), _header(metadata, "traceparent"))
        trailing = tuple((name.decode(), value.decode()) for name, value in trace)
        context.set_trailing_metadata(trailing)
        error: ApiError | None = None
        code, reason = grpc.StatusCode.OK, ""
        try:
            if open:
                content = await method(context)
            else:
                self._access.check_token(_header(metadata, "authorization"))
                if self._calls.locked():
                    raise busy("too many calls are under way", reason="calls")
                async with self._calls:
                    content = await method(context)
            await self.released.wait()
        except asyncio.CancelledError:
            expired = context.time_remaining() == 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            reason = "deadline" if expired else "disconnected"
            raise
        except Exception as raised:
            error = as_api_error(raised, trace)
            reason = error.reason
            late = reason == "deadline"
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else _STATUS_CODES[error.status]
        finally:
            self._access.record(
                name,
                code.name,
                began=began,
                reason=reason,
                failed=code is grpc.StatusCode.INTERNAL,
                trace=trace,
                method="gRPC",
                path=f"/{SERVICE}/{name}",
            )
        if error is not None:
            await self.released.wait()
            if error.retry_after is not None:  # for clients that retry by themselves (gRFC A6)
                trailing += (("grpc-retry-pushback-ms", str(1000 * error.retry_after)),)
            await context.abort(code, str(error), trailing)
        return content


async def _unknown_method(context: Any) -> bytes:
    raise ApiError("this server has no such method", status=501, reason="unknown")


def _header(metadata: dict[str, str], name: str) -> bytes:
    return metadata.get(name, "").encode()


# -- The server on grpcio's private API


class _CoreServer(cygrpc.AioServer):  # type: ignore[misc]
    def __init__(
        self,
        reject: Callable[[Any], Awaitable[None]],
        loop: asyncio.AbstractEventLoop,
        *args: Any,
    ) -> None:
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
    """A server like that of `grpc.aio.server()`, for registered methods; `reject` ends others."""

    def __init__(
        self,
        methods: Mapping[str, grpc.RpcMethodHandler],
        reject: Callable[[Any], Awaitable[None]],
        options: Sequence[tuple[str, int]],
    ) -> None:
        self._loop = cygrpc.get_working_loop()
        self._server = _CoreServer(reject, self._loop, None, (), (), tuple(options), None)
        self.add_registered_method_handlers(SERVICE, dict(methods))
