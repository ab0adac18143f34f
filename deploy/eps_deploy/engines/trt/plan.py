"""TensorRT's Python package, its log messages, and plans with their metadata.

A plan is executable code for one version of TensorRT and one kind of GPU, and cannot be inspected
before it is loaded. `PlanMetadata`, stored beside the plan, decides whether this machine may load
it. This module imports neither TensorRT nor CUDA.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from eps_core.errors import FileFormatError, one_line
from eps_core.files import replace_file
from eps_deploy.engines.base import EngineError

# -- TensorRT's Python package

OLDEST, NEWEST = 10, 11  # major versions
_INSTALL = "pip install 'eps-resnet[trt]'"


def load_tensorrt() -> Any:
    """Import `tensorrt`, which loads hundreds of megabytes of libraries.

    Raises EngineError: not installed, does not load on this machine, or an unsupported version.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except Exception as error:  # ImportError, OSError or RuntimeError, from its libraries too
        if isinstance(error, ModuleNotFoundError) and error.name == "tensorrt":
            raise EngineError(
                f"TensorRT is not installed; {_INSTALL} (Linux with an NVIDIA GPU)"
            ) from error
        raise EngineError(
            f"TensorRT is installed but does not load ({one_line(error)}); install an NVIDIA driver"
            f" that fits it, or a version that fits the driver: {_INSTALL}"
        ) from error
    if not OLDEST <= release(trt.__version__)[0] <= NEWEST:
        raise EngineError(
            f"TensorRT {trt.__version__} is installed; eps-resnet builds with"
            f" {OLDEST} and {NEWEST}; {_INSTALL}"
        )
    return trt


def release(version: str) -> tuple[int, ...]:
    """`11.4.0.106` as a tuple of numbers for comparison; a suffix such as `rc1` is ignored."""
    numbers = itertools.takewhile(str.isdecimal, version.split("."))
    return tuple(map(int, numbers)) or (0,)


# -- Log messages
#
# TensorRT uses the first logger that it receives in a process and ignores every later one, and
# only the log says why a call failed. So there is one logger per process, and callers collect its
# messages for the length of a block.

_LEVELS = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")  # VERBOSE is thousands of lines a build


class Message(NamedTuple):
    """A log message: level (`INTERNAL_ERROR`, `ERROR`, `WARNING`, `INFO`) and text in one line."""

    level: str
    text: str

    def __str__(self) -> str:
        return f"{self.level.lower().replace('_', ' ')}: {self.text}"


class Messages(list[Message]):
    """The messages of a block, in order."""

    def reason(self) -> str:
        """The text of the first error, which usually caused those after it."""
        errors = (text for level, text in self if level.endswith("ERROR"))
        return next(errors, "TensorRT gave no reason")


_lock = threading.Lock()


def logger_of(trt: Any) -> Any:
    """The process's `ILogger` for the package `trt`, created by the first call."""
    with _lock:
        return _create_logger(trt)


@cache
def _create_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the bindings insist on this form
            self.receivers: list[Callable[[Message], None]] = []

        def log(self, severity: Any, msg: str) -> None:
            """Called from C++ on any thread: must not raise."""
            if severity.name in _LEVELS:
                message = Message(severity.name, " ".join(msg.split()))
                for receive in tuple(self.receivers):
                    receive(message)

    return Logger()


@contextmanager
def collect_messages(
    trt: Any, receive: Callable[[Message], None] | None = None
) -> Iterator[Messages]:
    """Collect what TensorRT logs during a block, from any of its objects and threads.

    `receive` is called with each message, on the thread that logs it, and must not raise.
    """
    messages = Messages()
    receivers = [messages.append] if receive is None else [messages.append, receive]
    logger = logger_of(trt)
    logger.receivers += receivers
    try:
        yield messages
    finally:
        for receiver in receivers:
            logger.receivers.remove(receiver)


# -- Plans and their metadata

SCHEMA = 2  # 1 had a single optimization profile
PLAN = "model.plan"
METADATA = "model.plan.json"
LAYERS = "model.plan.layers.json"  # the JSON of TensorRT's engine inspector
HardwareCompatibility = Literal["none", "ampere-plus", "same-compute-capability"]
HARDWARE_COMPATIBILITY: tuple[HardwareCompatibility, ...] = get_args(HardwareCompatibility)
AMPERE = (8, 0)
_REBUILD = "rebuild it with eps-deploy --engine trt"
Profile = tuple[int, int, int]  # smallest, optimal and largest batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The machine that a plan is built or run on."""

    tensorrt: str  # version, all four numbers
    flavour: str = "tensorrt"  # name of the Python package, or tensorrt_rtx
    compute_capability: str  # of the GPU: 9.0
    device: str  # name of the GPU: NVIDIA H100 80GB HBM3
    memory: int  # bytes of GPU memory
    driver: str = ""  # version of NVIDIA's driver; empty when unknown
    cuda: str = ""  # version of CUDA; empty when unknown
    platform: str  # system and processor: linux-x86_64

    @property
    def capability(self) -> tuple[int, ...]:
        return release(self.compute_capability)

    def __str__(self) -> str:
        name = "TensorRT" if self.flavour == "tensorrt" else self.flavour
        return (
            f"{name} {self.tensorrt} on compute capability {self.compute_capability}"
            f" ({self.device}), {self.platform}"
        )


