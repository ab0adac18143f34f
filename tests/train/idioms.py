"""Ways to write a residual network, each with the gates that it should get.

`None` stands for a network that has to be refused. What a block's body has at hand: convolutions
`c` and `d`, norms `n` and `m`, a scale by channel `g`, a scalar `a`, an activation in place.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Body = Callable[[Any, Tensor], Any]


class Block(nn.Module):
    def __init__(self, body: Body | None = None) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.n, self.m = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.g, self.a = nn.Parameter(torch.full((8, 1, 1), 0.5)), nn.Parameter(torch.tensor(0.3))
        self.r, self.i, self.drop = nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.0)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        assert self.body is not None
        return self.body(self, x)


def network(*blocks: nn.Module) -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(stem, *blocks, pool, nn.Linear(8, 3))


def twice(body: Body) -> Callable[[], nn.Module]:
    return lambda: network(Block(body), Block(body))


def _iadd(s: Any, x: Tensor) -> Any:
    out: Tensor = s.n(s.c(x))
    out += x
    return s.r(out)


def _into_shortcut(s: Any, x: Tensor) -> Any:
    x = x * 1.5
    x += s.c(x)
    return x


def _held_view(s: Any, x: Tensor) -> Any:
    out = s.c(x)
    view = out.flatten(2)
    out += x
    return F.relu(out) * view.mean(-1)[..., None, None]


def _held_dropout(s: Any, x: Tensor) -> Any:
    out = s.c(x)
    kept = s.drop(out)
    out += x
    return F.relu(out) + 0.5 * kept


def _asserting(s: Any, x: Tensor) -> Any:
    out = s.c(x)
    torch._assert(out.shape[1] == 8, "eight channels")
    return x + out


def _no_grad(s: Any, x: Tensor) -> Any:
    with torch.no_grad():
        return F.relu(x + s.c(x))


def _autocast(s: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        out = s.c(x)
    return x + out.float()


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class StraightThrough(nn.Module):
    def forward(self, x: Tensor) -> Any:
        rounded: Tensor = Round.apply(x * 4)  # type: ignore[no-untyped-call]
        return rounded / 4


def _stochastic(s: Any, x: Tensor) -> Any:
    if s.training and random.random() < 0.3:
        return x
    return x + s.c(x)


def _stochastic_torch(s: Any, x: Tensor) -> Any:
    if s.training and torch.rand(1).item() < 0.3:
        return x
    return x + s.n(s.c(x))


def _survival(s: Any, x: Tensor) -> Any:
    if s.training:
        keep = torch.bernoulli(torch.tensor(0.7)).item()
        return x + s.c(x) if keep else x
    return x + 0.7 * s.c(x)


def _counting(s: Any, x: Tensor) -> Any:
    s.steps = getattr(s, "steps", 0) + 1
    return x + s.c(x)


def _saving(s: Any, x: Tensor) -> Any:
    s.seen = s.c(x)
    return x + s.seen


def _concat(s: Any, x: Tensor) -> Any:
    one, two = x.chunk(2, dim=1)
    return torch.cat([one, two + s.c(x)[:, :4]], dim=1)


def _split_heads(s: Any, x: Tensor) -> Any:
    n, c, h, w = x.shape
    out = s.c(x).reshape(n, c, h * w).transpose(1, 2).softmax(-1).transpose(1, 2).view(n, c, h, w)
    return x + out


def _dense(s: Any, x: Tensor) -> Any:
    y = x + s.c(x)
    return y + s.d(y) + x


def _squeeze(s: Any, x: Tensor) -> Any:
    out = s.c(x)
    return x + out * s.d(out).mean((2, 3), keepdim=True).sigmoid()


def _list_sum(s: Any, x: Tensor) -> Any:
    return sum([s.c(x), s.d(x)], x)


def _weights_off(s: Any, x: Tensor) -> Any:
    if s.a > 0:
        return x + s.c(x)
    return x


def _channels_last(s: Any, x: Tensor) -> Any:
    out = x.permute(0, 2, 3, 1) + s.c(x).permute(0, 2, 3, 1)
    return out.permute(0, 3, 1, 2)


BODIES: dict[str, tuple[int | None, Body]] = {
    "plus": (2, lambda s, x: x + s.c(x)),
    "plus, branch first": (2, lambda s, x: s.c(x) + x),
    "norm and activation": (2, lambda s, x: F.relu(x + s.n(s.c(x)))),
    "pre-activation": (2, lambda s, x: x + s.c(F.relu(s.n(x)))),
    "two layers": (2, lambda s, x: x + s.d(F.relu(s.n(s.c(x))))),
    "activation in place behind": (2, lambda s, x: s.r(x + s.n(s.c(x)))),
    "activation in place before": (2, lambda s, x: x + s.c(s.r(x * 1.0))),
    "in place": (2, _iadd),
    "in place into the shortcut": (2, _into_shortcut),
    "in place, held by a view": (None, _held_view),
    "in place, held by a dropout": (None, _held_dropout),
    "add_": (2, lambda s, x: s.c(x).add_(x)),
    "torch.add": (2, lambda s, x: torch.add(x, s.c(x))),
    "torch.add, named": (2, lambda s, x: torch.add(input=x, other=s.c(x))),
    "torch.add, alpha": (2, lambda s, x: torch.add(x, s.c(x), alpha=0.5)),
    "add, alpha": (2, lambda s, x: x.add(s.n(s.c(x)), alpha=0.2)),
    "aten.add": (2, lambda s, x: torch.ops.aten.add(x, s.c(x))),
    "minus": (2, lambda s, x: x - s.c(x)),
    "torch.sub": (2, lambda s, x: torch.sub(x, s.c(x))),
    "torch.sub, alpha": (2, lambda s, x: torch.sub(x, s.c(x), alpha=0.5)),
    "minus the shortcut": (None, lambda s, x: s.c(x) - x),
    "addcmul": (2, lambda s, x: torch.addcmul(x, s.g, s.c(x))),
    "addcmul, value": (2, lambda s, x: torch.addcmul(x, s.g, s.c(x), value=0.5)),
    "lerp": (2, lambda s, x: torch.lerp(x, s.c(x), 0.3)),
    "lerp, learned": (2, lambda s, x: torch.lerp(x, s.c(x), s.a)),
    "lerp, method": (2, lambda s, x: x.lerp(s.n(s.c(x)), 0.25)),
    "factor": (2, lambda s, x: x + 0.5 * s.c(x)),
    "scale by channel": (2, lambda s, x: x + s.g * s.c(x)),
    "scalar (ReZero)": (2, lambda s, x: x + s.a * s.c(x)),
    "gated": (2, lambda s, x: x + s.c(x) * s.d(x).sigmoid()),
    "highway": (2, lambda s, x: x + s.d(x).sigmoid() * (s.c(x) - x)),
    "squeeze and excite": (2, _squeeze),
    "two in one module": (4, lambda s, x: (y := x + s.c(x)) + s.d(y)),
    "sum of three": (4, lambda s, x: x + s.c(x) + s.d(x)),
    "built-in sum": (4, _list_sum),
    "across two": (6, _dense),
    "dropout": (2, lambda s, x: x + F.dropout(s.c(x), 0.3, s.training)),
    "dropout that is off": (2, lambda s, x: x + s.drop(s.c(x))),
    "stochastic depth": (2, _stochastic),
    "stochastic depth, torch": (2, _stochastic_torch),
    "stochastic depth, survival": (2, _survival),
    "factor by mode": (2, lambda s, x: x + (1.0 if s.training else 0.8) * s.c(x)),
    "mode as a factor": (2, lambda s, x: x + s.c(x) + 0.1 * s.training),
    "noise": (2, lambda s, x: x + s.c(x) + 0.1 * torch.randn_like(x) * s.training),
    "assertion": (2, _asserting),
    "checkpointed": (2, lambda s, x: x + checkpoint(s.c, x, use_reentrant=False)),
    "detached shortcut": (2, lambda s, x: x.detach() + s.c(x)),
    "no_grad": (None, _no_grad),
    "autocast": (None, _autocast),
    "counter": (2, _counting),
    "saves what it saw": (2, _saving),
    "control flow on numbers": (None, _weights_off),
    "concatenated": (2, _concat),
    "reshaped": (2, _split_heads),
    "padded shortcut": (2, lambda s, x: F.pad(x, (1, 1, 1, 1)) + F.pad(s.c(x), (1, 1, 1, 1))),
    "pooled": (2, lambda s, x: F.avg_pool2d(x, 2) + F.max_pool2d(s.c(x), 2)),
    "broadcast, pooled": (None, lambda s, x: x.mean((2, 3), keepdim=True) + s.c(x)),
    "broadcast, channels": (None, lambda s, x: x.mean(1, keepdim=True) + s.c(x)),
    "broadcast branch": (2, lambda s, x: x + s.c(x).mean((2, 3), keepdim=True)),
    "position": (
        2,
        lambda s, x: x + s.c(x) + F.interpolate(s.g[None], size=x.shape[-2:]),
    ),
    "position alone": (None, lambda s, x: s.c(x) + F.interpolate(s.g[None], size=x.shape[-2:])),
    "learned bias": (None, lambda s, x: s.c(x) + s.g),
    "of its size alone": (None, lambda s, x: s.c(x) + torch.arange(x.shape[-1]) * s.a),
    "no shortcut": (None, lambda s, x: s.c(x) + s.d(x)),
    "stacked": (None, lambda s, x: torch.stack([x, s.c(x)]).sum(0)),
    "einsum": (2, lambda s, x: x + torch.einsum("nchw,c->nchw", s.c(x), s.g[:, 0, 0])),
    "identity between": (2, lambda s, x: s.i(x) + s.i(s.c(x))),
    "out of float64": (2, lambda s, x: x + s.c(x).double().float()),
    "functional": (2, lambda s, x: x + F.conv2d(x, s.c.weight, s.c.bias, padding=1)),
    "weight norm by hand": (
        2,
        lambda s, x: x + F.conv2d(x, s.c.weight / s.c.weight.norm(), None, padding=1),
    ),
    "shared layer": (2, lambda s, x: x + s.c(F.relu(s.c(x)))),
    "deep branch": (2, lambda s, x: x + s.n(s.d(s.m(s.c(x)).relu()).tanh())),
    "clone before": (2, lambda s, x: x.clone() + s.c(x)),
    "written shortcut": (2, lambda s, x: (y := x * 2).add_(1) + s.c(y)),
    "slices": (2, lambda s, x: x[:, :, 1:-1] + s.c(x)[:, :, 1:-1]),
    "channels last": (
        2,
        lambda s, x: (x.permute(0, 2, 3, 1) + s.c(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    ),
    "where": (None, lambda s, x: torch.where(x > 0, x, s.c(x))),
    "maximum": (None, lambda s, x: torch.maximum(x, s.c(x))),
    "multiplied": (None, lambda s, x: x * s.c(x).sigmoid()),
}


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return x + y


class Residual(nn.Module):
    """A wrapper around any branch."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Any:
        out: Tensor = self.branch(x) + x
        return out


