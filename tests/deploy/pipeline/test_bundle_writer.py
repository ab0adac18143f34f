"""Writing a bundle: whole or not at all, and nobody else's folder is touched."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eps_core.errors import ConfigError, FileFormatError
from eps_deploy import load_bundle
from eps_deploy.pipeline.write import BundleWriter
from tests.commands import files_in

FIELDS: dict[str, Any] = {
    "input": {"shape": ["N", 1, 8, 8]},
    "output": {"shape": ["N", 2]},
    "preprocessing": {"resize": [8, 8], "crop": [8, 8], "color": "grey"},
    "labels": ["no", "yes"],
    "engine": {"file": "model.onnx"},
}


def write(
    output: Path, content: bytes, *, force: bool = False, fields: dict[str, Any] = FIELDS
) -> None:
    with BundleWriter(output, force=force) as writer:
        (writer.folder / "model.onnx").write_bytes(content)
        (writer.folder / "examples").mkdir()
        (writer.folder / "examples" / "one.png").write_bytes(b"png")
        writer.commit(fields)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "new" / "bundle", b"model")
    bundle = load_bundle(tmp_path / "new" / "bundle")
    assert bundle.read("model.onnx") == b"model"
    assert bundle.read("examples/one.png") == b"png"
    assert os.listdir(tmp_path / "new") == ["bundle"]


def test_others_may_read_it(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write(tmp_path / "bundle", b"model")
    finally:
        os.umask(mask)
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o755


def test_an_existing_place_is_refused_before_any_work(tmp_path: Path) -> None:
    write(tmp_path / "bundle", b"old")
    with pytest.raises(ConfigError, match=r"exists already; .* --force"):
        BundleWriter(tmp_path / "bundle", force=False)


def test_force_replaces_a_bundle(tmp_path: Path) -> None:
    write(tmp_path / "bundle", b"old")
    write(tmp_path / "bundle", b"new", force=True)
    assert load_bundle(tmp_path / "bundle").read("model.onnx") == b"new"
    assert os.listdir(tmp_path) == ["bundle"]


def test_force_replaces_a_damaged_bundle(tmp_path: Path) -> None:
    write(tmp_path / "bundle", b"old")
    (tmp_path / "bundle" / "model.onnx").unlink()
    write(tmp_path / "bundle", b"new", force=True)
    assert load_bundle(tmp_path / "bundle").read("model.onnx") == b"new"


@pytest.mark.parametrize("content", [{}, {"photo.jpg": b"x"}, {"manifest.json": b"{}"}])
def test_force_never_replaces_another_folder(tmp_path: Path, content: dict[str, bytes]) -> None:
    folder = tmp_path / "holiday"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    with pytest.raises(ConfigError, match="is not a bundle"):
        BundleWriter(folder, force=True)
    assert files_in(folder) == content


def test_force_never_deletes_what_somebody_put_into_a_bundle(tmp_path: Path) -> None:
    write(tmp_path / "bundle", b"old")
    (tmp_path / "bundle" / "examples" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"would delete examples/notes\.txt"):
        BundleWriter(tmp_path / "bundle", force=True)
    assert (tmp_path / "bundle" / "examples" / "notes.txt").read_text() == "mine"


def test_force_replaces_neither_files_nor_links(tmp_path: Path) -> None:
    write(tmp_path / "bundle", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    (tmp_path / "file").write_text("x")
    for name in ("link", "file"):
        with pytest.raises(ConfigError, match="is not a bundle"):
            BundleWriter(tmp_path / name, force=True)


def test_a_failure_leaves_the_old_bundle_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "bundle", b"old")
    before = files_in(tmp_path)

    def interrupted() -> None:
        with BundleWriter(tmp_path / "bundle", force=True) as writer:
            (writer.folder / "model.onnx").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files_in(tmp_path) == before


def test_a_full_disk_leaves_the_old_bundle_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "bundle", b"old")
    before = files_in(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "bundle", b"new", force=True)
    assert files_in(tmp_path) == before


def test_a_failed_rename_puts_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "bundle", b"old")
    before = files_in(tmp_path)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise PermissionError(errno.EACCES, "denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        write(tmp_path / "bundle", b"new", force=True)
    monkeypatch.undo()
    assert files_in(tmp_path) == before


def test_a_bundle_that_cannot_be_read_back_is_not_delivered(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="not a usable manifest"):
        write(tmp_path / "bundle", b"model", fields={**FIELDS, "preprocessing": {}})
    assert os.listdir(tmp_path) == []


def test_somebody_else_s_bundle_made_meanwhile_stays(tmp_path: Path) -> None:
    def too_late() -> None:
        with BundleWriter(tmp_path / "bundle", force=False) as writer:
            (writer.folder / "model.onnx").write_bytes(b"ours")
            write(tmp_path / "theirs", b"theirs")
            (tmp_path / "theirs").rename(tmp_path / "bundle")
            writer.commit(FIELDS)

    with pytest.raises(ConfigError, match="exists already"):
        too_late()
    assert load_bundle(tmp_path / "bundle").read("model.onnx") == b"theirs"
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_full_disk_names_the_bundle(tmp_path: Path) -> None:
    for name in (None, str(tmp_path / ".bundle.eps-deploy.part" / "model.onnx")):
        with (
            pytest.raises(OSError, match="No space left") as error,
            BundleWriter(tmp_path / "bundle", force=False),
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        assert error.value.filename == str(tmp_path / "bundle")


KILLED = """
import os, signal, sys
from pathlib import Path
from eps_deploy.pipeline.write import BundleWriter
from tests.deploy.pipeline.test_bundle_writer import FIELDS
with BundleWriter(Path(sys.argv[1]), force=True) as writer:
    (writer.folder / "model.onnx").write_bytes(b"killed")
    (writer.folder / "examples").mkdir()
    if sys.argv[2] == "committing":
        rename = Path.rename
        def die(self, target):
            if self == writer.folder:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)
        Path.rename = die
        writer.commit(FIELDS)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill(output: Path, when: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, output, when], cwd=Path(__file__).parents[3], check=False
    )
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_run_left_is_taken_over(tmp_path: Path) -> None:
    kill(tmp_path / "bundle", "writing")
    assert os.listdir(tmp_path) == [".bundle.eps-deploy.part"]
    write(tmp_path / "bundle", b"new")
    assert os.listdir(tmp_path) == ["bundle"]
    assert set(files_in(tmp_path / "bundle")) == {"manifest.json", "model.onnx", "examples/one.png"}


