"""Which runtime times the blocks: found by entry point, and what is said where there is none."""

from __future__ import annotations

import pytest
import torch

from eps_core.errors import ConfigError
from eps_core.machine import Conditions
from eps_train.data import dataset
from eps_train.gating.costs import TorchTimer, make_timer
from eps_train.models.spec import NetworkSpec
from tests.train.gating.timers import LAYERS, NO_ORT, timed_by

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
        assert make_timer(None, IDENTITY, said.append).name == TorchTimer.name
    assert said == [f"times are torch's: --timer {MISSING}"]


def test_an_installation_that_does_not_offer_it() -> None:
    message = r"^--timer ort: this installation .* install it again"
    with timed_by(), pytest.raises(ConfigError, match=message):
        make_timer("ort", IDENTITY)


@pytest.mark.parametrize("starved", [False, True])
def test_a_machine_too_busy_for_ratios_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, starved: bool
) -> None:
    monkeypatch.setattr(Conditions, "starved", starved)
    monkeypatch.setattr(Conditions, "disturbances", lambda self: ["others were faster"])
    said: list[str] = []
    with timed_by(LAYERS):
        timer = make_timer("ort", IDENTITY, said.append)
    model = NetworkSpec.parse("cifar:8x4", in_channels=1, classes=10).build()
    measure = timer.load(model, torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    assert len(measure([(), ("stages.0.0",)])) == 2
    measure([()])
    warning = (
        "warning: measured times may be wrong (others were faster); measure on a quiet machine"
    )
    assert said == [warning] * starved
