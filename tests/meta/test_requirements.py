"""What pyproject.toml asks of other packages."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from tests.meta.project import ROOT, pyproject


def requirement(extra: str, name: str) -> Requirement:
    listed = map(Requirement, pyproject()["project"]["optional-dependencies"][extra])
    (found,) = [asked for asked in listed if asked.name == name]
    return found


@pytest.mark.parametrize(
    ("extra", "name"),
    [("serve", "uvicorn"), ("serve", "grpcio"), ("ort", "onnxruntime")],
)
def test_what_we_know_the_insides_of_is_no_newer_than_what_was_tested(
    extra: str, name: str
) -> None:
    (pin,) = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line.startswith(f"{name}==")
    ]
    (tested,) = [part.version for part in pin.specifier]
    asked = requirement(extra, name).specifier
    major, minor, *_ = map(int, tested.split("."))
    assert asked.contains(tested)
    assert not asked.contains(f"{major}.{minor + 1}.0")


def test_onnxruntime_on_a_gpu_brings_its_cuda_libraries() -> None:
    """Else it works beside torch alone, which brings them too."""
    assert requirement("ort-gpu", "onnxruntime-gpu").extras == {"cuda", "cudnn"}
