"""What is known of a plan, kept beside it: a plan itself cannot be asked before it is loaded.

A plan is executable code for one version of TensorRT and one kind of GPU. What does not fit is
refused here, by name, before TensorRT sees it. Neither TensorRT nor CUDA is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from eps_core.errors import FileFormatError
from eps_deploy.engines.base import EngineError

# -- The one logger of the process, and the places where its messages go
#
# TensorRT takes the first logger that it is given for the whole process and ignores every later
# one, and a failed call says why only there. So there is one, it lives for ever, and whoever wants
# to know listens for a while.

_LEVELS = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")  # VERBOSE is thousands of lines a build


@dataclass(frozen=True, slots=True)
class Message:
    """What TensorRT said, in one line.

    Attributes:
        level: `INTERNAL_ERROR`, `ERROR`, `WARNING` or `INFO`.
        text: without line breaks.
    """

    level: str
    text: str

    @property
    def is_error(self) -> bool:
        return self.level in ("INTERNAL_ERROR", "ERROR")

    def __str__(self) -> str:
        return f"{self.level.lower().replace('_', ' ')}: {self.text}"


@dataclass(slots=True)
class Log:
    """The messages of a while, in their order."""

    messages: list[Message] = field(default_factory=list)

    def why(self) -> str:
        """The first error, which is mostly the cause of those after it."""
        for message in self.messages:
            if message.is_error:
                return message.text
        return "TensorRT gave no reason"

    def tail(self, count: int) -> list[str]:
        return [str(message) for message in self.messages[-count:]]


_loggers: dict[str, Any] = {}
_lock = threading.Lock()


def logger_of(trt: Any) -> Any:
    """The process's `ILogger` for the module `trt`, made at the first call."""
    with _lock:
        key = f"{trt.__name__} {id(trt)}"  # the logger's class keeps the module, so ids stay unique
        if key not in _loggers:
            _loggers[key] = _make(trt)
        return _loggers[key]


@contextmanager
def listening(trt: Any, say: Callable[[Message], None] | None = None) -> Iterator[Log]:
    """Collect what TensorRT says during a block, whichever of its threads and objects says it.

    `say` is called with each message as it comes, on whatever thread it comes, and must not raise.
    """
    log = Log()

    def sink(message: Message) -> None:
        log.messages.append(message)
        if say is not None:
            say(message)

    logger = logger_of(trt)
    logger.sinks.append(sink)
    try:
        yield log
    finally:
        logger.sinks.remove(sink)


