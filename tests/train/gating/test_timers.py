"""Which runtime times the blocks: found by entry point, and what is said where there is none."""

from __future__ import annotations

import pytest

from eps_core.errors import ConfigError
from eps_train.data import dataset
from eps_train.gating.costs import TorchTimer, make_timer
from tests.train.gating.timers import NO_ORT, timed_by

IDENTITY = dataset.load("digits").identity
# What loading the real one gives where ONNX Runtime is not installed.
MISSING = "ort: onnxruntime is not installed; pip install 'eps-resnet[ort]', or give --timer torch"


def test_onnx_runtime_where_it_is_installed() -> None:
    said: list[str] = []
    assert make_timer(None, IDENTITY, said.append).name.startswith("onnxruntime ")
    assert make_timer("ort", IDENTITY, said.append).name.startswith("onnxruntime ")
    assert make_timer("torch", IDENTITY, said.append).name.startswith("torch ")
    assert not said


def test_where_it_is_not_the_line_names_the_extra() -> None:
    with timed_by(NO_ORT), pytest.raises(ConfigError) as caught:
        make_timer("ort", IDENTITY)
    assert str(caught.value) == f"--timer {MISSING}"


def test_not_asked_for_torch_does_instead_and_says_so() -> None:
    said: list[str] = []
    with timed_by(NO_ORT):
        assert isinstance(make_timer(None, IDENTITY, said.append), TorchTimer)
    assert said == [f"times are torch's: --timer {MISSING}"]


def test_an_installation_that_does_not_offer_it() -> None:
    message = r"^--timer ort: this installation .* install it again"
    with timed_by(), pytest.raises(ConfigError, match=message):
        make_timer("ort", IDENTITY)
