"""The contents of a bundle besides its models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from eps_compact import CompactArtifact
from eps_deploy import load_bundle
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export.export import Deployed
from eps_deploy.pipeline.write import write_examples
from eps_deploy.report.report import GALLERY
from eps_train.data import dataset


def test_the_samples_are_test_images_with_the_logits_of_torch(deployed: Path) -> None:
    bundle = load_bundle(deployed / "bundle")
    test = dataset.load("digits").test
    compact = CompactArtifact.load(deployed / "compact.pt")
    with np.load(deployed / "bundle" / "samples.npz") as samples:
        indices = samples["indices"]
        assert len(set(indices.tolist())) == len(indices) == 33
        assert (samples["images"] == test.images[indices].numpy()).all()
        assert (samples["labels"] == test.labels[indices].numpy()).all()
        expected = Deployed(compact.build(), compact.data).infer(samples["images"])
        assert (samples["logits"] == expected).all()
        with OrtEngine(bundle.read(bundle.model)) as engine:
            found = engine.infer(samples["images"])
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_examples_are_one_test_image_a_class(deployed: Path) -> None:
    bundle = load_bundle(deployed / "bundle")
    test = dataset.load("digits").test
    paths = sorted((deployed / "bundle" / "examples").glob("*.png"))
    assert len(paths) == 10
    for label, path in enumerate(paths):
        _, named, _, index = path.stem.split("-")
        assert (named, int(test.labels[int(index)])) == (str(label), label)
        # The file gives back the very pixels: predictions on it are those of the test image.
        assert (bundle.preprocessing.read(path) == test.images[int(index)].numpy()).all()


def test_the_gallery_is_the_images_whose_answer_changed(deployed: Path) -> None:
    """By both networks' own files, and with the very pixels of the test part."""
    bundle = load_bundle(deployed / "bundle")
    test = dataset.load("digits").test
    images, labels = test.images.numpy(), test.labels.numpy()
    classes = []
    for name in ("baseline.onnx", "model.onnx"):
        with OrtEngine(bundle.read(name)) as engine:
            found = [engine.infer(images[at : at + 32]) for at in range(0, len(images), 32)]
        classes.append(np.concatenate(found).argmax(axis=1))
    before, after = classes
    changed = json.loads(bundle.read("report.json"))["answers"]["changed"]
    assert {entry["index"] for entry in changed} == set(np.flatnonzero(before != after).tolist())
    for entry in changed:
        found = [labels[entry["index"]], before[entry["index"]], after[entry["index"]]]
        assert [entry["label"], entry["baseline"], entry["judged"]] == [*map(str, found)]
    shown = {entry["image"]: entry["index"] for entry in changed if entry["image"]}
    assert 0 < len(shown) <= 3 * GALLERY
    written = {name for name in bundle.manifest["files"] if name.startswith("changed/")}
    assert written == set(shown)
    for name, index in shown.items():
        assert (bundle.preprocessing.read(bundle.root / name) == images[index]).all()


def test_colours_and_strange_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 6), dtype=np.uint8)
    labels = np.array([1, 1, 0, 0], dtype=np.int64)
    written = write_examples(tmp_path / "x", images, labels, ("../a b", "ü/c", "without images"))
    names = [path.name for path in written]
    assert names == ["label-_a_b-test-0002.png", "label-_c-test-0000.png"]
    with Image.open(written[1]) as image:
        assert (np.asarray(image).transpose(2, 0, 1) == images[0]).all()


def test_many_classes_give_ten_examples(tmp_path: Path) -> None:
    images = np.zeros((100, 1, 8, 8), np.uint8)
    classes = [f"c{index}" for index in range(100)]
    assert len(write_examples(tmp_path / "x", images, np.arange(100), classes)) == 10


def test_the_manifest_names_its_inputs(deployed: Path) -> None:
    manifest = json.loads((deployed / "bundle" / "manifest.json").read_bytes())
    compact = CompactArtifact.load(deployed / "compact.pt")
    assert manifest["source"]["compact_digest"] == compact.digest
    assert manifest["source"]["checkpoint_digest"] == compact.checkpoint["digest"]
    assert len(manifest["source"]["baseline_digest"]) == 64
    assert manifest["data"]["sha256"] == compact.data.sha256
    assert manifest["normalization"]["mean"] == list(compact.data.mean)
    assert manifest["input"] == {
        "name": "images",
        "dtype": "uint8",
        "shape": ["N", 1, 8, 8],
        "layout": "NCHW",
        "color": "grey",
        "range": [0, 255],
    }
    assert manifest["resampling"] == {
        "interpolation": "bilinear",
        "antialias": True,
        "reference": "Pillow",
    }
    assert manifest["output"] == {"name": "logits", "dtype": "float32", "shape": ["N", 10]}
    assert {"eps_resnet", "torch", "python"} <= manifest["versions"].keys()
