"""gRPC core: status codes, authentication and access log; no request stops the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from eps_deploy.serving.middleware import Access
from eps_deploy.serving.protocol import ApiError, InferenceFailed, busy
from eps_deploy.serving.rpc.core import RpcInterceptor
from tests.deploy.serving.rpc.client import SERVICE, caller, grpc_port
from tests.deploy.serving.rpc.http2 import call
from tests.deploy.serving.running import Process, command
from tests.deploy.serving.test_middleware import make_metrics

CODE = grpc.StatusCode
LIVE = f"/{SERVICE}/ServerLive"


def make_access() -> Access:
    return Access(make_metrics(), token=None, log_requests=False)


class Context:
    """In place of grpcio's."""

    def __init__(self, metadata: dict[str, str], remaining: float | None) -> None:
        self._metadata = metadata
        self._remaining = remaining
        self.code, self.details = CODE.OK, ""
        self.trailing: dict[str, str] = {}

    def invocation_metadata(self) -> Any:
        return tuple(self._metadata.items())

    def time_remaining(self) -> float | None:
        return self._remaining

    def set_trailing_metadata(self, trailing: Any) -> None:
        self.trailing = dict(trailing)

    async def abort(self, code: Any, details: str, trailing: Any) -> None:
        self.code, self.details, self.trailing = code, details, dict(trailing)
        raise aio.AbortError


class Asked(Context):
    """One call of a method that raises `error`, or answers."""

    def __init__(
        self,
        error: BaseException | None = None,
        *,
        token: bytes | None = None,
        log_requests: bool = False,
        open: bool = False,
        remaining: float | None = None,
        **metadata: str,
    ) -> None:
        named = {name.replace("_", "-"): value for name, value in metadata.items()}
        super().__init__(named, remaining)
        self.metrics = make_metrics()
        self.answer: bytes | None = None
        self._error = error
        asyncio.run(self._ask(token, log_requests, open))

    async def _ask(self, token: bytes | None, log_requests: bool, open: bool) -> None:
        access = Access(self.metrics, token=token, log_requests=log_requests)
        interceptor = RpcInterceptor(access, max_calls=1)
        handler = interceptor.handler("ModelInfer", self._inner, open=open)
        try:
            self.answer = await handler.stream_unary(None, self)
        except (aio.AbortError, asyncio.CancelledError):
            assert self._error is not None or token is not None

    async def _inner(self, context: Any) -> bytes:
        if self._error is not None:
            raise self._error
        return b"answer"

    def counted(self, code: str) -> bool:
        line = f'eps_requests_total{{code="{code}",endpoint="ModelInfer"}} 1.0'
        return line in self.metrics.exposition().decode()


def test_an_answer() -> None:
    asked = Asked(x_request_id="a.b-C_7", traceparent=f"00-{'a' * 32}-{'b' * 16}-01")
    assert asked.answer == b"answer"
    assert asked.counted("OK")
    assert asked.metrics.refused == {}
    assert asked.trailing["x-request-id"] == "a.b-C_7"
    assert asked.trailing["traceparent"].startswith("00-aaa")


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (ApiError("wrong"), CODE.INVALID_ARGUMENT),
        (ApiError("no", status=404, reason="unknown"), CODE.NOT_FOUND),
        (ApiError("large", status=413, reason="too-large"), CODE.RESOURCE_EXHAUSTED),
        (ApiError("slow", status=408, reason="slow"), CODE.DEADLINE_EXCEEDED),
        (ApiError("late", status=503, reason="deadline"), CODE.DEADLINE_EXCEEDED),
        (busy("full", reason="queue-full", retry_after=7), CODE.UNAVAILABLE),
        (InferenceFailed("the engine failed"), CODE.INTERNAL),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_an_api_error_as_a_status_code(refusal: Exception, code: Any) -> None:
    asked = Asked(refusal, x_request_id="mine")
    assert (asked.code, asked.details) == (code, str(refusal))
    assert asked.counted(code.name)
    assert asked.trailing["x-request-id"] == "mine"
    assert list(asked.metrics.refused) == [getattr(refusal, "reason", "engine")]
    # Clients that retry by themselves wait for as long as this says (gRFC A6).
    again = "7000" if code is CODE.UNAVAILABLE else None
    assert asked.trailing.get("grpc-retry-pushback-ms") == again


def test_an_unexpected_exception_is_logged_and_not_sent(log: Any) -> None:
    asked = Asked(KeyError("/a/path/of/this/host"))
    assert (asked.code, asked.details) == (CODE.INTERNAL, "internal error")
    assert "/a/path/of/this/host" in str(log.records[0].exc_info)


