"""A trained network as one ONNX file that takes raw pixels: what every engine is built from."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import version as package_version
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from eps_compact import folding
from eps_compact.exporting import FromPixels, quiet
from eps_core.errors import GraphError
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images, Logits
from eps_deploy.export import writer
from eps_deploy.export.pools import unambiguous
from eps_deploy.export.types import check_types
from eps_deploy.export.writer import BATCH, narrowed
from eps_deploy.precision import PRECISIONS, Precision
from eps_train.data.dataset import DataIdentity

OPSET = 18  # the lowest that torch's exporter writes
# What an exported file is before anything in it is quantised.
_FLOATS: dict[str, Precision] = {
    choice.float: choice for choice in (PRECISIONS["fp32"], PRECISIONS["fp16"], PRECISIONS["bf16"])
}


class Deployed(FromPixels):
    """What ships, and the reference that engines are held to.

    Args:
        network: of normalised float32 images, or of such images as `dtype` if that is another.
        identity: the data it was trained on.
        dtype: type that the network computes in, between the normalisation and the logits.
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
        """As `Engine.infer`, in torch."""
        device = next(self.normalize.buffers()).device
        logits: Logits = self(torch.from_numpy(images).to(device)).float().cpu().numpy()
        return logits


def in_precision(network: nn.Module, identity: DataIdentity, precision: Precision) -> Deployed:
    """`network` in torch with the float type of `precision`; a copy, unless that is float32.

    The only way to compute bfloat16 where no runtime has it. Raises GraphError when a number does
    not fit in that type.
    """
    dtype = dtype_of(precision)
    if dtype is torch.float32:
        return Deployed(network, identity)
    return Deployed(narrowed(network, dtype), identity, dtype)


def dtype_of(precision: Precision) -> torch.dtype:
    """The torch type of what is not quantised."""
    found: torch.dtype = getattr(torch, precision.float)
    return found


def export_onnx(
    model: nn.Module,
    identity: DataIdentity,
    path: Path,
    *,
    precision: Precision = PRECISIONS["fp32"],
    source: str = "",
    kept: Collection[str] = (),
) -> None:
    """Write `model` behind its normalisation to `path`, checked, with the weights inside.

    The graph takes `images` uint8 `[N, C, H, W]`, N dynamic, and gives `logits` float32
    `[N, classes]`; what is between, but for the normalisation, is in the float type of `precision`.
    A quantised one is exported in that type too, for `quantize` to go on with. The same network
    gives the same bytes.

    Args:
        model: a float32 network of normalised images, in any mode; it is exported in evaluation
            mode.
        identity: the data it was trained on: image shape, mean, std, classes.
        path: the file to write.
        precision: the float type that it takes; see `eps_deploy.precision`.
        source: digest of the file that the network came from, kept in the ONNX metadata.
        kept: blocks, by name, that stay in float32 for the sake of accuracy.

    Raises:
        GraphError: torch cannot express the network in ONNX, a number does not fit in the type, or
            ONNX finds the result unsound.
    """
    was_training = model.training
    model.eval()
    try:
        _check_ends(model, identity)
        proto = _written(model, identity, precision, kept)
        if proto is None:
            proto = _traced(model, identity, precision, kept)
        unambiguous(proto)
        _label(proto, source, precision, kept)
        _verify(proto, identity)
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


@torch.inference_mode()
def _check_ends(model: nn.Module, identity: DataIdentity) -> None:
    logits = Deployed(model, identity).infer(np.zeros((1, *identity.input_shape), np.uint8))
    if logits.shape != (1, len(identity.classes)):
        raise GraphError(
            f"the network gives logits of shape {list(logits.shape)} for an image, where the data"
            f" set {identity.name} has {len(identity.classes)} classes"
        )


def _written(
    model: nn.Module, identity: DataIdentity, precision: Precision, kept: Collection[str]
) -> onnx.ModelProto | None:
    """By the short way, for networks of the usual operators; None for any other."""
    if not isinstance(model, fx.GraphModule):
        return None
    folded, _ = folding.fold(model)
    return writer.write(folded, identity, dtype_of(precision), _opset(precision), kept)


def _traced(
    model: nn.Module, identity: DataIdentity, precision: Precision, kept: Collection[str]
) -> onnx.ModelProto:
    """By torch's own exporter, for every network that it takes."""
    if kept:
        raise GraphError(
            f"{min(kept)} cannot be kept in float32: the network has operators that torch's own"
            " exporter writes, as a whole in one type; use --fp32"
        )
    deployed = in_precision(model, identity, precision)
    # Two images, because torch.export takes a size of 1 for a constant.
    example = torch.zeros((2, *identity.input_shape), dtype=torch.uint8)
    batch = torch.export.Dim(BATCH, min=1)
    with quiet():
        program = torch.onnx.export(
            deployed,
            (example,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: batch},),
            opset_version=_opset(precision),
            dynamo=True,
            external_data=False,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    _tidy(proto)
    return proto


def _opset(precision: Precision) -> int:
    """The oldest that has what is needed: the more runtimes read the file."""
    if precision.float == "bfloat16":
        return 22  # the first with bfloat16 convolutions
    if precision.float == "float16" and precision.quantized:
        return 19  # the first with float16 scales of quantisation
    return OPSET


def _tidy(proto: onnx.ModelProto) -> None:
    """Drop the exporter's notes: they hold stack traces with paths of this machine."""
    graph = proto.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.metadata_props[:]
    graph.doc_string = ""
    graph.name = "eps_resnet"
    # Names that do not follow the counters of one torch version.
    for index, node in enumerate(graph.node):
        node.name = f"{index:04d}_{node.op_type}"


def _label(
    proto: onnx.ModelProto, source: str, precision: Precision, kept: Collection[str]
) -> None:
    """Say what the file is and where it comes from."""
    version = package_version("eps-resnet")
    proto.producer_name = "eps-resnet"
    proto.producer_version = version
    del proto.metadata_props[:]
    props = {
        "eps_resnet.version": version,
        "eps_resnet.source_sha256": source,
        "eps_resnet.precision": _FLOATS[precision.float].name,
        "eps_resnet.kept": ",".join(sorted(kept)),
    }
    onnx.helper.set_model_props(proto, props)


def _verify(proto: onnx.ModelProto, identity: DataIdentity) -> None:
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(
        proto, check_type=True, strict_mode=True, data_prop=True
    )
    shapes = [_shape(port) for port in (*inferred.graph.input, *inferred.graph.output)]
    wanted = [[BATCH, *identity.input_shape], [BATCH, len(identity.classes)]]
    if shapes != wanted:
        raise GraphError(f"the exported network has the shapes {shapes}, not {wanted}")


def _shape(port: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]
