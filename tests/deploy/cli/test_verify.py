"""`eps-verify bundle/`: proven again from the bundle's own files, without torch."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from eps_deploy.cli.verify import main
from tests.commands import Result, run

BLOCKED = """
import sys
sys.modules["torch"] = None
sys.argv = ["eps-verify", sys.argv[1]]
from eps_deploy.cli.verify import main
main()
"""


def verify(bundle: Path, *args: object) -> Result:
    return run("eps-verify", main, bundle, "--json", *args, cwd=bundle.parent)


def test_a_bundle_is_proven_again(bundle: Path) -> None:
    result = verify(bundle)
    assert result.code == 0, result.stderr
    checks = {check["name"]: check["passed"] for check in json.loads(result.stdout)["checks"]}
    assert checks == {"files": True, "report": True, "onnx": True}


def test_it_needs_no_torch(bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(bundle)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_flipped_byte_anywhere_is_rejected_in_one_line(bundle: Path) -> None:
    rng = random.Random(0)
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    for path in files:
        content = bytearray(path.read_bytes())
        at = rng.randrange(len(content))
        path.write_bytes(bytes([*content[:at], content[at] ^ 1, *content[at + 1 :]]))
        result = verify(bundle)
        assert result.code == 1, path
        assert len(result.stderr.splitlines()) == 1
        path.write_bytes(content)
    assert verify(bundle).code == 0


@pytest.mark.parametrize("option", [["--checkpoint", "ckpt.pt"], ["--no-data"]])
def test_an_option_of_compact_networks_is_rejected(bundle: Path, option: list[str]) -> None:
    result = verify(bundle, *option)
    assert result.code == 1
    assert f"{option[0]}: only applies to a compact.pt" in result.error


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = verify(tmp_path / "empty")
    assert result.code == 1
    assert "not a bundle of eps-deploy" in result.error
