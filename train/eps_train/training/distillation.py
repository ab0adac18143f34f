"""Distillation: training a network on the logits of another (Hinton et al., 2015, 1503.02531)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eps_core.errors import ConfigError
from eps_train.data.dataset import DataIdentity
from eps_train.models.resnets import Normalize
from eps_train.training.checkpoint import Checkpoint


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return `T² KL(softmax(teacher / T) || softmax(student / T))`, the mean over the images.

    The factor `T²` keeps the size of the gradient independent of the temperature.

    Args:
        student, teacher: logits `[N, classes]`, any floating-point type; the teacher's get no
            gradient.
        temperature: T, above 0.
    """
    target = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    found = F.log_softmax(student.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(found, target, reduction="batchmean", log_target=True)


class Teacher:
    """A trained network that gives logits for the images that a student is trained on.

    Args:
        checkpoint: as `eps-train` wrote it; its dead blocks are shut.
        device: where it runs, in evaluation mode.

    Attributes:
        digest: of its checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.digest = checkpoint.digest
        self._model = checkpoint.build_gated().eval().requires_grad_(False).to(device)
        self._normalize = Normalize.of(checkpoint.data).to(device)

    @classmethod
    def load(cls, path: Path, data: DataIdentity, device: torch.device) -> Teacher:
        """Read a checkpoint that was trained on the classes and the image shape of `data`.

        Raises:
            FileFormatError: `path` is not a checkpoint.
            ConfigError: it is of other classes, image sizes or `--fit`.
        """
        checkpoint = Checkpoint.load(path)
        theirs = checkpoint.data
        if theirs.classes != data.classes:
            raise ConfigError(
                f"--teacher {path}: knows other classes ({_some(theirs.classes)}) than the data"
                f" ({_some(data.classes)}); give one that was trained on this data set"
            )
        if theirs.input_shape != data.input_shape:
            raise ConfigError(
                f"--teacher {path}: takes images of {_size(theirs.input_shape)}, not"
                f" {_size(data.input_shape)}; train one with the same --image-size"
            )
        if (fit := theirs.preprocessing.fit) != data.preprocessing.fit:
            raise ConfigError(
                f"--teacher {path}: was trained on images with --fit {fit}, not"
                f" {data.preprocessing.fit}; train one with the same --fit"
            )
        return cls(checkpoint, device)

    @property
    def state(self) -> dict[str, Tensor]:
        """All tensors of its network."""
        return dict(self._model.state_dict())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return logits `[N, classes]` for raw images uint8 `[N, C, H, W]`."""
        logits: Tensor = self._model(self._normalize(images))
        return logits


def _some(classes: tuple[str, ...]) -> str:
    return f"{len(classes)}: {', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''}"


def _size(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
