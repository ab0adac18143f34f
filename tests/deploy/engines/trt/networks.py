"""Small networks as ONNX files, in every precision that has one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from eps_compact import CompactArtifact, compact
from eps_deploy.engines.base import Images
from eps_deploy.export.export import export_onnx
from eps_deploy.export.quantize import pick, quantize
from eps_deploy.precision import PRECISIONS
from eps_train.data import dataset
from eps_train.models.spec import NetworkSpec
from tests.checkpoints import make_checkpoint

ASYMMETRIC = {"WeightSymmetric": True, "QuantizeBias": False}
INT32_BIAS = {"ActivationSymmetric": True, "WeightSymmetric": True}


def export(precision: str, path: Path) -> Path:
    """A network of depth 8 on digits, as `eps-deploy` exports it."""
    checkpoint = make_checkpoint(depth=8)
    network = checkpoint.network
    artifact = CompactArtifact(
        network=NetworkSpec(family=network.family, arguments=network.arguments),
        state=dict(compact(checkpoint.build_gated()).state_dict()),
        data=checkpoint.data,
        certificate={},
        checkpoint={},
    )
    export_onnx(artifact.build(), checkpoint.data, path, precision=PRECISIONS[precision])
    return path


def every_precision(folder: Path) -> dict[str, bytes]:
    """The same network in each precision, by name."""
    files = {}
    for name, precision in PRECISIONS.items():
        model = export(name, folder / f"{name}.onnx").read_bytes()
        files[name] = quantize(model, _images(), precision) if precision.quantized else model
    return files


def _images() -> Images:
    return pick(dataset.load("digits"), 128)


class _Random(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, shape: tuple[int, ...]) -> None:
        self._left = iter(np.random.default_rng(0).integers(0, 256, (4, 2, *shape), np.uint8))

    def get_next(self) -> dict[str, npt.NDArray[np.uint8]] | None:
        images = next(self._left, None)
        return None if images is None else {"images": images}


def quantize_as_ort(source: Path, path: Path, options: dict[str, bool]) -> Path:
    """What ONNX Runtime's own quantisation makes of `source`, which is not for TensorRT."""
    graph = onnx.load(source).graph
    shape = tuple(dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim[1:])
    quantize_static(
        source,
        path,
        _Random(shape),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        extra_options=options,
    )
    return path


def mixed_bf16(path: Path) -> Path:
    """What torch's exporter makes of `model.bfloat16()`: bfloat16 images, float32 weights."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 1, 3, 3], [0.5] * 36)
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.BFLOAT16),
        helper.make_node("Conv", ["x", "w"], ["y"], name="stem"),
        helper.make_node("GlobalAveragePool", ["y"], ["z"]),
        helper.make_node("Flatten", ["z"], ["f"]),
        helper.make_node("Cast", ["f"], ["logits"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "mixed",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path
