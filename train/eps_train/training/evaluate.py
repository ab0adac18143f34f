"""Running a network over a set of images in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eps_train.data.images import Part

BATCH = 256


@dataclass(frozen=True, slots=True)
class Score:
    """Top-1 accuracy (0..1) and mean cross-entropy over `samples` images."""

    accuracy: float
    loss: float
    samples: int

    def to_dict(self) -> dict[str, float | int]:
        return {"accuracy": self.accuracy, "loss": self.loss, "samples": self.samples}


@torch.no_grad()
def logits(model: nn.Module, normalize: nn.Module, images: Tensor | Part) -> Tensor:
    """Logits float32 `[N, classes]`; leaves the mode as it was.

    Args:
        model, normalize: from images to logits, both on one device.
        images: uint8 `[N, C, H, W]`, or a part of a data set, read as it goes; on that device.
    """
    if isinstance(images, Tensor):
        pixels: Iterable[Tensor] = images.split(BATCH)
    else:
        pixels = (batch.images for batch in images.batches(BATCH))
    training = model.training
    model.eval()
    try:
        return torch.cat([model(normalize(batch)).float() for batch in pixels])
    finally:
        model.train(training)


def score(model: nn.Module, normalize: nn.Module, data: Part) -> Score:
    """Accuracy and loss of `model` on `data`, which lies on the model's device or on disk."""
    answers = logits(model, normalize, data)
    labels = data.labels.to(answers.device)
    correct = int((answers.argmax(dim=1) == labels).sum())
    return Score(correct / len(data), F.cross_entropy(answers, labels).item(), len(data))
