"""A saved network is data: its family and arguments, its gates, the blocks that are gone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from eps_train import graph
from eps_train.errors import ConfigError, FileFormatError
from eps_train.networks import FAMILIES


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec:
    """How to rebuild a network's graph; its tensors are kept beside it.

    Attributes:
        family: a key of `networks.FAMILIES`.
        arguments: keyword arguments of the family's factory.
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
        """Read what `--model` takes, ``cifar:DEPTH`` or ``cifar:DEPTHxWIDTH``; all blocks gated.

        Raises ConfigError for an unknown family or impossible arguments.
        """
        family, _, size = text.partition(":")
        depth, _, width = size.partition("x")
        if family not in FAMILIES or not depth.isdecimal() or not (width or "16").isdecimal():
            raise ConfigError(
                f"--model {text}: not a model; write cifar:DEPTH or cifar:DEPTHxWIDTH,"
                " for example cifar:110 or cifar:56x16"
            )
        arguments = {
            "depth": int(depth),
            "width": int(width or 16),
            "in_channels": in_channels,
            "classes": classes,
        }
        spec = cls(family=family, arguments=arguments)
        try:
            return replace(spec, gated=spec.all_blocks())
        except ValueError as error:
            raise ConfigError(f"--model {text}: {error}") from None

    def all_blocks(self) -> tuple[str, ...]:
        """Names of all residual blocks that the family builds with these arguments."""
        with torch.device("meta"):
            return tuple(graph.gates(FAMILIES[self.family](**self.arguments)))

    def build(self, state: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
        """Build the network, in training mode: freshly initialised, or filled with `state`.

        `state` may hold more than this network needs (weights of removed blocks), not less.
        Raises FileFormatError when the spec or the tensors do not fit each other.
        """
        try:
            factory = FAMILIES[self.family]
            inspect.signature(factory).bind(**self.arguments)
            if state is None:
                model = factory(**self.arguments)
            else:
                with torch.device("meta"):  # no time spent on initial weights that are replaced
                    model = factory(**self.arguments)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"unknown network {self.family} {dict(self.arguments)}"
            ) from error
        built = graph.remove_blocks(model, self.removed)
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
            built.load_state_dict({name: state[name].clone() for name in needed}, assign=True)
        return built
