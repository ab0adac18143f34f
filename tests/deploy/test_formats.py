"""The formats that other programs read change on purpose only.

`tests/meta/golden/formats.json` holds the keys of each file and of each `--json` output. Write it
again with `EPS_WRITE_GOLDEN=1 pytest tests/deploy/test_formats.py`, and
note the change in CHANGELOG.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from eps_compact.cli import main as compact_main
from eps_deploy.cli.verify import main as verify_main
from eps_train.cli import main as train_main
from tests.commands import Result, run

GOLDEN = Path(__file__).parents[1] / "meta" / "golden" / "formats.json"
TINY = ("--model", "cifar:8x4", "--epochs", "2", "--epsilon-warmup", "1")


def keys(value: Any) -> Any:
    """Keys of objects, also of those in lists; null for all other values."""
    if isinstance(value, dict):
        return {key: keys(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        found = {json.dumps(keys(item), sort_keys=True) for item in value} - {"null"}
        return [json.loads(item) for item in sorted(found)] or None
    return None


@pytest.fixture(scope="module")
def formats(
    tmp_path_factory: pytest.TempPathFactory, first_run: tuple[Path, Result]
) -> dict[str, Any]:
    folder, deployed = first_run
    bundle = folder / "bundle"
    trained = tmp_path_factory.mktemp("trained")
    train = run("eps-train", train_main, *TINY, "--json", cwd=trained)
    compacted = run("eps-compact", compact_main, "ckpt.pt", "--json", cwd=trained)
    verified = run("eps-verify", verify_main, bundle, "--json", cwd=folder)
    lines = (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    files = {
        "report.json": bundle / "report.json",
        "manifest.json": bundle / "manifest.json",
        "compact.json": trained / "compact.json",
        "config.json": trained / "config.json",
    }
    outputs = {
        "eps-train --json": train,
        "eps-compact --json": compacted,
        "eps-deploy --json": deployed,
        "eps-verify --json": verified,
    }
    return {
        **{name: keys(json.loads(path.read_bytes())) for name, path in files.items()},
        **{name: keys(json.loads(done.stdout)) for name, done in outputs.items()},
        "metrics.jsonl": keys([json.loads(line) for line in lines]),
    }


def test_formats_are_as_recorded(formats: dict[str, Any]) -> None:
    if os.environ.get("EPS_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(formats, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert formats == json.loads(GOLDEN.read_bytes())
