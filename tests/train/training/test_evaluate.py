from __future__ import annotations

import pytest
import torch
from torch import nn

from eps_train.data.images import ImageSet
from eps_train.models.resnets import Normalize
from eps_train.training.evaluate import BATCH, logits, score


class Brightness(nn.Module):
    """Two classes: dark and bright."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


def test_score_counts_correct_answers_over_several_batches() -> None:
    count = 2 * BATCH + 3
    images = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    images[::2] = 255
    labels = torch.zeros(count, dtype=torch.int64)
    labels[::2] = 1
    labels[:10] = 1 - labels[:10]  # ten wrong answers
    result = score(Brightness(), Normalize([127.5], [50.0]), ImageSet(images, labels))
    assert result.samples == count
    assert result.accuracy == pytest.approx((count - 10) / count)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_mode_and_statistics_alone(training: bool) -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits(model, nn.Identity(), torch.rand(4, 1, 2, 2))
    assert model.training is training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
