"""A step of the training: mixed labels, class weights, parts of a batch, and resuming with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eps_core.errors import ConfigError
from eps_train.data.images import ImageSet
from eps_train.training.step import GraphedStep, Teacher, balanced_weights
from eps_train.training.trainer import Stopped, Trainer
from tests.checkpoints import make_checkpoint
from tests.train.runs import PRUNING, digits, trainer

CPU = torch.device("cpu")
RANDOM: dict[str, Any] = {
    "model": "cifar:8x4",
    "epochs": 2,
    "batch_size": 192,
    "mixup": 0.4,
    "cutmix": 1.0,
    "random_erasing": 0.5,
    "label_smoothing": 0.1,
    "class_weights": "balanced",
    "accumulate": 2,
}


def batch(count: int = 32) -> ImageSet:
    train = digits().train
    return ImageSet(train.images[:count], train.labels[:count])


def gradients(run: Trainer) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in run.network.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def loss_of(run: Trainer, images: ImageSet) -> float:
    """Loss of a step at a learning rate of 0, without the side head."""
    run.network.train()
    return run.take_step(images)[0].item()


def test_mixed_labels_give_the_cross_entropy_of_both(tmp_path: Path) -> None:
    """With smoothing and weights, against the sum over the classes of each label."""
    smoothing, images = 0.1, batch()
    other = images.labels.roll(1)
    soft = 0.7 * F.one_hot(images.labels, 10) + 0.3 * F.one_hot(other, 10)
    changes: dict[str, Any] = {"lr_schedule": ((0, 0.0),), "aux_loss_weight": 0.0}
    run = trainer(tmp_path, **changes, label_smoothing=smoothing, class_weights="balanced")
    weights = balanced_weights(digits().train.labels, 10)
    run.network.train()
    with torch.no_grad():
        logits = run.network(run.normalize(images.images))[0]
    smoothed = (1 - smoothing) * soft + smoothing / 10
    expected = -(smoothed * weights * logits.log_softmax(1)).sum(1).mean()
    assert loss_of(run, ImageSet(images.images, soft)) == pytest.approx(expected.item(), rel=1e-5)
    plain = trainer(tmp_path, **changes)
    hard = loss_of(plain, images)
    assert loss_of(plain, ImageSet(images.images, F.one_hot(images.labels, 10).float())) == (
        pytest.approx(hard, rel=1e-5)
    )


def test_the_larger_share_of_a_mixed_label_is_the_correct_answer(tmp_path: Path) -> None:
    run = trainer(tmp_path, lr_schedule=((0, 0.0),))
    images = batch()
    run.network.train()
    with torch.no_grad():
        answers = run.network(run.normalize(images.images))[0].argmax(dim=1)
    soft = 0.6 * F.one_hot(answers, 10) + 0.4 * F.one_hot((answers + 1) % 10, 10)
    assert run.take_step(ImageSet(images.images, soft))[1] == len(images)


def test_a_teacher_sees_the_mixed_images(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watching(Teacher):
        def __call__(self, images: Tensor) -> Tensor:
            seen.append(images)
            return torch.zeros(len(images), 10)

    run = trainer(tmp_path, teacher=Watching(make_checkpoint(), CPU), mixup=1.0, accumulate=2)
    mixed = next(iter(run.batches.epoch(0, first=0)))
    run.network.train()
    run.take_step(mixed)
    assert torch.equal(torch.cat(seen), mixed.images)
    assert not torch.equal(mixed.images, mixed.images.round())


def test_balanced_weights_are_inverse_to_the_frequency() -> None:
    labels = torch.tensor([0] * 6 + [1] * 2)
    weights = balanced_weights(labels, 2)
    assert weights.tolist() == pytest.approx([8 / 12, 8 / 4])
    assert weights[labels].mean().item() == pytest.approx(1)
    assert balanced_weights(labels, 3).isfinite().all()


def test_parts_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    """Of two equal halves, whose batch norms compute what that of the whole batch does."""
    half = batch(16)
    doubled = ImageSet(half.images.repeat(2, 1, 1, 1), half.labels.repeat(2))
    whole, parts = trainer(tmp_path), trainer(tmp_path, accumulate=2)
    results = []
    for run in (whole, parts):
        run.pruner.begin_epoch()
        run.network.train()
        results.append(run.take_step(doubled))
    assert torch.allclose(results[0], results[1])
    theirs = gradients(whole)
    for name, gradient in gradients(parts).items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-3, atol=1e-6), name
    gates = [run.pruner.gates["stages.1.1"] for run in (whole, parts)]
    assert [int(gate.steps) for gate in gates] == [1, 2]
    assert gates[0].peak.item() == pytest.approx(gates[1].peak.item(), rel=1e-4)
    closed = [int(gate.closed_steps) for gate in gates]
    assert closed[1] == 2 * closed[0]


def test_an_uneven_batch_counts_every_image_alike(tmp_path: Path) -> None:
    run = trainer(tmp_path, accumulate=3, lr_schedule=((0, 0.0),))
    run.network.train()
    _, correct = run.take_step(batch(31)).tolist()
    assert correct == int(correct) <= 31
    assert {int(gate.steps) for gate in run.pruner.gates.values()} == {3}


@pytest.mark.parametrize(("size", "parts"), [(96, 5), (96, 64)])
def test_parts_that_do_not_fit_are_refused(size: int, parts: int) -> None:
    with pytest.raises(ConfigError, match=rf"--accumulate {parts}: a batch of {size} images"):
        replace(PRUNING, batch_size=size, accumulate=parts)


@pytest.mark.parametrize(("augmentation", "graphed"), [("shift", True), ("trivial", False)])
def test_a_run_stopped_in_an_epoch_goes_on_exactly(
    tmp_path: Path, torchvision_models: None, augmentation: str, graphed: bool
) -> None:
    """With all that is random; and from the buffers that a CUDA graph reads."""

    def made(folder: str, **options: Any) -> Trainer:
        run = trainer(tmp_path / folder, augmentation=augmentation, **RANDOM, **options)
        if graphed:
            run.take_step = GraphedStep(run.training_step, CPU)
        return run

    whole = made("whole")
    whole.run(lambda report: None)
    calls = iter(range(1, 1000))
    with pytest.raises(Stopped):
        made("stopped", stop=lambda: next(calls) == 9).run(lambda report: None)
    again = made("stopped")
    again.resume()
    assert again.step
    again.run(lambda report: None)
    theirs = whole.network.state_dict()
    for name, tensor in again.network.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