def _make(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the bindings insist on this form
            self.sinks: list[Callable[[Message], None]] = []

        def log(self, severity: Any, msg: str) -> None:
            """Called from C++ on any thread: nothing may be raised here."""
            if severity.name in _LEVELS:
                message = Message(severity.name, " ".join(msg.split()))
                for sink in tuple(self.sinks):
                    sink(message)

    return Logger()


# -- Finding the Python package of TensorRT, or saying in one line why it is not to be had

OLDEST, NEWEST = 10, 11  # major versions
_INSTALL = "pip install 'eps-resnet[trt]'"


def load_tensorrt() -> Any:
    """The module `tensorrt`.

    Imported here and nowhere else: it takes hundreds of megabytes of libraries with it, and most
    machines do not have it.

    Raises:
        EngineError: not installed, not loadable on this machine, or of a version that we do not
            know.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise _unloadable(error) from error
        raise EngineError(
            f"TensorRT is not installed; {_INSTALL} (Linux with an NVIDIA GPU)"
        ) from error
    except Exception as error:  # ImportError, OSError, RuntimeError: whatever its libraries meet
        raise _unloadable(error) from error
    if not OLDEST <= release(trt.__version__)[0] <= NEWEST:
        raise EngineError(
            f"TensorRT {trt.__version__} is installed; eps-resnet builds with"
            f" {OLDEST} and {NEWEST}; {_INSTALL}"
        )
    return trt


def flavour(trt: Any) -> str:
    """`tensorrt`, or `tensorrt_rtx` for TensorRT for RTX, whose plans are of another kind."""
    name: str = trt.__name__.partition(".")[0]
    return name


def release(version: str) -> tuple[int, ...]:
    """`11.4.0.106` as numbers, to be compared; what follows the numbers does not count."""
    numbers = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers) or (0,)


def _unloadable(error: Exception) -> EngineError:
    cause = " ".join(str(error).split()) or type(error).__name__
    return EngineError(
        f"TensorRT is installed but does not load ({cause}); install an NVIDIA driver that fits"
        f" it, or a version that fits the driver: {_INSTALL}"
    )


SCHEMA = 1
PLAN = "model.plan"
SIDECAR = "model.plan.json"
LAYERS = "model.plan.layers.json"  # the inspector's own words
HardwareCompatibility = Literal["none", "ampere-plus", "same-compute-capability"]
HARDWARE_COMPATIBILITY: tuple[HardwareCompatibility, ...] = get_args(HardwareCompatibility)
AMPERE = (8, 0)
_AGAIN = "rebuild it with eps-deploy --engine trt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The machine that a plan is built or run on.

    Attributes:
        tensorrt: version of TensorRT, all four numbers.
        flavour: the module's name, `tensorrt` or `tensorrt_rtx`.
        compute_capability: of the GPU: `9.0`.
        device: the GPU's name: `NVIDIA H100 80GB HBM3`.
        memory: bytes of GPU memory.
        driver: version of the NVIDIA driver, as it is known.
        cuda: version of CUDA, as it is known.
        platform: system and processor: `linux-x86_64`.
    """

    tensorrt: str
    flavour: str = "tensorrt"
    compute_capability: str
    device: str
    memory: int
    driver: str = ""
    cuda: str = ""
    platform: str

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
    """System and processor as `Host.platform` has them."""
    return f"{sys.platform}-{platform.machine().lower()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanMetadata:
    """Where a plan comes from and where it may go.

    Attributes:
        host: the machine that built it.
        onnx_sha256, plan_sha256: of the network and of the plan.
        precision: name in `eps_deploy.precision.PRECISIONS`.
        profile: smallest, optimal and largest batch.
        flags: TensorRT's builder flags that were set, by name.
        hardware_compatibility, version_compatible: what it was built to be loaded by.
        layers: how many layers of the engine compute in which type, `{"fp16": 30, "fp32": 2}`;
            empty when the plan was not loaded after the build, or TensorRT did not tell.
        seconds: what the build took.
        log: the last that TensorRT said.
    """

    host: Host
    onnx_sha256: str
    plan_sha256: str
    precision: str
    profile: tuple[int, int, int]
    flags: tuple[str, ...]
    hardware_compatibility: HardwareCompatibility
    version_compatible: bool
    layers: Mapping[str, int]
    seconds: float
    log: tuple[str, ...]

    def check(self, plan: bytes, host: Host, *, name: str = PLAN) -> None:
        """Raise EngineError unless `plan` is the one described and `host` may load it."""
        if hashlib.sha256(plan).hexdigest() != self.plan_sha256:
            raise EngineError(f"{name}: not the plan that {name}.json describes; {_AGAIN}")
        fits = (
            host.flavour == self.host.flavour
            and host.platform == self.host.platform
            and self._version_fits(host)
            and self._device_fits(host)
        )
        if not fits:
            raise EngineError(f"{name}: built for {self.host}; this machine has {host}; {_AGAIN}")

    def remark(self, host: Host) -> str | None:
        """What there is to say about a plan that may be loaded: another model of GPU."""
        if self.hardware_compatibility != "none" or host.device == self.host.device:
            return None
        return (
            f"the plan was built on {self.host.device}, this is {host.device}: it may be slower"
            " than one built here, and NVIDIA does not vouch for it; build it here, or with"
            " --hardware-compatibility same-compute-capability"
        )

    def _version_fits(self, host: Host) -> bool:
        """NVIDIA: the very version, unless version-compatible; then later ones, and 11 after 10."""
        built, here = release(self.host.tensorrt), release(host.tensorrt)
        if not self.version_compatible:
            return host.tensorrt == self.host.tensorrt
        return here >= built and (here[0] == built[0] or (built[0], here[0]) == (10, 11))

    def _device_fits(self, host: Host) -> bool:
        """NVIDIA: the same compute capability, unless built for Ampere and whatever is newer."""
        if self.hardware_compatibility == "ampere-plus":
            return host.capability >= AMPERE
        return host.capability == self.host.capability

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `model.plan.json` has it."""
        return {"schema": SCHEMA, **json.loads(json.dumps(asdict(self)))}

    def to_json(self) -> bytes:
        return (json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_dict(cls, data: Any, *, name: str = SIDECAR) -> PlanMetadata:
        """The opposite. Raises FileFormatError for what is damaged or too new."""
        try:
            schema = data["schema"]
            if isinstance(schema, int) and schema > SCHEMA:
                raise FileFormatError(
                    f"{name}: schema {schema} is newer than this eps-resnet reads (up to {SCHEMA});"
                    " upgrade eps-resnet"
                )
            if schema != SCHEMA:
                raise ValueError(schema)
            return cls(**{field.name: _read(field.name, data[field.name]) for field in fields(cls)})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"{name}: not a usable sidecar ({error!r}); {_AGAIN}") from error

    @classmethod
    def load(cls, path: Path) -> PlanMetadata:
        """Read `model.plan.json`. Raises FileFormatError."""
        try:
            return cls.from_dict(json.loads(path.read_bytes()), name=str(path))
        except FileNotFoundError:
            raise FileFormatError(
                f"{path}: no such file, and a plan is not loaded without it; {_AGAIN}"
            ) from None
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise FileFormatError(f"{path}: damaged or not JSON; {_AGAIN}") from None


def _read(name: str, value: Any) -> Any:
    """A field's value from JSON; ValueError or TypeError when it is none."""
    if name == "host":
        host = Host(**value)
        wrong = [
            field.name
            for field in fields(Host)
            if not isinstance(getattr(host, field.name), int if field.name == "memory" else str)
        ]
        if wrong:
            raise ValueError(wrong)
        return host
    if name == "profile":
        smallest, optimal, largest = (int(size) for size in value)
        if not 1 <= smallest <= optimal <= largest:
            raise ValueError(name)
        return smallest, optimal, largest
    if name in ("flags", "log"):
        return tuple(str(item) for item in value)
    if name == "layers":
        return {str(kind): int(count) for kind, count in value.items()}
    if name == "hardware_compatibility" and value not in HARDWARE_COMPATIBILITY:
        raise ValueError(value)
    if name == "version_compatible" and not isinstance(value, bool):
        raise ValueError(name)
    return float(value) if name == "seconds" else value
