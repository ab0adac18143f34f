"""What every test shares. A test that needs a device or a tool is skipped where that is missing."""

from __future__ import annotations

import base64
import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

# Torch's threads spin while they wait for each other: with the cores busy elsewhere, the small
# networks of these tests take many times longer on two threads than on one. Commands inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The clock of a shared machine says nothing about a property.
settings.register_profile("eps", deadline=None)
settings.load_profile("eps")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_trt_rtx() -> bool:
    return importlib.util.find_spec("tensorrt_rtx") is not None


def _has_image_builder() -> bool:
    from tests.image.containers import NoBuilderError, find

    try:
        find()
    except NoBuilderError:
        return False
    return True


TRAINING = ("tests.train", "tests.compact", "tests.integration", "tests.deploy")
NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "gpu": (_has_cuda, "needs a CUDA device"),
    "trt_rtx": (_has_trt_rtx, "needs the package tensorrt_rtx"),
    "image": (_has_image_builder, "needs Docker, or podman, runc and debootstrap as root"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, (available, reason) in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


# The modules whose plots are drawn; in all others drawing takes longer than the tiny runs.
DRAWN = (
    *("tests.train.training.test_plots", "tests.compact.test_plots", "tests.deploy.test_formats"),
    *("tests.compact.analysis.test_pareto", "tests.integration.test_run_files"),
)
PLOTS = (
    *("eps_train.training.run.draw", "eps_compact.plots.draw_blocks"),
    "eps_compact.plots.draw_pareto",
)
BLANK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module", autouse=True)
def undrawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Plots of eps-train and eps-compact are one pixel."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in DRAWN and request.module.__name__.startswith(TRAINING):
            for plot in PLOTS:
                patch.setattr(plot, lambda *args: BLANK)
        yield


@pytest.fixture(scope="module", autouse=True)
def unhurried(request: pytest.FixtureRequest) -> Iterator[None]:
    """eps-train and eps-compact do not warn of a machine that is busy with other tests."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.startswith(TRAINING[:3]):
            patch.setattr("eps_core.machine.WAITED", float("inf"))
        yield
