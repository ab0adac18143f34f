"""The ONNX Runtime engine."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime

from eps_deploy.engines.base import (
    INPUT_NAME,
    OUTPUT_NAME,
    EngineError,
    Images,
    Logits,
    check_images,
    padded_sizes,
)
from eps_deploy.precision import FP32, Precision

Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# A second thread did not make deep, narrow networks faster, and ONNX Runtime's spinning threads
# cost far more than they bring on cores that other processes use too.
THREADS = 1
MAX_BATCH = 256  # the graph has no limit; this bounds the memory of a request
# ONNX Runtime's default, EXHAUSTIVE, times every algorithm of every convolution at each new batch
# size: about 0.1 s per convolution, while serving.
_ALGORITHM_SEARCH = "HEURISTIC"
_FATAL_ONLY = 4  # log severity; errors are raised as exceptions too

# An ONNX file of y = Relu(x), float32 [1, 4], opset 13, as bytes: the package onnx is not needed.
_RELU = bytes.fromhex(
    "080712003a3b0a0c0a0178120179220452656c751201675a130a0178120e0a0c"
    "080112080a0208010a02080462130a0179120e0a0c080112080a0208010a02080442040a00100d"
)


class OrtEngine:
    """An exported network in an ONNX Runtime session; an `Engine` (see `engines.base`).

    Args:
        model: the bytes of an ONNX file exported by `eps-deploy`.
        provider: execution provider: the CPU, or an NVIDIA GPU through CUDA or TensorRT.
        threads: threads within one operator, on the CPU.
        max_batch: largest batch of `infer`.
        exact_qdq: compute a quantised network with the arithmetic of its file: round to int8 and
            back, multiply in float. TensorRT does so too. Otherwise ONNX Runtime uses its int8
            kernels, which round differently; on CPUs without VNNI slower ones that do not saturate.
        precision: of the file. CUDA rounds float32 products to TF32 only for `tf32`, and computes
            float16 convolutions channels-last, which its kernels for them want.
        name: name of the model in error messages.

    Raises:
        EngineError: another kind of model, one that the provider cannot run, or a provider that
            ONNX Runtime replaced by another one.
    """

    def __init__(
        self,
        model: bytes,
        *,
        provider: Provider = "cpu",
        threads: int = THREADS,
        max_batch: int = MAX_BATCH,
        exact_qdq: bool = False,
        precision: Precision = FP32,
        name: str = "model.onnx",
    ) -> None:
        if max_batch < 1:
            raise EngineError(f"{name}: the largest batch must be at least 1, not {max_batch}")
        open_one = partial(
            open_session,
            model,
            provider=provider,
            threads=threads,
            exact_qdq=exact_qdq,
            precision=precision,
            name=name,
        )
        on_cuda = CudaSession(open_one, max_batch) if provider == "cuda" else None
        session = open_one() if on_cuda is None else on_cuda.session
        self.input_shape, self.classes = _signature(session, name)
        self.max_batch, self._name = max_batch, name
        # On CUDA another session may replace this one.
        self._session: Any = session if on_cuda is None else None
        self._on_cuda = on_cuda
        self._described = {
            "name": "ort",
            "runtime": "onnxruntime",
            "version": onnxruntime.__version__,
            "provider": PROVIDERS[provider],
            "threads": threads,
            "max_batch": max_batch,
            "exact_qdq": exact_qdq,
            "tf32": precision.tf32 and provider != "cpu",
        }

    def infer(self, images: Images) -> Logits:
        """Logits float32 `[N, classes]` of images uint8 `[N, C, H, W]`, 1 <= N <= max_batch."""
        check_images(images, self.input_shape, self.max_batch)
        if self._session is None and self._on_cuda is None:
            raise EngineError(f"{self._name}: the engine was closed")
        try:
            if self._on_cuda is not None:
                return self._on_cuda.infer(images)
            logits: Logits = self._session.run([OUTPUT_NAME], {INPUT_NAME: images})[0]
            return logits
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"{self._name}: ONNX Runtime failed: {_reason(error)}") from error

    def describe(self) -> dict[str, Any]:
        graphs = {} if self._on_cuda is None else {"cuda_graphs": self._on_cuda.describe()}
        return self._described | graphs

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = self._on_cuda = None


def _signature(session: Any, name: str) -> tuple[tuple[int, int, int], int]:
    """The shape `[C, H, W]` of an image and the number of logits."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    found = [(port.name, port.type) for port in (*inputs, *outputs)]
    wanted = [(INPUT_NAME, "tensor(uint8)"), (OUTPUT_NAME, "tensor(float)")]
    if found != wanted or len(inputs[0].shape) != 4 or len(outputs[0].shape) != 2:
        raise EngineError(
            f"{name}: not a network exported by eps-deploy (its inputs and outputs"
            f" are {found}, not {wanted})"
        )
    sizes: list[Any] = [*inputs[0].shape[1:], outputs[0].shape[1]]
    if not all(isinstance(size, int) for size in sizes):
        raise EngineError(f"{name}: image size and classes must be fixed, not {sizes}")
    channels, height, width, classes = sizes
    return (channels, height, width), classes


