"""W&B's own package records a run offline; skipped where it is not installed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from eps_train.cli import main
from tests.commands import run

pytest.importorskip("wandb")
TINY = ("--model", "cifar:8x4", "--batch-size", "256", "--output", "out", "--tracker", "wandb")


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-settings"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    import wandb

    wandb.teardown()  # it keeps the settings of the first run of a process


def records(folder: Path) -> list[dict[str, float]]:
    """History of a run in W&B's offline file: LevelDB's log format of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, at, message, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<4xHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if (rest := -at % 32768) < 7:  # a block ends with zeros
            at += rest
        if kind in (1, 4):  # the whole message, or its last part
            record = Record.FromString(message)
            message = b""
            if items := record.history.item:
                found.append(
                    {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                )
    return found


def test_a_run_and_its_resumption_are_one_run_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for options in (("--epochs", 2), ("--epochs", 3, "--resume")):
        result = run("eps-train", main, *TINY, *options, cwd=tmp_path)
        assert result.code == 0, result.stderr
    run_id = json.loads((tmp_path / "out/trackers.json").read_text())["wandb"]
    folders = sorted((tmp_path / "out/wandb").glob(f"offline-run-*-{run_id}"))
    lines = [line for folder in folders for line in records(folder)]
    assert [line["_step"] for line in lines] == [1, 2, 3]
    assert all("loss/validation" in line for line in lines)


def test_without_an_account_it_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run("eps-train", main, *TINY, "--epochs", 1, cwd=tmp_path)
    assert result.code == 1
    assert result.error.startswith("eps-train: error: --tracker wandb: ")
    assert not (tmp_path / "out/config.json").exists()