def test_a_run_killed_between_old_and_new_loses_neither(tmp_path: Path) -> None:
    write(tmp_path / "bundle", b"old")
    kill(tmp_path / "bundle", "committing")
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(ConfigError, match="exists already"):
        write(tmp_path / "bundle", b"new")  # the old one is back, and --force was not given
    assert load_bundle(tmp_path / "bundle").read("model.onnx") == b"old"
    assert os.listdir(tmp_path) == ["bundle"]
    kill(tmp_path / "bundle", "committing")
    write(tmp_path / "bundle", b"new", force=True)
    assert load_bundle(tmp_path / "bundle").read("model.onnx") == b"new"
    assert os.listdir(tmp_path) == ["bundle"]


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle", force=False) as first:
        (first.folder / "model.onnx").write_bytes(b"first")
        with pytest.raises(ConfigError, match="another eps-deploy is writing it"):
            write(tmp_path / "bundle", b"second")
        first.commit(FIELDS)
    assert load_bundle(tmp_path / "bundle").read("model.onnx") == b"first"
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_link_in_the_temporary_folder_s_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    (tmp_path / ".bundle.eps-deploy.part").symlink_to("mine")
    with pytest.raises(OSError, match="bundle"):
        write(tmp_path / "bundle", b"new")
    assert (tmp_path / "mine" / "photo.jpg").exists()
