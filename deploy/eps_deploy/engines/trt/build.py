"""Building a plan: from an ONNX file to what TensorRT runs, on the GPU that will run it."""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eps_deploy.engines.base import INPUT_NAME, EngineError
from eps_deploy.engines.trt import timing_cache
from eps_deploy.engines.trt.inspect import information_of, summarize
from eps_deploy.engines.trt.logger import Log, Message, listening, logger_of
from eps_deploy.engines.trt.module import load_tensorrt
from eps_deploy.engines.trt.parse import Parsed, check_types, parse
from eps_deploy.engines.trt.sidecar import (
    AMPERE,
    HARDWARE_COMPATIBILITY,
    LAYERS,
    PLAN,
    SIDECAR,
    HardwareCompatibility,
    Host,
    Sidecar,
)
from eps_deploy.engines.trt.worker import Progress, Step, Worker, monitor_of
from eps_deploy.precision import Precision
from eps_train.atomic import replace_file
from eps_train.errors import ConfigError

_TAIL = 40  # lines of TensorRT's that the sidecar keeps
_LEVELS = range(6)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """How a plan is built.

    Attributes:
        opt_batch, max_batch: batch sizes that kernels are chosen for and that fit at most.
        workspace: bytes of GPU memory that a layer may use; None: TensorRT's default, all of it.
        optimization_level: 0 (quick to build) to 5.
        timing_cache: folder of the timing caches; None: none is kept.
        version_compatible: later versions of TensorRT can load the plan.
        hardware_compatibility: which other GPUs can load it.

    Raises:
        ConfigError: a value outside its range.
    """

    opt_batch: int = 16
    max_batch: int = 32
    workspace: int | None = None
    optimization_level: int = 3
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"

    def __post_init__(self) -> None:
        if not 1 <= self.opt_batch <= self.max_batch:
            raise ConfigError(
                f"--opt-batch {self.opt_batch} --max-batch {self.max_batch}: both must be at least"
                " 1, and the first no larger than the second"
            )
        if self.workspace is not None and self.workspace < 1:
            raise ConfigError(f"--workspace {self.workspace}: give a size of at least 1")
        if self.optimization_level not in _LEVELS:
            raise ConfigError(f"--optimization-level {self.optimization_level}: give 0 to 5")
        if self.hardware_compatibility not in HARDWARE_COMPATIBILITY:
            raise ConfigError(
                f"--hardware-compatibility {self.hardware_compatibility}: give one of"
                f" {', '.join(HARDWARE_COMPATIBILITY)}"
            )


@dataclass(frozen=True, slots=True)
class Built:
    """A plan that TensorRT built, and loaded again where it could.

    Attributes:
        plan: what `Runtime.deserialize_cuda_engine` takes.
        facts: all that :class:`Sidecar` holds but the host, and `information`, the inspector's
            JSON (empty when the plan was not loaded, or the inspector gave none).
    """

    plan: bytes
    facts: dict[str, Any]

    def sidecar(self, host: Host) -> Sidecar:
        facts = {key: value for key, value in self.facts.items() if key != "information"}
        return Sidecar(host=host, **facts)


