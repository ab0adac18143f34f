"""Breaking a module on purpose, to see whether its tests notice.

broken = mutated(build, ("return True", "return None"))
with pytest.raises(AssertionError):
    check_progress(broken)
"""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest


def mutated(module: ModuleType, *edits: tuple[str, str]) -> ModuleType:
    """A copy of `module` made from its source with each `(old, new)` text replaced.

    Each `old` must stand there exactly once: an edit that no longer applies would prove nothing.
    The copy has its own globals; what it imports is shared with the original.
    """
    source = inspect.getsource(module)
    for old, new in edits:
        found = source.count(old)
        assert found == 1, f"{module.__name__}: {found} times, not once: {old!r}"
        source = source.replace(old, new)
    copy = ModuleType(module.__name__, module.__doc__)
    copy.__file__, copy.__package__ = module.__file__, module.__package__
    exec(compile(source, f"{module.__file__} (mutated)", "exec"), copy.__dict__)
    return copy


def install(
    monkeypatch: pytest.MonkeyPatch, user: ModuleType, original: ModuleType, broken: ModuleType
) -> None:
    """Have `user` call `broken` wherever it imported something of `original`."""
    for name, value in list(vars(user).items()):
        if value is original:
            monkeypatch.setattr(user, name, broken)
        elif getattr(value, "__module__", None) == original.__name__ and hasattr(broken, name):
            monkeypatch.setattr(user, name, getattr(broken, name))
