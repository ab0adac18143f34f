"""Fixtures of the server's tests."""

from __future__ import annotations

import logging
from typing import Any

import pytest


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The log of eps-serve, from INFO on, as `caplog` records it."""
    monkeypatch.setattr(logging.getLogger("eps_serve"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog
