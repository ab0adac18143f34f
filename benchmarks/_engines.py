"""The engines of a device, each from images in host memory to logits in host memory.

- `trt`: TensorRT as `eps-serve` runs it: two optimization profiles, padded batches, CUDA graphs.
- `ort`: ONNX Runtime as `eps-serve` runs it, on CUDA or on the CPU.
- `eager`, `compile`: torch in channels-last; `compile` is `torch.compile`, on CUDA in the mode
  `reduce-overhead`, which uses CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eps_compact.exporting import quiet
from eps_core.cli import missing_package
from eps_deploy.engines.base import EngineError, Images
from eps_deploy.engines.ort import OrtEngine, Provider
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.engines.trt.cache import PlanCache
from eps_deploy.export.export import Deployed, in_precision
from eps_deploy.precision import Precision
from eps_train.training.forward import TrainingPrecision

ENGINES = ("trt", "ort", "eager", "compile")
Infer = Callable[[Images], object]


class Unavailable(Exception):
    """Raised with the reason why an engine does not run on this device."""


@contextmanager
def opened(
    engine: str,
    network: Deployed,
    path: Path,
    *,
    device: torch.device,
    precision: Precision,
    max_batch: int,
) -> Iterator[Infer]:
    """Open a network in an engine.

    Args:
        engine: one of `ENGINES`.
        network: in float32, for torch.
        path: its ONNX file in `precision`.
        device: a CPU or a CUDA device.
        precision: `fp32` or `fp16`.
        max_batch: largest batch.

    Raises:
        Unavailable: the engine does not run here.
    """
    on_cuda = device.type == "cuda"
    if engine == "trt" and not on_cuda:
        raise Unavailable("TensorRT needs an NVIDIA GPU")
    if engine in ("trt", "ort"):
        try:
            with _engine(engine, path.read_bytes(), on_cuda, precision, max_batch) as made:
                yield made.infer
        except EngineError as error:
            raise Unavailable(str(error)) from None
        except ModuleNotFoundError as error:
            raise Unavailable(missing_package(error)) from None
        return
    TrainingPrecision("fp32", device)  # which switches TF32 off
    module: nn.Module = in_precision(network.network, network.identity, precision)
    module = module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run: Callable[[Tensor], Tensor] = module
    if engine == "compile":
        torch._dynamo.reset()
        run = torch.compile(module, dynamic=False, mode="reduce-overhead" if on_cuda else "default")

    @torch.inference_mode()
    def infer(images: Images) -> object:
        return run(torch.from_numpy(images).to(device)).cpu().numpy()

    with quiet():
        try:
            yield infer
        finally:
            network.network.to("cpu")


def _engine(engine: str, model: bytes, on_cuda: bool, precision: Precision, max_batch: int) -> Any:
    if engine == "trt":
        plans = PlanCache(None, log=lambda line: None)
        options = BuildOptions(max_batch=max_batch, opt_batch=min(16, max_batch))
        return plans.open(plans.plan(model, precision, options))
    provider: Provider = "cuda" if on_cuda else "cpu"
    return OrtEngine(model, provider=provider, max_batch=max_batch, precision=precision)
