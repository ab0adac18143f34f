"""Format numbers for tables and log lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eps_core.stats import Interval


def milliseconds(value: float) -> str:
    """Format a time: three decimals below 10 ms, two below 100 ms, one above."""
    if value < 10:
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 100 else f"{value:,.1f}"


def interval(found: Interval) -> str:
    """Format a ratio with its interval: `2.12 (1.63 to 2.56)`."""
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
