"""gRPC interceptor: authentication, errors as status codes, trace headers, access log, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from eps_deploy.serving.middleware import Access, HeaderList, log_unexpected, trace_headers
from eps_deploy.serving.protocol import ApiError, InferenceFailed, as_api_error, busy

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
    """Wrap the gRPC methods; at most `max_calls` are in progress, beside those of open methods."""

    def __init__(self, access: Access, *, max_calls: int) -> None:
        self._access = access
        self._max_calls = max_calls
        self._in_progress = 0
        self._released = asyncio.Event()
        self._released.set()

    def hold(self) -> None:
        """Hold back all answers until :meth:`release`."""
        self._released.clear()

    def release(self) -> None:
        self._released.set()

    def handler(self, name: str, method: RpcMethod, *, open: bool = False) -> grpc.RpcMethodHandler:
        """Return grpcio's handler of a method.

        To grpcio it takes a stream: then `method` reads the message itself, once there is memory
        for it. On the wire a single message looks the same.

        Args:
            name: of the method.
            method: receives grpcio's context, returns the encoded answer, or raises ApiError or
                InferenceFailed.
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
        context.set_trailing_metadata(_as_metadata(trace))
        error: ApiError | None = None
        code, reason = grpc.StatusCode.OK, ""
        try:
            if open:
                content = await method(context)
            else:
                self._access.check_token(_header(metadata, "authorization"))
                content = await self._limited(method, context)
            await self._released.wait()
        except (ApiError, InferenceFailed) as raised:
            error = as_api_error(raised)
        except asyncio.CancelledError:
            expired = context.time_remaining() == 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            reason = "deadline" if expired else "disconnected"
            raise
        except Exception:
            log_unexpected(trace)
            error = ApiError("internal error", status=500, reason="internal")
        finally:
            if error is not None:
                late = error.reason == "deadline"
                code = grpc.StatusCode.DEADLINE_EXCEEDED if late else _STATUS_CODES[error.status]
                reason = error.reason
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
            await self._released.wait()
            trailing = _as_metadata(trace)
            if error.retry_after is not None:  # for clients that retry by themselves (gRFC A6)
                trailing += (("grpc-retry-pushback-ms", str(1000 * error.retry_after)),)
            await context.abort(code, str(error), trailing)
        return content

    async def _limited(self, method: RpcMethod, context: Any) -> bytes:
        if self._in_progress >= self._max_calls:
            raise busy("too many calls are under way", reason="calls")
        self._in_progress += 1
        try:
            return await method(context)
        finally:
            self._in_progress -= 1


async def _unknown_method(context: Any) -> bytes:
    raise ApiError("this server has no such method", status=501, reason="unknown")


def _header(metadata: dict[str, str], name: str) -> bytes:
    return metadata.get(name, "").encode()


def _as_metadata(headers: HeaderList) -> tuple[tuple[str, str], ...]:
    return tuple((name.decode(), value.decode()) for name, value in headers)
