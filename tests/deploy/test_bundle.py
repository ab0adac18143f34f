"""Loading and verifying a bundle; damaged or forged ones are rejected in one line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eps_core.errors import FileFormatError
from eps_deploy import load_bundle
from eps_deploy.bundle import MANIFEST, encode_manifest
from eps_deploy.cli.bench import main as bench
from eps_deploy.cli.predict import main as predict
from eps_deploy.cli.verify import main as verify
from tests.commands import run
from tests.deploy.serving.running import command

FILES = (
    "model.onnx",
    "baseline.onnx",
    "samples.npz",
    "report.json",
    "report.md",
    "examples/label-0-test-0003.png",
)


def refusal(bundle: Path) -> str:
    with pytest.raises(FileFormatError) as error:
        load_bundle(bundle)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Forge a manifest: changed, and sealed again as anyone can."""
    fields = json.loads((bundle / MANIFEST).read_bytes())
    change(fields)
    (bundle / MANIFEST).write_bytes(encode_manifest({**fields, "digest": "0" * 64}))


def test_a_bundle_says_what_it_holds(bundle: Path) -> None:
    loaded = load_bundle(str(bundle))
    assert loaded.labels == tuple("0123456789")
    assert loaded.input_shape == (1, 8, 8)
    assert loaded.preprocessing.color == "grey"
    assert loaded.manifest["precision"] == "fp32"
    assert loaded.manifest["engine"]["name"] == "ort"
    assert set(FILES) <= loaded.manifest["files"].keys()
    assert loaded.read("model.onnx") == (bundle / "model.onnx").read_bytes()
    with pytest.raises(FileFormatError, match="no file secrets"):
        loaded.read("secrets")


def test_the_digest_is_what_the_documentation_says(bundle: Path) -> None:
    content = (bundle / MANIFEST).read_text(encoding="utf-8")
    digest = json.loads(content)["digest"]
    assert hashlib.sha256(content.replace(digest, "0" * 64).encode()).hexdigest() == digest


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_is_refused(bundle: Path, name: str) -> None:
    intact = (bundle / name).read_bytes()
    for position in (0, len(intact) // 3, len(intact) - 1):
        damaged = bytearray(intact)
        damaged[position] ^= 1
        (bundle / name).write_bytes(damaged)
        assert f"{bundle / name}: changed" in refusal(bundle)


def test_one_flipped_bit_anywhere_in_the_manifest_is_refused(bundle: Path) -> None:
    intact = (bundle / MANIFEST).read_bytes()
    for position in range(0, len(intact), 7):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 8
        (bundle / MANIFEST).write_bytes(damaged)
        assert str(bundle / MANIFEST) in refusal(bundle)


@pytest.mark.parametrize("name", FILES)
def test_truncated_or_missing_files_are_refused(bundle: Path, name: str) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:-1])
    assert f"{bundle / name}: {len(content) - 1} bytes" in refusal(bundle)
    (bundle / name).unlink()
    assert f"{bundle / name}: missing" in refusal(bundle)


def test_truncated_manifests_are_refused(bundle: Path) -> None:
    content = (bundle / MANIFEST).read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 2, len(content) - 1):
        (bundle / MANIFEST).write_bytes(content[:length])
        assert "damaged" in refusal(bundle)


def test_a_manifest_from_the_future_asks_for_an_upgrade(bundle: Path) -> None:
    rewrite(bundle, lambda fields: fields.update(schema=2))
    assert "schema 2 is newer" in refusal(bundle)
    assert "upgrade" in refusal(bundle)


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b'{"format": "other"}', b"\xff\xfe", b"[" * 100_000, b"NaN"]
)
def test_foreign_manifests_are_refused(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    assert MANIFEST in refusal(bundle)


def test_folders_without_a_bundle_are_rejected(tmp_path: Path) -> None:
    assert "no manifest.json" in refusal(tmp_path)
    assert "no such folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(tmp_path / "file")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret"])
def test_a_forged_manifest_cannot_point_outside(bundle: Path, name: str) -> None:
    secret = bundle.parent / "secret"
    secret.write_bytes(b"x")
    listed = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    rewrite(bundle, lambda fields: fields["files"].update({name: listed}))
    assert "outside the bundle" in refusal(bundle)


def into_a_store(bundle: Path) -> Path:
    """The bundle as a download cache has it: each file a link to one that is named by its hash."""
    store = bundle.parent / "blobs"
    store.mkdir()
    for path in [path for path in bundle.rglob("*") if path.is_file()]:
        blob = store / hashlib.sha256(path.read_bytes()).hexdigest()
        path.replace(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    return store


def test_links_into_a_content_store_are_followed(bundle: Path, deployed: Path) -> None:
    """By every command that reads a bundle: the hashes prove what the links lead to."""
    image = next((deployed / "bundle" / "examples").glob("*.png"))
    into_a_store(bundle)
    for name, main, *arguments in (
        ("eps-predict", predict, bundle, image),
        ("eps-verify", verify, bundle),
        ("eps-bench", bench, bundle, bundle, "--batch", 1, "--time-budget", 0.01),
    ):
        result = run(name, main, *arguments, cwd=bundle.parent)
        assert result.code == 0, result.stderr
    with command(bundle) as process:
        process.wait_ready()
        assert process.post("/v1/classify", image.read_bytes()).status == 200


def test_what_a_link_leads_to_must_have_the_right_content(bundle: Path) -> None:
    store = into_a_store(bundle)
    model = (bundle / "model.onnx").resolve()
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "model.onnx: changed" in refusal(bundle)
    model.unlink()
    assert f"its link leads to ../blobs/{model.name}" in refusal(bundle)
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to("/dev/zero")  # never read: it has no end
    assert "model.onnx: not a file" in refusal(bundle)
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to(store)
    assert "model.onnx: not a file" in refusal(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.pop("labels"),
        lambda fields: fields.pop("files"),
        lambda fields: fields.pop("engine"),
        lambda fields: fields.update(preprocessing={"crop": 3}),
        lambda fields: fields.update(input=None),
        lambda fields: fields["input"].update(shape=["N", 3]),
        lambda fields: fields["input"].update(shape=["N", 3, 8, 8]),
        lambda fields: fields["labels"].append("surplus"),
        lambda fields: fields["engine"].update(file="other.onnx"),
        lambda fields: fields["files"].update({"model.onnx": "hash"}),
        lambda fields: fields.update(files=[]),
    ],
)
def test_forged_manifests_that_make_no_sense_are_refused(
    bundle: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    rewrite(bundle, change)
    refusal(bundle)


def test_what_is_not_listed_does_not_matter(bundle: Path) -> None:
    (bundle / ".directory").write_text("left by a file manager")
    load_bundle(bundle)


def test_links_in_a_circle_are_refused(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to("model.onnx")
    assert "model.onnx" in refusal(bundle)


def test_a_folder_in_the_place_of_the_manifest_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).mkdir()
    assert "manifest.json: cannot be read" in refusal(bundle)


def test_a_name_that_no_file_can_have_is_refused(bundle: Path) -> None:
    rewrite(bundle, lambda fields: fields["files"].update({"a\0b": {"bytes": 1, "sha256": ""}}))
    assert "outside the bundle" in refusal(bundle)
