"""Batch norms vanish into convolutions where that is exact algebra, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from eps_compact import compact
from eps_train.data.downloads import import_torchvision
from eps_train.gating import rewriting
from eps_train.gating.folding import BatchNorms, Pair, fold, refold, unfolded_state
from tests.checkpoints import make_checkpoint

BOUND = 2e-6  # of these networks, which are shallow


def lively(model: nn.Module) -> fx.GraphModule:
    """As a graph, in evaluation mode, with batch norms that have seen something."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, BatchNorms):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.normal_(generator=generator)
            if module.running_var is not None:
                module.running_var.uniform_(0.01, 4, generator=generator)
    return rewriting.trace(model.eval())


def check(model: nn.Module, x: Tensor, pairs: list[tuple[str, str]]) -> fx.GraphModule:
    traced = lively(model)
    before = {name: tensor.clone() for name, tensor in traced.state_dict().items()}
    with torch.no_grad():
        expected = traced(x)
        folded, found = fold(traced)
        assert [tuple(pair) for pair in found] == pairs
        answers = folded(x)
        torch.testing.assert_close(
            answers, expected, rtol=0, atol=BOUND * expected.abs().max().item()
        )
        assert torch.equal(traced(x), expected), "the original is left as it was"
    assert all(torch.equal(before[name], t) for name, t in traced.state_dict().items())
    return folded


def images(channels: int = 4) -> Tensor:
    return torch.randn(3, channels, 9, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"bias": True},
        {"padding_mode": "reflect"},
        {"padding_mode": "circular"},
        {"padding_mode": "replicate"},
        {"groups": 2},
        {"groups": 4},
        {"stride": 2, "dilation": 2},
        {"padding": "same"},
    ],
    ids=str,
)
def test_a_convolution_and_the_batch_norm_behind_it(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 8, 3, **{"padding": 1, **options})
    folded = check(nn.Sequential(conv, nn.BatchNorm2d(8)), images(), [("0", "1")])
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]
    found = folded.get_submodule("0")
    assert isinstance(found, nn.Conv2d)
    assert found.padding_mode == conv.padding_mode


@pytest.mark.parametrize(
    ("conv", "norm", "x"),
    [
        (nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), torch.randn(3, 4, 9)),
        (nn.Conv3d(4, 8, 2), nn.BatchNorm3d(8), torch.randn(2, 4, 4, 4, 4)),
        (nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8, affine=False), images()),
    ],
)
def test_other_dimensions_and_no_weights(conv: nn.Module, norm: nn.Module, x: Tensor) -> None:
    check(nn.Sequential(conv, norm), x, [("0", "1")])


def test_what_does_nothing_goes_first() -> None:
    layers = [nn.Conv2d(4, 8, 1), nn.Identity(), nn.Dropout(0.5), nn.BatchNorm2d(8), nn.Identity()]
    folded = check(nn.Sequential(*layers), images(), [("0", "3")])
    assert [name for name, _ in folded.named_children()] == ["0"]


