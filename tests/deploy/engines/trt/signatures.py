"""Which arguments a method of the bindings takes, decided as pybind11 would, from the manifest."""

from __future__ import annotations

import enum
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

Overload = Mapping[str, Any]  # {"params": [[name, type], [name, type, default], ...] | None}

_BY_VALUE = ("int", "bool", "str", "float", "tuple", "list", "Dims", "slice")


class Signatures:
    """Matches calls against overloads.

    Attributes:
        enums: the module's enumerations by name.
        classes: the module's classes by name; filled while they are made.
    """

    def __init__(self, enums: Mapping[str, type[enum.Enum]]) -> None:
        self.enums = enums
        self.classes: dict[str, type] = {}

    def bind(
        self,
        name: str,
        overloads: Sequence[Overload],
        positional: Sequence[Any],
        named: Mapping[str, Any],
        *,
        of_class: bool = True,
    ) -> list[Any]:
        """The arguments in their order, defaults filled in. Raises TypeError when none fits."""
        for overload in overloads:
            if overload["params"] is None:  # the bindings do not tell
                return [*positional, *named.values()]
            arguments = self._fit(overload["params"][of_class:], positional, named)
            if arguments is not None:
                return arguments
        raise TypeError(
            f"{name}(): incompatible function arguments: {positional} {named};"
            f" supported: {[overload['params'] for overload in overloads]}"
        )

    def _fit(
        self, params: Sequence[Sequence[Any]], positional: Sequence[Any], named: Mapping[str, Any]
    ) -> list[Any] | None:
        names = [param[0] for param in params]
        if len(positional) > len(params) or not set(named) <= set(names[len(positional) :]):
            return None
        given = {**dict(zip(names, positional, strict=False)), **named}
        arguments = []
        for name, kind, *default in params:
            if name in given and self.accepts(given[name], kind):
                arguments.append(given[name])
            elif name not in given and default:
                arguments.append(self._default(str(default[0])))
            else:
                return None
        return arguments

    def _default(self, text: str) -> Any:
        """A default as its docstring has it: `None`, `0`, `''`, `<Severity.WARNING: 2>`."""
        if text == "None":
            return None
        if text.startswith("<"):
            kind, _, member = text.strip("<>").partition(":")[0].rpartition(".")
            return next(
                members[member]
                for name, members in self.enums.items()
                if name.rpartition(".")[2] == kind
            )
        return "" if text == "''" else int(text)

    def accepts(self, value: object, kind: str) -> bool:
        """Whether pybind11 would convert `value` to a parameter of the type `kind`."""
        if value is None:
            by_value = kind in _BY_VALUE or kind in self.enums
            return not by_value and not kind.startswith(("typing", "collections"))
        if kind in ("int", "typing.SupportsInt"):
            return not isinstance(value, float) and hasattr(value, "__index__")
        if kind in ("float", "typing.SupportsFloat"):
            return isinstance(value, numbers.Real)
        if kind in ("bool", "str", "tuple", "list"):
            return type(value).__name__ == kind
        if kind == "Dims":
            return isinstance(value, self.classes["Dims"]) or _is_shape(value)
        if kind == "typing_extensions.Buffer":
            # Before Python 3.12 no class written in Python has a buffer; `__bytes__` stands for it.
            return isinstance(value, bytes | bytearray | memoryview) or hasattr(value, "__bytes__")
        if kind.startswith("collections.abc.Sequence"):
            return hasattr(value, "__len__") and not isinstance(value, str)
        known = self.enums.get(kind) or self.classes.get(kind)
        return known is None or isinstance(value, known)  # capsules and the like are not judged


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple | list) and all(
        hasattr(size, "__index__") and not isinstance(size, float) for size in value
    )
