"""Calibration: which images, and what range is read off them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from eps_core.errors import DataError
from eps_deploy.engines.base import Images
from eps_deploy.export import quantize
from eps_deploy.export.quantize import Method, ranges
from eps_train.data import dataset
from eps_train.data.dataset import Data

COUNT = 160


@pytest.fixture(scope="module")
def digits() -> Data:
    return dataset.load("digits")


def test_images_are_distinct_ones_of_the_training_part(digits: Data) -> None:
    images = quantize.pick(digits, COUNT)
    assert images.shape == (COUNT, 1, 8, 8)
    assert images.dtype == np.uint8
    train = [image.tobytes() for image in digits.train.images.numpy()]
    chosen = [image.tobytes() for image in images]
    places = [train.index(image) for image in chosen]
    assert places == sorted(set(places))


def test_they_are_the_same_every_time(digits: Data) -> None:
    first, again = quantize.pick(digits, COUNT), quantize.pick(digits, COUNT)
    assert (first == again).all()
    assert quantize.digest(first) == quantize.digest(again)
    assert quantize.digest(first) != quantize.digest(first[:-1])


def test_more_than_there_are_gives_all(digits: Data) -> None:
    assert len(quantize.pick(digits, 10**6)) == len(digits.train)


@pytest.mark.parametrize("samples", [-1, 0, 99])
def test_too_few_are_rejected_with_the_number_that_is_enough(digits: Data, samples: int) -> None:
    with pytest.raises(DataError, match=f"--calibration-samples {samples}: .* at least 100"):
        quantize.pick(digits, samples)


SIDE = 4


def magnitude_model(weights: Sequence[float] = (-2.0,) + (0.0,) * 15) -> onnx.ModelProto:
    """`pixels` as float, and `layer`, their weighted sum: of the first one, doubled."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["layer"]),
        helper.make_node("Sub", ["layer", "offset"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "magnitudes",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 1])],
        [
            helper.make_tensor("weight", TensorProto.FLOAT, [SIDE * SIDE, 1], weights),
            helper.make_tensor("offset", TensorProto.FLOAT, [1], [0.0]),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def pixels(values: list[int]) -> Images:
    """Images of which the first pixel has these values."""
    images = np.zeros((len(values), 1, SIDE, SIDE), np.uint8)
    images[:, 0, 0, 0] = values
    return images


def test_minmax_is_the_largest_magnitude_over_all_batches() -> None:
    images = pixels([*range(20), 200, *range(20)])
    assert ranges(magnitude_model(), ["layer", "pixels"], images, "minmax") == {
        "layer": 400.0,
        "pixels": 200.0,
    }


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_an_outlier_is_cut_off_but_not_of_the_pixels(method: Method) -> None:
    """Of 30,000 values one is five times as large as nearly all others."""
    random = np.random.default_rng(0)
    images = random.integers(0, 50, (30_000, 1, SIDE, SIDE), dtype=np.uint8)
    weights = random.standard_normal(SIDE * SIDE)
    images[-1] = np.where(weights > 0, 250, 0).reshape(1, SIDE, SIDE)
    model = magnitude_model(weights.tolist())
    most = ranges(model, ["layer"], images[:-1], "minmax")["layer"]
    found = ranges(model, ["layer", "pixels"], images, method)
    assert found["pixels"] == 250
    assert 0.5 * most < found["layer"] < 1.2 * most


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_a_value_that_is_always_0_has_a_range(method: Method) -> None:
    assert ranges(magnitude_model(), ["layer"], pixels([0] * 8), method) == {"layer": 0.0}


def test_a_value_that_is_not_finite_is_named() -> None:
    model = magnitude_model()
    model.graph.initializer[0].float_data[0] = float("inf")
    with pytest.raises(DataError, match="layer is not finite"):
        ranges(model, ["layer"], pixels([1]), "minmax")


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = magnitude_model()
    before = model.SerializeToString()
    ranges(model, ["layer", "logits"], pixels([1]), "minmax")
    assert model.SerializeToString() == before
