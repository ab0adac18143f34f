"""Any ONNX network of images on ONNX Runtime, for `eps-bench`: ours or a stranger's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from eps_compact.interleaving import Block
from eps_deploy.bench.subject import BenchError, Facts
from eps_deploy.engines.ort import Provider, open_session
from eps_deploy.exporting.onnx_types import executed_types, layer_types
from eps_deploy.measuring.latency import Picture
from eps_train.errors import FileFormatError

_INPUTS = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
_WORDS = {"float": "float32", "double": "float64"}  # ONNX Runtime's names, and everybody else's
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_HALVES = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
_FIX = (
    "fix them with python -m onnxruntime.tools.make_dynamic_shape_fixed --input_name {} "
    "--input_shape N,C,H,W"
)


class OnnxSubject:
    """A network with one input of four dimensions, the first of which is the batch.

    Args:
        model: bytes of the file, its weights inside.
        name: how the user calls it.
        provider, threads: of ONNX Runtime; set up as `eps-deploy` sets it up.
        picture: as `Subject.picture`.

    Raises:
        BenchError: more inputs, or others than images.
        EngineError: ONNX Runtime cannot load it, or does not run it on `provider`.
    """

    def __init__(
        self,
        model: bytes,
        *,
        name: str,
        provider: Provider,
        threads: int,
        picture: Picture | None = None,
    ) -> None:
        self.name, self.picture = name, picture
        self.gpu = None if provider == "cpu" else 0
        precision = _precision(model)
        self._session: Any = open_session(model, provider=provider, threads=threads, name=name)
        port, fixed = self._read_input()
        self._port, self._type = port.name, _INPUTS[port.type]
        self._shape = tuple(int(size) for size in port.shape[1:])
        self.batches: tuple[int, int | None] = (fixed or 1, fixed)
        self.facts = Facts(
            input=f"{np.dtype(self._type)} {list(self._shape)}",
            output=self._output(),
            precision=precision,
            runtime=f"onnxruntime {onnxruntime.__version__}",
            provider=provider,
            threads=threads if provider == "cpu" else None,
        )
        self.remark = _remark(model, name) if provider == "cpu" and "fp16" in precision else None

    def _read_input(self) -> tuple[Any, int | None]:
        """The one input, and its batch size if that is fixed."""
        ports = self._session.get_inputs()
        found = ", ".join(f"{port.name} {port.type} {port.shape}" for port in ports)
        if len(ports) != 1 or len(ports[0].shape) != 4 or ports[0].type not in _INPUTS:
            raise BenchError(
                f"{self.name}: eps-bench times networks with one input of images, [N, C, H, W] in"
                f" uint8, float32 or float16; this one takes {found}"
            )
        port = ports[0]
        if not all(isinstance(size, int) for size in port.shape[1:]):
            raise BenchError(
                f"{self.name}: the size of its images is not fixed: {found};"
                f" {_FIX.format(port.name)}"
            )
        return port, port.shape[0] if isinstance(port.shape[0], int) else None

    def _output(self) -> str:
        found = []
        for port in self._session.get_outputs():
            kind = port.type.removeprefix("tensor(").removesuffix(")")
            sizes = ", ".join(str(s) if isinstance(s, int) else "?" for s in port.shape[1:])
            found.append(f"{_WORDS.get(kind, kind)} [{sizes}]")
        return " and ".join(found)

    def call(self, batch: int) -> Callable[[], object]:
        feed = {self._port: self._images(batch)}

        def run() -> object:
            try:
                return self._session.run(None, feed)
            except Exception as error:  # the binding raises its own types, none of them public
                raise BenchError(
                    f"{self.name}: ONNX Runtime failed: {' '.join(str(error).split())}"
                ) from error

        return run

    def on_device(self, batch: int) -> Block | None:
        return None

    def end_to_end(self, batch: int) -> Callable[[], object] | None:
        if self.picture is None:
            return None
        return self.picture.end_to_end(
            lambda images: self._session.run(None, {self._port: images})[0], batch
        )

    def _images(self, batch: int) -> npt.NDArray[Any]:
        """Made-up images: any pixels of raw ones, about what a normalised one holds of floats."""
        chance = np.random.default_rng(0)
        size = (batch, *self._shape)
        if self._type is np.uint8:
            return chance.integers(0, 256, size=size, dtype=np.uint8)
        return chance.standard_normal(size=size, dtype=np.float32).astype(self._type)

    def close(self) -> None:
        self._session = None


def read_model(path: Path) -> bytes:
    """An ONNX file with its weights inside, also those that lie in files beside it.

    The files may be links, as in the cache of Hugging Face. Raises FileFormatError.
    """
    if not path.exists():
        raise FileFormatError(f"{path}: no such file")
    try:
        model = onnx.load(str(path), load_external_data=False)
        for tensor in _tensors(model.graph):
            if uses_external_data(tensor):
                _load_weights(tensor, path.parent)
        return bytes(model.SerializeToString())
    except Exception as error:  # onnx and protobuf raise many unrelated types
        cause = " ".join(str(error).split()) or type(error).__name__
        raise FileFormatError(f"{path}: not an ONNX file that can be read: {cause}") from error


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All weights and constants of a graph, also of the graphs within its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _load_weights(tensor: onnx.TensorProto, folder: Path) -> None:
    """Read a tensor's values; onnx refuses a link, so it is given what the link leads to.

    A name that leads out of `folder` by itself is left to onnx, which refuses it.
    """
    (location,) = (entry for entry in tensor.external_data if entry.key == "location")
    name = PurePath(location.value)
    if not name.is_absolute() and ".." not in name.parts:
        found = (folder / name).resolve()
        folder, location.value = found.parent, found.name
    load_external_data_for_tensor(tensor, str(folder))


def _remark(model: bytes, name: str) -> str | None:
    """What there is to say about a file in float16, from what this processor makes of it."""
    if "float16" in executed_types(model, name=name):
        return None
    return (
        f"{name}: ONNX Runtime computes its float16 here in float32, with casts around each"
        " convolution; the times say nothing about float16 elsewhere"
    )


def _precision(model: bytes) -> str:
    """What the layers compute in: `fp32`, `int8-fp16`, or several of them with a plus between."""
    proto = onnx.load_from_string(model)
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"node {index}"
    found = sorted({_SHORT.get(kind, kind) for kind in layer_types(proto).values()})
    if "int8" in found:
        halves = {tensor.data_type for tensor in proto.graph.initializer} & _HALVES.keys()
        return "-".join(["int8", *sorted(_HALVES[kind] for kind in halves)])
    return "+".join(found) or "no layers"
