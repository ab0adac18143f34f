"""`--keep` and `--tracker` as a user meets them: what is refused, replaced, and left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eps_compact.cli import main as compact
from eps_train.cli import main as train
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.paths import RunPaths
from tests.commands import Result, files_in, run

TINY = ("--model", "cifar:8x4", "--epochs", "2", "--batch-size", "256")


def eps_train(cwd: Path, *args: object) -> Result:
    return run("eps-train", train, *args, cwd=cwd)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    result = eps_train(folder, *TINY, "--with-baseline", "--keep", 2, "--tracker", "tensorboard")
    assert result.code == 0, result.stderr
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run's folder that a test may spoil."""
    for name, content in files_in(trained).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_both_runs_leave_theirs(trained: Path) -> None:
    written = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert written >= {
        "epoch-0001.pt",
        "epoch-0002.pt",
        "baseline-epoch-0001.pt",
        "baseline-epoch-0002.pt",
    }
    for name in ("", "baseline"):
        assert len(RunPaths.of(trained, name).event_files()) == 1


@pytest.mark.parametrize("pattern", ["epoch-0001.pt", "tensorboard/ckpt/events.out.tfevents.*"])
def test_what_an_earlier_run_left_is_refused(folder: Path, pattern: str) -> None:
    (path,) = folder.glob(pattern)
    left = str(path.relative_to(folder))
    for name in files_in(folder):
        if name != left:
            (folder / name).unlink()
    before = files_in(folder)
    result = eps_train(folder, *TINY)
    assert result.code == 1
    assert f"{left}: exists already; choose another place or add --force" in result.error
    assert files_in(folder) == before


def test_force_removes_them_but_neither_the_baselines_nor_anybody_elses(folder: Path) -> None:
    (folder / "epoch-0001-good.pt").write_text("mine")
    theirs = {name for name in files_in(folder) if "baseline" in name}
    result = eps_train(folder, *TINY, "--force")
    assert result.code == 0, result.stderr
    assert set(files_in(folder)) == {
        *("ckpt.pt", "last.pt", "metrics.jsonl", "training.png", "config.json"),
        "epoch-0001-good.pt",
        *theirs,
    }


def test_a_folder_in_the_place_of_a_kept_file_is_refused(folder: Path) -> None:
    (folder / "epoch-0001.pt").unlink()
    (folder / "epoch-0001.pt").mkdir()
    before = files_in(folder)
    result = eps_train(folder, *TINY, "--force")
    assert result.code == 1
    assert "epoch-0001.pt: is a folder; move it away" in result.error
    assert files_in(folder) == before


def test_a_kept_checkpoint_can_be_compacted(folder: Path) -> None:
    result = run("eps-compact", compact, "epoch-0001.pt", cwd=folder)
    assert result.code == 0, result.stderr
    assert (folder / "compact.pt").exists()


def test_resuming_a_finished_run_changes_none_of_them(folder: Path) -> None:
    before = {name: content for name, content in files_in(folder).items() if name.endswith(".pt")}
    result = eps_train(folder, *TINY, "--with-baseline", "--keep", 2, "--resume")
    assert result.code == 0, result.stderr
    after = files_in(folder)
    assert {name: after[name] for name in before} == before


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if "tensorboard" in name.split(".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    result = eps_train(tmp_path, *TINY, "--tracker", "tensorboard")
    assert result.code == 1
    expected = (
        "--tracker tensorboard: tensorboard is not installed; pip install 'eps-resnet[train]'"
    )
    assert result.error == f"eps-train: error: {expected}"
    assert not list(tmp_path.iterdir())


def test_where_nothing_may_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that is mounted read-only, which holds back root too."""
    open_ = Path.open

    def read_only(self: Path, mode: str = "r", *args: object, **options: object) -> object:
        if mode[0] in "wa" and tmp_path in (tmp_path.joinpath(self)).parents:
            raise OSError(30, "Read-only file system", str(self))
        return open_(self, mode, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", read_only)
    result = eps_train(tmp_path, *TINY, "--keep", 1, "--tracker", "tensorboard")
    assert result.code == 1
    assert result.error.endswith("config.json: Read-only file system; choose another place")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("full", ["epoch-0002.pt", "ckpt.pt", "last.pt", "training.png"])
def test_a_full_disk_leaves_all_that_was_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """Whichever file no longer fits, what --resume goes on from is whole, and it does go on."""
    open_, part, opened = Path.open, f".{full}.part", []

    def no_space(self: Path, mode: str = "r", *args: object, **options: object) -> object:
        if self.name == part and mode[0] == "w":
            opened.append(self)
            if len(opened) == 2 or full.startswith(("epoch", "training")):
                raise OSError(28, "No space left on device", str(self))
        return open_(self, mode, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", no_space)
    result = eps_train(tmp_path, *TINY, "--keep", 2)
    assert result.code == 1
    assert f"{full}: No space left on device; free some space" in result.error
    assert "Traceback" not in result.stderr
    monkeypatch.undo()
    for path in tmp_path.glob("*.pt"):
        Checkpoint.load(path)
    assert not list(tmp_path.glob(".*.part"))
    again = eps_train(tmp_path, *TINY, "--keep", 2, "--resume")
    assert again.code == 0, again.stderr
    assert {path.name for path in tmp_path.glob("epoch-*")} == {"epoch-0001.pt", "epoch-0002.pt"}
