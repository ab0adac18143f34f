"""Small residual networks of every kind, and a reference for each that knows no gates."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

BRANCHES = ("plain", "bottleneck", "grouped", "inverted", "nested")
ORDERS = ("post", "pre", "shared", "bare")
SHORTCUTS = ("conv", "pool")
ADDITIONS = ("x + out", "out + x", "out += x", "x += out", "out.add_", "torch.add", "alpha")
ACTIVATIONS = ("relu", "in place", "F in place", "silu in place", "hardswish")
DROPS = ("none", "own", "module", "function", "method")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One block; what makes `order`: see :class:`Block`."""

    branch: str
    order: str
    shortcut: str
    addition: str
    activation: str
    drop: str
    width: int
    stride: int
    excite: bool
    scale: bool
    kept: bool  # whether the network's head reads this block's result too


@dataclass(frozen=True)
class Plan:
    kinds: tuple[Kind, ...]
    seed: int
    p: float = field(default=0.5)  # of all drops

    @property
    def blocks(self) -> list[str]:
        """Names of the residual blocks, in the order of computation."""
        names = []
        for index, kind in enumerate(self.kinds):
            if kind.branch == "nested":
                names.append(f"blocks.{index}.branch.inner")
            names.append(f"blocks.{index}")
        return names


def kinds() -> st.SearchStrategy[Kind]:
    return st.builds(
        Kind,
        branch=st.sampled_from(BRANCHES),
        order=st.sampled_from(ORDERS),
        shortcut=st.sampled_from(SHORTCUTS),
        addition=st.sampled_from(ADDITIONS),
        activation=st.sampled_from(ACTIVATIONS),
        drop=st.sampled_from(DROPS),
        width=st.sampled_from([4, 4, 8]),
        stride=st.sampled_from([1, 1, 2]),
        excite=st.booleans(),
        scale=st.booleans(),
        kept=st.booleans(),
    )


def plans(p: float = 0.5) -> st.SearchStrategy[Plan]:
    return st.builds(
        Plan,
        st.lists(kinds(), min_size=1, max_size=4).map(tuple),
        st.integers(0, 2**16),
        st.just(p),
    )


