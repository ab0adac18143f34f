"""The ONNX files of a deployment: what `--repair` keeps is in them, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from eps_deploy.export.quantize import pick
from eps_deploy.export.types import belongs, layer_types
from eps_deploy.pipeline import build
from eps_deploy.pipeline.build import Stages
from eps_deploy.pipeline.inputs import find_sources
from eps_deploy.pipeline.options import Options
from eps_deploy.precision import PRECISIONS
from eps_train.data import dataset


@pytest.mark.parametrize("name", ["int8", "int8-fp16", "fp16"])
def test_exactly_the_kept_blocks_stay_in_higher_precision(
    deployed: Path, tmp_path: Path, name: str
) -> None:
    precision = PRECISIONS[name]
    lower = "int8" if precision.quantized else precision.float
    higher = precision.float if precision.quantized else "float32"
    sources = find_sources(deployed / "compact.pt")
    options = Options(model=deployed / "compact.pt", precision=precision, repair=True)
    built = build.build_networks(sources)
    images = pick(dataset.load("digits"), 100) if precision.quantized else None
    choices = [(), sources.blocks()[:1], sources.blocks()]
    made = []
    for kept in choices:
        stages = Stages(tmp_path / "stages", resume=False)
        models = build.export(options, sources, built, images, stages, kept)
        types = layer_types(onnx.load_from_string(models.compact))
        assert types == {layer: higher if belongs(layer, kept) else lower for layer in types}
        assert models.kept == kept
        made.append(models)
    assert len({models.compact for models in made}) == len(choices)
    assert len({models.baseline for models in made}) == 1
