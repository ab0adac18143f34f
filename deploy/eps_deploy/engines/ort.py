"""The ONNX Runtime engine."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime

from eps_deploy.engines.base import (
    INPUT_NAME,
    OUTPUT_NAME,
    EngineError,
    Images,
    Logits,
    check_images,
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
        name: str = "model.onnx",
    ) -> None:
        if max_batch < 1:
            raise EngineError(f"{name}: the largest batch must be at least 1, not {max_batch}")
        self._session: Any = open_session(
            model, provider=provider, threads=threads, exact_qdq=exact_qdq, tf32=tf32, name=name
        )
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
            logits = self._session.run([OUTPUT_NAME], {INPUT_NAME: images})[0]
        except Exception as error:
            raise EngineError(f"{self._name}: ONNX Runtime failed: {_reason(error)}") from error
        assert isinstance(logits, np.ndarray)
        assert logits.dtype == np.float32
        return logits

    def describe(self) -> dict[str, Any]:
        return {
            "name": "ort",
            "runtime": "onnxruntime",
            "version": onnxruntime.__version__,
            "provider": PROVIDERS[self._provider],
            "threads": self.threads,
            "max_batch": self._max_batch,
            "exact_qdq": self._exact_qdq,
            "tf32": self._tf32 and self._provider != "cpu",
        }

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None


def open_session(
    model: bytes,
    *,
    provider: Provider,
    threads: int,
    exact_qdq: bool = False,
    tf32: bool = False,
    name: str = "model.onnx",
    optimized: Path | None = None,
) -> Any:
    """Create an ONNX Runtime session on exactly this provider; raises as `OrtEngine` does.

    `optimized` is a file to write ONNX Runtime's optimised graph to.
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
            model, options, providers=_providers(provider, tf32), enable_fallback=0
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


def _providers(provider: Provider, tf32: bool) -> list[tuple[str, dict[str, str]]]:
    """Providers with their options, in order; the last one runs what the others do not support."""
    if provider == "cpu":
        return [(PROVIDERS["cpu"], {})]
    settings = {"use_tf32": str(int(tf32)), "cudnn_conv_algo_search": _ALGORITHM_SEARCH}
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
