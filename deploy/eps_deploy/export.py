"""A trained network as one ONNX file that takes raw pixels: what every engine is built from."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import version as package_version
from pathlib import Path

import onnx
import torch
from torch import nn

from eps_compact.exporting import FromPixels
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images, Logits
from eps_train.data import DataIdentity
from eps_train.errors import GraphError

# The lowest opset that torch's exporter writes: the more runtimes read the file.
OPSET = 18
_BATCH = "N"


class Deployed(FromPixels):
    """What ships, and the reference that engines are held to."""

    @torch.inference_mode()
    def infer(self, images: Images) -> Logits:
        """As `Engine.infer`, in torch."""
        logits: Logits = self(torch.from_numpy(images)).float().numpy()
        return logits


def export_onnx(model: nn.Module, identity: DataIdentity, path: Path, *, source: str = "") -> None:
    """Write `model` behind its normalisation to `path`, checked, with the weights inside.

    The graph takes `images` uint8 `[N, C, H, W]`, N dynamic, and gives `logits` float32
    `[N, classes]`. The same network gives the same bytes.

    Args:
        model: a network of normalised images, in any mode; it is exported in evaluation mode.
        identity: the data it was trained on: image shape, mean, std, classes.
        path: the file to write.
        source: digest of the file that the network came from, kept in the ONNX metadata.

    Raises:
        GraphError: torch cannot express the network in ONNX, or ONNX finds the result unsound.
    """
    was_training = model.training
    try:
        proto = _convert(Deployed(model, identity), identity.input_shape)
        _tidy(proto, source)
        _verify(proto, identity)
    except (GraphError, ModuleNotFoundError):
        raise
    except Exception as error:  # torch, onnxscript and onnx raise dozens of unrelated types
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise GraphError(f"{path.name}: the network cannot be exported to ONNX: {cause}") from error
    finally:
        model.train(was_training)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _convert(deployed: Deployed, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    # Two images, because torch.export takes a size of 1 for a constant.
    example = torch.zeros((2, *input_shape), dtype=torch.uint8)
    batch = torch.export.Dim(_BATCH, min=1)
    with _quiet():
        program = torch.onnx.export(
            deployed,
            (example,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: batch},),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks on stdout, in warnings and in its log about its own workings."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _tidy(proto: onnx.ModelProto, source: str) -> None:
    """Drop the exporter's notes (they hold stack traces with paths of this machine), add ours."""
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
    proto.producer_name = "eps-resnet"
    proto.producer_version = package_version("eps-resnet")
    del proto.metadata_props[:]
    onnx.helper.set_model_props(
        proto,
        {"eps_resnet.version": package_version("eps-resnet"), "eps_resnet.source_sha256": source},
    )


def _verify(proto: onnx.ModelProto, identity: DataIdentity) -> None:
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(
        proto, check_type=True, strict_mode=True, data_prop=True
    )
    shapes = [_shape(port) for port in (*inferred.graph.input, *inferred.graph.output)]
    wanted = [[_BATCH, *identity.input_shape], [_BATCH, len(identity.classes)]]
    if shapes != wanted:
        raise GraphError(f"the exported network has the shapes {shapes}, not {wanted}")


def _shape(port: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]
