"""Leaving blocks out from the middle of a pass, against networks rewritten without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from eps_compact.analysis.importance import WORST_LOSS, Predictions, leave_one_out_logits
from eps_train.data.downloads import import_torchvision
from eps_train.gating import rewriting
from eps_train.models.resnets import CifarResNet


def settled(model: nn.Module) -> nn.Module:
    """Batch norms as after training, so that every block has its say."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def own() -> fx.GraphModule:
    return rewriting.trace(settled(CifarResNet(depth=20, width=4)))


def in_place() -> fx.GraphModule:
    """ReLUs of torchvision work in place, on the sum that a gate returns."""
    import_torchvision()
    import torchvision

    return rewriting.insert_gates(settled(torchvision.models.resnet18(num_classes=10)))


class Branching(nn.Module):
    """What lies before a block is needed behind it too, and overwritten there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        early = self.stem(x)
        left = early.narrow(3, 0, 4)
        out = early + self.first(early)
        out = out.relu_() + self.second(out)
        early += 1
        return torch.cat([out.mean((2, 3)), early.mean((2, 3)), left.mean((2, 3))], 1)


def branching() -> fx.GraphModule:
    torch.manual_seed(0)
    # Autograd refuses the step that overwrites; evaluation does not.
    return rewriting.insert_gates(Branching().eval().requires_grad_(False))


@pytest.mark.parametrize("factory", [own, in_place, branching])
def test_logits_are_those_of_the_rewritten_network(factory: Callable[[], fx.GraphModule]) -> None:
    model = factory()
    images = torch.randn(5, 3, 32, 32)
    found = dict(leave_one_out_logits(model, images))
    assert list(found) == [*rewriting.gates(model), None]
    with torch.no_grad():
        for block in rewriting.gates(model):
            assert torch.equal(found[block], rewriting.remove_blocks(model, [block])(images)), block
        assert torch.equal(found[None], model(images))
    assert len({tuple(answer.flatten().tolist()) for answer in found.values()}) == len(found)


def test_what_precedes_a_block_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving out each of nine blocks costs about half of nine passes besides the whole one."""
    model, steps = own(), 0
    run_node = fx.Interpreter.run_node

    def counted(self: fx.Interpreter, node: fx.Node) -> object:
        nonlocal steps
        steps += 1
        return run_node(self, node)

    monkeypatch.setattr(fx.Interpreter, "run_node", counted)
    assert len(list(leave_one_out_logits(model, torch.randn(1, 3, 32, 32)))) == 1 + 9
    passes = steps / len(model.graph.nodes)
    assert 1 + 9 * 0.4 < passes < 1 + 9 * 0.6


def test_an_answer_that_is_no_number_is_the_worst_there_is() -> None:
    """One such block must not make the table, or JSON, unreadable."""
    answers = Predictions()
    answers.add(
        torch.tensor([[0.0, torch.nan], [0.0, torch.inf], [9.0, 0.0]]), torch.zeros(3).long()
    )
    assert answers.loss.tolist()[:2] == [WORST_LOSS, WORST_LOSS]
    assert answers.loss[2] < 1e-3
