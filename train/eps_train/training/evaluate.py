"""Evaluation of a network on a set of images, and the metrics of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eps_core.errors import DataError
from eps_train.data.images import Part
from eps_train.data.inputs import Batch
from eps_train.training.checkpoint import GateRecord

BATCH = 256


@dataclass(frozen=True, slots=True)
class Score:
    """Top-1 accuracy (0..1) and mean cross-entropy over `samples` images."""

    accuracy: float
    loss: float
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochMetrics:
    """Metrics of one epoch, of the network that would ship after it.

    Attributes:
        epoch: 1-based.
        lr, epsilon: learning rate and threshold of the epoch.
        loss, train_accuracy: means over the epoch's steps, in training mode.
        validation: on the validation part, without dead blocks and with live gates open.
        discarded: blocks whose gate was closed, averaged over the steps (a dead block counts as 1).
        died: blocks latched at the end of this epoch.
        gates: records of all gates after this epoch.
        parameters: learned parameters of the network without its dead blocks.
        best: whether the checkpoint of this epoch is the best one.
        seconds: wall time, without saving.
        images: training images seen.
    """

    epoch: int
    lr: float
    epsilon: float
    loss: float
    train_accuracy: float
    validation: Score
    discarded: float
    died: tuple[str, ...]
    gates: tuple[GateRecord, ...]
    parameters: int
    best: bool
    seconds: float
    images: int


@torch.no_grad()
def answers(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor | None]:
    """Run `model` on batches in evaluation mode; its mode is restored.

    Batches are moved to the device of the model; raises DataError where there is none.

    Returns:
        Logits float32 `[N, classes]`, and labels int64 `[N]` where the batches have them.
    """
    device = next((parameter.device for parameter in model.parameters()), None)
    training = model.training
    model.eval()
    found, labels = [], []
    try:
        for batch in batches:
            inputs, *rest = [batch] if isinstance(batch, Tensor) else batch
            found.append(model(inputs.to(device)).float())
            labels += [label.to(device) for label in rest[:1]]
    finally:
        model.train(training)
    if not found:
        raise DataError("heldout: yields no batch; give it images to judge blocks by")
    return torch.cat(found), torch.cat(labels) if labels else None


def logits(model: nn.Module, normalize: nn.Module, images: Tensor | Part) -> Tensor:
    """Logits float32 `[N, classes]` in evaluation mode; the model's mode is restored.

    `images` are uint8 `[N, C, H, W]`, or a part of a data set, read batch by batch; on the device
    of `model` and `normalize`.
    """
    return answers(model, NormalizedImages(normalize, images))[0]


@dataclass(frozen=True, slots=True)
class NormalizedImages:
    """Images as batches of a network's inputs, read anew in every pass; as for :func:`logits`."""

    normalize: nn.Module
    images: Tensor | Part

    def __iter__(self) -> Iterator[Tensor]:
        if isinstance(self.images, Tensor):
            yield from map(self.normalize, self.images.split(BATCH))
        else:
            yield from (self.normalize(batch.images) for batch in self.images.batches(BATCH))


def score(model: nn.Module, normalize: nn.Module, data: Part) -> Score:
    """Accuracy and loss of `model` on `data`, which is on the model's device or on disk."""
    found = logits(model, normalize, data)
    labels = data.labels.to(found.device)
    correct = int((found.argmax(dim=1) == labels).sum())
    return Score(correct / len(data), F.cross_entropy(found, labels).item(), len(data))
