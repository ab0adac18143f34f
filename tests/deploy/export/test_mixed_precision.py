"""Repair: which blocks it keeps, that none is kept in vain, and that it gives up in time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx

from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export import quantize as calibration
from eps_deploy.export.export import Deployed, export_onnx
from eps_deploy.export.mixed_precision import Trial, repair, units
from eps_deploy.export.quantize import quantize
from eps_deploy.precision import PRECISIONS
from eps_train.data import dataset
from eps_train.gating import rewriting
from eps_train.models.spec import NetworkSpec

BLOCKS = tuple(f"block{index}" for index in range(54))


def spoiled_by(*bad: str) -> Callable[[tuple[str, ...]], Trial]:
    """A network that passes once all of `bad` are kept."""

    def attempt(kept: tuple[str, ...]) -> Trial:
        left = set(bad) - set(kept)
        return Trial(passed=not left, value=float(len(left)))

    return attempt


@pytest.mark.parametrize("bad", [("block0",), ("block53",), ("block7", "block30", "block31")])
def test_exactly_the_bad_ones_are_kept(bad: tuple[str, ...]) -> None:
    found = repair(BLOCKS, spoiled_by(*bad))
    assert found.kept == bad
    assert (found.before.passed, found.after.passed) == (False, True)
    assert found.before.value == len(bad)


def test_one_among_many_takes_few_trials() -> None:
    many = tuple(f"block{index}" for index in range(375))
    assert repair(many, spoiled_by("block200")).trials <= 2 + 2 * 9


def test_the_worst_is_kept_where_several_would_do() -> None:
    """Errors that add up, of which any sum below 10 passes."""
    errors = dict.fromkeys(BLOCKS, 0.5) | {"block40": 8.0}

    def attempt(kept: tuple[str, ...]) -> Trial:
        value = sum(error for block, error in errors.items() if block not in kept)
        return Trial(passed=value < 30, value=value)

    assert repair(BLOCKS, attempt).kept == ("block40",)


def test_none_is_kept_when_it_passes_anyway() -> None:
    found = repair(BLOCKS, spoiled_by())
    assert (found.kept, found.after.passed, found.trials) == ((), True, 1)


def test_it_gives_up_when_all_blocks_do_not_help() -> None:
    found = repair(BLOCKS, lambda kept: Trial(passed=False, value=1.0))
    assert (found.kept, found.after.passed, found.trials) == ((), False, 2)


def test_no_trial_is_made_twice() -> None:
    seen = []

    def attempt(kept: tuple[str, ...]) -> Trial:
        seen.append(kept)
        return spoiled_by("block3", "block9", "block10")(kept)

    found = repair(BLOCKS, attempt)
    assert len(seen) == len(set(seen)) == found.trials


def spoiled_network() -> fx.GraphModule:
    """One channel of one block is so much larger than the others that int8 leaves nothing of them.

    The next convolution takes it back, so that in float32 it makes no difference.
    """
    torch.manual_seed(0)
    spec = NetworkSpec.parse("cifar:14x8", in_channels=1, classes=10)
    model = rewriting.drop_taps(rewriting.drop_gates(spec.build())).eval()
    with torch.no_grad():
        model.get_parameter("stages.1.1.bn2.weight")[0] = 3000
        model.get_parameter("stages.1.1.conv2.weight")[:, 0] /= 3000
    return model


@pytest.mark.parametrize("kind", ["int8", "int8-fp16"])
def test_a_spoiled_block_of_a_real_network_is_found(tmp_path: Path, kind: str) -> None:
    digits, model, precision = dataset.load("digits"), spoiled_network(), PRECISIONS[kind]
    path = tmp_path / "model.onnx"
    export_onnx(model, digits.identity, path, precision=precision)
    content, images = path.read_bytes(), calibration.pick(digits, 100)
    tested = digits.test.images.numpy()[:50]
    expected = Deployed(model, digits.identity).infer(tested)

    def attempt(kept: tuple[str, ...]) -> Trial:
        with OrtEngine(quantize(content, images, precision, kept=kept), exact_qdq=True) as engine:
            difference = np.abs(engine.infer(tested) - expected).max()
        value = float(difference / np.abs(expected).max())
        return Trial(passed=value < 0.05, value=value)

    names = units(content, spec_blocks())
    assert names == ("stem.0", *spec_blocks(), "classifier")
    candidates = tuple(name for name in names if name != "stem.0")  # something stays quantized
    found = repair(candidates, attempt)
    assert found.kept == ("stages.1.1",)
    assert found.after.value < found.before.value / 2


def spec_blocks() -> tuple[str, ...]:
    return tuple(f"stages.{stage}.{block}" for stage in range(3) for block in range(2))
