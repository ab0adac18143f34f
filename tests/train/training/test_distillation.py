"""Distillation: the loss against its definition, and which teachers are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eps_core.errors import ConfigError, FileFormatError
from eps_train.models.resnets import Normalize
from eps_train.training.evaluate import logits
from eps_train.training.step import Teacher, distillation_loss
from tests.checkpoints import make_checkpoint
from tests.train.runs import PRUNING, digits, trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_is_the_divergence_from_the_teacher(temperature: float) -> None:
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (torch.softmax(x / temperature, 1) for x in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    found = distillation_loss(student, teacher, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


def test_gradient_at_high_temperature_is_that_of_squared_logits() -> None:
    """For T to infinity it goes to `(student - teacher) / classes`, centred logits (the paper)."""
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    student, teacher = (x - x.mean(1, keepdim=True) for x in (student, teacher))
    student.requires_grad_()
    distillation_loss(student, teacher, 1000.0).backward()
    assert student.grad is not None
    expected = (student.detach() - teacher) / 6 / 4
    assert torch.allclose(student.grad, expected, rtol=0.01, atol=1e-4)


def test_teacher_gets_no_gradient() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    distillation_loss(student, teacher, 2.0).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_teacher_gives_the_logits_of_its_checkpoint() -> None:
    checkpoint = make_checkpoint()
    images = torch.randint(0, 256, (4, *checkpoint.data.input_shape), dtype=torch.uint8)
    teacher = Teacher(checkpoint, CPU)
    expected = logits(checkpoint.build_gated(), Normalize.of(checkpoint.data), images)
    found = teacher(images)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not found.requires_grad


def test_a_teacher_of_other_data_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    checkpoint.save(tmp_path / "baseline.pt")
    data = checkpoint.data
    Teacher.load(tmp_path / "baseline.pt", data, CPU)
    with pytest.raises(ConfigError, match=r"baseline.pt: knows other classes .* data set$"):
        Teacher.load(tmp_path / "baseline.pt", replace(data, classes=data.classes[1:]), CPU)
    shape = replace(data.preprocessing, resize=(9, 9), crop=(9, 9))
    with pytest.raises(ConfigError, match=r"baseline.pt: takes images of 1x8x8, not 1x9x9; .*size"):
        Teacher.load(tmp_path / "baseline.pt", replace(data, preprocessing=shape), CPU)
    boxed = replace(data, preprocessing=replace(data.preprocessing, fit="letterbox"))
    with pytest.raises(ConfigError, match=r"baseline.pt: was trained .* --fit crop, not letterbox"):
        Teacher.load(tmp_path / "baseline.pt", boxed, CPU)
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(FileFormatError, match=r"text\.pt"):
        Teacher.load(tmp_path / "text.pt", data, CPU)


def test_without_weight_nothing_changes_and_with_it_the_logits_follow(tmp_path: Path) -> None:
    reference = teacher = Teacher(make_checkpoint(depth=8), CPU)
    images = digits().validation

    def trained(name: str, teacher: Teacher | None, **changes: Any) -> tuple[Tensor, float]:
        run = trainer(tmp_path / name, PRUNING, epsilon=0.0, epochs=2, teacher=teacher, **changes)
        run.run_epoch()
        found = logits(run.model, run.normalize, images)
        assert teacher is None or run.checkpoint().metrics["teacher"] == teacher.digest
        expected = reference(images.images)
        return found, distillation_loss(found, expected, 4.0).item()

    alone, apart = trained("alone", None)
    same, _ = trained("same", teacher, distillation_weight=0.0)
    assert torch.equal(alone, same)
    _, near = trained("led", teacher, distillation_weight=1.0)
    assert near < apart


def test_a_resumed_run_needs_its_teacher(tmp_path: Path) -> None:
    teacher = Teacher(make_checkpoint(depth=8), CPU)
    teacher.digest = "1234"
    first = trainer(tmp_path, teacher=teacher)
    first.save(first.run_epoch())
    with pytest.raises(ConfigError, match=r"another teacher, or none; name its teacher with --tea"):
        trainer(tmp_path).resume()
    trainer(tmp_path, teacher=teacher).resume()