def build(
    model: bytes,
    precision: Precision,
    options: BuildOptions,
    *,
    host: Host,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    trt: Any = None,
    on_device: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Built:
    """Build the plan of an ONNX file as `eps-deploy` exports it.

    The work is done on another thread; `progress` and `say` are called on this one. Ctrl-C, and
    whatever these two raise, calls the build off and goes on.

    Args:
        model: the bytes of the ONNX file.
        precision: the one that it was exported in.
        options: how to build.
        host: this machine; it decides what is possible and which timing cache fits.
        progress: called with a phase and how many of its steps are done and there are; phases nest.
            False calls the build off.
        say: takes TensorRT's warnings and errors as they come.
        trt: the module to build with; None: `tensorrt`.
        on_device: makes the GPU current for a block. It is entered on the building thread, because
            CUDA's current device is a matter of each thread, and is device 0 where nobody says.

    Raises:
        EngineError: no TensorRT, a network that it does not take or that is not of this precision,
            a GPU that cannot do it, a failed build; in TensorRT's own words where it has some.
    """
    trt = load_tensorrt() if trt is None else trt
    check_possible(precision, options, host, trt)
    worker: Worker[Built] = Worker()

    def work() -> Built:
        def hear(message: Message) -> None:
            if message.level != "INFO":
                worker.tell(message)

        with on_device(), listening(trt, hear) as log:
            try:
                return _build(model, precision, options, host, trt, worker, log)
            except BaseException as error:
                # Its frames hold TensorRT's objects, which must end while the GPU is current.
                traceback.clear_frames(error.__traceback__)
                raise

    def handle(event: Step | Message | str) -> None:
        if not isinstance(event, Step):
            if say is not None:
                say(str(event))
        elif progress is not None and progress(event.phase, event.done, event.steps) is False:
            raise EngineError("the build was called off")

    return worker.run(work, handle)


def write_plan(folder: Path, built: Built, host: Host) -> Sidecar:
    """Put plan and sidecar into `folder`, each whole or not at all, the sidecar last.

    An old sidecar does not vouch for a new plan: its hash is another one. Raises OSError.
    """
    sidecar = built.sidecar(host)
    replace_file(folder / PLAN, built.plan)
    if built.facts["information"]:
        replace_file(folder / LAYERS, built.facts["information"].encode())
    replace_file(folder / SIDECAR, sidecar.to_json())
    return sidecar


def check_possible(precision: Precision, options: BuildOptions, host: Host, trt: Any) -> None:
    """Raise EngineError for what this TensorRT does not have, or this GPU cannot do.

    TensorRT would do the latter in another way, without a word.
    """
    if options.hardware_compatibility != "none":
        _level(options.hardware_compatibility, trt)
    if host.capability >= AMPERE:
        return
    gpu = f"{host.device} has compute capability {host.compute_capability}"
    if precision.float == "bfloat16" or precision.tf32:
        option = "--tf32" if precision.tf32 else "--bf16"
        raise EngineError(f"{option} needs compute capability 8.0; {gpu}: use --fp16 or --fp32")
    if options.hardware_compatibility == "ampere-plus":
        raise EngineError(
            f"--hardware-compatibility ampere-plus needs compute capability 8.0; {gpu}"
        )


def _build(
    model: bytes,
    precision: Precision,
    options: BuildOptions,
    host: Host,
    trt: Any,
    worker: Worker[Built],
    log: Log,
) -> Built:
    start = time.perf_counter()
    parsed = parse(model, trt)
    check_types(parsed, precision, trt)
    config = _configure(parsed, precision, options, trt, log)
    monitor = monitor_of(trt, worker)
    config.progress_monitor = monitor
    folder, before = options.timing_cache, None
    if folder is not None:
        before = timing_cache.take(config, folder, host, worker.tell)
    serialized = parsed.builder.build_serialized_network(parsed.network, config)
    if worker.cancelled.is_set():
        raise EngineError("the build was called off")
    if serialized is None:
        raise EngineError(f"TensorRT cannot build the engine: {log.why()}")
    plan = bytes(serialized)
    seconds = time.perf_counter() - start
    if folder is not None:
        timing_cache.keep(config, folder, host, before, worker.tell)
    information, layers = "", dict[str, int]()
    if host.flavour != "tensorrt_rtx":  # which builds without a GPU, and cannot load there
        information, layers = _load(plan, options, trt, worker)
    return Built(
        plan,
        {
            "onnx_sha256": hashlib.sha256(model).hexdigest(),
            "plan_sha256": hashlib.sha256(plan).hexdigest(),
            "precision": precision.name,
            "profile": (1, options.opt_batch, options.max_batch),
            "flags": _flags(config, trt),
            "hardware_compatibility": options.hardware_compatibility,
            "version_compatible": options.version_compatible,
            "layers": layers,
            "seconds": round(seconds, 3),
            "log": tuple(log.tail(_TAIL)),
            "information": information,
        },
    )


def _configure(
    parsed: Parsed, precision: Precision, options: BuildOptions, trt: Any, log: Log
) -> Any:
    """The builder's configuration; raises EngineError for whatever TensorRT does not accept."""
    config = parsed.builder.create_builder_config()
    if config is None:
        raise EngineError(f"TensorRT makes no builder configuration: {log.why()}")
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector says little else
    _set_flag(config, trt.BuilderFlag.TF32, precision.tf32)  # TensorRT's default is on
    if options.version_compatible:
        _set_flag(config, trt.BuilderFlag.VERSION_COMPATIBLE, True)
    if options.hardware_compatibility != "none":
        config.hardware_compatibility_level = _level(options.hardware_compatibility, trt)
    _add_profile(parsed, config, options, log)
    return config


def _add_profile(parsed: Parsed, config: Any, options: BuildOptions, log: Log) -> None:
    profile = parsed.builder.create_optimization_profile()
    shape = parsed.input_shape
    batches = (1, options.opt_batch, options.max_batch)
    profile.set_shape(INPUT_NAME, *((batch, *shape) for batch in batches))
    if not bool(profile) or config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT refuses the batch sizes {batches}: {log.why()}")


def _set_flag(config: Any, flag: Any, wanted: bool) -> None:
    (config.set_flag if wanted else config.clear_flag)(flag)
    if config.get_flag(flag) is not wanted:
        raise EngineError(f"TensorRT does not {'set' if wanted else 'clear'} its flag {flag.name}")


def _level(name: HardwareCompatibility, trt: Any) -> Any:
    member = name.upper().replace("-", "_")
    level = getattr(trt.HardwareCompatibilityLevel, member, None)
    if level is None:
        raise EngineError(
            f"--hardware-compatibility {name}: TensorRT {trt.__version__} does not have it;"
            " take another, or a later TensorRT"
        )
    return level


def _flags(config: Any, trt: Any) -> tuple[str, ...]:
    """By name: the numbers differ between TensorRT 10 and 11."""
    members = trt.BuilderFlag.__members__
    return tuple(sorted(name for name, flag in members.items() if config.get_flag(flag)))


def _load(
    plan: bytes, options: BuildOptions, trt: Any, worker: Worker[Built]
) -> tuple[str, dict[str, int]]:
    """Load the plan as whoever runs it will: the inspector's JSON and the layers by type.

    Both are empty where the inspector cannot be read: that is no reason to throw a plan away.
    """
    with listening(trt) as log:
        runtime = trt.Runtime(logger_of(trt))
        if options.version_compatible:
            runtime.engine_host_code_allowed = True  # of a plan that was built here just now
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"TensorRT does not load the plan that it just built: {log.why()}")
        try:
            information = information_of(engine, trt)
            return information, summarize(information).all
        except EngineError as error:
            worker.tell(f"the plan is built; which types its layers have is not known: {error}")
            return "", {}
