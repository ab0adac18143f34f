"""Open model files for `eps-bench`: bundles, ONNX files, TensorRT plans, checkpoints and artifacts.

Each becomes a :class:`ModelFile` whose engine is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from eps_compact import CompactArtifact
from eps_core.errors import FileFormatError, one_line
from eps_deploy.bench.latency import BenchError, ExampleImage, ModelFile
from eps_deploy.bundle import load_bundle, open_engine
from eps_deploy.engines.base import Engine, Images, Logits
from eps_deploy.engines.ort import Provider, open_session
from eps_deploy.export.export import Deployed
from eps_deploy.export.types import executed_types, layer_types
from eps_train.gating import rewriting
from eps_train.training import forward
from eps_train.training.checkpoint import FORMAT, Checkpoint
from eps_train.training.forward import TrainingPrecision

_PLANS = (".plan", ".engine")
_DEVICE = 0  # the GPU that everything runs on; CUDA_VISIBLE_DEVICES selects another


def open_model_file(path: Path, *, provider: Provider, threads: int) -> ModelFile:
    """Load a bundle, an ONNX file, a TensorRT plan with its metadata, or a `.pt` with torch.

    Raises:
        EpsError: not such a file, one that does not run here, or not on `provider`.
    """
    name = str(path)
    if path.is_dir():
        bundle = load_bundle(path)
        images = [file for file in bundle.manifest["files"] if file.startswith("examples/")]
        example = None
        if images:
            example = ExampleImage(
                content=bundle.read(min(images)),
                preprocessing=bundle.preprocessing,
                labels=bundle.labels,
            )
        if bundle.model.endswith(_PLANS):
            return plan_file(open_engine(bundle), name, str(bundle.manifest["precision"]), example)
        return onnx_file(bundle.read(bundle.model), name, provider, threads, example)
    if path.suffix == ".onnx":
        return onnx_file(read_model(path), name, provider, threads)
    if path.suffix in _PLANS and path.exists():
        from eps_deploy.engines.trt.engine import TrtEngine
        from eps_deploy.engines.trt.plan import PlanMetadata

        metadata = PlanMetadata.load(path.with_name(f"{path.name}.json"))
        engine = TrtEngine(path.read_bytes(), metadata, device=_DEVICE, name=name)
        return plan_file(engine, name, metadata.precision)
    if path.suffix == ".pt":
        if provider == "tensorrt":
            raise BenchError(f"{path}: torch has no such provider; use --provider cpu or cuda")
        return torch_file(path, provider, threads)
    what = "not a kind of file that eps-bench times" if path.exists() else "no such file"
    raise BenchError(
        f"{path}: {what}; name a bundle's folder, a .onnx, a .plan with its .plan.json, or a .pt"
        " of eps-train or eps-compact"
    )


def plan_file(
    engine: Engine, name: str, precision: str, example: ExampleImage | None = None
) -> ModelFile:
    return ModelFile(
        name=name,
        engine=engine,
        precision=precision,
        gpu=_DEVICE,
        batches=(1, engine.max_batch),
        example=example,
    )


# -- ONNX files on ONNX Runtime: ours, or any network of images

_INPUTS = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
_DTYPES = {"float": "float32", "double": "float64"}  # ONNX Runtime's names, and NumPy's
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_HALVES = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
_LARGEST = 1 << 30  # images in a batch: no limit


class OnnxFileEngine:
    """An `Engine` for any ONNX network with one input of images `[N, C, H, W]`.

    Unlike `OrtEngine` it accepts float images, a fixed batch size, and several outputs, of which
    `infer` returns the first.

    Args:
        model: bytes of the file, its weights inside.
        name: what error messages call it.

    Raises:
        BenchError: more inputs, or others than images.
        EngineError: ONNX Runtime cannot load it, or does not run it on `provider`.
    """

    def __init__(self, model: bytes, *, name: str, provider: Provider, threads: int) -> None:
        self._name, self._provider, self._threads = name, provider, threads
        self._session: Any = open_session(model, provider=provider, threads=threads, name=name)
        ports = self._session.get_inputs()
        found = ", ".join(f"{port.name} {port.type} {port.shape}" for port in ports)
        if len(ports) != 1 or len(ports[0].shape) != 4 or ports[0].type not in _INPUTS:
            raise BenchError(
                f"{name}: eps-bench times networks with one input of images, [N, C, H, W] in"
                f" uint8, float32 or float16; this one takes {found}"
            )
        self._input = ports[0].name
        batch, *sizes = ports[0].shape
        if not all(isinstance(size, int) for size in sizes):
            raise BenchError(
                f"{name}: the size of its images is not fixed: {found}; fix it with python -m"
                " onnxruntime.tools.make_dynamic_shape_fixed"
                f" --input_name {self._input} --input_shape N,C,H,W"
            )
        self.dtype = _INPUTS[ports[0].type]
        self.input_shape = (sizes[0], sizes[1], sizes[2])
        self.fixed_batch: int | None = batch if isinstance(batch, int) else None
        self.max_batch = self.fixed_batch or _LARGEST
        outputs = []
        for port in self._session.get_outputs():
            dtype = port.type.removeprefix("tensor(").removesuffix(")")
            shape = [str(size) if isinstance(size, int) else "?" for size in port.shape[1:]]
            outputs.append(f"{_DTYPES.get(dtype, dtype)} [{', '.join(shape)}]")
        self.output = " and ".join(outputs)
        self.classes = int(shape[-1]) if shape and shape[-1].isdecimal() else 0

    def infer(self, images: npt.NDArray[Any]) -> Logits:
        try:
            output: Logits = self._session.run(None, {self._input: images})[0]
        except Exception as error:  # the binding raises its own types, none of them public
            raise BenchError(
                f"{self._name}: ONNX Runtime failed: {' '.join(str(error).split())}"
            ) from error
        return output

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": "onnxruntime",
            "version": onnxruntime.__version__,
            "provider": self._provider,
            "threads": self._threads,
        }

    def __enter__(self) -> OnnxFileEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None


def onnx_file(
    model: bytes,
    name: str,
    provider: Provider,
    threads: int,
    example: ExampleImage | None = None,
) -> ModelFile:
    precision = _precision(model)
    engine = OnnxFileEngine(model, name=name, provider=provider, threads=threads)
    on_cpu = provider == "cpu"
    remark = None
    if on_cpu and "fp16" in precision and "float16" not in executed_types(model, name=name):
        remark = (
            f"{name}: ONNX Runtime computes its float16 here in float32, with casts around each"
            " convolution; the times say nothing about float16 elsewhere"
        )
    return ModelFile(
        name=name,
        engine=engine,
        precision=precision,
        gpu=None if on_cpu else _DEVICE,
        batches=(engine.fixed_batch or 1, engine.fixed_batch),
        dtype=engine.dtype,
        output=engine.output,
        remark=remark,
        example=example,
    )


def read_model(path: Path) -> bytes:
    """Return an ONNX file with all its weights inside, also those stored in files beside it.

    The files may be links, as in the Hugging Face cache. Raises FileFormatError.
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
        cause = one_line(error)
        raise FileFormatError(f"{path}: not an ONNX file that can be read: {cause}") from error


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All weights and constants of a graph and of its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _load_weights(tensor: onnx.TensorProto, folder: Path) -> None:
    """Read a tensor's external data, resolving links, which onnx refuses.

    A name that leads out of `folder` by itself is left to onnx, which refuses it.
    """
    (location,) = (entry for entry in tensor.external_data if entry.key == "location")
    name = PurePath(location.value)
    if not name.is_absolute() and ".." not in name.parts:
        found = (folder / name).resolve()
        folder, location.value = found.parent, found.name
    load_external_data_for_tensor(tensor, str(folder))


