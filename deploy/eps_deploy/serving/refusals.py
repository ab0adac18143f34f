"""What a client is refused, and with which HTTP status. Messages name no path of this machine."""

from __future__ import annotations

from eps_train.errors import EpsError


class Refusal(EpsError):
    """A request that gets an error for an answer: `{"error": message}`.

    Args:
        message: one line for whoever sent the request.
        status: of HTTP.
        reason: short name, for metrics and logs.
        retry_after: seconds after which to try again; None: trying again does not help.
        headers: further ones for the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        reason: str = "invalid",
        retry_after: int | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after
        self.headers = headers


def not_found(message: str) -> Refusal:
    return Refusal(message, status=404, reason="unknown")


def too_large(message: str) -> Refusal:
    return Refusal(message, status=413, reason="too-large")


def busy(message: str, *, reason: str, retry_after: int = 1) -> Refusal:
    """The server could answer this, but not now (RFC 9110, 15.6.4)."""
    return Refusal(message, status=503, reason=reason, retry_after=retry_after)


class InferenceFailed(EpsError):
    """The engine failed at a request that was right: the only error with status 500."""


def as_refusal(error: Refusal | InferenceFailed) -> Refusal:
    """What a client is told of it, on either wire."""
    if isinstance(error, Refusal):
        return error
    return Refusal(str(error), status=500, reason="engine")