class Adding(Block):
    def __init__(self, add: nn.Module) -> None:
        super().__init__()
        self.add = add

    def forward(self, x: Tensor) -> Any:
        out: Tensor = self.add(x, self.c(x))
        return out


class Merge(nn.Module):
    """fastai's: the input is kept as an attribute of the tensor."""

    def forward(self, x: Tensor) -> Any:
        out: Tensor = x + x.orig  # type: ignore[attr-defined]
        return out


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class OneWeight(nn.Module):
    """No children, one weight, and a functional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.1)

    def forward(self, x: Tensor) -> Any:
        return x + F.conv2d(x, self.weight, padding=1)


class Ema(nn.Module):
    ema: Tensor

    def __init__(self, *, assigned: bool = False) -> None:
        super().__init__()
        self.register_buffer("ema", torch.ones(1, 8, 1, 1))
        self.assigned = assigned

    def forward(self, x: Tensor) -> Any:
        if self.training:
            seen = 0.1 * x.detach().abs().mean((0, 2, 3), keepdim=True)
            if self.assigned:
                self.ema = 0.9 * self.ema + seen
            else:
                self.ema.mul_(0.9).add_(seen)
        return x / (self.ema + 1e-3)


class EmaBlock(Block):
    ema: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.ema.mul_(0.9)
        out: Tensor = x + self.c(x) * self.ema
        return out


class Branch(nn.Module):
    def __init__(self, *behind: nn.Module) -> None:
        super().__init__()
        self.c, self.behind = nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(*behind)

    def forward(self, x: Tensor) -> Any:
        out: Tensor = self.behind(self.c(x))
        return out


class Frozen(nn.Sequential):
    """Keeps its batch norms in evaluation mode, as one does for fine-tuning."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(False)
        return self


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.7) / 0.7