def _precision(model: bytes) -> str:
    """What the layers compute in: `fp32`, `int8-fp16`, or several joined by a plus."""
    proto = onnx.load_from_string(model)
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"node {index}"
    found = sorted({_SHORT.get(kind, kind) for kind in layer_types(proto).values()})
    if "int8" in found:
        halves = {tensor.data_type for tensor in proto.graph.initializer} & _HALVES.keys()
        return "-".join(["int8", *sorted(_HALVES[kind] for kind in halves)])
    return "+".join(found) or "no layers"


# -- Checkpoints and artifacts in PyTorch


class TorchEngine:
    """An `Engine` for a network of ours in PyTorch: eager, float32 (TF32 off), channels-last."""

    max_batch = _LARGEST

    def __init__(self, model: Deployed, *, name: str, device: str, threads: int) -> None:
        self.device = forward.choose(device)
        TrainingPrecision("fp32", self.device)  # turns TF32 off in this process
        self._model = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._name, self._threads = name, threads
        self.input_shape, self.classes = model.identity.input_shape, len(model.identity.classes)

    @torch.inference_mode()
    def infer(self, images: Images) -> Logits:
        # Another file's engine may have changed the number since; to ask is cheap.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        try:
            logits: Logits = self._model(torch.from_numpy(images).to(self.device)).cpu().numpy()
        except (RuntimeError, MemoryError) as error:
            if "allocate memory" in str(error) or "out of memory" in str(error):
                raise BenchError(f"{self._name}: out of memory at batch {len(images)}") from error
            raise
        return logits

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": "torch",
            "version": f"{torch.__version__} eager",
            "provider": self.device.type,
            "threads": self._threads,
        }

    def __enter__(self) -> TorchEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def torch_file(path: Path, device: str, threads: int) -> ModelFile:
    """Load a `compact.pt` or a checkpoint; a checkpoint runs with its gates, the dead ones closed.

    Raises:
        FileFormatError: damaged, or another program's.
        BenchError: no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchError(f"{path}: torch sees no CUDA device here; use --provider cpu")
    engine = TorchEngine(_load(path), name=str(path), device=device, threads=threads)
    gpu = (engine.device.index or 0) if engine.device.type == "cuda" else None
    return ModelFile(name=str(path), engine=engine, precision="fp32", gpu=gpu)


def _load(path: Path) -> Deployed:
    try:
        checkpoint = Checkpoint.load(path)
    except FileFormatError as error:
        try:
            artifact = CompactArtifact.load(path)
        except FileFormatError as second:
            # Report the error of the format that the file claims to have.
            raise (error if f"found {FORMAT}" in str(second) else second) from None
        return Deployed(artifact.build(), artifact.data)
    return Deployed(rewriting.drop_taps(checkpoint.build_gated()), checkpoint.data)