class OwnDrop(nn.Module):
    """Stochastic depth as most libraries write it."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        mask = x.new_empty((len(x), 1, 1, 1)).bernoulli_(1 - self.p)
        return x * mask / (1 - self.p)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=True)


def activation(kind: Kind) -> nn.Module:
    made: dict[str, nn.Module] = {
        "relu": nn.ReLU(),
        "in place": nn.ReLU(inplace=True),
        "F in place": InPlace(),
        "silu in place": nn.SiLU(inplace=True),
        "hardswish": nn.Hardswish(),
    }
    return made[kind.activation]


class Excite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = x.mean((2, 3), keepdim=True)
        found: Tensor = x * self.up(F.relu_(self.down(weight))).sigmoid()
        return found


class Pool(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = after - before, stride

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        if self.more > 0:
            return F.pad(x, (0, 0, 0, 0, 0, self.more))
        # Contiguous: kernels, and so the last digits, depend on it.
        return x[:, : self.more or None].contiguous()


class Inner(nn.Module):
    """A block inside a branch."""

    factor: float | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return x + (out if self.factor is None else out * self.factor)


def branch(kind: Kind, before: int) -> nn.Sequential:
    after, stride = kind.width, kind.stride
    layers: dict[str, nn.Module] = {}
    if kind.branch == "bottleneck":
        layers["one"] = nn.Conv2d(before, 2, 1, bias=False)
        layers["norm"], layers["act"] = nn.BatchNorm2d(2), activation(kind)
        layers["two"] = nn.Conv2d(2, after, 3, stride, 1)
    elif kind.branch == "grouped":
        layers["one"] = nn.Conv2d(before, after, 3, stride, 1, groups=2, bias=False)
    elif kind.branch == "inverted":
        layers["one"], layers["act"] = nn.Conv2d(before, 2 * before, 1), activation(kind)
        layers["two"] = nn.Conv2d(2 * before, 2 * before, 3, stride, 1, groups=2 * before)
        layers["norm"] = nn.BatchNorm2d(2 * before)
        layers["three"] = nn.Conv2d(2 * before, after, 1)
    else:
        layers["one"] = nn.Conv2d(before, after, 3, stride, 1, bias=False)
    if kind.branch == "nested":
        layers["inner"] = Inner(after)
    if kind.excite:
        layers["excite"] = Excite(after)
    found = nn.Sequential()
    for name, layer in layers.items():
        found.add_module(name, layer)
    return found


class Block(nn.Module):
    """`order`: post-activation, with a norm that ends the branch; pre-activation, the branch's own
    or the shortcut's too; or bare: the branch begins with the activation, which may rectify the
    shortcut in place.
    """

    factor: float | None = None

    def __init__(self, kind: Kind, before: int, p: float) -> None:
        super().__init__()
        self.kind, self.p = kind, p
        self.norm = nn.BatchNorm2d(kind.width if kind.order == "post" else before)
        self.act = activation(kind)
        self.branch = branch(kind, before)
        self.shortcut: nn.Module = nn.Identity()
        if kind.width != before or kind.stride > 1:
            self.shortcut = (
                nn.Conv2d(before, kind.width, 1, kind.stride, bias=False)
                if kind.shortcut == "conv"
                else Pool(before, kind.width, kind.stride)
            )
        self.scale = nn.Parameter(torch.rand(kind.width, 1, 1)) if kind.scale else None
        self.own_drop, self.drop = OwnDrop(p), nn.Dropout2d(p)

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        if kind.order == "post":
            out = self.norm(self.branch(x))
        elif kind.order == "bare":
            out = self.branch(self.act(x))
        else:
            active = self.act(self.norm(x))
            out = self.branch(active)
            # Only where the shape changes, as in the original.
            x = active if kind.order == "shared" and kind.width != self.norm.num_features else x
        x = self.shortcut(x)
        out = out if self.scale is None else out * self.scale
        out = self._dropped(out)
        out = out if self.factor is None else out * self.factor
        out = self._added(x, out)
        return self.act(out) if kind.order == "post" else out

    def _dropped(self, out: Tensor) -> Tensor:
        if self.kind.drop == "own":
            out = self.own_drop(out)
        elif self.kind.drop == "module":
            out = self.drop(out)
        elif self.kind.drop == "function":
            out = F.dropout(out, self.p, self.training)
        elif self.kind.drop == "method":
            out = F.dropout2d(out, self.p, training=self.training)
        return out

    def _added(self, x: Tensor, out: Tensor) -> Tensor:
        how = self.kind.addition
        if how == "out += x":
            out += x
        elif how == "x += out":
            x += out
            out = x
        elif how == "out.add_":
            out = out.add_(x)
        elif how == "torch.add":
            out = torch.add(out, x)
        elif how == "alpha":
            out = torch.add(x, out, alpha=1)
        else:
            out = x + out if how == "x + out" else out + x
        return out


class Network(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        torch.manual_seed(plan.seed)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        width, read = 4, 0
        self.blocks = nn.ModuleList()
        for kind in plan.kinds:
            self.blocks.append(Block(kind, width, plan.p))
            width = kind.width
            read += kind.width if kind.kept else 0
        self.head = nn.Linear(width + read, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias)
                assert module.running_mean is not None
                nn.init.normal_(module.running_mean, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept = []
        for block in self.blocks.children():
            assert isinstance(block, Block)
            x = block(x)
            if block.kind.kept:
                kept.append(x)  # the next block may overwrite it
        logits: Tensor = self.head(torch.cat([f.mean((2, 3)) for f in [*kept, x]], dim=1))
        return logits


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def silenced(model: nn.Module, dead: Iterable[str]) -> nn.Module:
    """A copy whose branches of the blocks `dead` are multiplied by 0, in their own code."""
    found = copy.deepcopy(model)
    for name in dead:
        block = found.get_submodule(name)
        assert isinstance(block, (Block, Inner))
        block.factor = 0.0
    return found
