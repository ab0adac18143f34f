"""What happens around every call: errors as statuses, and what `envelope` has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.middleware import Account, Marks, check_token, identify, log_mistake
from eps_deploy.serving.protocol import ApiError, InferenceFailed, as_refusal, busy

SERVICE = "inference.GRPCInferenceService"
Answer = Callable[[Any], Awaitable[bytes]]

_CODES = {
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


class Frame:
    """Around the calls.

    Args:
        metrics: counts what was answered.
        token: that clients must send as metadata `authorization: Bearer TOKEN`; None: none.
        log_requests: log every call, not only those that went wrong here.
        most: calls that may be under way at one time, beside those of open methods.
    """

    def __init__(
        self, metrics: Metrics, *, token: bytes | None, log_requests: bool, most: int
    ) -> None:
        self._account = Account(metrics, log_requests=log_requests)
        self._token = token
        self._most = most
        self._under_way = 0
        self._released = asyncio.Event()
        self._released.set()

    def hold(self) -> None:
        """Keep answers back from now on."""
        self._released.clear()

    def release(self) -> None:
        self._released.set()

    def handler(self, method: str, answer: Answer, *, open: bool = False) -> grpc.RpcMethodHandler:
        """A method's handler.

        To grpcio it takes a stream: then the message is read by `answer`, when it may come and how
        much of it there is room for is known. On the wire a single message looks the same.

        Args:
            method: its name.
            answer: gets grpcio's context, returns the encoded answer, or raises Refusal or
                InferenceFailed.
            open: it needs no token, and is answered at any time.
        """

        async def handle(_: Any, context: Any) -> bytes:
            return await self._handle(method, answer, open, context)

        return grpc.stream_unary_rpc_method_handler(handle)

    async def refuse(self, context: Any) -> None:
        """End a call of another method."""
        await self._handle("none", _unknown, False, context)

    async def _handle(self, method: str, answer: Answer, open: bool, context: Any) -> bytes:
        began = time.perf_counter()
        metadata = dict(context.invocation_metadata())
        marks = identify(_header(metadata, "x-request-id"), _header(metadata, "traceparent"))
        context.set_trailing_metadata(_texts(marks))
        refusal: ApiError | None = None
        code, reason = grpc.StatusCode.OK, ""
        try:
            if open:
                content = await answer(context)
            else:
                if self._token is not None:
                    check_token(self._token, _header(metadata, "authorization"))
                content = await self._counted(answer, context)
            await self._released.wait()
        except (ApiError, InferenceFailed) as error:
            refusal = as_refusal(error)
        except asyncio.CancelledError:
            expired = context.time_remaining() == 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            reason = "deadline" if expired else "disconnected"
            raise
        except Exception:
            log_mistake(marks)
            refusal = ApiError("internal error", status=500, reason="internal")
        finally:
            if refusal is not None:
                code, reason = _code(refusal), refusal.reason
            self._close(method, code, reason, began, marks)
        if refusal is not None:
            await self._released.wait()
            await context.abort(code, str(refusal), _texts(marks) + _pushback(refusal))
        return content

    async def _counted(self, answer: Answer, context: Any) -> bytes:
        if self._under_way >= self._most:
            raise busy("too many calls are under way", reason="calls")
        self._under_way += 1
        try:
            return await answer(context)
        finally:
            self._under_way -= 1

    def _close(
        self, method: str, code: grpc.StatusCode, reason: str, began: float, marks: Marks
    ) -> None:
        self._account.close(
            method,
            code.name,
            began=began,
            reason=reason,
            failed=code is grpc.StatusCode.INTERNAL,
            marks=marks,
            method="gRPC",
            path=f"/{SERVICE}/{method}",
        )


async def _unknown(context: Any) -> bytes:
    raise ApiError("this server has no such method", status=501, reason="unknown")


def _header(metadata: dict[str, str], name: str) -> bytes:
    return metadata.get(name, "").encode()


def _texts(marks: Marks) -> tuple[tuple[str, str], ...]:
    return tuple((name.decode(), value.decode()) for name, value in marks)


def _code(refusal: ApiError) -> grpc.StatusCode:
    if refusal.reason == "deadline":
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return _CODES[refusal.status]


def _pushback(refusal: ApiError) -> tuple[tuple[str, str], ...]:
    """When to try again, for clients that retry by themselves (gRFC A6)."""
    if refusal.retry_after is None:
        return ()
    return (("grpc-retry-pushback-ms", str(1000 * refusal.retry_after)),)
