"""Times of blocks on ONNX Runtime, for the ledger of `eps_compact`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import onnxruntime
from torch import Tensor, nn

from eps_compact.timing import Runs, interleaved
from eps_deploy.engines.base import Images
from eps_deploy.engines.ort import THREADS, OrtEngine
from eps_deploy.export import export_onnx
from eps_train.data import DataIdentity


class OrtTimer:
    """An `eps_compact.timing.Timer` that runs the networks as `eps-deploy --engine ort` does.

    To export a network takes seconds, and that is time of the ledger's too.

    Args:
        identity: the data that the networks were trained on.
        image: the raw image that they are timed on, uint8 `[1, C, H, W]`.
    """

    name = f"onnxruntime {onnxruntime.__version__} on the CPU, {THREADS} thread, batch 1"

    def __init__(self, identity: DataIdentity, image: Images) -> None:
        self._identity, self._image = identity, image

    def __call__(
        self, networks: Sequence[nn.Module], image: Tensor, seconds: float
    ) -> list[list[Runs]]:
        """As `Timer` has it; `image`, which is normalised already, is not looked at."""
        with ExitStack() as open_engines, tempfile.TemporaryDirectory() as folder:
            calls = []
            for network in networks:
                path = Path(folder) / "model.onnx"
                export_onnx(network, self._identity, path)
                engine = open_engines.enter_context(OrtEngine(path.read_bytes()))
                calls.append(partial(engine.infer, self._image))
            return interleaved(calls, seconds)
