"""The ONNX files of a deployment: what `--repair` keeps is in them, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from eps_deploy.export.quantize import pick
from eps_deploy.export.types import layer_types
from eps_deploy.pipeline import builder
from eps_deploy.pipeline.inputs import find_inputs
from eps_deploy.pipeline.options import Options
from eps_deploy.precision import PRECISIONS, belongs
from eps_train.data import dataset


@pytest.mark.parametrize("name", ["int8", "int8-fp16", "fp16"])
def test_exactly_the_kept_blocks_stay_in_higher_precision(deployed: Path, name: str) -> None:
    precision = PRECISIONS[name]
    lower = "int8" if precision.quantized else precision.float
    higher = precision.float if precision.quantized else "float32"
    inputs = find_inputs(deployed / "compact.pt")
    options = Options(model=deployed / "compact.pt", precision=precision, repair=True)
    built = builder.build_networks(inputs)
    images = pick(dataset.load("digits"), 100) if precision.quantized else None
    choices = [(), inputs.blocks()[:1], inputs.blocks()]
    made = [builder.export_compact(options, inputs, built, images, kept) for kept in choices]
    for kept, model in zip(choices, made, strict=True):
        types = layer_types(onnx.load_from_string(model))
        assert types == {layer: higher if belongs(layer, kept) else lower for layer in types}
    assert len(set(made)) == len(choices)
    models = builder.export(options, inputs, built, images)
    assert (models.compact, models.kept) == (made[0], ())
    assert set(layer_types(onnx.load_from_string(models.baseline)).values()) == {lower}