class Warm(Block):
    """A factor that grows with each call."""

    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        out: Tensor = x + self.c(x) * min(1.0, self.calls / 10)
        return out


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = x + layer(F.relu(x))
        return x


class Down(Block):
    """A projection beside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.c.stride = self.p_stride = (2, 2)
        self.p = nn.Conv2d(8, 8, 1, 2)

    def forward(self, x: Tensor) -> Any:
        out: Tensor = self.p(x) + self.d(F.relu(self.c(x)))
        return out


class Recurrent(nn.Module):
    """One block, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(lambda s, x: x + s.c(x))

    def forward(self, x: Tensor) -> Any:
        return self.block(self.block(self.block(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Any:
        y = x.flatten(2).transpose(1, 2)
        z = self.norm(y)
        y = y + self.attention(z, z, z, need_weights=False)[0]
        y = y + self.mlp(y)
        return y.transpose(1, 2).reshape(x.shape)


class Dictionary(Block):
    def forward(self, x: Tensor) -> Any:
        parts = {"shortcut": x, "branch": self.c(x)}
        return parts["shortcut"] + parts["branch"]


def _closure() -> Any:
    """Two layers are registered, but only a lambda calls them."""
    model: Any = network(Lambda(lambda x: x), Block(lambda s, x: x + s.c(x)))
    block = Block()
    model.add_module("hidden", nn.Identity())
    model.hidden.add_module("inner", block)
    model[1].function = lambda x: F.relu(block.c(x))
    return model


def _tied() -> nn.Module:
    one, other = Block(lambda s, x: x + s.c(x)), Block(lambda s, x: x + s.c(x))
    other.c.weight = one.c.weight
    return network(one, other)


def _hooked() -> Any:
    model: Any = network(Block(lambda s, x: x + s.c(x)))
    model[1].c.register_forward_hook(lambda m, a, out: out * 0.5)
    return model


def _weight_norm() -> Any:
    model: Any = network(Block(lambda s, x: x + s.c(x)))
    nn.utils.parametrizations.weight_norm(model[1].c)
    return model


def _spectral_norm() -> Any:
    model: Any = network(Block(lambda s, x: x + s.c(x)))
    nn.utils.parametrizations.spectral_norm(model[1].c)
    return model


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    tokens = Lambda(lambda x: x.flatten(2).transpose(1, 2))
    back = Lambda(lambda x: x.transpose(1, 2)[..., None])
    return network(Block(lambda s, x: x + s.c(x)), tokens, layer, back)


def around(*branches: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(network(*map(Residual, branches)))


NETWORKS: dict[str, tuple[int | None, Callable[[], nn.Module]]] = {
    "module that adds": (2, lambda: network(Adding(Add()), Adding(Add()))),
    "one module adds in both": (2, lambda: network(*(lambda a: (Adding(a), Adding(a)))(Add()))),
    "wrapper": (2, around(Branch(), Branch())),
    "wrapper in a wrapper": (
        2,
        around(nn.Sequential(Residual(Branch()), Branch())),
    ),
    "lambda in a wrapper": (1, around(nn.Sequential(Branch(), Lambda(F.relu)))),
    "partial": (
        1,
        around(nn.Sequential(Branch(), Lambda(partial(F.leaky_relu)))),
    ),
    "functional convolution": (2, lambda: network(OneWeight(), OneWeight())),
    "buffer that is written": (
        2,
        around(Branch(Ema()), Branch(Ema())),
    ),
    "buffer that is replaced": (1, around(Branch(Ema(assigned=True)))),
    "buffer written by the block": (1, lambda: network(EmaBlock(), Block(lambda s, x: x + s.c(x)))),
    "straight-through": (1, around(Branch(StraightThrough()))),
    "drop path": (2, around(Branch(DropPath()), Branch(DropPath()))),
    "warm-up by counting": (None, lambda: network(Warm())),
    "frozen norms": (None, lambda: Frozen(network(Block(lambda s, x: x + s.n(s.c(x)))))),
    "loop": (3, lambda: network(Loop())),
    "projection": (1, lambda: network(Down())),
    "attention": (2, lambda: network(Attention())),
    "dictionary": (1, lambda: network(Dictionary())),
    "one block three times": (3, lambda: network(Recurrent())),
    "reached by a closure": (1, _closure),
    "tied weights": (2, _tied),
    "hook": (1, _hooked),
    "weight norm": (1, _weight_norm),
    "spectral norm": (1, _spectral_norm),
    "torch's encoder": (1, _encoder),
    "group norm": (1, around(Branch(nn.GroupNorm(2, 8), nn.SiLU()))),
    "batch norm without statistics": (
        1,
        around(Branch(nn.BatchNorm2d(8, track_running_stats=False))),
    ),
    "instance norm": (1, around(Branch(nn.InstanceNorm2d(8)))),
    "grouped convolution": (1, around(nn.Conv2d(8, 8, 3, padding=1, groups=4))),
    "transposed convolution": (
        1,
        around(nn.ConvTranspose2d(8, 8, 3, padding=1)),
    ),
}

IDIOMS: dict[str, tuple[int | None, Callable[[], nn.Module]]] = {
    **{name: (gates, twice(body)) for name, (gates, body) in BODIES.items()},
    **NETWORKS,
}
