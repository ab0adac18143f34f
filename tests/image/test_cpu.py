"""The image of the target `cpu`: what is in it; that it starts, answers and stops as it should."""

from __future__ import annotations

import json
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.image.containers import Container, Tool
from tests.meta.project import ROOT, files

# Building takes a minute, and five where the base image is not there yet.
pytestmark = [pytest.mark.image, pytest.mark.slow, pytest.mark.timeout(1800)]

LARGEST = 450_000_000  # bytes
STOP = 2  # seconds until what did not stop is killed
UNUSED = ("torch", "torchvision", "onnx", "sklearn", "matplotlib", "tensorboard", "pip")


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}")


def test_size(tool: Tool, built: tuple[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    tag, seconds = built
    size = tool.inspect("image", tag)["Size"]
    say(capsys, f"cpu image: {size / 1e6:.0f} MB, built by {tool.name} in {seconds:.0f} s")
    assert size < LARGEST


def test_only_what_serving_needs(tool: Tool, image: str) -> None:
    look = (
        f"import importlib.util as util; print([name for name in {UNUSED} if util.find_spec(name)])"
    )
    with tool.start(image, "-c", look, options=("--entrypoint", "python")) as container:
        tool.call("wait", container.name)
        assert container.logs.splitlines()[-1] == "[]"


def test_every_version_is_pinned(tool: Tool, image: str) -> None:
    text = (ROOT / "deploy/image/constraints.txt").read_text(encoding="utf-8")
    look = (
        "from importlib.metadata import distributions; "
        "[print(d.name.lower().replace('_', '-') + '==' + d.version) for d in distributions()]"
    )
    options = ("--entrypoint", "python")
    with tool.start(image, "-I", "-c", look, options=options) as container:
        tool.call("wait", container.name)
        installed = set(container.logs.split())
    assert installed - set(text.split()) == {f"eps-resnet=={version('eps-resnet')}"}


def test_answers_as_a_read_only_user(
    server: Container, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.perf_counter()
    answer = json.loads(server.ask(sys.executable, "-m", "tests.image.ask", "ADDRESS", str(bundle)))
    assert answer["difference"] < 1e-4
    assert answer["labels"]
    assert "10001" in server.execute("id", "-u").stdout
    assert server.execute("touch", "/file", "/models/file", "/opt/eps/file").returncode
    say(capsys, f"asked in {time.perf_counter() - began:.1f} s: {answer}")


def test_stops_at_once(server: Container, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    assert server.stop(STOP) == 0, server.logs
    say(capsys, f"stopped in {time.perf_counter() - began:.2f} s")


def test_speaks_grpc(tool: Tool, image: str, bundle: Path) -> None:
    options = ("--volume", f"{bundle}:/models:ro")
    with tool.start(image, "/models", "--grpc-port", "8001", options=options) as container:
        container.wait()
        assert "listening on grpc://" in container.logs
        assert container.stop(STOP) == 0, container.logs


def test_stops_while_it_starts(tool: Tool, image: str, bundle: Path) -> None:
    """The first process of a container is deaf to signals that it does not handle yet."""
    options = ("--volume", f"{bundle}:/models:ro")
    with tool.start(image, options=options) as container:
        while container.state["Running"] and not container.logs:
            pass
        assert container.stop(STOP) == 0, container.logs


def test_no_bundle_is_one_line(tool: Tool, image: str) -> None:
    with tool.start(image) as container:
        tool.call("wait", container.name)
        assert container.state["ExitCode"] == 1
        (line,) = container.logs.splitlines()
        assert "/models" in line


def test_bundle_is_baked_in(tool: Tool, image: str, bundle: Path, tmp_path: Path) -> None:
    context = tmp_path / "context"
    for path in files():
        copy = context / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    shutil.copytree(bundle, context / "mine")
    tag = f"{image}-baked"
    tool.build("cpu", tag, "--build-arg", "BUNDLE=mine", context=context)
    try:
        with tool.start(tag) as container:
            container.wait()
            assert container.stop(STOP) == 0
    finally:
        tool.remove(tag)
