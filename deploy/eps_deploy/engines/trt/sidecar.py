"""What is known of a plan, kept beside it: a plan itself cannot be asked before it is loaded.

A plan is executable code for one version of TensorRT and one kind of GPU. What does not fit is
refused here, by name, before TensorRT sees it. Neither TensorRT nor CUDA is imported.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.module import release
from eps_train.errors import FileFormatError

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
class Sidecar:
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
    def from_dict(cls, data: Any, *, name: str = SIDECAR) -> Sidecar:
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
    def load(cls, path: Path) -> Sidecar:
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