def this_platform() -> str:
    """System and processor, as in `Host.platform`."""
    return f"{sys.platform}-{platform.machine().lower()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanMetadata:
    """How and where a plan was built, and where it may be loaded."""

    host: Host  # the machine that built it
    onnx_sha256: str
    plan_sha256: str
    precision: str  # name in `eps_deploy.precision.PRECISIONS`
    profiles: tuple[Profile, ...]  # from 1 on; each starts where the one before it ends
    flags: tuple[str, ...]  # names of TensorRT's builder flags that were set
    hardware_compatibility: HardwareCompatibility  # as in `BuildOptions`
    version_compatible: bool
    layers: Mapping[str, int]  # number by type, as {"fp16": 30, "fp32": 2}; empty when unknown
    seconds: float  # duration of the build
    log: tuple[str, ...]  # TensorRT's last messages

    def __post_init__(self) -> None:
        covered = 0
        for smallest, optimal, largest in self.profiles:
            if not covered + 1 == smallest <= optimal <= largest:
                raise ValueError(f"profiles {self.profiles}")
            covered = largest
        if not covered:
            raise ValueError("no profiles")

    def check(self, plan: bytes, host: Host, *, name: str = PLAN) -> None:
        """Raise EngineError unless `plan` is the one described and `host` may load it."""
        if hashlib.sha256(plan).hexdigest() != self.plan_sha256:
            raise EngineError(f"{name}: not the plan that {name}.json describes; {_REBUILD}")
        same = (host.flavour, host.platform) == (self.host.flavour, self.host.platform)
        if not (same and self._version_fits(host) and self._device_fits(host)):
            raise EngineError(f"{name}: built for {self.host}; this machine has {host}; {_REBUILD}")

    def remark(self, host: Host) -> str | None:
        """A warning about a plan that `host` may load, but whose GPU is another model."""
        if self.hardware_compatibility != "none" or host.device == self.host.device:
            return None
        return (
            f"the plan was built on {self.host.device}, this is {host.device}: it may be slower"
            " than one built here, and NVIDIA does not vouch for it; build it here, or with"
            " --hardware-compatibility same-compute-capability"
        )

    def _version_fits(self, host: Host) -> bool:
        """NVIDIA: the same version; version-compatible plans also later ones, and 11 after 10."""
        built, here = release(self.host.tensorrt), release(host.tensorrt)
        if not self.version_compatible:
            return host.tensorrt == self.host.tensorrt
        return here >= built and (here[0] == built[0] or (built[0], here[0]) == (10, 11))

    def _device_fits(self, host: Host) -> bool:
        """NVIDIA: the same compute capability, unless built for Ampere and newer GPUs."""
        if self.hardware_compatibility == "ampere-plus":
            return host.capability >= AMPERE
        return host.capability == self.host.capability

    def to_json(self) -> bytes:
        """The content of `model.plan.json`."""
        fields = {"schema": SCHEMA, **msgspec.to_builtins(self)}
        return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, *, name: str = METADATA) -> PlanMetadata:
        """Parse `model.plan.json`. Raises FileFormatError when it is damaged or too new."""
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            raise FileFormatError(f"{name}: damaged or not JSON; {_REBUILD}") from None
        schema = fields.get("schema") if isinstance(fields, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise FileFormatError(
                f"{name}: schema {schema} is newer than this eps-resnet reads (up to {SCHEMA});"
                " upgrade eps-resnet"
            )
        if schema == 1:
            raise FileFormatError(
                f"{name}: of an earlier eps-resnet, whose plans had one optimization profile;"
                f" {_REBUILD}"
            )
        try:
            if schema != SCHEMA:
                raise ValueError(f"schema {schema!r}")
            return msgspec.convert(fields, cls)
        except ValueError as error:
            raise FileFormatError(
                f"{name}: not usable plan metadata ({error}); {_REBUILD}"
            ) from error

    @classmethod
    def load(cls, path: Path) -> PlanMetadata:
        """Read `model.plan.json`. Raises FileFormatError."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise FileFormatError(
                f"{path}: no such file, and a plan is not loaded without it; {_REBUILD}"
            ) from None
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from None
        return cls.from_json(content, name=str(path))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A plan with its metadata."""

    content: bytes  # what TensorRT deserializes
    metadata: PlanMetadata
    inspection: str = ""  # the JSON of TensorRT's engine inspector; empty when there is none

    def files(self) -> dict[str, bytes]:
        """The files that store it, by name."""
        layers = {LAYERS: self.inspection.encode()} if self.inspection else {}
        return {PLAN: self.content, **layers, METADATA: self.metadata.to_json()}

    def write(self, folder: Path) -> None:
        """Write the files atomically, the metadata last. Raises OSError.

        Older metadata never describes a newer plan: it holds the hash of another one.
        """
        for name, content in self.files().items():
            replace_file(folder / name, content)
