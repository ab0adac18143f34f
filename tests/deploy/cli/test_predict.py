"""`eps-predict`: the labels that torch gives, and one line for each file that is not an image."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eps_compact import CompactArtifact
from eps_deploy.cli.predict import main
from eps_deploy.export.export import Deployed
from tests.commands import Result, run


def predict(*args: object, cwd: Path) -> Result:
    return run("eps-predict", main, *args, cwd=cwd)


def examples(folder: Path) -> list[Path]:
    return sorted((folder / "bundle" / "examples").glob("*.png"))


def test_one_line_an_image(deployed: Path) -> None:
    paths = examples(deployed)
    result = predict("bundle", *paths, cwd=deployed)
    assert result.code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(paths)
    for line, path in zip(lines, paths, strict=True):
        name, label, probability = line.rsplit(maxsplit=2)
        assert name == f"{path}:"
        assert label in "0123456789"
        assert 0 < float(probability) <= 1


def test_the_same_answers_as_torch(deployed: Path) -> None:
    paths = examples(deployed)
    result = predict("bundle", *paths, "--top", "10", "--json", cwd=deployed)
    answers = json.loads(result.stdout)["predictions"]
    compact = CompactArtifact.load(deployed / "compact.pt")
    pixels = np.stack([compact.data.preprocessing.read(path) for path in paths])
    logits = Deployed(compact.build(), compact.data).infer(pixels)
    expected = torch.from_numpy(logits).double().softmax(dim=1)
    for answer, row in zip(answers, expected, strict=True):
        found = {entry["label"]: entry["probability"] for entry in answer["top"]}
        assert [found[str(label)] for label in range(10)] == pytest.approx(row.tolist(), abs=1e-5)
        probabilities = [entry["probability"] for entry in answer["top"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)


def test_top(deployed: Path) -> None:
    path = examples(deployed)[0]
    three = predict("bundle", path, "--top", "3", cwd=deployed).stdout.split()
    assert len(three) == 1 + 3 * 2
    all_ten = predict("bundle", path, "--top", "99", cwd=deployed).stdout.split()
    assert len(all_ten) == 1 + 10 * 2
    assert predict("bundle", path, "--top", "0", cwd=deployed).code == 2


def test_an_image_of_another_size_and_colour(deployed: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (300, 200), "red").save(tmp_path / "red.png")
    result = predict("bundle", tmp_path / "red.png", cwd=deployed)
    assert result.code == 0, result.stderr


def test_many_images_go_in_several_batches(deployed: Path) -> None:
    paths = examples(deployed) * 7
    result = predict("bundle", *paths, cwd=deployed)
    lines = result.stdout.splitlines()
    assert [line.rpartition(":")[0] for line in lines] == [str(path) for path in paths]
    # Which batch an image is in changes nothing that is printed.
    assert len(set(lines)) == 10


def test_bad_images_are_named_and_the_others_answered(deployed: Path, tmp_path: Path) -> None:
    good = examples(deployed)[0]
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:70])
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    bad = [
        tmp_path / name
        for name in ("text.png", "cut.png", "empty.png", "folder.png", "missing.png")
    ]
    result = predict("bundle", *bad[:3], good, *bad[3:], good, cwd=deployed)
    assert result.code == 1
    assert len(result.stdout.splitlines()) == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 5
    for path, line in zip(bad, lines, strict=True):
        assert line.startswith(f"eps-predict: error: {path}: ")


def test_bad_images_in_json(deployed: Path) -> None:
    result = predict("bundle", "missing.png", "--json", cwd=deployed)
    assert result.code == 1
    answer = json.loads(result.stdout)
    assert answer["predictions"] == []
    assert answer["errors"] == [{"image": "missing.png", "error": "missing.png: no such file"}]


def test_an_image_whose_logits_are_not_finite_is_named(
    deployed: Path, overflowing: Path, tmp_path: Path
) -> None:
    """The network overflows on it: that is an error, no label with the probability NaN."""
    for colour in ("white", "black"):
        Image.new("L", (8, 8), colour).save(tmp_path / f"{colour}.png")
    good = examples(deployed)[0]
    images = (tmp_path / "white.png", good, tmp_path / "black.png")
    result = predict(overflowing, *images, cwd=deployed)
    assert result.code == 1
    assert result.stdout == predict("bundle", good, cwd=deployed).stdout
    lines = result.stderr.splitlines()
    assert [line.partition(": the network's")[0] for line in lines] == [
        f"eps-predict: error: {tmp_path / name}" for name in ("white.png", "black.png")
    ]
    assert all("not finite" in line for line in lines)
    result = predict(overflowing, *images, "--json", cwd=deployed)
    assert result.code == 1
    answer = json.loads(result.stdout)
    assert [entry["image"] for entry in answer["predictions"]] == [str(good)]
    assert [entry["image"] for entry in answer["errors"]] == [str(images[0]), str(images[2])]


@pytest.mark.parametrize(
    "arguments", [["nowhere", "a.png"], ["compact.pt", "a.png"], [".", "a.png"]]
)
def test_what_is_no_bundle_is_rejected_in_one_line(deployed: Path, arguments: list[str]) -> None:
    result = predict(*arguments, cwd=deployed)
    assert (result.code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert result.error.startswith("eps-predict: error: ")


def test_a_damaged_bundle_is_rejected(bundle: Path) -> None:
    model = bytearray((bundle / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(model)
    result = predict("bundle", "bundle/examples/label-0-test-0003.png", cwd=bundle.parent)
    assert (result.code, result.stdout) == (1, "")
    assert "model.onnx: changed" in result.error


def test_usage(deployed: Path) -> None:
    assert predict("bundle", cwd=deployed).code == 2
    assert predict(cwd=deployed).code == 2


def test_no_torch_is_needed(deployed: Path) -> None:
    """In a fresh process in which torch and everything for training cannot be imported."""
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "onnx", "sklearn", "matplotlib"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
from eps_deploy.cli.predict import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "bundle", str(examples(deployed)[0])],
        cwd=deployed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_large_images_are_read_without_a_warning(deployed: Path, tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    result = predict("bundle", tmp_path / "large.png", cwd=deployed)
    assert (result.code, result.stderr) == (0, "")
