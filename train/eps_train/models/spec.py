"""Network specification: a network as data, which is rebuilt without pickling code."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from eps_core.errors import ConfigError, FileFormatError, GraphError, one_line
from eps_train.config import from_plain_data, plain_data
from eps_train.gating import parity, rewriting
from eps_train.gating.tracing import in_mode
from eps_train.models import registry, stored
from eps_train.models.registry import FAMILIES

_WIDTHS = {"cifar": 16, "imagenet": 64}  # default widths: those of the paper
_NOT_A_MODEL = (
    "not a model; write cifar:DEPTH or cifar:DEPTHxWIDTH, imagenet:DEPTH, torchvision:NAME,"
    " timm:NAME or package.module:factory, for example cifar:110, cifar:56x16 or imagenet:50"
)
_DIGITS = 4  # of depth and width; longer numbers take minutes to fail


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec:
    """How to rebuild a network's graph; its tensors are stored separately.

    Attributes:
        family: a key of `registry.FAMILIES`, a factory (`torchvision:resnet50`,
            `timm:resnetv2_50`, `mypackage.module:factory`), or `stored.FAMILY`.
        arguments: its keyword arguments: int, and for timm also float, bool and str; of a stored
            graph, the graph itself.
        gated: blocks with a gate; every other block has a plain addition.
        removed: blocks that were removed.
        broadcast: residual additions that are not blocks, because their shortcut has another shape
            than their sum, and so cannot replace it.
    """

    family: str
    arguments: Mapping[str, Any]
    gated: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    broadcast: tuple[str, ...] = ()

    @property
    def holds_graph(self) -> bool:
        """Whether the graph itself is stored, so that no code of the user's builds the network."""
        return self.family == stored.FAMILY

    def to_dict(self) -> dict[str, Any]:
        return plain_data(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> NetworkSpec:
        """Inverse of :meth:`to_dict`. Raises ConfigError for bad fields."""
        return from_plain_data(fields, cls)

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        in_channels: int,
        classes: int,
        image_size: tuple[int, int] | None = None,
    ) -> NetworkSpec:
        """Parse the value of `--model`; all blocks are gated.

        It is ``cifar:DEPTH``, ``imagenet:DEPTH`` (both also ``DEPTHxWIDTH``),
        ``torchvision:NAME``, ``timm:NAME``, or ``package.module:factory`` for a function or class
        that is called with `num_classes`, and with `in_chans` if it has that. Those of timm accept
        further arguments: ``timm:NAME,img_size=64``.

        With `image_size`, height and width, a network that is not of our families is run on a blank
        batch, and compared with itself with open gates.

        Raises:
            ConfigError: no such network, impossible arguments, or a network that does not fit the
                data.
            GraphError: a network that cannot be traced, has no residual addition, or computes
                something else with gates.
        """
        family = text.partition(":")[0]
        ends = {"in_channels": in_channels, "classes": classes}
        try:
            if family in FAMILIES:
                spec = cls(family=family, arguments=_size(text) | ends)
            elif _is_factory(text):
                name, given = registry.split_arguments(text)
                spec = cls(family=name, arguments=registry.arguments_for(name, **ends) | given)
            else:
                raise ConfigError(f"{text}: {_NOT_A_MODEL}")
            skeleton = spec.skeleton()
            registry.check_ends(text, skeleton, **ends)
            if image_size is not None and family not in FAMILIES:
                broadcast = spec._try_out((in_channels, *image_size), classes)
                spec = replace(spec, broadcast=broadcast)
                skeleton = spec.skeleton()
        except ValueError as error:
            raise ConfigError(f"--model {text}: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"--model {error}") from None
        except GraphError as error:
            raise GraphError(f"--model {text}: {error}") from None
        return replace(spec, gated=tuple(rewriting.gates(skeleton)))

    def all_blocks(self) -> tuple[str, ...]:
        """Names of all residual blocks, removed ones included."""
        return tuple(rewriting.gates(self.skeleton()))

    def _whole(self) -> fx.GraphModule:
        """The network with all gates, freshly initialized."""
        if self.holds_graph:
            return stored.rebuild(self.arguments)
        model = registry.make(self.family, self.arguments)
        if self.family in FAMILIES:
            # Ours do not depend on the mode, and change nothing in forward().
            return rewriting.trace(model, one_mode=True, copied=False)
        return rewriting.without_broadcasts(rewriting.add_gates(model), self.broadcast)

    def _try_out(self, shape: tuple[int, int, int], classes: int) -> tuple[str, ...]:
        """Run the network on images of this shape; returns its `broadcast` additions."""
        size = "x".join(map(str, shape))
        blank = torch.zeros((parity.BATCH, *shape))
        with torch.random.fork_rng(devices=[]):
            model = registry.make(self.family, self.arguments)
        try:
            logits = parity.dry_run(model, blank, training=False)
        except Exception as error:  # whatever the user's forward() raises
            raise ConfigError(
                f"{self.family}: does not run on a batch of images of {size} ({one_line(error)});"
                " it must accept images of the size of --image-size as its only input"
            ) from error
        if not isinstance(logits, Tensor) or logits.shape != (parity.BATCH, classes):
            found = "x".join(map(str, logits.shape)) if isinstance(logits, Tensor) else "no tensor"
            raise ConfigError(
                f"{self.family}: returns {found} for {parity.BATCH} images of {size}, not logits of"
                f" {parity.BATCH}x{classes}"
            )
        gated = rewriting.add_gates(model)
        example = parity.example_for(model, shape)
        if example is not None:
            parity.refuse_difference(model, gated, example)
        return rewriting.broadcasts(gated, blank)

    def skeleton(self) -> fx.GraphModule:
        """The network with all gates and without data (on the meta device).

        Where a factory computes with its tensors, they have data.
        """
        try:
            with torch.device("meta"):
                return self._whole()
        except ConfigError:
            if self.family in FAMILIES:
                raise
        return self._with_data()

    def _with_data(self) -> fx.GraphModule:
        """The network with all gates; draws no random numbers of the caller's state."""
        with torch.random.fork_rng(devices=[]):
            return self._whole()

    def build(self, state: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
        """Build the network, in training mode: freshly initialized, or with the tensors of `state`.

        `state` may hold more than this network needs (weights of removed blocks), but not less.
        Raises FileFormatError when the spec or the tensors do not fit each other.
        """
        try:
            if state is None:
                model = self._whole()
            else:  # to be filled; a factory may store tensors outside the state dict
                model = self.skeleton() if self.family in FAMILIES else self._with_data()
        except (ConfigError, GraphError, TypeError, ValueError) as error:
            given = "" if self.holds_graph else f" {dict(self.arguments)}"
            raise FileFormatError(f"unknown network {self.family}{given} ({error})") from error
        built = rewriting.remove_blocks(model, self.removed) if self.removed else model
        built = rewriting.drop_gates(built, keep=self.gated)
        if state is not None:
            needed = built.state_dict()
            if missing := sorted(needed.keys() - state.keys()):
                raise FileFormatError(f"tensors are missing, the first is {missing[0]}")
            for name, tensor in needed.items():
                if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
                    raise FileFormatError(
                        f"tensor {name} has another shape or type than its network"
                    )
            # Copies: two networks built from one state must not share parameters.
            built.load_state_dict(
                {name: state[name].clone() for name in needed}, assign=self.family in FAMILIES
            )
        return built


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphSpec(NetworkSpec):
    """A network in memory, which is rebuilt by copying its graph.

    Attributes:
        graph: the network with all gates, on the CPU; never modified.
    """

    graph: fx.GraphModule = field(compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Inverse of :meth:`NetworkSpec.from_dict`.

        Raises:
            NotStorable: the network has code of its own, which no file can hold.
        """
        return NetworkSpec(
            family=stored.FAMILY,
            arguments=stored.store(self.graph),
            gated=self.gated,
            removed=self.removed,
            broadcast=self.broadcast,
        ).to_dict()

    def skeleton(self) -> fx.GraphModule:
        return self._whole()

    def _whole(self) -> fx.GraphModule:
        return copy.deepcopy(self.graph)


def _size(text: str) -> dict[str, int]:
    """Depth and width of `family:DEPTH` or `family:DEPTHxWIDTH`; the latter only if given."""
    family, _, size = text.partition(":")
    depth, cross, width = size.partition("x")
    if not depth.isdecimal() or (cross and not width.isdecimal()):
        raise ConfigError(f"{text}: {_NOT_A_MODEL}")
    if max(len(depth), len(width)) > _DIGITS:
        raise ConfigError(f"{family}: depth and width must be below {10**_DIGITS:,}")
    return {"depth": int(depth), "width": int(width) if cross else _WIDTHS[family]}


def _is_factory(text: str) -> bool:
    module, _, member = text.partition(":")
    if module == "timm":
        member = member.partition(",")[0]
    if module in ("torchvision", "timm"):
        return bool(member)
    return all(part.isidentifier() for part in (*module.split("."), member))


# -- Cost: parameters and floating-point operations


@dataclass(frozen=True, slots=True)
class Cost:
    """Learned parameters, and FLOPs of one forward pass of one image.

    A multiply-add counts as two FLOPs. Convolutions and linear layers are counted, as is usual;
    normalization, activations and additions are not.
    """

    parameters: int
    flops: int


def cost(model: nn.Module, input_shape: tuple[int, int, int]) -> Cost:
    """Count `model` for one float32 image of `input_shape` `[C, H, W]`, on the meta device."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    image = torch.empty((1, *input_shape), device="meta")
    counter = _FlopCount()  # type: ignore[no-untyped-call]
    with in_mode(model, False), torch.no_grad(), counter:
        torch.func.functional_call(model, empty, (image,))
    return Cost(count_parameters(model), counter.total)


class _FlopCount(TorchDispatchMode):
    """Adds up FLOPs by the formulas of :mod:`torch.utils.flop_counter`.

    torch's own `FlopCounterMode` takes twice as long: it counts by module, and decomposes what has
    no formula.
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def count_parameters(model: nn.Module) -> int:
    """Number of learned parameters of a network."""
    return sum(parameter.numel() for parameter in model.parameters())
