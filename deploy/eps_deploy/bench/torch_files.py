"""A `compact.pt` or a checkpoint in PyTorch, for `eps-bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from eps_compact import CompactArtifact
from eps_compact.interleaving import Block
from eps_deploy.bench.subject import BenchError, Facts
from eps_deploy.exporting.export import Deployed
from eps_train import devices, graph
from eps_train.checkpoint import FORMAT, Checkpoint
from eps_train.data import DataIdentity
from eps_train.errors import FileFormatError
from eps_train.precision import Precision


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
        self._device = devices.choose(device)
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
    whole = graph.drop_taps(checkpoint.build_gated())
    return Deployed(whole, checkpoint.data), checkpoint.data
