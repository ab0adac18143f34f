"""One network in five runtimes with the same number of threads, and a matrix product (GEMM).

- `ours`: the ONNX file of `eps-deploy`, in a session with its settings.
- `plain`: the file of `torch.onnx.export` without options, in ONNX Runtime with its defaults.
- `eager`, `compile`: torch, channels-last; `compile` is `torch.compile` with its defaults.
- `openvino`: OpenVINO on the ONNX file of `eps-deploy`, tuned for latency, in float32. Its default
  on this kind of processor is bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from eps_compact.exporting import quiet
from eps_deploy.engines.base import Images
from eps_deploy.engines.ort import OrtEngine

Call = Callable[[], object]
GEMM = 1024  # rows and columns of both matrices


def ours(path: Path, images: Images, threads: int) -> Call:
    engine = OrtEngine(path.read_bytes(), threads=threads)
    return lambda: engine.infer(images)


def write_plain(network: nn.Module, images: Images, path: Path) -> None:
    """Export with `torch.onnx.export` and a dynamic batch."""
    with quiet():
        torch.onnx.export(
            network,
            (torch.from_numpy(images[:2]),),
            str(path),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )


def plain(path: Path, images: Images, threads: int) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: images})


def eager(network: nn.Module, images: Images) -> Call:
    """torch, eager, on the number of threads that torch is set to."""
    pixels = torch.from_numpy(images)
    return lambda: _infer(network, pixels)


def compiled(network: nn.Module, images: Images) -> Call:
    """`torch.compile` for this batch size; compiling takes about a minute."""
    torch._dynamo.reset()
    work = torch.compile(network, dynamic=False)
    pixels = torch.from_numpy(images)
    with quiet():
        _infer(work, pixels)
    return lambda: _infer(work, pixels)


def openvino(path: Path, images: Images, threads: int) -> Call | None:
    """OpenVINO; None where it is not installed."""
    try:
        module: Any = import_module("openvino")
    except ModuleNotFoundError:
        return None
    core = module.Core()
    model = core.read_model(str(path))
    model.reshape(list(images.shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def call() -> object:
        return np.array(request.infer([images], share_inputs=True)[0])

    return call


def gemm() -> tuple[Call, int]:
    """A float32 matrix product in torch, and its FLOPs."""
    chance = torch.Generator().manual_seed(0)
    a, b = (torch.randn(GEMM, GEMM, generator=chance) for _ in range(2))
    out = torch.empty(GEMM, GEMM)
    return lambda: torch.mm(a, b, out=out), 2 * GEMM**3


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("torch", "onnxruntime", "openvino"):
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            found[name] = None
    return found


@torch.inference_mode()
def _infer(network: Callable[[Tensor], Tensor], pixels: Tensor) -> object:
    return network(pixels).numpy()
