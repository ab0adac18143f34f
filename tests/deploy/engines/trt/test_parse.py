from __future__ import annotations

from typing import Any

import pytest

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt import build as module
from tests.deploy.engines.trt.builder import FLOAT, HALF, PLAN, Builder
from tests.deploy.engines.trt.checks import run
from tests.deploy.engines.trt.contract import VERSIONS, Version

both = pytest.mark.parametrize("version", VERSIONS)


@both
def test_a_parser_without_an_error_of_its_own(version: Version) -> None:
    with pytest.raises(EngineError, match="ModelImporter: something is wrong"):
        run(module, Builder(version, refuse=("parse", "get_error")))


@pytest.mark.parametrize(
    ("precision", "quantized", "said"),
    [
        ("int8", False, "none of the 2 convolutions and linear layers takes int8"),
        ("fp32", True, "layer 0000_Conv computes in int8, not in float32"),
    ],
)
def test_int8_layers_must_match_the_precision(precision: str, quantized: bool, said: str) -> None:
    with pytest.raises(
        EngineError, match=f"{said}: this ONNX file is not of precision {precision}"
    ):
        run(module, Builder(quantized=quantized), precision)


def test_int8_on_fp16() -> None:
    fake = Builder(kinds=(HALF, HALF), quantized=True)
    assert run(module, fake, "int8-fp16").content == PLAN


@pytest.mark.parametrize(
    "ports",
    [
        (("pixels", "UINT8", (-1, 3, 8, 8)), ("logits", FLOAT, (-1, 10))),
        (("images", FLOAT, (-1, 3, 8, 8)), ("logits", FLOAT, (-1, 10))),
        (("images", "UINT8", (-1, 3, 8, 8)),),
        (("images", "UINT8", (2, 3, 8, 8)), ("logits", FLOAT, (2, 10))),
    ],
)
def test_another_programs_network_is_refused(ports: Any) -> None:
    with pytest.raises(EngineError, match=r"not of a network exported by|must be free"):
        run(module, Builder(ports=ports))
