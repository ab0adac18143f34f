"""From ONNX to a TensorRT network, and whether it is the network that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, EngineError
from eps_deploy.engines.trt.logger import Log, listening, logger_of
from eps_deploy.precision import Float, Precision

_FLOATS: dict[Float, str] = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class Parsed:
    """A network and what it lives on: none of these may be freed before the build is over.

    Attributes:
        builder, network: as TensorRT has them.
        parser: owns the memory of the network's weights.
    """

    builder: Any
    network: Any
    parser: Any

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape `[C, H, W]` of one image."""
        _, channels, height, width = tuple(self.network.get_input(0).shape)
        return int(channels), int(height), int(width)


@dataclass(frozen=True, slots=True)
class Products:
    """The layers that multiply: convolutions and linear ones.

    Attributes:
        total: how many there are.
        quantized: how many of them take int8.
    """

    total: int
    quantized: int


def parse(model: bytes, trt: Any) -> Parsed:
    """The network of an ONNX file as `eps-deploy` exports it.

    Raises:
        EngineError: TensorRT does not understand it, in its own words, or it is another network.
    """
    with listening(trt) as log:
        builder = trt.Builder(logger_of(trt))
        # TensorRT 11 has strong typing alone, 10 has to be asked. The member stands for a bit,
        # and passing it as it is would be taken for another flag.
        strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = _given(builder.create_network(strongly_typed), "makes no network", log)
        parser = trt.OnnxParser(network, logger_of(trt))
        if not parser.parse(model):
            raise EngineError(f"TensorRT does not understand the ONNX file: {_errors(parser, log)}")
        parsed = Parsed(builder, network, parser)
        _check_ports(network, trt)
        return parsed


def check_types(parsed: Parsed, precision: Precision, trt: Any) -> Products:
    """Whether each convolution and each linear layer computes as `precision` has it.

    Raises:
        EngineError: one that does not, by its name.
    """
    wanted = _FLOATS[precision.float]
    layers = [parsed.network.get_layer(index) for index in range(parsed.network.num_layers)]
    made_by = {
        layer.get_output(index).name: layer.type
        for layer in layers
        for index in range(layer.num_outputs)
    }
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    products = [layer for layer in layers if layer.type in kinds]
    quantized = 0
    for layer in products:
        found = layer.get_output(0).dtype.name
        if found != wanted:
            raise EngineError(
                f"layer {layer.name} computes in {found}, not in {wanted}: this ONNX file is not"
                f" of precision {precision.name}; export it again"
            )
        quantized += made_by.get(layer.get_input(0).name) == trt.LayerType.DEQUANTIZE
    if precision.quantized and not quantized:
        raise EngineError(
            f"none of the {len(products)} convolutions and linear layers takes int8: this ONNX file"
            f" is not of precision {precision.name}; export it again"
        )
    if quantized and not precision.quantized:
        raise EngineError(
            f"{quantized} of the {len(products)} convolutions and linear layers take int8: this"
            f" ONNX file is not of precision {precision.name}; export it again"
        )
    return Products(len(products), quantized)


def _check_ports(network: Any, trt: Any) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    found = [(port.name, port.dtype.name, len(tuple(port.shape))) for port in (*inputs, *outputs)]
    if found != [(INPUT_NAME, "UINT8", 4), (OUTPUT_NAME, "FLOAT", 2)]:
        ports = [f"{name} {kind} of {rank} dimensions" for name, kind, rank in found]
        raise EngineError(
            "the ONNX file is not of a network exported by eps-deploy: its inputs and outputs are"
            f" {', '.join(ports) or 'none'}"
        )
    batch, *sizes = tuple(inputs[0].shape)
    if batch != -1 or min(sizes) < 1:
        raise EngineError(
            f"the ONNX file takes images of the shape {[batch, *sizes]}; the batch size must be"
            " free and all else fixed"
        )


def _errors(parser: Any, log: Log) -> str:
    """The parser's first complaint, with the node that it is about."""
    if not parser.num_errors:
        return log.why()
    error = parser.get_error(0)
    lines = [line.strip() for line in str(error.desc()).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or log.why()  # what comes after is what came of it
    where = " ".join(part for part in (error.node_operator(), error.node_name()) if part)
    return f"{text} (at {where})" if where else text


def _given(value: Any, failure: str, log: Log) -> Any:
    if value is None:
        raise EngineError(f"TensorRT {failure}: {log.why()}")
    return value
