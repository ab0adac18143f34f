"""Which runtime times the blocks: found by entry point, and what is said where there is none."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from eps_compact.analysis import importance
from eps_compact.analysis.importance import GROUP, TorchTimer, make_timer
from eps_core.errors import ConfigError
from eps_train.data import dataset

IDENTITY = dataset.load("digits").identity
# What loading the real one gives where ONNX Runtime is not installed.
MISSING = "ort: onnxruntime is not installed; pip install 'eps-resnet[ort]', or give --timer torch"


def offer(monkeypatch: pytest.MonkeyPatch, *found: EntryPoint) -> None:
    monkeypatch.setattr(
        importance, "entry_points", lambda **names: EntryPoints(found).select(**names)
    )


class _NotInstalled(EntryPoint):
    def load(self) -> object:
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")


def test_onnx_runtime_where_it_is_installed() -> None:
    said: list[str] = []
    assert make_timer(None, IDENTITY, said.append).name.startswith("onnxruntime ")
    assert make_timer("ort", IDENTITY, said.append).name.startswith("onnxruntime ")
    assert make_timer("torch", IDENTITY, said.append).name.startswith("torch ")
    assert not said


def test_where_it_is_not_the_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, _NotInstalled("ort", "nowhere:Timer", GROUP))
    with pytest.raises(ConfigError) as caught:
        make_timer("ort", IDENTITY)
    assert str(caught.value) == f"--timer {MISSING}"


def test_not_asked_for_torch_does_instead_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, _NotInstalled("ort", "nowhere:Timer", GROUP))
    said: list[str] = []
    assert isinstance(make_timer(None, IDENTITY, said.append), TorchTimer)
    assert said == [f"times are torch's: --timer {MISSING}"]


def test_an_installation_that_does_not_offer_it(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)
    with pytest.raises(ConfigError, match=r"^--timer ort: this installation .* install it again"):
        make_timer("ort", IDENTITY)
