"""TensorRT plans of this machine: built once, kept in a folder, checked before they are loaded."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eps_core import files
from eps_core.cli import Log
from eps_core.errors import ConfigError, EpsError, FileFormatError
from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.build import BuildOptions, build, check_possible
from eps_deploy.engines.trt.cuda import Cuda, host_facts
from eps_deploy.engines.trt.engine import TrtEngine
from eps_deploy.engines.trt.plan import METADATA, PLAN, SCHEMA, Plan, PlanMetadata, load_tensorrt
from eps_deploy.precision import Precision

_DIGITS = 16  # hexadecimal, of the key in a folder's name
_POLL = 1.0  # seconds between looks at another process that builds the same plan
_PROGRESS_INTERVAL = 5.0  # seconds between lines of progress: TensorRT reports hundreds a second


class PlanCache:
    """Builds plans for this machine and opens them; with a folder, each is built only once.

    The folder has a subfolder for each network, build options, TensorRT and GPU. Processes may
    share it: one builds, the others wait for it.

    Args:
        folder: None: nothing is kept, and every plan is built.
        log: receives a line for each step.
        stop: when set, a build in progress is cancelled.
        device: index of the GPU.
        trt, cuda: the package and the GPU to use; None: `tensorrt`, and the GPU `device`.

    Raises:
        EngineError: there is no TensorRT or no such GPU.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        log: Log,
        stop: threading.Event | None = None,
        device: int = 0,
        trt: Any = None,
        cuda: Cuda | None = None,
    ) -> None:
        self._folder = folder
        self._log = log
        self._stop = threading.Event() if stop is None else stop
        self._trt: Any = load_tensorrt() if trt is None else trt
        self._cuda = Cuda(device) if cuda is None else cuda
        self.host = host_facts(self._trt, self._cuda)

    def check_possible(self, precision: Precision, options: BuildOptions) -> None:
        """Raise EngineError for what this TensorRT or this GPU does not support."""
        check_possible(precision, options, self.host, self._trt)

    def plan(
        self,
        model: bytes,
        precision: Precision,
        options: BuildOptions,
        *,
        kept: Collection[str] = (),
        name: str = PLAN,
    ) -> Plan:
        """The plan of an ONNX file, from the folder or built now; arguments as for :func:`build`.

        Raises:
            EngineError: TensorRT cannot build it, or the build was cancelled.
            OSError: the folder cannot be written.
        """
        if self._folder is None:
            plan = self._build(model, precision, options, kept, name)
        else:
            onnx_sha256 = hashlib.sha256(model).hexdigest()
            key = {
                "schema": SCHEMA,
                "profiles": options.profiles,
                "onnx": onnx_sha256,
                "precision": precision.name,
                "options": asdict(replace(options, timing_cache=None)),
                "tensorrt": [self.host.flavour, self.host.tensorrt],
                "device": [self.host.device, self.host.compute_capability, self.host.platform],
            }
            digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
            place = self._folder / f"plan-{digest[:_DIGITS]}"
            options = replace(options, timing_cache=self._folder / "timing")
            lock = self._lock(place)
            try:
                found = self._cached(place, onnx_sha256)
                plan = found or self._build(model, precision, options, kept, name)
                if found is None:
                    plan.write(place)
            finally:
                files.release(lock)
        if remark := plan.metadata.remark(self.host):
            self._log(remark)
        return plan

    def open(self, plan: Plan, *, name: str = PLAN, contexts: int = 1) -> TrtEngine:
        """Load a plan; arguments and errors as for :class:`TrtEngine`."""
        return TrtEngine(
            plan.content,
            plan.metadata,
            name=name,
            contexts=contexts,
            trt=self._trt,
            cuda=self._cuda,
        )

    def _lock(self, place: Path) -> int | None:
        """Lock the folder for this process; waits while another one builds there."""
        waiting = False
        while not self._stop.is_set():
            try:
                return files.acquire(place, "another server is building this plan")
            except ConfigError as busy:
                if not waiting:
                    self._log(f"{busy}; waiting for it")
                    waiting = True
                self._stop.wait(_POLL)
        raise EngineError("the build was cancelled")

    def _cached(self, place: Path, onnx_sha256: str) -> Plan | None:
        """The plan in a folder, if it is intact and for this machine."""
        if not (place / METADATA).exists():
            return None
        try:
            metadata = PlanMetadata.load(place / METADATA)
            content = (place / PLAN).read_bytes()
            metadata.check(content, self.host, name=str(place / PLAN))
            if metadata.onnx_sha256 != onnx_sha256:
                raise FileFormatError(f"{place}: built from another network")
        except (EpsError, OSError) as error:
            self._log(f"the plan in the cache is not used, and built again: {error}")
            return None
        self._log("the plan is in the cache")
        return Plan(content=content, metadata=metadata)

    def _build(
        self,
        model: bytes,
        precision: Precision,
        options: BuildOptions,
        kept: Collection[str],
        name: str,
    ) -> Plan:
        next_line = time.monotonic() + _PROGRESS_INTERVAL

        def progress(phase: str, done: int, steps: int) -> bool:
            nonlocal next_line
            if time.monotonic() >= next_line:
                self._log(f"  {phase}: {done} of {steps}")
                next_line = time.monotonic() + _PROGRESS_INTERVAL
            return not self._stop.is_set()

        self._log(f"building {name}, which takes from seconds to many minutes")
        plan = build(
            model,
            precision,
            options,
            host=self.host,
            kept=kept,
            progress=progress,
            log=self._log,
            trt=self._trt,
            on_device=self._cuda.current,
        )
        self._log(f"built {name} in {plan.metadata.seconds:.1f} s")
        return plan
