"""What is around every request, on either wire: token, identifiers, counting, logging."""

from __future__ import annotations

import hmac
import re
import secrets
import time
from typing import Any

from eps_deploy.serving.logs import logger
from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.refusals import Refusal

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Marks = list[tuple[bytes, bytes]]


def check_token(token: bytes, authorization: bytes) -> None:
    """Raise Refusal (401) unless a header Authorization has this value: `Bearer TOKEN`."""
    scheme, _, given = authorization.partition(b" ")
    # compare_digest first and always: the time shall not tell how much of it was right.
    right = hmac.compare_digest(given.strip(), token)
    if not right or scheme.lower() != b"bearer":
        raise Refusal(
            "this server wants a token: send the header Authorization: Bearer TOKEN",
            status=401,
            reason="token",
            headers=((b"www-authenticate", b"Bearer"),),
        )


def identify(request_id: bytes, trace: bytes) -> Marks:
    """Headers by which a request is known, for its answer and the log.

    Args:
        request_id: the header X-Request-ID; a new one in its place where it is none.
        trace: the header traceparent (W3C Trace Context, 3.2); left out where it is none.
    """
    known = _REQUEST_ID.fullmatch(request_id)
    marks = [(b"x-request-id", request_id if known else secrets.token_hex(8).encode())]
    if _TRACEPARENT.fullmatch(trace):
        marks.append((b"traceparent", trace))
    return marks


class Account:
    """What is counted and logged of requests.

    Args:
        metrics: count.
        log_requests: log every request, not only those that went wrong here.
    """

    def __init__(self, metrics: Metrics, *, log_requests: bool) -> None:
        self._metrics = metrics
        self._log_requests = log_requests

    def close(
        self,
        endpoint: str,
        code: int | str,
        *,
        began: float,
        reason: str,
        failed: bool,
        marks: Marks,
        **facts: Any,
    ) -> None:
        """A request has its answer.

        Args:
            endpoint, code: for metrics.
            began: `time.perf_counter` when it came.
            reason: why it was refused; "": it was not.
            failed: the fault was not the client's, and it is no overload, which shall not fill a
                disk as well.
            marks: see :func:`identify`.
            **facts: for the log, before what is logged of every request.
        """
        seconds = time.perf_counter() - began
        self._metrics.answered(endpoint, code)
        if reason:
            self._metrics.refuse(reason, seconds)
        if not self._log_requests and not failed:
            return
        facts |= {"status": code, "ms": round(1e3 * seconds, 3)}
        facts |= {name.decode().replace("-", "_"): value.decode() for name, value in marks}
        if reason:
            facts["reason"] = reason
        logger.info("request", extra={"facts": facts})


def log_mistake(marks: Marks) -> None:
    """Log the exception that is being handled, which must not happen, with the request's name."""
    facts = {"request_id": marks[0][1].decode()}
    logger.exception("a request failed, which must not happen", extra={"facts": facts})
