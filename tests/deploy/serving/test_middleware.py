"""HTTP middleware: errors as JSON, authentication, access log, and errors inside."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.middleware import Access, HttpMiddleware, send_json
from eps_deploy.serving.protocol import ApiError, InferenceFailed


def make_metrics() -> Metrics:
    return Metrics(queued=lambda: 3, connections=lambda: 2, ready=lambda: True, held=lambda: 1000)


class Asked:
    """One request to a middleware around an application that raises `error`, or answers."""

    def __init__(
        self,
        error: Exception | None = None,
        *,
        token: bytes | None = None,
        log_requests: bool = False,
        late: bool = False,
        path: str = "/v2",
        **headers: str,
    ) -> None:
        self.messages: list[MutableMapping[str, Any]] = []
        self.metrics = make_metrics()
        access = Access(self.metrics, token=token, log_requests=log_requests)
        middleware = HttpMiddleware(self._inner, access)
        self._error, self._late = error, late
        given = [(name.replace("_", "-").encode(), v.encode()) for name, v in headers.items()]
        scope = {"type": "http", "method": "GET", "path": path, "headers": given}
        asyncio.run(middleware(scope, self._receive, self._send))

    async def _receive(self) -> MutableMapping[str, Any]:
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        self.messages.append(message)

    async def _inner(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._error is None or self._late:
            await send_json({"fine": True}, send)
        if self._error is not None:
            raise self._error

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def json(self) -> Any:
        return json.loads(self.messages[1]["body"])


def test_an_api_error_as_json() -> None:
    asked = Asked(ApiError("too many", status=503, reason="queue-full", retry_after=7))
    assert (asked.status, asked.json) == (503, {"error": "too many"})
    assert asked.headers[b"retry-after"] == b"7"
    assert asked.metrics.refused == {"queue-full": 1}


def test_an_engine_that_fails(log: Any) -> None:
    asked = Asked(InferenceFailed("the engine failed"))
    assert (asked.status, asked.json) == (500, {"error": "the engine failed"})
    assert [record.facts["reason"] for record in log.records] == ["engine"]


def test_an_unexpected_exception_is_logged_and_not_sent(log: Any) -> None:
    asked = Asked(KeyError("/a/path/of/this/host"))
    assert (asked.status, asked.json) == (500, {"error": "internal error"})
    assert "/a/path/of/this/host" in str(log.records[0].exc_info)


def test_an_error_after_the_response_has_started_sends_nothing() -> None:
    asked = Asked(ApiError("the client went away"), late=True)
    assert [message["type"] for message in asked.messages] == [
        "http.response.start",
        "http.response.body",
    ]


@pytest.mark.parametrize("given", ["", "x y", "x" * 129, "ä"])
def test_an_invalid_request_id_is_replaced(given: str) -> None:
    found = Asked(x_request_id=given).headers[b"x-request-id"]
    assert len(found) == 16
    assert found != Asked(x_request_id=given).headers[b"x-request-id"]
    assert Asked(x_request_id="a.b-C_7").headers[b"x-request-id"] == b"a.b-C_7"


@pytest.mark.parametrize("given", ["", "00-1-2-01", f"00-{'0' * 32}-{'b' * 16}-01", "x" * 55])
def test_an_invalid_traceparent_is_dropped(given: str) -> None:
    assert b"traceparent" not in Asked(traceparent=given).headers


def test_the_token_is_checked_first() -> None:
    error = AssertionError("must not be reached")
    assert Asked(error, token=b"secret", path="/v1/card").status == 401
    assert Asked(error, token=b"secret", authorization="Bearer sécret").status == 401
    assert Asked(token=b"secret", authorization="Bearer secret").status == 200
    assert Asked(token=b"secret", authorization="bearer  secret").status == 200
    assert Asked(token=b"secret", path="/v2/health/live").status == 200


def test_access_log(log: Any) -> None:
    for error in (None, ApiError("wrong"), ApiError("busy", status=503)):
        Asked(error)
    assert not log.records
    for error in (None, ApiError("wrong")):
        Asked(error, log_requests=True)
    assert [record.facts["status"] for record in log.records] == [200, 400]
