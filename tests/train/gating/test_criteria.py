"""Criteria of block importance: their values against definitions, and that they only observe."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eps_train.config import choices
from eps_train.gating import rewriting
from eps_train.gating.gate import relative_response
from eps_train.gating.pruning_state import BlockScores, gate_gradient
from tests.train.gating.networks import gated

CRITERIA = [name for name in choices("criterion") if name != "response"]
IMAGES, LABELS = torch.randn(6, 3, 8, 8), torch.arange(6) % 4


def step(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    loss = F.cross_entropy(model(images), LABELS)
    loss.backward()
    return loss.detach()


class Scaled(nn.Module):
    """`shortcut + w branch` in the place of a gate."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return shortcut + self.weight * branch


def test_gate_gradient_is_the_derivative_of_the_loss() -> None:
    """Against a central difference of the loss in float64, and against autograd."""
    model = gated(seed=1).double().train()
    images = IMAGES.double()
    scores = BlockScores(model, "gradient")
    step(model, images)
    found = scores.read()
    assert found.keys() == rewriting.gates(model).keys()
    for block in found:

        def loss(weight: Tensor, block: str = block) -> Tensor:
            scaled = copy.deepcopy(model)
            scaled.set_submodule(f"{block}.gate", Scaled(weight))
            return F.cross_entropy(scaled(images), LABELS)

        one = torch.ones((), dtype=torch.float64)
        weight = one.clone().requires_grad_()
        (exact,) = torch.autograd.grad(loss(weight), weight)
        h = 1e-5
        difference = (loss(one + h) - loss(one - h)) / (2 * h)
        assert found[block] == pytest.approx(abs(exact.item()), rel=1e-4)
        assert exact.item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_change_nothing_of_a_step(criterion: str) -> None:
    plain = gated(seed=2).train()
    observed = copy.deepcopy(plain)
    scores = BlockScores(observed, criterion)
    assert torch.equal(step(plain), step(observed))
    theirs = dict(plain.named_parameters())
    for name, parameter in observed.named_parameters():
        grad = theirs[name].grad
        assert parameter.grad is not None
        assert grad is not None
        assert torch.equal(parameter.grad, grad)
    assert scores.read().keys() == rewriting.gates(plain).keys()


def test_scores_are_means_over_the_steps_and_start_anew() -> None:
    model = gated(seed=3).train()
    halves = []
    for images in (IMAGES, 2 * IMAGES):
        scores = BlockScores(copy.deepcopy(model), "relative")
        step(scores._model, images)
        halves.append(scores.read())
    scores = BlockScores(model, "relative")
    # Batch statistics decide in training, so that the second step is as if it were the first.
    step(model, IMAGES), step(model, 2 * IMAGES)
    both = scores.read()
    for block, value in both.items():
        assert value == pytest.approx((halves[0][block] + halves[1][block]) / 2, rel=1e-5)
    assert set(scores.read().values()) == {0.0}


def test_evaluation_does_not_count() -> None:
    model = gated().eval()
    scores = BlockScores(model, "influence")
    model(IMAGES)
    assert set(scores.read().values()) == {0.0}


def test_relative_response_has_no_scale() -> None:
    shortcut, branch = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = branch.abs().max() / shortcut.square().mean().sqrt()
    assert relative_response(shortcut, branch) == pytest.approx(expected.item(), rel=1e-5)
    scaled = relative_response(1000 * shortcut, 1000 * branch)
    assert scaled == pytest.approx(expected.item(), rel=1e-5)
    assert relative_response(shortcut, torch.zeros_like(branch)) == 0
    zeros = torch.zeros_like(shortcut)
    assert relative_response(zeros, zeros) == 0
    assert 1e10 < relative_response(zeros, branch).item() < math.inf


def test_influence_is_one_minus_the_cosine() -> None:
    model = gated(seed=4).train()
    scores = BlockScores(model, "influence")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for block, gate in rewriting.gates(model).items():
        gate.register_forward_hook(
            lambda _, given, result, block=block: seen.update({block: (given[0], result)})
        )
    step(model)
    for block, value in scores.read().items():
        x, h = (tensor.flatten(1) for tensor in seen[block])
        cosine = (x * h).sum(1) / (x.norm(dim=1) * h.norm(dim=1))
        assert value == pytest.approx(1 - cosine.mean().item(), abs=1e-5)


def test_l1_is_the_mean_weight_of_the_branch() -> None:
    model = gated(seed=5)
    block = "stages.1.1"
    for name in ("conv1", "conv2"):
        conv = model.get_submodule(f"{block}.{name}")
        assert isinstance(conv, nn.Conv2d)
        nn.init.constant_(conv.weight, -0.25)
    assert BlockScores(model, "l1").read()[block] == pytest.approx(0.25)


def test_random_is_an_order_from_the_seed() -> None:
    model = gated()
    one, other = (BlockScores(model, "random", seed=seed).read() for seed in (0, 1))
    assert one != other
    assert BlockScores(model, "random", seed=0).read() == one
    assert sorted(one.values()) == [float(place) for place in range(len(one))]


def test_a_removed_block_is_no_longer_observed() -> None:
    model = gated().train()
    scores = BlockScores(model, "gradient")
    left = rewriting.remove_blocks(model, ["stages.0.1"])
    scores.observe(left)
    step(left)
    found = scores.read()
    assert found.keys() == rewriting.gates(left).keys()
    assert all(value > 0 for value in found.values())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gate_gradient_in_either_memory_format(memory_format: torch.memory_format) -> None:
    branch, gradient = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = (branch * gradient).sum().item()
    laid = branch.contiguous(memory_format=memory_format)
    assert gate_gradient(laid, gradient).item() == pytest.approx(expected, abs=1e-4)
    assert gate_gradient(laid, gradient.contiguous(memory_format=memory_format)).item() == (
        pytest.approx(expected, abs=1e-4)
    )


def test_measurements_of_an_epoch_can_be_resumed() -> None:
    model = gated(seed=6).train()
    scores = BlockScores(model, "gradient")
    step(model)
    resumed = BlockScores(copy.deepcopy(model), "gradient")
    resumed.load_state_dict(scores.state_dict())
    assert resumed.read() == scores.read()
