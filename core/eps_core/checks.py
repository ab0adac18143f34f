"""What `eps-verify` found, one thing at a time. No torch here: bundles are verified without."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: None: it was not, or could not be, looked at.
        detail: what was found, or why it was not looked at; one line.
    """

    name: str
    passed: bool | None
    detail: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Verification:
    """All checks of one file; `lossless` is what its certificate says."""

    lossless: bool
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)