class Activated(nn.BatchNorm2d):
    """As libraries have it: a batch norm with an activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3)],
        [nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1)],
        [nn.Conv2d(4, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)],
        [nn.Conv2d(4, 8, 3), Activated(8)],
        [nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)],
        [nn.Conv2d(4, 8, 3), nn.InstanceNorm2d(8)],
        [nn.ConvTranspose2d(4, 8, 3), nn.BatchNorm2d(8)],
    ],
    ids=lambda layers: "-".join(type(layer).__name__ for layer in layers),
)
def test_what_does_not_fold(layers: list[nn.Module]) -> None:
    check(nn.Sequential(*layers), images(), [])


class Steps(nn.Module):
    """A convolution and a batch norm, used as `steps` says."""

    def __init__(self, steps: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def twice(net: Any, x: Tensor) -> Tensor:
    out: Tensor = net.norm(net.conv(net.conv(x)))
    return out


def answer_used(net: Any, x: Tensor) -> Tensor:
    seen = net.conv(x)
    out: Tensor = net.norm(seen) + seen
    return out


def weight_read(net: Any, x: Tensor) -> Tensor:
    out: Tensor = net.norm(net.conv(x)) + net.conv.weight.sum()
    return out


def after_addition(net: Any, x: Tensor) -> Tensor:
    out: Tensor = net.norm(x + net.conv(x))
    return out


@pytest.mark.parametrize("steps", [twice, answer_used, weight_read, after_addition])
def test_what_others_look_at_does_not_fold(steps: Callable[[Any, Tensor], Tensor]) -> None:
    check(Steps(steps), images(), [])


def test_one_batch_norm_behind_two_convolutions() -> None:
    def shared(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.norm(net.conv(x)) + net.norm(net.other(x))
        return out

    folded = check(Steps(shared), images(), [("conv", "norm"), ("other", "norm")])
    assert not any(name.startswith("norm") for name in folded.state_dict())


def test_a_batch_norm_that_is_used_elsewhere_too_stays() -> None:
    def both(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.norm(net.conv(net.norm(x)))
        return out

    folded = check(Steps(both), images(), [("conv", "norm")])
    assert "norm.running_var" in folded.state_dict()


def test_weights_that_two_convolutions_share_do_not_fold() -> None:
    def in_turn(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.norm(net.conv(net.other(x)))
        return out

    model = Steps(in_turn)
    model.other.weight = model.conv.weight
    check(model, images(), [])


def with_activation(**options: Any) -> nn.Module:
    import_torchvision()  # which timm imports
    from timm.layers.norm_act import BatchNormAct2d

    return BatchNormAct2d(8, **options)


def test_of_a_batch_norm_with_an_activation_the_activation_stays() -> None:
    layers = nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False),
        with_activation(act_layer=nn.SiLU),
        nn.Conv2d(8, 8, 1),
        with_activation(apply_act=False),
    )
    folded = check(layers, images(), [("0", "1"), ("2", "3")])
    assert isinstance(folded.get_submodule("1"), nn.SiLU)
    assert sorted(folded.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    model = lively(layers)
    pairs = fold(model)[1]
    again = lively(layers)
    filled = unfolded_state(folded.state_dict(), pairs)
    again.load_state_dict({name: filled[name] for name in again.state_dict()})
    refold(again, pairs, folded.state_dict())
    assert torch.equal(again(images()), folded(images()))


def test_an_activation_with_numbers_of_its_own_does_not_fold() -> None:
    check(nn.Sequential(nn.Conv2d(4, 8, 3), with_activation(act_layer=nn.PReLU)), images(), [])


def test_a_batch_norm_with_an_activation_behind_two_convolutions_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1)
            self.norm = with_activation()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(self.b(self.norm(self.a(x))))
            return found

    check(Twice(), images(), [])


def test_hooks_do_not_fold() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    check(model, images(), [])


def test_a_spectral_norm_is_no_plain_convolution() -> None:
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 1))
    check(nn.Sequential(conv, nn.BatchNorm2d(8)), images(), [])


def test_our_networks() -> None:
    """In pre-activation networks that is the stem, and the inner batch norm of each block."""
    checkpoint = make_checkpoint(dead=("stages.0.1", "stages.1.0"), depth=14)
    plain = compact(checkpoint.build_gated())
    folded, pairs = fold(plain)
    assert pairs == (
        Pair("stem.0", "stem.1"),
        *(
            Pair(f"stages.{block}.conv1", f"stages.{block}.bn2")
            for block in ("0.0", "1.1", "2.0", "2.1")
        ),
    )
    norms = [name for name, module in folded.named_modules() if isinstance(module, BatchNorms)]
    assert norms == ["stages.1.1.bn1", "stages.2.0.bn1", "stages.2.1.bn1", "head.0"]
    again, none = fold(folded)
    assert none == ()
    assert again.code == folded.code


def test_refolding_gives_the_same_network_back() -> None:
    plain = compact(make_checkpoint(depth=8).build_gated())
    folded, pairs = fold(plain)
    state = folded.state_dict()
    filled = unfolded_state(state, pairs)
    fresh = compact(make_checkpoint(depth=8, seed=3).build_gated())
    fresh.load_state_dict({name: filled[name] for name in fresh.state_dict()})
    refold(fresh, pairs, state)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(fresh(x), folded(x))
    assert fresh.code == folded.code
    assert all(fresh.state_dict()[n].data_ptr() != t.data_ptr() for n, t in state.items())


def test_numbers_are_rounded_once() -> None:
    """Each folded weight is the float32 that is nearest to the exact product."""
    conv, norm = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.25)
    model = lively(nn.Sequential(conv, norm))
    folded, _ = fold(model)
    scale = norm.weight.double() / (norm.running_var.double() + 0.25).sqrt()  # type: ignore[union-attr]
    assert folded.state_dict()["0.weight"].item() == (conv.weight.double() * scale).float().item()
