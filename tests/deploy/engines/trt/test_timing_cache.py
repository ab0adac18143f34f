from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eps_core import files as folder_lock
from eps_deploy.engines.trt import build as module
from eps_deploy.engines.trt.build import BuildOptions
from tests.deploy.engines.trt.builder import HOST, PLAN, Builder
from tests.deploy.engines.trt.checks import run
from tests.deploy.engines.trt.contract import VERSIONS, Version

both = pytest.mark.parametrize("version", VERSIONS)


def build(fake: Builder, folder: Path) -> list[str]:
    """What was said about the timing cache; the build itself must succeed."""
    said: list[str] = []
    options = BuildOptions(timing_cache=folder)
    assert run(module, fake, options=options, log=said.append).content == PLAN
    return [text for text in said if text != "warning: a slow kernel"]


@both
def test_times_go_from_build_to_build(version: Version, tmp_path: Path) -> None:
    fake = Builder(version, cache=b"times of the first")
    assert not build(fake, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    assert file == module.timing_cache_path(tmp_path / "cache", fake.host)
    assert file.read_bytes() == b"times of the first"
    second = Builder(version)
    assert not build(second, tmp_path / "cache")
    created = [call for call in second.trt.calls if call.name == "create_timing_cache"]
    assert [call.arguments for call in created] == [(b"times of the first",)]


def test_each_version_and_each_gpu_has_its_own(tmp_path: Path) -> None:
    hosts = [
        HOST,
        replace(HOST, tensorrt="10.16.1.11"),
        replace(HOST, device="NVIDIA H200"),
        replace(HOST, compute_capability="8.0"),
    ]
    files = {module.timing_cache_path(tmp_path, host).name for host in hosts}
    assert len(files) == len(hosts)
    assert "tensorrt-11.4.0.106-sm9.0-NVIDIA-H100-80GB-HBM3.timing" in files


@both
def test_what_another_build_wrote_meanwhile_is_kept_too(version: Version, tmp_path: Path) -> None:
    fake = Builder(version, cache=b"ours")
    file = module.timing_cache_path(tmp_path, fake.host)

    config = fake.trt.make("IBuilderConfig", _flags=set(), _cache=None)
    said: list[str] = []
    with module.timing_cache(config, tmp_path, fake.host, said.append):
        config._cache._content = b"ours"
        file.write_bytes(b"theirs")
    assert file.read_bytes() == b"ourstheirs"
    assert fake.combined == [b"theirs"]
    assert not said


@both
@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        ("set_timing_cache", "refuses this timing cache; building with an empty one"),
        ("create_timing_cache", "refuses this timing cache"),
        ("get_timing_cache", "has no timing cache to keep"),
        ("serialize", "does not serialize its timing cache"),
    ],
)
def test_a_failing_cache_is_logged_and_the_build_goes_on(
    version: Version, refuse: str, said: str, tmp_path: Path
) -> None:
    fake = Builder(version, refuse=(refuse,))
    module.timing_cache_path(tmp_path, fake.host).write_bytes(b"old")
    assert any(said in text for text in build(fake, tmp_path))


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"")
    (text,) = build(Builder(), place)
    assert "the timing cache is not kept" in text or "building without" in text


def test_a_folder_that_another_build_holds(tmp_path: Path) -> None:
    with folder_lock.held(tmp_path, "busy"):
        (text,) = build(Builder(), tmp_path)
    assert "not kept" in text
    assert "another build is writing its times" in text
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Builder(cache=b"new")
    file = module.timing_cache_path(tmp_path, fake.host)
    file.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    (text,) = build(fake, tmp_path)
    assert text.endswith("the timing cache is not kept: No space left on device")
    assert file.read_bytes() == b"old"
