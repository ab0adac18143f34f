from __future__ import annotations

import json
import random
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from eps_core import checksummed, cli
from eps_core.files import held, replace_file
from eps_train.cli import main
from eps_train.config import TrainingConfig
from eps_train.data import dataset
from eps_train.recipes import RECIPES
from eps_train.training import run as summary
from eps_train.training.checkpoint import FORMAT, VERSION, Checkpoint
from eps_train.training.trainer import Trainer
from tests.commands import Result, files_in, run

TINY = ("--model", "cifar:8x4", "--epochs", "2")


def eps_train(cwd: Path, *args: object) -> Result:
    return run("eps-train", main, *args, cwd=cwd)


def damaged(content: bytes, how: str) -> bytes:
    """`content` with one bit flipped, cut short, or replaced."""
    if how == "flipped":
        altered = bytearray(content)
        altered[len(content) // 2] ^= 4
        return bytes(altered)
    return {"truncated": content[: len(content) // 2], "empty": b"", "foreign": b"PK" * 100}[how]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    result = eps_train(folder, *TINY, "--with-baseline", "--json")
    assert result.code == 0, result.stderr
    (folder / "summary.json").write_text(result.stdout.splitlines()[-1])
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run's folder that a test may spoil."""
    for name, content in files_in(trained).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_trains_the_network_and_its_baseline_into_one_folder(trained: Path) -> None:
    written = {path.name for path in trained.iterdir()} - {"summary.json"}
    assert written == {
        "ckpt.pt",
        "last.pt",
        "metrics.jsonl",
        "training.png",
        "config.json",
        "baseline.pt",
        "baseline-last.pt",
        "baseline-metrics.jsonl",
        "baseline-training.png",
        "baseline-config.json",
    }
    assert Checkpoint.load(trained / "ckpt.pt").network.gated
    assert not Checkpoint.load(trained / "baseline.pt").network.gated


def test_json_summary_agrees_with_the_checkpoints(trained: Path) -> None:
    runs = json.loads((trained / "summary.json").read_text())["runs"]
    assert [found["path"] for found in runs] == ["ckpt.pt", "baseline.pt"]
    for found in runs:
        metrics = Checkpoint.load(trained / found["path"]).metrics
        assert found["test"] == metrics["test"]
        assert found["test"]["samples"] == 359
        assert found["blocks"] == {"total": 3, "kept": 3}


def test_metrics_hold_one_line_an_epoch(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[0]["gates"].keys() == {"stages.0.0", "stages.1.0", "stages.2.0"}
    assert all(0 <= line["validation"]["accuracy"] <= 1 for line in lines)


def test_existing_output_is_refused_and_kept(folder: Path) -> None:
    before = files_in(folder)
    result = eps_train(folder, *TINY)
    assert result.code == 1
    assert result.error == (
        "eps-train: error: ckpt.pt: exists already; choose another place or add --force"
    )
    assert files_in(folder) == before
    mistyped = eps_train(folder, *TINY, "--weights", "none.pt")
    assert (mistyped.code, mistyped.error) == (1, "eps-train: error: none.pt: no such file")


def test_force_trains_anew(folder: Path) -> None:
    before = (folder / "ckpt.pt").read_bytes()
    result = eps_train(folder, *TINY, "--seed", 7, "--force")
    assert result.code == 0, result.stderr
    assert (folder / "ckpt.pt").read_bytes() != before
    assert (folder / "baseline.pt").exists(), "not an output of this run"


def test_resume_of_a_finished_run_changes_no_checkpoint(folder: Path) -> None:
    before = files_in(folder)
    result = eps_train(folder, *TINY, "--with-baseline", "--resume")
    assert result.code == 0, result.stderr
    assert files_in(folder) == before


def test_resume_drops_the_metrics_of_epochs_it_repeats(folder: Path) -> None:
    """As after a kill between the metrics line and the save, with the line cut short."""
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"epoch": 3, "rate": 0.1}\n{"epoch": 4, "ra')
    result = eps_train(folder, *TINY, "--resume")
    assert result.code == 0, result.stderr
    assert metrics.read_text() == whole


def test_resume_with_nothing_there_starts_anew_and_says_so(tmp_path: Path) -> None:
    result = eps_train(tmp_path, *TINY, "--epochs", 1, "--resume")
    assert result.code == 0
    assert "last.pt: does not exist yet; starting from the first epoch" in result.stderr


def test_resume_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    result = eps_train(tmp_path, *TINY, "--resume", "--output", "nowhere")
    assert result.code == 1
    assert result.error == "eps-train: error: --output nowhere: no such folder to resume in"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "foreign"])
def test_resume_from_a_damaged_checkpoint_is_refused(folder: Path, how: str) -> None:
    last = folder / "last.pt"
    last.write_bytes(damaged(last.read_bytes(), how))
    before = files_in(folder)
    result = eps_train(folder, *TINY, "--resume")
    assert result.code == 1
    assert result.error.startswith("eps-train: error: last.pt: damaged, truncated, or not an eps")
    assert files_in(folder) == before


def test_resume_refuses_every_one_of_fifty_flipped_bits(folder: Path) -> None:
    last = folder / "last.pt"
    whole = last.read_bytes()
    random_state = random.Random(1)
    for _ in range(50):
        altered = bytearray(whole)
        altered[random_state.randrange(len(whole))] ^= 1 << random_state.randrange(8)
        last.write_bytes(altered)
        result = eps_train(folder, *TINY, "--resume")
        assert result.code == 1
        assert "last.pt: damaged, truncated" in result.error


def test_resume_refuses_a_newer_format(folder: Path) -> None:
    payload, _ = checksummed.read(folder / "last.pt", format=FORMAT, version=VERSION)
    checksummed.write(folder / "last.pt", {**payload, "version": 99})
    result = eps_train(folder, *TINY, "--resume")
    assert result.code == 1
    assert "last.pt: format version 99 is newer" in result.error
    assert "upgrade eps-resnet" in result.error


def test_resume_refuses_the_best_checkpoint_in_place_of_the_last(folder: Path) -> None:
    (folder / "last.pt").write_bytes((folder / "ckpt.pt").read_bytes())
    result = eps_train(folder, *TINY, "--resume")
    assert result.code == 1
    assert "last.pt: holds no state to resume from" in result.error


def test_resume_with_other_options_is_refused(folder: Path) -> None:
    for options, difference in (
        (("--epochs", 1), "epochs 2, not 1"),
        (("--batch-size", 48), "not 48"),
        (("--dataset", "mnist"), "no train-images-idx3-ubyte"),
    ):
        result = eps_train(folder, *TINY, *options, "--resume")
        assert result.code == 1
        assert difference in result.error


def test_resume_of_a_run_of_an_earlier_version_is_refused(folder: Path) -> None:
    last = Checkpoint.load(folder / "last.pt")
    last.config["rates"] = last.config.pop("lr_schedule")
    last.save(folder / "last.pt")
    result = eps_train(folder, *TINY, "--resume")
    assert result.code == 1
    assert "last.pt: written by an earlier version of eps-train, whose" in result.error
    assert "had the field rates; resume it with that version" in result.error


def test_resume_with_more_epochs_goes_on_and_says_what_changes(folder: Path) -> None:
    result = eps_train(folder, *TINY, "--epochs", 4, "--resume")
    assert result.code == 0, result.stderr
    assert "last.pt: the run was to have 2 epochs, and goes on to 4" in result.stderr
    assert re.search(
        r"the final decay of the learning rate begins in epoch \d, not \d", result.stderr
    )
    last = Checkpoint.load(folder / "last.pt")
    assert (last.metrics["epoch"], last.config["epochs"]) == (4, 4)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]
    again = eps_train(folder, *TINY, "--resume")
    assert "belongs to a run with epochs 4, not 2" in again.error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--recipe", "cifat"),
            "--recipe cifat: unknown; the recipes are: digits, fashion-mnist, images,",
        ),
        (("--dataset", "digit"), "--dataset digit: unknown; the data sets are: digits, mnist"),
        (("--model", "resnet"), "--model resnet: not a model; write cifar:DEPTH"),
        (("--model", "cifar:57"), "depth must be 6n + 2"),
        (("--model", "cifar:56x0"), "at least 1"),
        (("--device", "cuda:63"), "--device cuda:63: torch sees"),
        (("--device", "tpu"), "--device tpu: not a device"),
        (("--epsilon", "nan"), "--epsilon nan: must be finite"),
        (("--epsilon", "inf"), "--epsilon inf: must be finite"),
        (("--output", "file.txt/run"), "file.txt/run"),
    ],
)
def test_what_the_user_can_repair_is_one_line_and_exit_1(
    tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    (tmp_path / "file.txt").write_text("not a folder")
    before = files_in(tmp_path)
    result = eps_train(tmp_path, *args)
    assert result.code == 1
    assert message in result.error
    assert "Traceback" not in result.stderr
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    "args",
    [
        ("--epochs", "-1"),
        ("--epochs", "many"),
        ("--epsilon", "-1"),
        ("--seed", "-1"),
        ("--speed",),
        ("--resume", "--force"),
        ("--epsilon", "0", "--with-baseline"),
    ],
)
def test_impossible_flags_are_usage_errors(tmp_path: Path, args: tuple[str, ...]) -> None:
    result = eps_train(tmp_path, *args)
    assert result.code == 2
    assert "Error" in result.stderr
    assert not list(tmp_path.iterdir())


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    result = eps_train(tmp_path, "--model", "cifar:110", "--dry-run")
    assert result.code == 0
    assert "54 blocks" in result.stderr
    assert "1,727,674" in result.stderr  # 1,727,962 with three input channels; 2 * 16 * 9 fewer
    assert not list(tmp_path.iterdir())


def test_dry_run_needs_no_data_and_no_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # to import it is an error now
    result = eps_train(tmp_path, "--recipe", "cifar10-110", "--dry-run")
    assert result.code == 0, result.stderr
    assert "1,727,962" in result.stderr
    assert "1000 of 351 steps of 128 images" in result.stderr
    assert re.search(r"time .* about [\d.]+ (s|min|h) on cpu, at [\d.]+ s a step", result.stderr)


def test_what_a_cpu_is_too_slow_to_try_is_not_estimated(tmp_path: Path) -> None:
    result = eps_train(tmp_path, "--recipe", "imagenet-101", "--device", "cpu", "--dry-run")
    assert result.code == 0, result.stderr
    assert "GFLOPs an image are too many to try on a CPU" in " ".join(result.stderr.split())


def test_the_device_chooses_the_batch_size_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run has memory for 256 images; the resumed one does not try again, a new one does.

    The files that `--force` replaces have no say in it.
    """
    found = iter([256, 128])
    monkeypatch.setattr("eps_train.training.probe.largest_batch", lambda *_: next(found))
    auto = (*TINY, "--device", "cpu", "--batch-size", "auto")
    for how, size in (((), 256), (("--resume",), 256), (("--force",), 128)):
        result = eps_train(tmp_path, *auto, *how)
        assert result.code == 0, result.stderr
        assert f"batch size: {size}" in result.stderr
        assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == size
    assert "tried on the device when" in eps_train(tmp_path, *auto, "--dry-run").stderr


def test_list_recipes_names_them_all(tmp_path: Path) -> None:
    result = eps_train(tmp_path, "--list-recipes")
    assert result.code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(RECIPES)


def test_show_recipe_prints_the_resolved_configuration(tmp_path: Path) -> None:
    flags = ("--epochs", 9, "--epsilon", 1.5, "--epsilon-warmup", 4, "--seed", 3)
    shown = TrainingConfig.from_dict(
        json.loads(eps_train(tmp_path, "--show-recipe", *flags).stdout)
    )
    assert shown.epsilon_warmup == 4
    assert (shown.recipe, shown.epochs, shown.epsilon, shown.seed) == ("digits", 9, 1.5, 3)


def test_epsilon_zero_trains_the_plain_network(tmp_path: Path) -> None:
    result = eps_train(tmp_path, *TINY, "--epsilon", 0, "--epochs", 1)
    assert result.code == 0, result.stderr
    assert Checkpoint.load(tmp_path / "ckpt.pt").network.gated == ()


def test_ctrl_c_says_how_to_go_on_and_exits_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    save = Trainer.save

    def interrupted(self: Trainer, report: object) -> None:
        save(self, report)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", interrupted)
    result = eps_train(tmp_path, *TINY)
    assert result.code == 130
    assert "last.pt holds 1 of 2 epochs; --resume goes on from there" in result.stderr
    assert result.error == "eps-train: interrupted"
    monkeypatch.undo()
    assert eps_train(tmp_path, *TINY, "--resume").code == 0


def write_images(folder: Path) -> None:
    """Two classes, light and dark, in colour, of two sizes."""
    random_state = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (folder / name).mkdir(parents=True)
        for index in range(40):
            size = (12, 16) if index % 2 else (16, 12)
            pixels = random_state.integers(low, low + 128, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def test_trains_on_a_folder_of_images(tmp_path: Path) -> None:
    write_images(tmp_path / "my images")
    common = ("--dataset", "folder:my images", "--model", "cifar:8x4", "--epochs", 3)
    refused = eps_train(tmp_path, *common)
    assert refused.code == 1
    assert "--image-size" in refused.error
    trained = eps_train(tmp_path, *common, "--image-size", "9x11", "--json")
    assert trained.code == 0, trained.stderr
    made = Checkpoint.load(tmp_path / "ckpt.pt").data
    assert made.classes == ("dark", "light")
    assert made.input_shape == (3, 9, 11)
    assert made.sizes == {"train": 58, "validation": 6, "test": 16}


def test_trains_on_the_images_of_a_csv_file(tmp_path: Path) -> None:
    write_images(tmp_path / "set")
    files = sorted((tmp_path / "set").rglob("*.png"))
    lines = [f"set/{file.relative_to(tmp_path / 'set')},{file.parent.name}" for file in files]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines, "set/x.png,dark"]))
    args = ("--dataset", "csv:labels.csv", "--image-size", 9, "--dry-run")
    refused = eps_train(tmp_path, *args)
    assert (refused.code, refused.stdout) == (1, "")
    assert refused.error == (
        "eps-train: error: data set csv:labels.csv: line 82: set/x.png: no such file; paths are"
        " relative to ."
    )
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines]))
    planned = eps_train(tmp_path, *args)
    assert planned.code == 0, planned.stderr
    described = "data set csv:labels.csv: 2 classes: dark (40), light (40); train 58, validation 6"
    assert described in planned.stderr


def write_split_images(folder: Path) -> None:
    """Train, Val and Test of two classes each, small and of one size."""
    random_state = np.random.default_rng(0)
    for part, count in (("Train", 12), ("Val", 4), ("Test", 5)):
        for name, low in (("dark", 0), ("light", 128)):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = random_state.integers(low, low + 128, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_the_first_line_names_classes_parts_and_what_is_left_out(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    write_split_images(tmp_path / "set")
    (tmp_path / "set" / "Train" / "dark" / "notes.txt").touch()
    result = eps_train(tmp_path, "--dataset", "folder:set", *TINY, "--epochs", 1, *options)
    assert result.code == 0, result.stderr
    assert result.stderr.splitlines()[0] == (
        "data set folder:set: 2 classes: dark (21), light (21);"
        " train 24, validation 8, test 10; left out: 1 file (.txt 1)"
    )


def test_all_damaged_images_are_listed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a set that stays on disk, of which the test part is read last."""
    write_split_images(tmp_path / "set")
    monkeypatch.setattr(dataset, "room_for_images", lambda: 100)
    damaged_ones = ["Test/dark/3.png", "Test/light/1.png", "Val/dark/0.png"]
    for name in damaged_ones:
        path = tmp_path / "set" / name
        path.write_bytes(path.read_bytes()[:60])
    common = ("--dataset", "folder:set", *TINY, "--epochs", 1)
    refused = eps_train(tmp_path, *common)
    assert refused.code == 1
    listed = refused.stderr.splitlines()[:-1]
    assert sorted(listed) == [
        f"set/{name}: cannot be decoded: image file is truncated" for name in damaged_ones
    ]
    assert "3 of 42 images cannot be read: set/" in refused.error
    assert "--skip-damaged" in refused.error
    assert set(files_in(tmp_path)) == {f"set/{name}" for name in files_in(tmp_path / "set")}
    trained = eps_train(tmp_path, *common, "--skip-damaged")
    assert trained.code == 0, trained.stderr
    assert (
        "train 24, validation 7, test 8; left out: 3 images that cannot be read" in trained.stderr
    )
    made = Checkpoint.load(tmp_path / "ckpt.pt").data
    assert sorted(made.skipped) == damaged_ones
    assert (
        dataset.load_again(replace(made, name=f"folder:{tmp_path / 'set'}")).identity.sizes
        == made.sizes
    )


def test_a_test_image_that_changed_does_not_stop_a_run_from_going_on(tmp_path: Path) -> None:
    write_split_images(tmp_path / "set")
    common = ("--dataset", "folder:set", *TINY)
    assert eps_train(tmp_path, *common).code == 0
    Image.new("L", (8, 8), 7).save(tmp_path / "set" / "Test" / "dark" / "0.png")
    resumed = eps_train(tmp_path, *common, "--epochs", 3, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert "last.pt: the images of the test part have changed since" in resumed.stderr
    Image.new("L", (8, 8), 7).save(tmp_path / "set" / "Val" / "dark" / "0.png")
    refused = eps_train(tmp_path, *common, "--epochs", 3, "--resume")
    assert refused.code == 1
    assert "was trained on other data (its validation part differs)" in refused.error


def test_a_run_is_resumed_however_its_folder_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split_images(tmp_path / "set")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert eps_train(tmp_path, "--dataset", "folder:set", *TINY).code == 0
    for other in ("folder:./set/", f"folder:{tmp_path / 'set'}", "folder:~/set"):
        result = eps_train(tmp_path, "--dataset", other, *TINY, "--resume")
        assert result.code == 0, result.stderr


def test_the_recipe_of_a_resumed_run_is_the_default(tmp_path: Path) -> None:
    """Without `--weights`, which only begins a run, a folder of images would mean another one."""
    write_split_images(tmp_path / "set")
    common = ("--dataset", "folder:set", "--image-size", 8, *TINY)
    assert eps_train(tmp_path, *common, "--output", "first").code == 0
    begun = eps_train(tmp_path, *common, "--weights", "first/ckpt.pt")
    assert begun.code == 0, begun.stderr
    resumed = eps_train(tmp_path, *common, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert "recipe: finetune" in resumed.stderr
    (tmp_path / "config.json").unlink()
    assert "belongs to a run with" in eps_train(tmp_path, *common, "--resume").error


def test_a_folder_that_is_not_named_or_not_there(tmp_path: Path) -> None:
    empty = eps_train(tmp_path, "--dataset", "folder:")
    assert (empty.code, "--dataset folder:: names no folder; write folder:PATH" in empty.error) == (
        1,
        True,
    )
    missing = eps_train(tmp_path, "--dataset", "folder:gone")
    assert "folder:gone: no such folder; name it with --data-root" in missing.error


def test_large_images_are_read_without_a_remark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write_images(tmp_path / "set")
    result = eps_train(tmp_path, "--dataset", "folder:set", *TINY, "--epochs", 1, "--image-size", 8)
    assert result.code == 0, result.stderr
    assert "DecompressionBomb" not in result.stderr


def test_images_of_one_color_are_not_trained_on(tmp_path: Path) -> None:
    for index in range(20):
        path = tmp_path / "set" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    result = eps_train(tmp_path, "--dataset", "folder:set", *TINY)
    assert result.code == 1
    assert "data set folder:set: its training images are all one color" in result.error


def test_on_a_narrow_terminal_no_word_of_the_summary_is_broken(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = json.loads((trained / "summary.json").read_text())["runs"]
    narrow = Console(stderr=True, width=60, markup=False, highlight=False)
    monkeypatch.setattr(cli, "log", lambda: narrow)
    summary.show(runs)
    shown = capsys.readouterr().err
    for word in ("parameters", "validation", "written", "baseline.pt", "of 359"):
        assert word in shown


@pytest.mark.parametrize("size", ["0", "7", "axb", "-32", "32x5"])
def test_impossible_image_sizes_are_usage_errors(tmp_path: Path, size: str) -> None:
    result = eps_train(tmp_path, "--dataset", "folder:.", "--image-size", size)
    assert result.code == 2
    assert "--image-size" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("--model", "cifar:57"),
        ("--device", "cuda:63"),
        ("--seed", 2**32),
        ("--model", "cifar:99999999998"),
        ("--model", "cifar:8x" + "1" * 5000),
    ],
)
def test_force_deletes_nothing_for_a_run_that_cannot_start(folder: Path, args: object) -> None:
    before = files_in(folder)
    assert isinstance(args, tuple)
    assert eps_train(folder, "--epochs", 1, "--force", *args).code in (1, 2)
    assert files_in(folder) == before


def test_a_folder_in_the_place_of_a_file_is_found_before_anything_is_deleted(folder: Path) -> None:
    (folder / "last.pt").unlink()
    (folder / "last.pt").mkdir()
    before = files_in(folder)
    result = eps_train(folder, *TINY, "--force")
    assert result.code == 1
    assert "last.pt: is a folder; move it away" in result.error
    assert files_in(folder) == before


def test_resume_without_the_best_checkpoint_is_refused_before_training(folder: Path) -> None:
    (folder / "ckpt.pt").unlink()
    result = eps_train(folder, *TINY, "--resume")
    assert result.code == 1
    assert result.error == "eps-train: error: ckpt.pt: no such file"
    assert "epoch " not in result.stderr


def test_a_full_disk_says_what_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second epoch cannot be saved: the first one is what --resume goes on from."""
    saves: list[Path] = []

    def full(path: Path, content: bytes) -> None:
        if path.name == "last.pt":
            saves.append(path)
            if len(saves) == 2:
                raise OSError(28, "No space left on device", str(path))
        replace_file(path, content)

    monkeypatch.setattr(checksummed, "replace_file", full)
    result = eps_train(tmp_path, *TINY)
    assert result.code == 1
    assert "last.pt holds 1 of 2 epochs; --resume goes on from there" in result.stderr
    assert "last.pt: No space left on device; free some space" in result.error
    monkeypatch.undo()
    assert eps_train(tmp_path, *TINY, "--resume").code == 0


def test_paths_are_printed_as_they_are(tmp_path: Path) -> None:
    result = eps_train(tmp_path, *TINY, "--epochs", 1, "--output", "[red]x[b]")
    assert result.code == 0
    assert "[red]x[b]/ckpt.pt" in result.stderr


def test_two_runs_into_one_folder_are_refused(tmp_path: Path) -> None:
    with held(tmp_path, "busy"):
        before = files_in(tmp_path)
        result = eps_train(tmp_path, *TINY, "--force")
    assert result.code == 1
    assert result.error == "eps-train: error: --output .: another eps-train is writing there"
    assert files_in(tmp_path) == before


def test_ctrl_c_at_the_very_end_of_a_run_still_stops_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Trainer._finish

    def interrupted(self: Trainer) -> Checkpoint:
        signal.raise_signal(signal.SIGINT)
        return finish(self)

    monkeypatch.setattr(Trainer, "_finish", interrupted)
    result = eps_train(tmp_path, *TINY, "--with-baseline")
    assert result.code == 130
    assert Checkpoint.load(tmp_path / "ckpt.pt").metrics["test"] is not None
    assert (tmp_path / "training.png").exists()
    assert not (tmp_path / "baseline-last.pt").exists()
