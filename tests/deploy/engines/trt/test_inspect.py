from __future__ import annotations

import json

import pytest

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.build import count_layer_types, type_in

# As TensorRT 10 writes it, with details and without.
TEN = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to conv",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "images", "Format/Datatype": "Row major linear UInt8 format"}],
            "TacticName": "",
        },
        {
            "Name": "stem + relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format/Datatype": "Channel major FP16 format where"}],
            "Weights": {"Type": "Half", "Count": 432},
            "TacticName": "sm90_xmma_fprop_implicit_gemm_f16f16",
        },
        {
            "Name": "stages.0.0.conv1",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "y", "Format/Datatype": "Thirty-two wide channel Int8 format"}],
            "Weights": {"Type": "Int8", "Count": 2304},
        },
        {
            "Name": "head",
            "LayerType": "gemm",
            "Inputs": [{"Name": "z", "Format/Datatype": "Half"}],
        },
        {"Name": "softmax", "LayerType": "kgen", "Inputs": [], "Outputs": []},
    ],
    "Bindings": ["images", "logits"],
}
# As TensorRT 11 writes it.
ELEVEN = {
    "Layers": [
        {
            "Name": "stem",
            "LayerType": "fusion",
            "TacticName": "sm90_xmma_fprop_implicit_gemm_bf16",
            "Inputs": [{"Name": "x", "Format": "Row major linear", "Datatype": "BFloat16"}],
        },
        {
            "Name": "pool",
            "LayerType": "CaskPooling",
            "Inputs": [{"Name": "x", "Format": "Row major linear", "DataType": "Float"}],
        },
    ],
    "I/O Tensors": [{"Name": "images", "IOMode": "Input", "DataType": "UInt8"}],
}


def test_the_form_of_tensorrt_10() -> None:
    counts = count_layer_types(json.dumps(TEN))
    assert counts == {"uint8": 1, "fp16": 2, "int8": 1, "other": 1}


def test_the_form_of_tensorrt_11() -> None:
    assert count_layer_types(json.dumps(ELEVEN)) == {"bf16": 1, "fp32": 1}


def test_control_characters_in_names() -> None:
    """TensorRT 8.6 wrote some."""
    text = '{"Layers": [{"Name": "stem\x01\n", "LayerType": "gemm", "Inputs": []}]}'
    assert count_layer_types(text) == {"other": 1}


def test_names_alone_tell_no_types() -> None:
    names = json.dumps({"Layers": ["/stem/Conv + /relu", "reshape"]})
    assert count_layer_types(names) == {"other": 2}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Half", "fp16"),
        ("FP16", "fp16"),
        ("BFloat16", "bf16"),
        ("BF16", "bf16"),
        ("Float", "fp32"),
        ("Row major linear FP32 format (kLINEAR)", "fp32"),
        ("Row major linear INT8 format", "int8"),
        ("UInt8", "uint8"),
        ("Int64", "int64"),
        ("Int32", "int32"),
        ("FP8", "fp8"),
        ("N/A due to dynamic shapes", "other"),
    ],
)
def test_names_of_types(text: str, kind: str) -> None:
    assert type_in(text) == kind


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"Layers": 3}', '{"Layers": [3]}', '{"Layers": [{"Inputs": [3]}]}']
)
def test_other_text_is_a_one_line_error(text: str) -> None:
    with pytest.raises(EngineError, match="inspector gave no usable JSON"):
        count_layer_types(text)
