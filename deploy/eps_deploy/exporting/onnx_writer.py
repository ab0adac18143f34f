"""The ONNX graph of a residual network, written step by step from its torch.fx graph.

torch's own exporter traces the network anew, decomposes and optimises it, which takes minutes on a
depth of hundreds. The networks at hand are made of a dozen operators that ONNX has under the same
names, so they are written down as they stand, with the names of the torch modules, by which an
engine's layers can be told apart. A network with anything else is left to torch's exporter.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
import torch
from onnx import TensorProto, helper
from torch import fx, nn

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME
from eps_deploy.exporting.onnx_graph import OnnxGraph, UnknownStep
from eps_deploy.exporting.onnx_rules import FUNCTIONS, LAYERS
from eps_deploy.exporting.onnx_types import belongs
from eps_train.aliasing import acts_on_others
from eps_train.data import DataIdentity
from eps_train.networks import Normalize

BATCH = "N"
_IR = 10  # of ONNX 1.17, the oldest that is supported: files say no more than they need


def write(
    network: fx.GraphModule,
    identity: DataIdentity,
    dtype: torch.dtype,
    opset: int,
    kept: Collection[str] = (),
) -> onnx.ModelProto | None:
    """The network behind its normalisation, or None when it holds an operator not known here.

    `images` uint8 `[N, C, H, W]` to `logits` float32 `[N, classes]`; between the normalisation,
    which is done in float32, and the logits everything is of type `dtype`. Batch norms that stand
    alone become one scale and one shift a channel, computed in float64.

    Args:
        network: in evaluation mode, float32, without gates, of normalised images.
        identity: image shape, mean, std and classes.
        dtype: float32, float16 or bfloat16.
        opset: of ONNX; bfloat16 convolutions need 22.
        kept: names of blocks or modules that are in float32 all the same, with their additions.

    Raises:
        GraphError: a number that is not finite in `dtype`; the tensor is named.
    """
    out = OnnxGraph()
    try:
        _write(out, network, identity, dtype, kept)
    except UnknownStep:
        return None
    images: list[str | int | None] = [BATCH, *identity.input_shape]
    logits: list[str | int | None] = [BATCH, len(identity.classes)]
    graph = helper.make_graph(
        out.nodes,
        "eps_resnet",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, images)],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, logits)],
        out.tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_IR)


def _write(
    out: OnnxGraph,
    network: fx.GraphModule,
    identity: DataIdentity,
    dtype: torch.dtype,
    kept: Collection[str],
) -> None:
    modules = dict(network.named_modules(remove_duplicate=False))
    for node in network.graph.nodes:
        if acts_on_others(node, modules):
            raise UnknownStep  # ONNX has values, not memory
        wide = node.op in ("placeholder", "output") or _is_kept(node, kept)
        out.dtype = torch.float32 if wide else dtype
        if node.op == "placeholder" and not out.values:
            out.values[node] = _normalised(out, identity)
        elif node.op == "output":
            _finish(out, out.value(node.args[0], flat=True))
        else:
            out.values[node] = _step(out, node, modules)


def _is_kept(node: fx.Node, kept: Collection[str]) -> bool:
    """Whether a step is of one of the blocks; a function is where one of its operands is."""
    if node.op != "call_module":
        operands = (source for source in node.all_input_nodes if source.op == "call_module")
        return any(_is_kept(source, kept) for source in operands)
    return belongs(str(node.target), kept)


def _normalised(out: OnnxGraph, identity: DataIdentity) -> str:
    normalize = Normalize.of(identity)
    mean = out.tensor("normalize.mean", normalize.mean)
    std = out.tensor("normalize.std", normalize.std)
    pixels = out.add("Cast", out.unused("normalize.cast"), [INPUT_NAME], to=TensorProto.FLOAT)
    centred = out.add("Sub", out.unused("normalize.sub"), [pixels, mean])
    return out.add("Div", out.unused("normalize.div"), [centred, std])


def _finish(out: OnnxGraph, value: str) -> None:
    last = out.nodes[-1]
    if list(last.output) == [value]:
        last.output[0] = OUTPUT_NAME
    else:
        out.nodes.append(helper.make_node("Identity", [value], [OUTPUT_NAME], name=OUTPUT_NAME))


def _step(out: OnnxGraph, node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        layer = modules[str(node.target)]
        rule = LAYERS.get(type(layer))
        if rule is None or _hooked(layer) or len(node.args) != 1 or node.kwargs:
            raise UnknownStep
        return rule(out, out.unused(str(node.target)), layer, out.value(node.args[0]))
    function = FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if function is None:
        raise UnknownStep
    return function(out, out.unused(node.name), node)


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
