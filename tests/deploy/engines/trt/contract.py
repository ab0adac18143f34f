"""A stand-in for `tensorrt` that has what the real bindings have, and nothing else.

It is made from the names and signatures of the bindings of one version (`manifests/`). An unknown
attribute, a removed enumeration member, a wrong keyword, count or type of arguments fails as
pybind11 would fail it. What a call does comes from the test; one that the test did not describe
raises NotImplementedError, so that no test passes by an accident.

    trt = make_fake("11.4", {"Builder": {"create_network": lambda builder, flags: ...}})

Behaviour is keyed by class, then by method (all of its parameters are passed, in order, defaults
filled in), property (called with the object), or `set NAME` (called with object and value, when a
property is set). `functions` holds that of the module's own functions. Setting a property without
behaviour stores the value, which reading it gives back.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from tests.deploy.engines.trt.signatures import Overload, Signatures

Version = Literal["11.4", "10.16"]
VERSIONS: tuple[Version, ...] = ("11.4", "10.16")
Behaviour = Mapping[str, Mapping[str, Callable[..., Any]]]

# What users derive from: their objects have whatever attributes they like.
_INTERFACES = (
    "ILogger",
    "IProgressMonitor",
    "IErrorRecorder",
    "IProfiler",
    "IOutputAllocator",
    "IGpuAllocator",
    "IGpuAsyncAllocator",
    "IStreamReader",
    "IStreamReaderV2",
    "IStreamWriter",
    "IDebugListener",
    "IInt8Calibrator",
    "IInt8EntropyCalibrator2",
    "IInt8MinMaxCalibrator",
    "IAlgorithmSelector",
)


class Call(NamedTuple):
    """One call into the fake: `Call("Builder", "create_network", (2,))`."""

    of: str
    name: str
    arguments: tuple[Any, ...]


class FakeModule(ModuleType):
    """The fake itself.

    Attributes:
        calls: every call and every property that was set, in order.
    """

    calls: list[Call]

    def make(self, name: str, **private: Any) -> Any:
        """An object of a class that cannot be constructed; `private` names start with `_`."""
        kind: type = getattr(self, name)
        result: Any = object.__new__(kind)
        for key, value in {"_base_ready": True, **private}.items():
            assert key.startswith("_")
            object.__setattr__(result, key, value)
        return result

    def count(self, of: str, name: str) -> int:
        return sum(call[:2] == (of, name) for call in self.calls)


class _Binding(type):
    """As pybind11's: a class whose `__init__` does not call its base's cannot be made."""

    def __call__(cls, *positional: Any, **named: Any) -> Any:
        result = super().__call__(*positional, **named)
        if not hasattr(result, "_base_ready"):
            raise TypeError(f"{cls.__name__}: the base's __init__() must be called")
        return result


def make_fake(version: Version, impl: Behaviour) -> FakeModule:
    """The module `tensorrt` of `version`, with the behaviour `impl` (see above)."""
    path = Path(__file__).parent / "manifests" / f"tensorrt-{version}-api.json"
    return _Maker(json.loads(path.read_text()), impl).module


class _Maker:
    def __init__(self, manifest: Mapping[str, Any], impl: Behaviour) -> None:
        self.module = FakeModule("tensorrt")
        self.module.calls = []
        self.module.__dict__["__version__"] = manifest["version"]
        self.impl = impl
        enums = {
            name: _enumeration(name.rpartition(".")[2], described["members"])
            for name, described in manifest["enums"].items()
        }
        self.signatures = Signatures(enums)
        for name, described in manifest["classes"].items():
            self._add_class(name, described)
        for name, kind in enums.items():
            if "." not in name:
                setattr(self.module, name, kind)
        for name, target in manifest["constants"].items():
            kind_name, _, member = target.partition(".")
            if kind_name in enums:
                setattr(self.module, name, enums[kind_name][member])
        for name, overloads in manifest["functions"].items():
            setattr(self.module, name, self._function(name, overloads))
        for name in ("ILogger", "Logger"):
            logger: Any = self.signatures.classes[name]
            logger.Severity = enums["ILogger.Severity"]
            for severity in enums["ILogger.Severity"]:
                setattr(logger, severity.name, severity)
        self._check(impl, manifest)

    @staticmethod
    def _check(impl: Behaviour, manifest: Mapping[str, Any]) -> None:
        """Behaviour for what the bindings do not have would never be called."""
        for name, described in impl.items():
            known: set[str] = set(manifest["functions"])
            if name != "functions":
                of = manifest["classes"][name]
                known = {"__init__", "__bytes__", *of["methods"], *of["properties"]}
            assert {key.removeprefix("set ") for key in described} <= known, (name, described)

    def _add_class(self, name: str, described: Mapping[str, Any]) -> None:
        body: dict[str, Any] = {"__init__": self._initializer(name, described)}
        if name not in _INTERFACES:
            body["__setattr__"] = _set_attribute
        for key, of in described["properties"].items():
            body[key] = self._property(name, key, of)
        for key, overloads in described["methods"].items():
            body[key] = self._method(name, key, overloads)
        if "__bytes__" in self.impl.get(name, {}):
            body["__bytes__"] = self.impl[name]["__bytes__"]
        known = self.signatures.classes
        bases = tuple(known[base] for base in described["bases"] if base in known)
        known[name] = _Binding(name, bases or (object,), body)
        setattr(self.module, name, known[name])

    def _initializer(self, of: str, described: Mapping[str, Any]) -> Callable[..., None]:
        def initialize(self_: Any, *positional: Any, **named: Any) -> None:
            if not described["constructible"]:
                raise TypeError(f"tensorrt.{of}: No constructor defined!")
            if any(value is None for value in (*positional, *named.values())):
                raise TypeError(f"{of}(): incompatible constructor arguments: None")
            arguments = self.signatures.bind(of, described["init"], positional, named)
            self.module.calls.append(Call(of, "__init__", tuple(arguments)))
            object.__setattr__(self_, "_base_ready", True)
            handler = self.impl.get(of, {}).get("__init__")
            if handler is not None:
                handler(self_, *arguments)

        return initialize

    def _method(self, of: str, name: str, overloads: list[Overload]) -> Callable[..., Any]:
        def method(self_: Any, *positional: Any, **named: Any) -> Any:
            arguments = self.signatures.bind(f"{of}.{name}", overloads, positional, named)
            self.module.calls.append(Call(of, name, tuple(arguments)))
            return self._handler(of, name)(self_, *arguments)

        method.__name__ = name
        return method

    def _function(self, name: str, overloads: list[Overload]) -> Callable[..., Any]:
        def function(*positional: Any, **named: Any) -> Any:
            arguments = self.signatures.bind(name, overloads, positional, named, of_class=False)
            self.module.calls.append(Call("functions", name, tuple(arguments)))
            return self._handler("functions", name)(*arguments)

        return function

    def _property(self, of: str, name: str, described: Mapping[str, Any]) -> property:
        def read(self_: Any) -> Any:
            stored = f"_set_{name}"
            return vars(self_)[stored] if stored in vars(self_) else self._handler(of, name)(self_)

        def write(self_: Any, value: Any) -> None:
            if not self.signatures.accepts(value, described["type"]):
                raise TypeError(f"{of}.{name}: needs {described['type']}, not {value!r}")
            self.module.calls.append(Call(of, f"set {name}", (value,)))
            handler = self.impl.get(of, {}).get(f"set {name}")
            if handler is not None:
                handler(self_, value)
            else:
                object.__setattr__(self_, f"_set_{name}", value)

        return property(read, write if described["writable"] else None)

    def _handler(self, of: str, name: str) -> Callable[..., Any]:
        handler = self.impl.get(of, {}).get(name)
        if handler is None:
            raise NotImplementedError(f"the test gives {of}.{name} no behaviour")
        return handler


def _enumeration(name: str, members: Mapping[str, int]) -> type[enum.Enum]:
    """As pybind11's: converts to its integer, is none, and takes part in no arithmetic."""
    made: Any = enum.EnumMeta.__call__(enum.Enum, name, dict(members), module="tensorrt")
    made.__int__ = made.__index__ = lambda member: member.value
    result: type[enum.Enum] = made
    return result


def _set_attribute(self: Any, name: str, value: Any) -> None:
    if not name.startswith("_") and not isinstance(getattr(type(self), name, None), property):
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
    object.__setattr__(self, name, value)
