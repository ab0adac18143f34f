"""From a file's name to what `eps-bench` times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from eps_compact import CompactArtifact
from eps_core.errors import FileFormatError
from eps_core.interleave import Block
from eps_deploy.bench.latency import BenchError, Facts, Picture, Subject, on_gpu
from eps_deploy.bundle import Bundle, load_bundle
from eps_deploy.engines.base import Engine
from eps_deploy.engines.ort import Provider, open_session
from eps_deploy.export.export import Deployed
from eps_deploy.export.types import executed_types, layer_types
from eps_train.data.dataset import DataIdentity
from eps_train.gating import rewriting
from eps_train.training import forward
from eps_train.training.checkpoint import FORMAT, Checkpoint
from eps_train.training.forward import Precision

_PLANS = (".plan", ".engine")
_DEVICE = 0  # the GPU that everything runs on; CUDA_VISIBLE_DEVICES chooses another


def open_subject(path: Path, *, provider: Provider, threads: int) -> Subject:
    """Load a bundle, an ONNX file, a TensorRT plan with its sidecar, or a file of ours with torch.

    Raises:
        EpsError: not such a file, one that does not run here, or not on `provider`.
    """
    if path.is_dir():
        return _bundle(path, provider, threads)
    if path.suffix == ".onnx":
        return OnnxSubject(read_model(path), name=str(path), provider=provider, threads=threads)
    if path.suffix in _PLANS:
        return _plan(path)
    if path.suffix == ".pt":
        if provider == "tensorrt":
            raise BenchError(f"{path}: torch has no such provider; use --provider cpu or cuda")

        return TorchSubject(path, device=provider, threads=threads)
    what = "no such file" if not path.exists() else "not a kind of file that eps-bench times"
    raise BenchError(
        f"{path}: {what}; name a bundle's folder, a .onnx, a .plan with its .plan.json, or a .pt"
        " of eps-train or eps-compact"
    )


def _bundle(root: Path, provider: Provider, threads: int) -> Subject:
    bundle = load_bundle(root)
    picture = _picture(bundle)
    if bundle.model.endswith(_PLANS):
        from eps_deploy.bundle import open_engine

        precision = str(bundle.manifest["precision"])
        return EngineSubject(open_engine(bundle), str(root), precision, picture)

    return OnnxSubject(
        bundle.read(bundle.model),
        name=str(root),
        provider=provider,
        threads=threads,
        picture=picture,
    )


def _picture(bundle: Bundle) -> Picture | None:
    """The first of the bundle's example pictures."""
    examples = sorted(name for name in bundle.manifest["files"] if name.startswith("examples/"))
    if not examples:
        return None
    return Picture(
        content=bundle.read(examples[0]),
        preprocessing=bundle.preprocessing,
        labels=bundle.labels,
    )


def _plan(path: Path) -> Subject:
    if not path.exists():
        raise BenchError(f"{path}: no such file")
    from eps_deploy.engines.trt.engine import TrtEngine
    from eps_deploy.engines.trt.plan import PlanMetadata

    sidecar = PlanMetadata.load(path.with_name(f"{path.name}.json"))
    engine = TrtEngine(path.read_bytes(), sidecar, device=_DEVICE, name=str(path))
    return EngineSubject(engine, str(path), sidecar.precision)


class EngineSubject:
    """One of our own engines on a GPU: a TensorRT plan."""

    def __init__(
        self, engine: Engine, name: str, precision: str, picture: Picture | None = None
    ) -> None:
        self.name = name
        self.gpu = _DEVICE
        self.batches: tuple[int, int | None] = (1, engine.max_batch)
        self.remark: str | None = None
        self._engine, self._picture = engine, picture
        told = engine.describe()
        self.facts = Facts(
            input=f"uint8 {list(engine.input_shape)}",
            output=f"float32 [{engine.classes}]",
            precision=precision,
            runtime=f"{told['runtime']} {told['version']}",
            provider=str(told.get("provider", told.get("device", "GPU"))),
            threads=None,
        )

    def call(self, batch: int) -> Callable[[], object]:
        images = self._images(batch)
        return lambda: self._engine.infer(images)

    def on_device(self, batch: int) -> Block | None:
        return on_gpu(self._engine, self._images(batch))

    def end_to_end(self, batch: int) -> Callable[[], object] | None:
        if self._picture is None:
            return None
        return self._picture.end_to_end(self._engine.infer, batch)

    def _images(self, batch: int) -> Any:
        size = (batch, *self._engine.input_shape)
        return np.random.default_rng(0).integers(0, 256, size=size, dtype=np.uint8)

    def close(self) -> None:
        self._engine.__exit__(None, None, None)


# -- Any ONNX network of images on ONNX Runtime, for `eps-bench`: ours or a stranger's

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


# -- A `compact.pt` or a checkpoint in PyTorch, for `eps-bench`


class TorchSubject:
    """A network of ours as PyTorch runs it: eager, float32 (TF32 off), channels-last.

    A checkpoint is the network that it holds: with its gates, the dead ones shut.

    Args:
        path: the file.
        device: `cpu` or `cuda`.
        threads: on the processor.

    Raises:
        FileFormatError: damaged, or another program's.
        BenchError: no such device.
    """

    def __init__(self, path: Path, *, device: str, threads: int) -> None:
        self.name = str(path)
        if device == "cuda" and not torch.cuda.is_available():
            raise BenchError(f"{path}: torch sees no CUDA device here; use --provider cpu")
        model, identity = _load(path)
        self._device = forward.choose(device)
        on_gpu = self._device.type == "cuda"
        Precision("fp32", self._device)  # turns TF32 off in this process
        self._model = model.to(self._device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._shape = identity.input_shape
        self._threads = threads
        self.batches: tuple[int, int | None] = (1, None)
        self.remark: str | None = None
        self.gpu = (self._device.index or 0) if on_gpu else None
        self.facts = Facts(
            input=f"uint8 {list(self._shape)}",
            output=f"float32 [{len(identity.classes)}]",
            precision="fp32",
            runtime=f"torch {torch.__version__} eager",
            provider=self._device.type,
            threads=None if on_gpu else threads,
        )

    def call(self, batch: int) -> Callable[[], object]:
        size = (batch, *self._shape)
        images = torch.randint(
            0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )

        @torch.inference_mode()
        def run() -> object:
            # Another subject may have wanted another number since; to ask costs nothing.
            if torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)
            try:
                return self._model(images.to(self._device)).cpu()
            except (RuntimeError, MemoryError) as error:
                if "allocate memory" in str(error) or "out of memory" in str(error):
                    raise BenchError(f"{self.name}: out of memory at batch {batch}") from error
                raise

        return run

    def on_device(self, batch: int) -> Block | None:
        return None

    def end_to_end(self, batch: int) -> Callable[[], object] | None:
        return None

    def close(self) -> None:
        pass


def _load(path: Path) -> tuple[torch.nn.Module, DataIdentity]:
    """The network behind its normalisation, and the data it was trained on."""
    try:
        checkpoint = Checkpoint.load(path)
    except FileFormatError as error:
        try:
            artifact = CompactArtifact.load(path)
        except FileFormatError as second:
            # What is told is what the file claims to be.
            raise (error if f"found {FORMAT}" in str(second) else second) from None
        return Deployed(artifact.build(), artifact.data), artifact.data
    whole = rewriting.drop_taps(checkpoint.build_gated())
    return Deployed(whole, checkpoint.data), checkpoint.data
