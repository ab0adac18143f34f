"""The lock on a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eps_core.errors import ConfigError
from eps_core.files import held

BUSY = "out: another one is writing there"

HOLDER = """
import sys
from pathlib import Path
from eps_core.files import held
with held(Path(sys.argv[1]), ""):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_excludes_others_until_its_holder_is_killed(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "new" / "out"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=BUSY), held(folder, BUSY):
            pass
        other.kill()
    with held(folder, BUSY):
        assert not list(folder.iterdir())


def test_the_lock_ends_with_the_with_block(tmp_path: Path) -> None:
    for _ in range(2):
        with held(tmp_path, BUSY):
            pass
