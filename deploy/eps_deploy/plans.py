"""TensorRT plans in a deployment: built on this machine's GPU, or left to the one that serves."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eps_deploy.engines.base import Engine, EngineError
from eps_deploy.engines.trt.build import BuildOptions, build, check_possible
from eps_deploy.engines.trt.cuda import Cuda, host_facts
from eps_deploy.engines.trt.module import load_tensorrt
from eps_deploy.engines.trt.run import TrtEngine
from eps_deploy.engines.trt.sidecar import (
    LAYERS,
    PLAN,
    SIDECAR,
    Host,
    Sidecar,
    this_platform,
)
from eps_deploy.options import Options
from eps_deploy.reporting.report import Check
from eps_deploy.stages import Stages

DEFERRED = "--defer-build: the plan is built by the machine that serves the bundle"
BUILDER = "builder"
NO_REHEARSAL = {
    "what": "model.onnx through NVIDIA's parser and builder",
    "why": "needs no GPU but the package tensorrt-rtx-cu13, which is not installed",
}
_RTX = "tensorrt_rtx"
_EVERY = 5.0  # seconds between lines of progress
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A plan that was built on this machine.

    Attributes:
        content: what TensorRT loads.
        sidecar: what is known of it.
        layers: the inspector's JSON; "" when TensorRT gave none.
    """

    content: bytes
    sidecar: Sidecar
    layers: str

    def open(self, options: Options, name: str) -> Engine:
        """Ready to run. Raises EngineError."""
        return TrtEngine(self.content, self.sidecar, device=options.device, name=name)

    def files(self) -> dict[str, bytes]:
        """What a bundle holds of it, by name."""
        files = {PLAN: self.content, SIDECAR: self.sidecar.to_json()}
        if self.layers:
            files[LAYERS] = self.layers.encode()
        return files

    def pack(self) -> bytes:
        header = {"sidecar": self.sidecar.to_dict(), "layers": self.layers}
        return json.dumps(header).encode() + b"\n" + self.content

    @classmethod
    def unpack(cls, packed: bytes) -> Plan:
        line, _, content = packed.partition(b"\n")
        header = json.loads(line)
        sidecar = Sidecar.from_dict(header["sidecar"])
        return cls(content=content, sidecar=sidecar, layers=header["layers"])


def require(options: Options) -> None:
    """Raise EngineError, in one line with the remedy, unless plans can be built here."""
    try:
        trt, _, host = _machine(options)
        check_possible(options.precision, options.plan, host, trt)
    except EngineError as error:
        raise EngineError(
            f"--engine trt: {error}; or add --defer-build to have the plan built by the machine"
            " that serves, or use --engine ort"
        ) from error


def build_plan(options: Options, model: bytes, name: str, stages: Stages, say: Say) -> Plan:
    """The plan of an ONNX file; one that a killed run had built is taken up.

    Raises EngineError as `engines.trt.build.build` does.
    """
    trt, cuda, host = _machine(options)

    def make() -> bytes:
        say(f"building {name}.plan, which takes from seconds to many minutes")
        built = build(
            model,
            options.precision,
            _with_cache(options.plan),
            host=host,
            progress=_Progress(say),
            say=say,
            trt=trt,
            on_device=cuda.current,
        )
        layers = built.facts["information"]
        return Plan(content=built.plan, sidecar=built.sidecar(host), layers=layers).pack()

    sha256 = hashlib.sha256(model).hexdigest()
    key = {"onnx": sha256, "wishes": wishes(options), "host": asdict(host)}
    plan = Plan.unpack(stages.content(f"build-{name}", key, make))
    if remark := plan.sidecar.remark(host):
        say(remark)
    return plan


def rehearse(options: Options, model: bytes) -> Check | None:
    """Whether NVIDIA's parser and builder take the ONNX file, on a machine without a GPU.

    Those of TensorRT for RTX, whose builder needs none; None where it is not installed. Its plan is
    of another kind than TensorRT's, and is thrown away.
    """
    if importlib.util.find_spec(_RTX) is None:
        return None
    trt = importlib.import_module(_RTX)
    host = Host(
        tensorrt=trt.__version__,
        flavour=_RTX,
        compute_capability="12.0",  # what it builds for; nothing is run
        device="none",
        memory=0,
        platform=this_platform(),
    )
    text = f"TensorRT for RTX {trt.__version__} parses and builds model.onnx without a GPU"
    try:
        plain = replace(options.plan, version_compatible=False, hardware_compatibility="none")
        build(model, options.precision, plain, host=host, trt=trt)
    except EngineError as error:
        return Check(name=BUILDER, passed=False, value=None, limit=0.0, text=str(error))
    return Check(name=BUILDER, passed=True, value=0.0, limit=0.0, text=text)


def wishes(options: Options) -> dict[str, Any]:
    """How the plan is, or is to be, built; where its timing cache lies is no part of it."""
    found = asdict(options.plan)
    del found["timing_cache"]
    return {**found, "precision": options.precision.name}


def _machine(options: Options) -> tuple[Any, Cuda, Host]:
    trt = load_tensorrt()
    cuda = Cuda(options.device)
    return trt, cuda, host_facts(trt, cuda)


def _with_cache(wanted: BuildOptions) -> BuildOptions:
    """With the user's own cache folder (XDG Base Directory Specification), unless one is named."""
    if wanted.timing_cache is not None:
        return wanted
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:  # a user without a home, as containers have: no cache is kept
            return wanted
    return replace(wanted, timing_cache=Path(base) / "eps-resnet" / "tensorrt")


class _Progress:
    """A line of progress now and then: TensorRT reports hundreds of steps a second."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._next = time.monotonic() + _EVERY

    def __call__(self, phase: str, done: int, steps: int) -> bool:
        if time.monotonic() >= self._next:
            self._say(f"  {phase}: {done} of {steps}")
            self._next = time.monotonic() + _EVERY
        return True
