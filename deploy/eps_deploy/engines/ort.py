"""The ONNX Runtime engine."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable
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
_NOT_IMPLEMENTED = "NOT_IMPLEMENTED"


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
        tf32: let an NVIDIA GPU round float32 products to TF32.
        nhwc: have CUDA compute convolutions channels-last, which its float16 kernels want.
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
        tf32: bool = False,
        nhwc: bool = False,
        name: str = "model.onnx",
    ) -> None:
        if max_batch < 1:
            raise EngineError(f"{name}: the largest batch must be at least 1, not {max_batch}")

        def open_one(graphs: bool) -> Any:
            return open_session(
                model,
                provider=provider,
                threads=threads,
                exact_qdq=exact_qdq,
                tf32=tf32,
                nhwc=nhwc,
                graphs=graphs,
                name=name,
            )

        self._on_cuda = CudaSession(open_one) if provider == "cuda" else None
        self._session: Any = open_one(False) if self._on_cuda is None else self._on_cuda.session
        self.threads = threads
        self._provider = provider
        self._max_batch = max_batch
        self._exact_qdq = exact_qdq
        self._tf32 = tf32
        self._name = name
        self._read_signature()

    def _read_signature(self) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        found = [(port.name, port.type) for port in (*inputs, *outputs)]
        wanted = [(INPUT_NAME, "tensor(uint8)"), (OUTPUT_NAME, "tensor(float)")]
        if found != wanted or len(inputs[0].shape) != 4 or len(outputs[0].shape) != 2:
            raise EngineError(
                f"{self._name}: not a network exported by eps-deploy (its inputs and outputs"
                f" are {found}, not {wanted})"
            )
        sizes: list[Any] = [*inputs[0].shape[1:], outputs[0].shape[1]]
        if not all(isinstance(size, int) for size in sizes):
            raise EngineError(f"{self._name}: image size and classes must be fixed, not {sizes}")
        channels, height, width, classes = (int(size) for size in sizes)
        self._input_shape, self._classes = (channels, height, width), classes
        if self._on_cuda is not None:
            self._on_cuda.set_shapes(self._input_shape, classes, self._max_batch)
            self._session = self._on_cuda  # which may open another one

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self._input_shape

    @property
    def classes(self) -> int:
        return self._classes

    @property
    def max_batch(self) -> int:
        return self._max_batch

    def infer(self, images: Images) -> Logits:
        """Logits float32 `[N, classes]` of images uint8 `[N, C, H, W]`, 1 <= N <= max_batch."""
        check_images(images, self._input_shape, self._max_batch)
        if self._session is None:
            raise EngineError(f"{self._name}: the engine was closed")
        try:
            if self._on_cuda is not None:
                logits = self._on_cuda.infer(images)
            else:
                logits = self._session.run([OUTPUT_NAME], {INPUT_NAME: images})[0]
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"{self._name}: ONNX Runtime failed: {_reason(error)}") from error
        assert isinstance(logits, np.ndarray)
        assert logits.dtype == np.float32
        return logits

    def describe(self) -> dict[str, Any]:
        graphs = {} if self._on_cuda is None else {"cuda_graphs": self._on_cuda.describe()}
        return {
            "name": "ort",
            "runtime": "onnxruntime",
            "version": onnxruntime.__version__,
            "provider": PROVIDERS[self._provider],
            "threads": self.threads,
            "max_batch": self._max_batch,
            "exact_qdq": self._exact_qdq,
            "tf32": self._tf32 and self._provider != "cpu",
            **graphs,
        }

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = self._on_cuda = None


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
    it runs without graphs, in the same tensors.

    Args:
        open_session: opens a session, with CUDA graphs or without.

    Raises:
        EngineError: no session can be opened.
    """

    def __init__(self, open_session: Callable[[bool], Any]) -> None:
        self._open = open_session
        self._lock = threading.Lock()
        self._why_not: str | None = None
        self._bound: dict[int, _Bound] = {}
        self._sizes: tuple[int, ...] = ()
        try:
            self.session: Any = open_session(True)
        except EngineError as error:
            self.session = open_session(False)
            self._why_not = str(error)

    def set_shapes(self, input_shape: tuple[int, int, int], classes: int, max_batch: int) -> None:
        """Set the shape `[C, H, W]` of an image, the number of logits and the largest batch."""
        self._input_shape, self._classes = input_shape, classes
        self._sizes = padded_sizes(max_batch)

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
                self.session = self._open(False)
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
        images = create([size, *self._input_shape], np.uint8, "cuda", 0)
        logits = create([size, self._classes], np.float32, "cuda", 0)
        binding = self.session.io_binding()
        binding.bind_ortvalue_input(INPUT_NAME, images)
        binding.bind_ortvalue_output(OUTPUT_NAME, logits)
        options = onnxruntime.RunOptions()
        if self._why_not is None:
            options.add_run_config_entry(_GRAPH_ID, str(size))
        staged = np.zeros([size, *self._input_shape], np.uint8)
        return _Bound(staged, images, logits, binding, options)


# -- Sessions


def open_session(
    model: bytes,
    *,
    provider: Provider,
    threads: int,
    exact_qdq: bool = False,
    tf32: bool = False,
    nhwc: bool = False,
    graphs: bool = False,
    name: str = "model.onnx",
    optimized: Path | None = None,
) -> Any:
    """Create an ONNX Runtime session on exactly this provider; raises as `OrtEngine` does.

    Args:
        nhwc: compute convolutions channels-last; only applies to `cuda`.
        graphs: run as CUDA graphs, with the bindings of a `CudaSession`; only applies to `cuda`.
        optimized: file to write ONNX Runtime's optimised graph to.
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
        _load_libraries()
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=_providers(provider, tf32, nhwc, graphs), enable_fallback=0
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
    provider: Provider, tf32: bool, nhwc: bool, graphs: bool
) -> list[tuple[str, dict[str, str]]]:
    """Providers with their options, in order; the last one runs what the others do not support."""
    if provider == "cpu":
        return [(PROVIDERS["cpu"], {})]
    settings = {"use_tf32": str(int(tf32)), "cudnn_conv_algo_search": _ALGORITHM_SEARCH}
    if provider == "cuda":
        settings |= {"prefer_nhwc": str(int(nhwc)), "enable_cuda_graph": str(int(graphs))}
    both = [(PROVIDERS["cuda"], settings), (PROVIDERS["cpu"], {})]
    return [(PROVIDERS["tensorrt"], {}), *both] if provider == "tensorrt" else both


def _load_libraries() -> None:
    """Load CUDA and cuDNN from the Python packages of onnxruntime-gpu, where installed."""
    preload = getattr(onnxruntime, "preload_dlls", None)  # since 1.21
    if preload is not None:
        # It prints what is missing; whether that matters, the session's providers show.
        with contextlib.redirect_stdout(io.StringIO()):
            preload()


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
    if _NOT_IMPLEMENTED in reason and provider == "cpu":
        return (
            "ONNX Runtime has no such layers for the CPU, as of bfloat16 convolutions"
            f" ({reason}); use --fp32 or --fp16 here, or an NVIDIA GPU"
        )
    return f"ONNX Runtime cannot load it: {reason}"


def _reason(error: Exception) -> str:
    """ONNX Runtime's error message in one line."""
    return " ".join(str(error).split())