@pytest.mark.parametrize(
    ("remaining", "code", "reason"),
    [(None, "CANCELLED", "disconnected"), (0.0, "DEADLINE_EXCEEDED", "deadline")],
)
def test_a_client_that_goes_away(remaining: float | None, code: str, reason: str) -> None:
    """Which is how grpcio tells that its deadline has passed as well."""
    asked = Asked(asyncio.CancelledError(), remaining=remaining)
    assert asked.counted(code)
    assert asked.metrics.refused == {reason: 1}


def test_the_token_is_checked_first() -> None:
    error = AssertionError("must not be reached")
    for given in ("", "secret", "Bearer wrong", "Bearer sécret", "Basic secret"):
        asked = Asked(error, token=b"secret", authorization=given)
        assert asked.code is CODE.UNAUTHENTICATED
        assert "token" in asked.details
    assert Asked(token=b"secret", authorization="Bearer secret").answer == b"answer"
    assert Asked(token=b"secret", open=True).answer == b"answer"


def test_access_log(log: Any) -> None:
    for error in (None, ApiError("wrong"), busy("full", reason="queue-full")):
        Asked(error)
    assert not log.records
    for error in (None, ApiError("wrong")):
        Asked(error, log_requests=True)
    facts = [record.facts for record in log.records]
    assert [entry["status"] for entry in facts] == ["OK", "INVALID_ARGUMENT"]
    assert facts[0]["path"] == "/inference.GRPCInferenceService/ModelInfer"
    assert facts[1]["reason"] == "invalid"


def test_too_many_calls_in_progress() -> None:
    async def body() -> None:
        interceptor = RpcInterceptor(make_access(), max_calls=1)
        go = asyncio.Event()

        async def wait(context: Any) -> bytes:
            await go.wait()
            return b"answer"

        handler, probe = (
            interceptor.handler("ModelInfer", wait),
            interceptor.handler("Live", wait, open=True),
        )
        first = asyncio.create_task(handler.stream_unary(None, Context({}, None)))
        await asyncio.sleep(0)
        second = Context({}, None)
        with pytest.raises(aio.AbortError):
            await asyncio.wait_for(handler.stream_unary(None, second), 10)
        assert second.code is CODE.UNAVAILABLE
        assert second.trailing["grpc-retry-pushback-ms"] == "1000"
        last = asyncio.create_task(probe.stream_unary(None, Context({}, None)))
        go.set()
        assert await first == await last == b"answer"
        assert await handler.stream_unary(None, Context({}, None)) == b"answer"

    asyncio.run(body())


def test_answers_are_held_back_during_shutdown() -> None:
    async def body() -> None:
        interceptor = RpcInterceptor(make_access(), max_calls=9)
        asked: list[Context] = [Context({}, None), Context({}, None)]

        async def fine(context: Any) -> bytes:
            return b"answer"

        async def wrong(context: Any) -> bytes:
            raise ApiError("wrong")

        interceptor.released.clear()
        held = [
            asyncio.create_task(
                interceptor.handler("ModelInfer", answer).stream_unary(None, context)
            )
            for answer, context in zip((fine, wrong), asked, strict=True)
        ]
        for _ in range(10):
            await asyncio.sleep(0)
        assert not any(task.done() for task in held)
        assert asked[1].code is CODE.OK
        interceptor.released.set()
        assert await held[0] == b"answer"
        with pytest.raises(aio.AbortError):
            await held[1]

    asyncio.run(body())


# -- Requests that stop grpcio's own asyncio server do not stop this one


@pytest.fixture(scope="module")
def process(deployed: Path) -> Iterator[Process]:
    with command(deployed / "bundle", "--grpc-port", "0") as running:
        running.wait_ready()
        yield running
        assert running.stop() == 0


@pytest.mark.parametrize(
    "path",
    [b"/\xff/\xfe", LIVE.encode() + b"\xff", b"", b"/", b"no slash", b"/a/b/c", b"/\xc3\xa4/x"],
)
def test_any_path(process: Process, path: bytes) -> None:
    """A path that is not UTF-8 stopped grpcio 1.85's server, for all its clients."""
    call(grpc_port(process), path)
    with caller(grpc_port(process)) as client:
        assert client.send("ServerLive")


def test_any_metadata(process: Process) -> None:
    call(grpc_port(process), LIVE.encode(), x_request_id=b"\xff\xfe", authorization=b"\x80")
    with caller(grpc_port(process)) as client:
        assert client.send("ServerLive")
    assert all(line.startswith("{") for line in process.lines)  # no traceback of grpcio's


def test_an_unknown_method(process: Process) -> None:
    with caller(grpc_port(process)) as client, pytest.raises(grpc.RpcError) as caught:
        client.send("ModelConfig")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    metrics = process.get("/metrics").body.decode()
    assert 'eps_requests_total{code="UNIMPLEMENTED",endpoint="none"}' in metrics
