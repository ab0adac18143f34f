"""In which types a network's layers compute: as its ONNX file says, and as ONNX Runtime does it.

No torch here.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import onnx
from onnx import TensorProto

from eps_core.errors import GraphError
from eps_deploy.engines.ort import Provider, open_session
from eps_deploy.precision import Precision

# All that multiplies weights, under ONNX's names and those of ONNX Runtime's fused variants.
LAYERS = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul"}
    | {"QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "NhwcFusedConv"}
    | {"NhwcConv", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
)
_LONE_NORM = "_bn_nchwc"  # how ONNX Runtime names the convolution that it makes of a batch norm
_UNKNOWN = "unknown"
_WORDS: dict[int, str] = {
    TensorProto.UNDEFINED: _UNKNOWN,
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
}


def layer_types(model: onnx.ModelProto, *, as_executed: bool = False) -> dict[str, str]:
    """Type in which each convolution, `Gemm` and `MatMul` computes, by its node's name.

    As in `float16`. One whose operands are dequantised integers counts as `int8`, since an engine
    may compute it as such; `as_executed` it is in the type that they were dequantised to.
    """
    known = value_types(onnx.shape_inference.infer_shapes(model))
    makers = {output: node for node in model.graph.node for output in node.output}
    if not as_executed:
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear":
                known[node.output[0]] = known.get(node.input[0], _made(makers.get(node.input[0])))
    return {
        node.name: _layer_type(node, makers, known)
        for node in model.graph.node
        if node.op_type in LAYERS and not node.name.endswith(_LONE_NORM)
    }


def belongs(name: str, blocks: Iterable[str]) -> bool:
    """Whether the layer `name` is one of `blocks` or lies in one."""
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def check_types(model: onnx.ModelProto, precision: Precision, kept: Collection[str] = ()) -> None:
    """Raise GraphError, with a layer's name, unless all compute in the type of `precision`.

    That is int8 for a quantised one, where a layer that cannot be quantised (a product of two
    activations) has the precision's float type; at least one must be in int8. Layers in `kept` may
    be in float32 too.
    """
    types = layer_types(model)
    allowed = {precision.float, "int8"} if precision.quantized else {precision.float}
    for name, found in types.items():
        if found not in allowed and not (found == "float32" and belongs(name, kept)):
            wanted = " or ".join(sorted(allowed))
            raise GraphError(f"layer {name} is in {found}; {precision.name} has {wanted} alone")
    if precision.quantized and "int8" not in types.values():
        raise GraphError(f"no layer is in int8, which {precision.name} is about")


def executed_types(
    model: bytes,
    *,
    provider: Provider = "cpu",
    exact_qdq: bool = False,
    name: str = "model.onnx",
) -> dict[str, int]:
    """How many of the layers ONNX Runtime really computes in each type on this machine.

    From the graph that its optimiser leaves: a processor without float16 arithmetic gets float32
    layers with casts around them, for example. Raises EngineError as `OrtEngine` does.
    """
    with tempfile.TemporaryDirectory(prefix="eps-deploy-") as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(
            model, provider=provider, threads=1, exact_qdq=exact_qdq, name=name, optimized=path
        )
        optimized = onnx.load(path)
    types = layer_types(optimized, as_executed=True)
    return dict(sorted(Counter(types.values()).items()))


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX's number for the type of each value, constants included, by name; 0: not known."""
    graph = model.graph
    known = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        known[value.name] = value.type.tensor_type.elem_type
    return known


def _layer_type(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], known: Mapping[str, int]
) -> str:
    # Inference does not know ONNX Runtime's own operators, but their weights stand in the file.
    kinds = {_name(known.get(name, _made(makers.get(name)))) for name in _operands(node)}
    kinds.discard(_UNKNOWN)
    if kinds <= {"int8", "uint8"} and kinds:
        return "int8"  # ONNX Runtime shifts activations by 128 where its kernels want that
    return " and ".join(sorted(kinds)) or _UNKNOWN


def _operands(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the input and of the weights."""
    weights = 3 if node.op_type in ("QLinearConv", "QLinearMatMul", "QGemm") else 1
    yield from (node.input[index] for index in (0, weights) if index < len(node.input))


def _made(maker: onnx.NodeProto | None) -> int:
    """Type that a node gives, where inference has not found it."""
    if maker is None or maker.op_type != "Cast":
        return TensorProto.UNDEFINED
    return next(int(item.i) for item in maker.attribute if item.name == "to")


def _name(kind: int) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    name: str = TensorProto.DataType.Name(kind)
    return name.lower()
