"""From a file's name to what `eps-bench` times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eps_compact.interleaving import Block
from eps_deploy.bench.subject import BenchError, Facts, Subject
from eps_deploy.bundle import Bundle, load_bundle
from eps_deploy.engines.base import Engine
from eps_deploy.engines.ort import Provider
from eps_deploy.measuring.latency import Picture, on_gpu

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
        from eps_deploy.bench.onnx_files import OnnxSubject, read_model

        return OnnxSubject(read_model(path), name=str(path), provider=provider, threads=threads)
    if path.suffix in _PLANS:
        return _plan(path)
    if path.suffix == ".pt":
        if provider == "tensorrt":
            raise BenchError(f"{path}: torch has no such provider; use --provider cpu or cuda")
        from eps_deploy.bench.torch_files import TorchSubject

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
        from eps_deploy.loading import open_engine

        precision = str(bundle.manifest["precision"])
        return EngineSubject(open_engine(bundle), str(root), precision, picture)
    from eps_deploy.bench.onnx_files import OnnxSubject

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
    from eps_deploy.engines.trt.run import TrtEngine
    from eps_deploy.engines.trt.sidecar import Sidecar

    sidecar = Sidecar.load(path.with_name(f"{path.name}.json"))
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
