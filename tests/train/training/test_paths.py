from __future__ import annotations

from pathlib import Path

from eps_train.training.paths import RunPaths


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_all_names_what_this_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    events = "events.out.tfevents.1700000000.host.42.0"
    mine = ("epoch-0012.pt", "epoch-10000.pt", f"tensorboard/ckpt/{events}.eps-train")
    touch(
        tmp_path,
        *mine,
        "epoch-12.pt",
        "epoch-0012-best.pt",
        "my-epoch-0012.pt",
        "baseline-epoch-0012.pt",
        f"tensorboard/baseline/{events}.eps-train",
        f"tensorboard/ckpt/{events}",
    )
    named = {str(path.relative_to(tmp_path)) for path in RunPaths.of(tmp_path).all()}
    assert named == {
        *("ckpt.pt", "last.pt", "metrics.jsonl", "training.png", "config.json"),
        *mine,
    }
    theirs = {str(path.relative_to(tmp_path)) for path in RunPaths.of(tmp_path, "baseline").all()}
    assert "baseline-epoch-0012.pt" in theirs
    assert f"tensorboard/baseline/{events}.eps-train" in theirs
    assert len(theirs) == 7


def test_a_folder_that_does_not_exist_holds_nothing(tmp_path: Path) -> None:
    files = RunPaths.of(tmp_path / "new")
    assert files.all() == list(files)
