"""An ONNX graph in the making: its nodes, its constants, and which of its values are flat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx

from eps_deploy.exporting.narrowing import narrow

KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
}


class UnknownStep(Exception):
    """An operator, or a use of one, that is not written here."""


class OnnxGraph:
    """Nodes and constants so far.

    Attributes:
        nodes, tensors: of the ONNX graph, in order.
        dtype: type of the step that is being written: of its operands, constants and result.
        values: name of what each step of the torch.fx graph computes.
        flat: names of the values `[N, features]`; all others are `[N, C, H, W]`.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.dtype = torch.float32
        self.values: dict[fx.Node, str] = {}
        self.flat: set[str] = set()
        self._taken: set[str] = set()
        self._types: dict[str, torch.dtype] = {}

    def unused(self, name: str) -> str:
        """`name`, or a variant of it where a module is called more than once."""
        count = 1
        unique = name
        while unique in self._taken:
            count += 1
            unique = f"{name}#{count}"
        self._taken.add(unique)
        return unique

    def value(self, argument: object, *, flat: bool | None = None) -> str:
        """Name of an operand, cast if need be, and :meth:`shaped`."""
        if not isinstance(argument, fx.Node):
            raise UnknownStep
        name = self.values[argument]
        if self._types[name] is not self.dtype:
            name = self._cast(name)
        return self.shaped(name, flat=flat)

    def _cast(self, name: str) -> str:
        short = str(self.dtype).removeprefix("torch.")
        cast = f"{name}.{short}"
        if cast not in self._types:
            self._append("Cast", cast, [name], cast, to=KINDS[self.dtype])
            if name in self.flat:
                self.flat.add(cast)
        return cast

    def shaped(self, name: str, *, flat: bool | None) -> str:
        """`name`; with `flat` it must be `[N, features]` or, if False, `[N, C, H, W]`."""
        if flat is not None and flat != (name in self.flat):
            raise UnknownStep
        return name

    def tensor(self, name: str, value: Tensor) -> str:
        """A constant of the graph; integers stay what they are."""
        cast = narrow(name, value, self.dtype)
        raw = cast.view(torch.int16) if cast.dtype is torch.bfloat16 else cast
        self.tensors.append(
            TensorProto(
                name=name,
                data_type=KINDS[cast.dtype],
                dims=cast.shape,
                raw_data=raw.numpy().tobytes(),
            )
        )
        return name

    def add(
        self, kind: str, name: str, inputs: Sequence[str], *, flat: bool = False, **attributes: Any
    ) -> str:
        """One node; returns the name of what it computes."""
        value = f"{name}.out"
        self._append(kind, name, inputs, value, **attributes)
        if flat:
            self.flat.add(value)
        return value

    def _append(
        self, kind: str, name: str, inputs: Sequence[str], value: str, **attributes: Any
    ) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [value], name=name, **attributes))
        self._types[value] = self.dtype
