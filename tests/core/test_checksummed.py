"""Checksummed files: damaged, truncated, foreign and newer ones are refused; writes are atomic."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eps_core import checksummed
from eps_core.errors import FileFormatError

FORMAT = "eps-resnet-made-up"


def payload(**other: Any) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": 1,
        "tensors": {"weight": torch.arange(600, dtype=torch.float32), "flag": torch.tensor(True)},
        "half": torch.ones(3, dtype=torch.bfloat16),
        "numbers": [1, 2.5, None, True, ("a", {"ε": -1})],
        **other,
    }


def read(path: Path, version: int = 1) -> dict[str, Any]:
    return checksummed.read(path, format=FORMAT, version=version)[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "made.pt"
    checksummed.write(path, payload())
    return path


def test_round_trip(file: Path) -> None:
    found = read(file)
    assert torch.equal(found["tensors"]["weight"], payload()["tensors"]["weight"])
    assert found["half"].dtype == torch.bfloat16
    assert found["numbers"] == payload()["numbers"]


def test_digest_names_the_content(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in "abc")
    digest = checksummed.write(one, payload())
    assert len(digest) == 64
    assert checksummed.read(one, format=FORMAT, version=1)[1] == digest
    assert checksummed.write(same, payload()) == digest
    assert checksummed.write(other, payload(more=1)) != digest


def test_torch_and_zip_tools_still_open_it(file: Path) -> None:
    import zipfile

    assert torch.load(file, weights_only=True)["format"] == FORMAT
    assert zipfile.ZipFile(file).testzip() is None


def test_fifty_flipped_bits_are_all_refused(file: Path) -> None:
    whole, rng = file.read_bytes(), random.Random(0)
    for bit in rng.sample(range(8 * len(whole)), 50):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        with pytest.raises(FileFormatError, match="damaged, truncated, or not an eps-resnet file"):
            read(file)


def test_fifty_truncations_are_all_refused(file: Path) -> None:
    whole, rng = file.read_bytes(), random.Random(0)
    for length in [0, 1, 63, 64, 65, len(whole) - 1, *rng.sample(range(len(whole)), 44)]:
        file.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="damaged, truncated, or not an eps-resnet file"):
            read(file)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    plain, text = tmp_path / "plain.pt", tmp_path / "text.pt"
    torch.save(payload(), plain)
    text.write_text("hello " * 50)
    for path in (plain, text):
        with pytest.raises(FileFormatError, match=f"^{path}: .*not an eps-resnet file"):
            read(path)


def test_another_format_is_named(file: Path) -> None:
    with pytest.raises(
        FileFormatError, match=f"expected an eps-resnet-other file, found {FORMAT}$"
    ):
        checksummed.read(file, format="eps-resnet-other", version=1)


@pytest.mark.parametrize("content", [{"weights": torch.zeros(2)}, {"format": 7, "version": 1}])
def test_a_valid_checksum_but_an_unknown_format(content: dict[str, Any], tmp_path: Path) -> None:
    checksummed.write(tmp_path / "a.pt", content)
    with pytest.raises(FileFormatError, match="found another program's file"):
        read(tmp_path / "a.pt")


def test_too_new_asks_for_an_upgrade(tmp_path: Path) -> None:
    checksummed.write(tmp_path / "a.pt", payload(version=3))
    with pytest.raises(FileFormatError, match=r"version 3 is newer .* \(up to 2\); upgrade"):
        read(tmp_path / "a.pt", version=2)
    assert read(tmp_path / "a.pt", version=4)["version"] == 3


@pytest.mark.parametrize("version", [None, "1", 0, -2, 1.5])
def test_no_usable_version(version: object, tmp_path: Path) -> None:
    checksummed.write(tmp_path / "a.pt", payload(version=version))
    with pytest.raises(FileFormatError, match="no usable format version"):
        read(tmp_path / "a.pt")


class Trap:
    """Unpickling it runs code: it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def with_checksum(content: bytes) -> bytes:
    return content + hashlib.sha256(content).hexdigest().encode()


def test_code_in_a_pickle_never_runs_even_with_a_valid_checksum(tmp_path: Path) -> None:
    archive, bare, folder = (tmp_path / name for name in ("archive.pt", "bare.pt", "folder"))
    torch.save(payload(trap=Trap(folder)), archive)
    content = bytearray(archive.read_bytes())
    content[-2:] = (64).to_bytes(2, "little")  # length of the archive's comment
    archive.write_bytes(with_checksum(bytes(content)))
    bare.write_bytes(
        with_checksum(pickle.dumps(payload(trap=Trap(folder), tensors=None, half=None)))
    )
    for path in (archive, bare):
        with pytest.raises(FileFormatError, match="refused: it holds more than tensors and plain"):
            read(path)
    assert not folder.exists()
    torch.load(archive, weights_only=False)
    assert folder.exists(), "the trap works"


@pytest.mark.parametrize(
    "value", [np.float64(1.5), Path("a"), {1, 2}, torch.float32, Trap(Path("a"))]
)
def test_what_could_not_be_read_is_not_written(value: object, file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(TypeError, match="neither a tensor nor plain data"):
        checksummed.write(file, payload(deep=[{"in": (value,)}]))
    assert file.read_bytes() == before


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no such file$"):
        read(tmp_path / "missing.pt")
    with pytest.raises(FileFormatError, match=r"is a folder, not a file$"):
        read(tmp_path)


def broken(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_names_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", broken)  # as the system does, it names none
    with pytest.raises(OSError, match="No space left") as error:
        checksummed.write(file, payload())
    assert error.value.filename == str(file)


def interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.read_bytes"])
@pytest.mark.parametrize("failure", [broken, interrupted])
def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(
    file: Path, place: str, failure: Any
) -> None:
    before = file.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, failure)
        with pytest.raises((OSError, KeyboardInterrupt)):
            checksummed.write(file, payload(more=2))
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]
    checksummed.write(file, payload(more=2))
    assert read(file)["more"] == 2


def test_a_disk_that_returns_other_bytes_is_an_error(file: Path) -> None:
    before = file.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.read_bytes", lambda path: before)
        with pytest.raises(OSError, match="what was read back differs"):
            checksummed.write(file, payload(more=2))
    assert file.read_bytes() == before


KILLED = """
import os, signal, sys
from pathlib import Path
from eps_core.files import replace_file
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
replace_file(Path(sys.argv[1]), b"new" * 1000)
"""


def test_a_process_killed_while_writing_leaves_the_old_file(file: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read(file)["numbers"] == payload()["numbers"]
    checksummed.write(file, payload(more=2))
    assert os.listdir(file.parent) == [file.name], "the temporary file is overwritten"


def test_missing_folders_are_created_and_permissions_are_the_default(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.pt"
    checksummed.write(path, payload())
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode
