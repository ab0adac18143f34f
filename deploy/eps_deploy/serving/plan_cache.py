"""A bundle whose plan was left to the machine that serves it: built once, kept, checked again.

`--engine-cache` holds one folder for each network, way of building, TensorRT and GPU. The bundle
itself is never changed: it may be mounted read-only and shared.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eps_deploy.bundle import Bundle
from eps_deploy.engines.base import Engine, EngineError
from eps_deploy.engines.trt.build import BuildOptions, build, write_plan
from eps_deploy.engines.trt.cuda import Cuda, host_facts
from eps_deploy.engines.trt.module import load_tensorrt
from eps_deploy.engines.trt.run import TrtEngine
from eps_deploy.engines.trt.sidecar import PLAN, SIDECAR, Sidecar
from eps_deploy.loading import ONNX
from eps_deploy.precision import PRECISIONS
from eps_train import folder_lock
from eps_train.errors import ConfigError, EpsError, FileFormatError

Say = Callable[[str], None]
_DIGITS = 16  # hexadecimal, of the key in a folder's name
_POLL = 1.0  # seconds between looks at another server that builds the same plan
_TIMES = "timing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """What plans are built and run with; the fields are given by tests alone."""

    trt: Any
    cuda: Cuda

    @classmethod
    def first(cls) -> Gpu:
        """TensorRT and the first GPU. Raises EngineError where one is missing."""
        return cls(trt=load_tensorrt(), cuda=Cuda(0))


class PlanCache:
    """Plans in a folder.

    Args:
        folder: as `--engine-cache`.
        say: told what is being done.
        stop: when set, a build that is under way is called off.
        gpu: None: this machine's.
    """

    def __init__(
        self, folder: Path, *, say: Say, stop: threading.Event, gpu: Gpu | None = None
    ) -> None:
        self._folder = folder
        self._say = say
        self._stop = stop
        self._gpu = Gpu.first() if gpu is None else gpu
        self._host = host_facts(self._gpu.trt, self._gpu.cuda)

    def open(self, bundle: Bundle, file: str = ONNX) -> Engine:
        """The engine of a bundle with a deferred plan, built now if it was not built before.

        `file` names the network in the bundle.

        Raises:
            EngineError: TensorRT cannot build or load it.
            OSError: the folder cannot be written.
        """
        model = bundle.read(file)
        place = self._place(bundle, model)
        lock = self._lock(place)
        try:
            found = self._kept(place, model)
            plan, sidecar = found or self._build(place, bundle, model)
        finally:
            folder_lock.release(lock)
        if remark := sidecar.remark(self._host):
            self._say(remark)
        return TrtEngine(plan, sidecar, trt=self._gpu.trt, cuda=self._gpu.cuda)

    def _place(self, bundle: Bundle, model: bytes) -> Path:
        wishes = bundle.manifest["engine"]
        key = {
            "onnx": hashlib.sha256(model).hexdigest(),
            "precision": bundle.manifest["precision"],
            "options": {field.name: wishes.get(field.name) for field in fields(BuildOptions)},
            "tensorrt": [self._host.flavour, self._host.tensorrt],
            "device": [self._host.device, self._host.compute_capability, self._host.platform],
        }
        text = json.dumps(key, sort_keys=True).encode()
        return self._folder / f"plan-{hashlib.sha256(text).hexdigest()[:_DIGITS]}"

    def _lock(self, place: Path) -> int | None:
        """The folder for this process alone; waits while another one builds there."""
        told = False
        while not self._stop.is_set():
            try:
                return folder_lock.acquire(place, "another server is building this plan")
            except ConfigError as busy:
                if not told:
                    self._say(f"{busy}; waiting for it")
                    told = True
                time.sleep(_POLL)
        raise EngineError("the build was called off")

    def _kept(self, place: Path, model: bytes) -> tuple[bytes, Sidecar] | None:
        """What is in the cache, if it is whole and for this machine."""
        if not (place / SIDECAR).exists():
            return None
        try:
            sidecar = Sidecar.load(place / SIDECAR)
            plan = (place / PLAN).read_bytes()
            sidecar.check(plan, self._host, name=str(place / PLAN))
            if sidecar.onnx_sha256 != hashlib.sha256(model).hexdigest():
                raise FileFormatError(f"{place}: built from another network")
        except (EpsError, OSError) as error:
            self._say(f"the plan in the cache is not used, and built again: {error}")
            return None
        self._say("the plan is in the cache")
        return plan, sidecar

    def _build(self, place: Path, bundle: Bundle, model: bytes) -> tuple[bytes, Sidecar]:
        self._say("building the plan, which takes from seconds to many minutes")
        built = build(
            model,
            PRECISIONS[bundle.manifest["precision"]],
            _options(bundle, self._folder / _TIMES),
            host=self._host,
            progress=lambda *_: not self._stop.is_set(),
            say=self._say,
            trt=self._gpu.trt,
            on_device=self._gpu.cuda.current,
        )
        sidecar = write_plan(place, built, self._host)
        self._say(f"built the plan in {sidecar.seconds:.1f} s")
        return built.plan, sidecar


def _options(bundle: Bundle, timing_cache: Path) -> BuildOptions:
    """How `eps-deploy` was told to build. Raises FileFormatError for a manifest that says less."""
    recorded = bundle.manifest["engine"]
    names = [field.name for field in fields(BuildOptions) if field.name != "timing_cache"]
    try:
        return BuildOptions(timing_cache=timing_cache, **{name: recorded[name] for name in names})
    except (KeyError, TypeError, ConfigError) as error:
        raise FileFormatError(
            f"{bundle.root}: the manifest does not say how to build the plan ({error!r});"
            " run eps-deploy again"
        ) from error
