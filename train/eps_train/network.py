"""A saved network is data: its family and arguments, its gates, the blocks that are gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from eps_train import factories, graph
from eps_train.errors import ConfigError, FileFormatError, GraphError
from eps_train.factories import FAMILIES

_WIDTHS = {"cifar": 16, "imagenet": 64}  # where `--model` names none: those of the paper
_NOT_A_MODEL = (
    "not a model; write cifar:DEPTH or cifar:DEPTHxWIDTH, imagenet:DEPTH, torchvision:NAME,"
    " timm:NAME or package.module:factory, for example cifar:110, cifar:56x16 or imagenet:50"
)
_DIGITS = 4  # of depth and width; what is longer takes minutes to fail


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec:
    """How to rebuild a network's graph; its tensors are kept beside it.

    Attributes:
        family: a key of `factories.FAMILIES`, or a factory: `torchvision:resnet50`,
            `timm:resnetv2_50`, `mypackage.module:factory`.
        arguments: its keyword arguments, all of them int.
        gated: blocks that carry a gate; every other block's gate is a plain addition.
        removed: blocks that were taken out.
    """

    family: str
    arguments: Mapping[str, Any]
    gated: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "arguments": dict(self.arguments),
            "gated": list(self.gated),
            "removed": list(self.removed),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> NetworkSpec:
        return cls(
            family=fields["family"],
            arguments=dict(fields["arguments"]),
            gated=tuple(fields["gated"]),
            removed=tuple(fields["removed"]),
        )

    @classmethod
    def parse(cls, text: str, *, in_channels: int, classes: int) -> NetworkSpec:
        """Read what `--model` takes; all blocks are gated.

        That is ``cifar:DEPTH``, ``imagenet:DEPTH`` (both also ``DEPTHxWIDTH``),
        ``torchvision:NAME``, ``timm:NAME``, or ``package.module:factory`` for a function or class
        that is called with `num_classes`, and with `in_chans` if it has that.

        Raises:
            ConfigError: no such network, impossible arguments, or one that does not fit the data.
            GraphError: a network that cannot be traced, or has no residual addition.
        """
        family = text.partition(":")[0]
        ends = {"in_channels": in_channels, "classes": classes}
        try:
            if family in FAMILIES:
                spec = cls(family=family, arguments=_size(text) | ends)
            elif _is_factory(text):
                spec = cls(family=text, arguments=factories.arguments_for(text, **ends))
            else:
                raise ConfigError(f"{text}: {_NOT_A_MODEL}")
            skeleton = spec.skeleton()
            factories.check_ends(text, skeleton, **ends)
        except ValueError as error:
            raise ConfigError(f"--model {text}: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"--model {error}") from None
        except GraphError as error:
            raise GraphError(f"--model {text}: {error}") from None
        return replace(spec, gated=tuple(graph.gates(skeleton)))

    def all_blocks(self) -> tuple[str, ...]:
        """Names of all residual blocks that the network is built with."""
        return tuple(graph.gates(self.skeleton()))

    def _whole(self) -> fx.GraphModule:
        """The network with all gates, freshly initialised."""
        model = factories.make(self.family, self.arguments)
        return graph.trace(model) if self.family in FAMILIES else graph.insert_gates(model)

    def skeleton(self) -> fx.GraphModule:
        """The network with all gates and without numbers (on the meta device).

        Where a factory computes with its tensors, they are real.
        """
        try:
            with torch.device("meta"):
                return self._whole()
        except ConfigError:
            if self.family in FAMILIES:
                raise
        with torch.random.fork_rng(devices=[]):
            return self._whole()

    def _to_be_filled(self) -> fx.GraphModule:
        """The network with all gates; its tensors are to be replaced, so they cost no time.

        A factory of somebody else's may keep tensors beside the state dict, so it gets to make
        them, but draws no random numbers of ours.
        """
        if self.family in FAMILIES:
            return self.skeleton()
        with torch.random.fork_rng(devices=[]):
            return self._whole()

    def build(self, state: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
        """Build the network, in training mode: freshly initialised, or filled with `state`.

        `state` may hold more than this network needs (weights of removed blocks), not less.
        Raises FileFormatError when the spec or the tensors do not fit each other.
        """
        try:
            model = self._whole() if state is None else self._to_be_filled()
        except (ConfigError, GraphError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"unknown network {self.family} {dict(self.arguments)} ({error})"
            ) from error
        built = graph.remove_blocks(model, self.removed) if self.removed else model
        built = graph.drop_gates(built, keep=self.gated)
        if state is not None:
            needed = built.state_dict()
            missing = sorted(needed.keys() - state.keys())
            if missing:
                raise FileFormatError(f"tensors are missing, the first is {missing[0]}")
            for name, tensor in needed.items():
                if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
                    raise FileFormatError(
                        f"tensor {name} has another shape or type than its network"
                    )
            # Copies: two networks built from one state must not share what training changes.
            built.load_state_dict(
                {name: state[name].clone() for name in needed}, assign=self.family in FAMILIES
            )
        return built


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
    if module in ("torchvision", "timm"):
        return bool(member)
    return all(part.isidentifier() for part in (*module.split("."), member))
