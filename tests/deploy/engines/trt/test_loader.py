from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.plan import load_tensorrt, release
from tests.deploy.engines.trt.contract import VERSIONS, Version, make_fake


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_installed_is_used(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = make_fake(version, {})
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert load_tensorrt() is trt


@pytest.fixture
def _not_imported() -> Iterator[None]:
    """No module `tensorrt` is imported yet; what a test imports leaves with it."""
    before = sys.modules.pop("tensorrt", None)
    yield
    sys.modules.pop("tensorrt", None)
    if before is not None:
        sys.modules["tensorrt"] = before


@pytest.mark.usefixtures("_not_imported")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("import no_such_module", "TensorRT is installed but does not load"),
        ("raise OSError('libnvinfer.so.11:\\n cannot open')", r"\(libnvinfer.so.11: cannot open\)"),
        ("raise RuntimeError", r"\(RuntimeError\)"),
        ("__version__ = '8.6.1'", r"TensorRT 8\.6\.1 is installed; eps-resnet builds with 10 and"),
    ],
)
def test_an_unusable_package_is_a_one_line_error_with_the_remedy(
    content: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=said) as caught:
        load_tensorrt()
    assert "eps-resnet[trt]" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_not_imported")
def test_a_missing_one_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:1])  # built-in modules alone
    with pytest.raises(EngineError, match=r"not installed; pip install 'eps-resnet\[trt\]'"):
        load_tensorrt()


def test_versions_compare_as_numbers() -> None:
    assert release("10.16.1.11") > release("10.9.0")
    assert release("11.0.0rc1") == (11, 0)
    assert release("unknown") == (0,)