# -- A session on CUDA, with its tensors in the GPU's memory and a CUDA graph for each batch size
#
# ONNX Runtime captures a graph in the first runs with a new `gpu_graph_id` and replays it in later
# ones, without looking at the shapes and addresses that are bound then: each id has one binding for
# good. Each thread captures its own. 0 is ONNX Runtime's own, -1 runs without graph. Documented in
# its docs/execution-providers/CUDA-ExecutionProvider.md and onnxruntime_run_options_config_keys.h.

_GRAPH_ID = "gpu_graph_id"


class _Bound(NamedTuple):
    """The tensors of one batch size."""

    staged: Images  # on the host, whole rows
    images: Any  # OrtValue on the GPU
    logits: Any
    binding: Any
    options: Any  # of a run


class CudaSession:
    """Runs a session on CUDA, one call at a time: ONNX Runtime captures no graph in parallel runs.

    A batch is padded to the next of `padded_sizes`. Where ONNX Runtime cannot capture the network,
    it runs without graphs, in the same tensors. `open_session` is the function of this name with
    all arguments but `graphs`.
    """

    def __init__(self, open_session: Callable[..., Any], max_batch: int) -> None:
        self._open, self._sizes = open_session, padded_sizes(max_batch)
        self._lock = threading.Lock()
        self._why_not: str | None = None
        self._bound: dict[int, _Bound] = {}
        try:
            self.session: Any = open_session(graphs=True)
        except EngineError as error:
            self.session = open_session()
            self._why_not = str(error)

    def infer(self, images: Images) -> Logits:
        """As `Engine.infer`, for images that were checked already."""
        size = next(size for size in self._sizes if size >= len(images))
        with self._lock:
            try:
                return self._run(size, images)
            except Exception as error:
                if self._why_not is not None:
                    raise
                # The capture failed, and nothing says what state that leaves the session in.
                self._why_not = _reason(error)
                self._bound.clear()
                self.session = self._open()
                return self._run(size, images)

    def describe(self) -> dict[str, Any]:
        used = self._why_not is None
        batches = sorted(self._bound) if used else []
        return {"used": used, "why_not": self._why_not, "batches": batches, "not_captured": {}}

    def _run(self, size: int, images: Images) -> Logits:
        bound = self._bound.get(size) or self._bind(size)
        bound.staged[: len(images)] = images
        bound.images.update_inplace(bound.staged)
        self.session.run_with_iobinding(bound.binding, bound.options)
        self._bound[size] = bound
        logits: Logits = bound.logits.numpy()[: len(images)].copy()
        return logits

    def _bind(self, size: int) -> _Bound:
        create = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        shape = [size, *self.session.get_inputs()[0].shape[1:]]
        images = create(shape, np.uint8, "cuda", 0)
        classes = self.session.get_outputs()[0].shape[1]
        logits = create([size, classes], np.float32, "cuda", 0)
        binding = self.session.io_binding()
        binding.bind_ortvalue_input(INPUT_NAME, images)
        binding.bind_ortvalue_output(OUTPUT_NAME, logits)
        options = onnxruntime.RunOptions()
        if self._why_not is None:
            options.add_run_config_entry(_GRAPH_ID, str(size))
        return _Bound(np.zeros(shape, np.uint8), images, logits, binding, options)


# -- Sessions


