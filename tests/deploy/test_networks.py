"""The ONNX files of a deployment: what `--repair` keeps is in them, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from eps_deploy import networks
from eps_deploy.exporting.calibration import pick
from eps_deploy.exporting.onnx_types import belongs, layer_types
from eps_deploy.options import Options
from eps_deploy.precision import PRECISIONS
from eps_deploy.sources import find_sources
from eps_deploy.stages import Stages
from eps_train import data


@pytest.mark.parametrize("name", ["int8", "int8-fp16", "fp16"])
def test_exactly_the_kept_blocks_stay_in_higher_precision(
    deployed: Path, tmp_path: Path, name: str
) -> None:
    precision = PRECISIONS[name]
    lower = "int8" if precision.quantized else precision.float
    higher = precision.float if precision.quantized else "float32"
    sources = find_sources(deployed / "compact.pt")
    options = Options(model=deployed / "compact.pt", precision=precision, repair=True)
    built = networks.build(sources)
    images = pick(data.load("digits"), 100) if precision.quantized else None
    choices = [(), sources.blocks()[:1], sources.blocks()]
    made = []
    for kept in choices:
        stages = Stages(tmp_path / "stages", resume=False)
        models = networks.export(options, sources, built, images, stages, kept)
        types = layer_types(onnx.load_from_string(models.compact))
        assert types == {layer: higher if belongs(layer, kept) else lower for layer in types}
        assert models.kept == kept
        made.append(models)
    assert len({models.compact for models in made}) == len(choices)
    assert len({models.baseline for models in made}) == 1
