"""The image is built once, with whatever builds images here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.conftest import deploy, make_workshop
from tests.image.containers import Container, Tool, find, prepare

TAG = "localhost/eps-resnet:image-test"


@pytest.fixture(scope="session")
def tool() -> Tool:
    found = find()
    prepare(found)
    return found


@pytest.fixture(scope="session")
def built(tool: Tool) -> tuple[str, float]:
    """The tag of the target `cpu`, and the seconds that building it took."""
    start = time.perf_counter()
    return tool.build("cpu", TAG), time.perf_counter() - start


@pytest.fixture(scope="session")
def image(built: tuple[str, float]) -> str:
    return built[0]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that anyone may read, as the user in a container must."""
    folder = make_workshop(tmp_path_factory.mktemp("deployed"))
    result = deploy(folder, "--min-speedup", "0", "--max-accuracy-drop", "100")
    assert result.code == 0, result.stderr
    return folder / "bundle"


@pytest.fixture
def server(tool: Tool, image: str, bundle: Path) -> Iterator[Container]:
    """A server of the bundle, ready."""
    with tool.start(image, options=("--volume", f"{bundle}:/models:ro")) as container:
        container.wait()
        yield container
