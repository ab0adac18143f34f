"""Export a trained network to one ONNX file that takes raw pixels, the source of every engine."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import version as package_version
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from eps_compact.exporting import quiet
from eps_core.errors import GraphError
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images, Logits
from eps_deploy.export import writer
from eps_deploy.export.pools import resolve_ceil_mode
from eps_deploy.export.types import check_types
from eps_deploy.export.writer import BATCH, cast_network
from eps_deploy.precision import PRECISIONS, Precision
from eps_train.data.dataset import DataIdentity
from eps_train.gating import folding
from eps_train.models.resnets import FromPixels

# The precision of a file before quantization, by the type of its weights.
_FLOATS: dict[str, Precision] = {
    choice.float: choice for choice in (PRECISIONS["fp32"], PRECISIONS["fp16"], PRECISIONS["bf16"])
}


class Deployed(FromPixels):
    """A network behind its normalization: the reference for every engine.

    Args:
        network: network of normalized images of type `dtype`.
        identity: data that it was trained on.
        dtype: type in which the network computes, between the normalization and the logits.
    """

    def __init__(
        self, network: nn.Module, identity: DataIdentity, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(network, identity)
        self.identity = identity
        self._dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        if self._dtype is torch.float32:
            return super().forward(images)
        logits: Tensor = self.network(self.normalize(images).to(self._dtype))
        return logits.float()

    @torch.inference_mode()
    def infer(self, images: Images) -> Logits:
        """Compute logits in torch; like `Engine.infer`."""
        device = next(self.normalize.buffers()).device
        logits: Logits = self(torch.from_numpy(images).to(device)).float().cpu().numpy()
        return logits


def in_precision(network: nn.Module, identity: DataIdentity, precision: Precision) -> Deployed:
    """Return `network` in torch with the float type of `precision`, as a copy unless it is float32.

    This is the only way to compute bfloat16 where no runtime supports it. Raises GraphError if a
    number does not fit in the type.
    """
    dtype = _dtype(precision)
    if dtype is torch.float32:
        return Deployed(network, identity)
    return Deployed(cast_network(network, dtype), identity, dtype)


def export_onnx(
    model: nn.Module,
    identity: DataIdentity,
    path: Path,
    *,
    precision: Precision = PRECISIONS["fp32"],
    source: str = "",
    kept: Collection[str] = (),
) -> None:
    """Export `model` behind its normalization to `path`, checked, with the weights inside.

    The graph takes `images` uint8 `[N, C, H, W]`, N dynamic, and gives `logits` float32
    `[N, classes]`. The normalization is in float32, everything from there to the logits in the
    float type of `precision`, also if it is a quantized one (see `quantize`). The same network
    gives the same bytes.

    Args:
        model: float32 network of normalized images, exported in evaluation mode whatever its mode.
        identity: data that it was trained on: image shape, mean, std, classes.
        path: file to write.
        precision: precision of the file.
        source: digest of the file that the network came from, stored in the ONNX metadata.
        kept: names of blocks that stay in float32 for the sake of accuracy.

    Raises:
        GraphError: torch cannot express the network in ONNX, a number does not fit in the type, or
            ONNX's checker rejects the result.
    """
    was_training = model.training
    model.eval()
    try:
        _check_classes(model, identity)
        proto = None
        if isinstance(model, fx.GraphModule):
            folded, _ = folding.fold(model)
            proto = writer.write(folded, identity, _dtype(precision), _opset(precision), kept)
        if proto is None:
            proto = _trace(model, identity, precision, kept)
        resolve_ceil_mode(proto)
        version = package_version("eps-resnet")
        proto.producer_name, proto.producer_version = "eps-resnet", version
        del proto.metadata_props[:]
        props = {
            "eps_resnet.version": version,
            "eps_resnet.source_sha256": source,
            "eps_resnet.precision": _FLOATS[precision.float].name,
            "eps_resnet.kept": ",".join(sorted(kept)),
        }
        onnx.helper.set_model_props(proto, props)
        _check_graph(proto, identity)
        check_types(proto, _FLOATS[precision.float], kept)
    except GraphError as error:
        raise GraphError(f"{path.name}: {error}") from error
    except ModuleNotFoundError:
        raise
    except Exception as error:  # torch, onnxscript and onnx raise dozens of unrelated types
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise GraphError(f"{path.name}: the network cannot be exported to ONNX: {cause}") from error
    finally:
        model.train(was_training)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _dtype(precision: Precision) -> torch.dtype:
    found: torch.dtype = getattr(torch, precision.float)
    return found


def _opset(precision: Precision) -> int:
    """The oldest sufficient opset, so that as many runtimes as possible read the file."""
    if precision.float == "bfloat16":
        return 22  # the first with bfloat16 convolutions
    if precision.float == "float16" and precision.quantized:
        return 19  # the first with float16 scales of quantization
    return 18  # the lowest that torch's exporter writes


@torch.inference_mode()
def _check_classes(model: nn.Module, identity: DataIdentity) -> None:
    logits = Deployed(model, identity).infer(np.zeros((1, *identity.input_shape), np.uint8))
    if logits.shape != (1, len(identity.classes)):
        raise GraphError(
            f"the network gives logits of shape {list(logits.shape)} for an image, where the data"
            f" set {identity.name} has {len(identity.classes)} classes"
        )


def _trace(
    model: nn.Module, identity: DataIdentity, precision: Precision, kept: Collection[str]
) -> onnx.ModelProto:
    """Export with torch's own exporter, which takes almost every network."""
    if kept:
        raise GraphError(
            f"{min(kept)} cannot be kept in float32: the network has operators that torch's own"
            " exporter writes, as a whole in one type; use --fp32"
        )
    # Two images, because torch.export treats a size of 1 as a constant.
    example = torch.zeros((2, *identity.input_shape), dtype=torch.uint8)
    with quiet():
        program = torch.onnx.export(
            in_precision(model, identity, precision),
            (example,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},),
            opset_version=_opset(precision),
            dynamo=True,
            external_data=False,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    graph = proto.graph
    # The exporter's notes hold stack traces with paths of this machine.
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.metadata_props[:]
    graph.doc_string = ""
    graph.name = "eps_resnet"
    # Names must not depend on the counters of one torch version.
    for index, node in enumerate(graph.node):
        node.name = f"{index:04d}_{node.op_type}"
    return proto


def _check_graph(proto: onnx.ModelProto, identity: DataIdentity) -> None:
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(
        proto, check_type=True, strict_mode=True, data_prop=True
    )
    shapes = [
        [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]
        for port in (*inferred.graph.input, *inferred.graph.output)
    ]
    expected = [[BATCH, *identity.input_shape], [BATCH, len(identity.classes)]]
    if shapes != expected:
        raise GraphError(f"the exported network has the shapes {shapes}, not {expected}")
