"""Running a network over a set of images in evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eps_train.images import ImageSet

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
def logits(model: nn.Module, normalize: nn.Module, images: Tensor) -> Tensor:
    """Logits float32 `[N, classes]` of uint8 images `[N, C, H, W]`; leaves the mode as it was."""
    training = model.training
    model.eval()
    try:
        return torch.cat([model(normalize(batch)).float() for batch in images.split(BATCH)])
    finally:
        model.train(training)


def score(model: nn.Module, normalize: nn.Module, data: ImageSet) -> Score:
    """Accuracy and loss of `model` on `data`, which lies on the model's device."""
    answers = logits(model, normalize, data.images)
    correct = (answers.argmax(dim=1) == data.labels).double().mean().item()
    return Score(correct, F.cross_entropy(answers, data.labels).item(), len(data))
