"""A graph that answers as its network does, in training and in evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eps_core.errors import GraphError
from eps_train.gating import rewriting
from eps_train.gating.tracing import ByMode, trace


class WideBlock(nn.Module):
    """Dropout as a function, between the layers of a block: the mode is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out = F.dropout(self.one(x), 0.5, self.training)
        out = F.dropout(self.two(out).relu(), p=0.5, training=self.training)
        return x + out


class DropPath(nn.Module):
    """Decides by its mode, and by a number drawn at random."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = x.new_empty(len(x), 1).bernoulli_(0.5)
        return x * kept


class CountingNorm(nn.BatchNorm1d):
    """A layer of torch's, with something after it, and with a step that only training takes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.after = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        out: Tensor = self.after(super().forward(x))
        return out


class Lucky(nn.Module):
    """A block that its own mode switches off: its addition cannot be told from here."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x
        out: Tensor = x + self.one(x)
        return out


class Network(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(8, 8), middle, nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x) * scale
        if mask is not None:
            x = x * mask
        x = self.middle(x)
        x = F.dropout(x, training=self.training)
        out: Tensor = self.head(x)
        return out


def answer(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    out: Tensor = model(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
    return out


@pytest.mark.parametrize("middle", [WideBlock(), DropPath(), CountingNorm(8), Lucky()])
@pytest.mark.parametrize("training", [True, False])
def test_switches_as_the_network_does(middle: nn.Module, training: bool) -> None:
    model = Network(copy.deepcopy(middle)).train(training)
    traced = trace(copy.deepcopy(model))
    again = copy.deepcopy(traced)
    for mode in (training, not training, training):
        model.train(mode)
        expected = answer(model)
        assert torch.equal(answer(traced.train(mode)), expected)
        assert torch.equal(answer(again.train(mode)), expected)
    for key, tensor in model.state_dict().items():
        assert torch.equal(traced.state_dict()[key], tensor), key


def test_tracing_leaves_modes_and_tensors_alone() -> None:
    model = Network(CountingNorm(8)).train()
    model.middle.eval()  # a frozen part
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    traced = trace(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not traced.get_submodule("middle").training


def test_blocks_with_functional_dropout_get_their_gate() -> None:
    model = Network(WideBlock())
    gated = rewriting.insert_gates(copy.deepcopy(model))
    assert list(rewriting.gates(gated)) == ["middle"]
    assert sum(isinstance(module, ByMode) for module in gated.modules()) == 3
    for training in (True, False, True):
        assert torch.equal(answer(gated.train(training)), answer(model.train(training)))
    left = rewriting.remove_blocks(gated, ["middle"])
    assert sum(isinstance(module, ByMode) for module in left.modules()) == 1


class OtherPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(x) if self.training else x


def test_a_network_that_takes_other_paths_in_training_is_refused() -> None:
    with pytest.raises(GraphError, match=r"^OtherPaths: .*other paths in training than in eval"):
        trace(OtherPaths())
    model = OtherPaths().eval()
    x = torch.randn(2, 8)
    assert torch.equal(trace(model, one_mode=True)(x), x)


class Unused(nn.Module):
    def forward(self, x: Tensor, flag: bool = False, *, extra: Tensor | None = None) -> Tensor:
        return x if extra is None and not flag else -x


def test_optional_arguments_are_fixed() -> None:
    traced = trace(Unused())
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "output"]


def test_the_reason_is_one_line() -> None:
    class Looping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                raise ValueError("two\nlines")
            return x

    with pytest.raises(GraphError) as error:
        trace(Looping())
    assert "\n" not in str(error.value)


class Augmenting(nn.Module):
    """Operators that work in place, on a tensor that is read afterwards under another name."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x = x * 2
        x += 1
        x -= 0.5
        x *= 3
        x /= 7
        size = x.size(0)
        size *= 2
        return torch.cat([kept, x]).reshape(size, -1)


def test_operators_in_place_stay_in_place() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(trace(Augmenting())(x), Augmenting()(x))