def open_session(
    model: bytes,
    *,
    provider: Provider,
    threads: int,
    exact_qdq: bool = False,
    precision: Precision = FP32,
    graphs: bool = False,
    name: str = "model.onnx",
    optimized: Path | None = None,
) -> Any:
    """Create an ONNX Runtime session on exactly this provider; arguments and errors as `OrtEngine`.

    With `graphs`, CUDA runs it as CUDA graphs, with the bindings of a `CudaSession`. `optimized` is
    a file to write ONNX Runtime's optimised graph to.
    """
    wanted = PROVIDERS[provider]
    if wanted not in onnxruntime.get_available_providers():
        raise EngineError(f"{name}: {_MISSING[provider]}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # a residual network is one chain: nothing to overlap
    options.log_severity_level = _FATAL_ONLY
    if exact_qdq:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not has_vnni():
        # The fast int8 kernels would add pairs of products in 16 bits, which saturate.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if provider != "cpu":
        # The process's own logger, not the session's: cuDNN logs an error for each convolution that
        # it leaves to another kernel, in float16 on an H200 hundreds of lines.
        onnxruntime.set_default_logger_severity(_FATAL_ONLY)
        if hasattr(onnxruntime, "preload_dlls"):  # since 1.21
            # Loads CUDA and cuDNN from the Python packages of onnxruntime-gpu, where installed. It
            # prints what is missing; whether that matters, the session's providers show.
            with contextlib.redirect_stdout(io.StringIO()):
                onnxruntime.preload_dlls()
    providers = _providers(provider, precision, graphs)
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=providers, enable_fallback=0
        )
    except Exception as error:  # the binding raises its own types, none of them public
        raise EngineError(f"{name}: {_complaint(error, provider)}") from error
    granted = session.get_providers()
    if granted[:1] != [wanted]:
        raise EngineError(
            f"{name}: ONNX Runtime runs it on {granted[0]}, not on {wanted}; {_REMEDY[provider]}"
        )
    return session


def try_provider(provider: Provider) -> None:
    """Run a small model on the provider. Raises EngineError with the remedy if that fails."""
    name = f"--provider {provider}"
    session = open_session(_RELU, provider=provider, threads=1, name=name)
    values = np.array([[-1, 0, 1, 2]], np.float32)
    if session.run(None, {"x": values})[0].tolist() != [[0, 0, 1, 2]]:
        raise EngineError(f"{name}: it computes wrong numbers")


def has_vnni() -> bool:
    """Whether this CPU sums int8 products in 32 bits; False when unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags)


def _providers(
    provider: Provider, precision: Precision, graphs: bool
) -> list[tuple[str, dict[str, str]]]:
    """Providers with their options, in order; the last one runs what the others do not support."""
    if provider == "cpu":
        return [(PROVIDERS["cpu"], {})]
    settings = {"use_tf32": str(int(precision.tf32)), "cudnn_conv_algo_search": _ALGORITHM_SEARCH}
    if provider == "cuda":
        nhwc = precision.float == "float16"
        settings |= {"prefer_nhwc": str(int(nhwc)), "enable_cuda_graph": str(int(graphs))}
    both = [(PROVIDERS["cuda"], settings), (PROVIDERS["cpu"], {})]
    return [(PROVIDERS["tensorrt"], {}), *both] if provider == "tensorrt" else both


_REMEDY = {
    "cpu": "install the extra eps-resnet[ort]",
    "cuda": (
        "the CUDA or cuDNN libraries of its version do not load, or there is no NVIDIA GPU;"
        " run eps-doctor, or use --provider cpu"
    ),
    "tensorrt": (
        "its TensorRT provider needs the libraries of TensorRT 10 (libnvinfer.so.10) and an NVIDIA"
        " GPU; use --engine trt for TensorRT 11, or --provider cuda"
    ),
}
_NO_GPU = (
    "this onnxruntime has no {} provider; install the extra eps-resnet[ort-gpu] in place of"
    " eps-resnet[ort] (not beside it), or use --provider cpu"
)
_MISSING = {
    "cpu": "this onnxruntime has no CPU provider; install the extra eps-resnet[ort]",
    "cuda": _NO_GPU.format("CUDA"),
    "tensorrt": _NO_GPU.format("TensorRT"),
}


def _complaint(error: Exception, provider: Provider) -> str:
    reason = _reason(error)
    if "NOT_IMPLEMENTED" in reason and provider == "cpu":
        return (
            "ONNX Runtime has no such layers for the CPU, as of bfloat16 convolutions"
            f" ({reason}); use --fp32 or --fp16 here, or an NVIDIA GPU"
        )
    return f"ONNX Runtime cannot load it: {reason}"


def _reason(error: Exception) -> str:
    """ONNX Runtime's error message in one line."""
    return " ".join(str(error).split())
