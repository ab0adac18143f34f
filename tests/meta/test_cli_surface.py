"""The command lines change on purpose only."""

from __future__ import annotations

import click
import pytest

from tests.meta.cli_surface import FROZEN, surface
from tests.meta.project import command, scripts


def test_the_command_lines_are_as_frozen() -> None:
    assert surface().splitlines() == FROZEN.read_text(encoding="utf-8").splitlines(), (
        "the command lines changed; if that is meant, run `python -m tests.meta.cli_surface` "
        "in the repository root, and note the change in CHANGELOG.md"
    )


@pytest.mark.parametrize("script", sorted(scripts()))
def test_each_command_does_one_thing(script: str) -> None:
    assert not isinstance(command(script), click.Group)


@pytest.mark.parametrize("script", sorted(scripts()))
def test_each_option_is_explained(script: str) -> None:
    options = [item for item in command(script).params if isinstance(item, click.Option)]
    assert not [option.opts for option in options if not option.help and not option.hidden]
