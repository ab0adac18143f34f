"""Build TensorRT plans from ONNX files, on the GPU that runs them."""

from __future__ import annotations

import hashlib
import json
import queue
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from eps_core import files
from eps_core.cli import Log
from eps_core.errors import ConfigError, EpsError, GraphError
from eps_core.files import replace_file
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, EngineError
from eps_deploy.engines.trt.plan import (
    AMPERE,
    HARDWARE_COMPATIBILITY,
    HardwareCompatibility,
    Host,
    Message,
    Messages,
    Plan,
    PlanMetadata,
    Profile,
    collect_messages,
    load_tensorrt,
    logger_of,
)
from eps_deploy.precision import Precision, check_layer_types

Progress = Callable[[str, int, int], bool]


def option(
    help: str, metavar: str | None = None, *, limits: tuple[int, int | None] | None = None
) -> dict[str, Any]:
    """Metadata of a field: help text, placeholder and limits of its command-line option."""
    return {"help": help, "metavar": metavar, "limits": limits}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """How a plan is built; the metadata of each field describes its option of `eps-deploy`.

    `workspace` is in bytes here, and in MiB on the command line. Raises ConfigError for a value
    outside its range.
    """

    opt_batch: int = field(
        default=16,
        metadata=option("Batch size that TensorRT optimizes for.", "N", limits=(1, 4096)),
    )
    max_batch: int = field(
        default=32, metadata=option("Largest batch size of the engine.", "N", limits=(1, 4096))
    )
    workspace: int | None = field(
        default=None,
        metadata=option(
            "TensorRT workspace memory per layer.  [default: all GPU memory]",
            "MIB",
            limits=(1, None),
        ),
    )
    optimization_level: int = field(
        default=3,
        metadata=option(
            "TensorRT builder optimization level: 0 builds fastest, 5 searches longest.",
            limits=(0, 5),
        ),
    )
    timing_cache: Path | None = field(
        default=None,
        metadata=option(
            "TensorRT timing cache folder.  [default: ~/.cache/eps-resnet/tensorrt]", "DIR"
        ),
    )
    version_compatible: bool = field(
        default=False,
        metadata=option("Build a TensorRT plan that later TensorRT versions can load."),
    )
    hardware_compatibility: HardwareCompatibility = field(
        default="none", metadata=option("Other GPUs that can load the TensorRT plan.")
    )

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Smallest, optimal and largest batch of each optimization profile.

        Batch 1 has one of its own: its kernels are chosen for a single image.
        """
        larger = (2, max(2, self.opt_batch), self.max_batch)
        return ((1, 1, 1),) if self.max_batch == 1 else ((1, 1, 1), larger)

    def __post_init__(self) -> None:
        if not 1 <= self.opt_batch <= self.max_batch:
            raise ConfigError(
                f"--opt-batch {self.opt_batch} --max-batch {self.max_batch}: both must be at least"
                " 1, and the first no larger than the second"
            )
        if self.workspace is not None and self.workspace < 1:
            raise ConfigError(f"--workspace {self.workspace}: give a size of at least 1")
        if self.optimization_level not in range(6):
            raise ConfigError(f"--optimization-level {self.optimization_level}: give 0 to 5")
        if self.hardware_compatibility not in HARDWARE_COMPATIBILITY:
            raise ConfigError(
                f"--hardware-compatibility {self.hardware_compatibility}: give one of"
                f" {', '.join(HARDWARE_COMPATIBILITY)}"
            )


def check_possible(precision: Precision, options: BuildOptions, host: Host, trt: Any) -> None:
    """Raise EngineError for what this TensorRT or this GPU does not support.

    TensorRT silently computes an unsupported precision in another way.
    """
    if options.hardware_compatibility != "none":
        _compatibility_level(options.hardware_compatibility, trt)
    if host.capability >= AMPERE:
        return
    gpu = f"{host.device} has compute capability {host.compute_capability}"
    if precision.float == "bfloat16" or precision.tf32:
        flag = "--tf32" if precision.tf32 else "--bf16"
        raise EngineError(f"{flag} needs compute capability 8.0; {gpu}: use --fp16 or --fp32")
    if options.hardware_compatibility == "ampere-plus":
        raise EngineError(
            f"--hardware-compatibility ampere-plus needs compute capability 8.0; {gpu}"
        )


def _compatibility_level(name: HardwareCompatibility, trt: Any) -> Any:
    member = name.upper().replace("-", "_")
    level = getattr(trt.HardwareCompatibilityLevel, member, None)
    if level is None:
        raise EngineError(
            f"--hardware-compatibility {name}: TensorRT {trt.__version__} does not have it;"
            " take another, or a later TensorRT"
        )
    return level


# -- Building

_LOG_LINES = 40  # of TensorRT's log, kept in the plan's metadata


def build(
    model: bytes,
    precision: Precision,
    options: BuildOptions,
    *,
    host: Host,
    kept: Collection[str] = (),
    progress: Progress | None = None,
    log: Log | None = None,
    trt: Any = None,
    on_device: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Plan:
    """Build the plan of an ONNX file exported by `eps-deploy`.

    The build runs on another thread; `progress` and `log` are called on this one. Ctrl-C, and
    exceptions that these two raise, cancel the build and are raised again.

    Args:
        model: the bytes of the ONNX file.
        precision: the one that it was exported in.
        options: how to build.
        host: this machine; it decides what is possible and which timing cache applies.
        kept: blocks of the network that stay in higher precision (`eps-deploy --repair`).
        progress: called with a phase, its steps done and its number of steps; phases nest.
            Returning False cancels the build.
        log: receives TensorRT's warnings and errors, one line each.
        trt: the package to build with; None: `tensorrt`.
        on_device: makes the GPU current. It is entered on the building thread, because CUDA's
            current device belongs to a thread.

    Raises:
        EngineError: no TensorRT, a network that TensorRT rejects or that is not of this precision,
            an unsupported GPU, or a failed build; with TensorRT's reason where it gives one.
    """
    trt = load_tensorrt() if trt is None else trt
    check_possible(precision, options, host, trt)
    worker: _Worker[Plan] = _Worker()

    def report(phase: str, done: int, steps: int) -> None:
        if progress is not None and progress(phase, done, steps) is False:
            raise EngineError("the build was cancelled")

    def tell(line: object) -> None:
        if log is not None:
            worker.call(partial(log, str(line)))

    def run_steps(messages: Messages) -> Plan:
        start = time.perf_counter()
        parsed = parse(model, trt)
        try:
            check_layer_types(network_types(parsed, precision, trt), precision, kept)
        except GraphError as error:
            raise EngineError(f"{error}; export it again") from None
        config = _configure(parsed, precision, options, trt, messages)
        config.progress_monitor = _progress_monitor(trt, worker, report)
        with timing_cache(config, options.timing_cache, host, tell):
            serialized = parsed.builder.build_serialized_network(parsed.network, config)
            if worker.cancelled.is_set():
                raise EngineError("the build was cancelled")
            if serialized is None:
                raise EngineError(f"TensorRT cannot build the engine: {messages.reason()}")
            content = bytes(serialized)
            seconds = time.perf_counter() - start
        inspection, layers = "", dict[str, int]()
        if host.flavour != "tensorrt_rtx":  # which builds without a GPU, and cannot load there
            inspection, layers = _inspect(content, options, trt, tell)
        flags = trt.BuilderFlag.__members__  # the numbers differ between TensorRT 10 and 11
        metadata = PlanMetadata(
            host=host,
            onnx_sha256=hashlib.sha256(model).hexdigest(),
            plan_sha256=hashlib.sha256(content).hexdigest(),
            precision=precision.name,
            profiles=options.profiles,
            flags=tuple(sorted(name for name, flag in flags.items() if config.get_flag(flag))),
            hardware_compatibility=options.hardware_compatibility,
            version_compatible=options.version_compatible,
            layers=layers,
            seconds=round(seconds, 3),
            log=tuple(map(str, messages[-_LOG_LINES:])),
        )
        return Plan(content=content, metadata=metadata, inspection=inspection)

    def work() -> Plan:
        def receive(message: Message) -> None:
            if message.level != "INFO":
                tell(message)

        with on_device(), collect_messages(trt, receive) as messages:
            try:
                return run_steps(messages)
            except BaseException as error:
                # Its frames hold TensorRT's objects, which must be freed while the GPU is current.
                traceback.clear_frames(error.__traceback__)
                raise

    return worker.run(work)


def _configure(
    parsed: Parsed, precision: Precision, options: BuildOptions, trt: Any, messages: Messages
) -> Any:
    """The `IBuilderConfig`; raises EngineError for a setting that TensorRT does not accept."""
    config = parsed.builder.create_builder_config()
    if config is None:
        raise EngineError(f"TensorRT makes no builder configuration: {messages.reason()}")
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector says little else
    _set_flag(config, trt.BuilderFlag.TF32, precision.tf32)  # TensorRT's default is on
    if options.version_compatible:
        _set_flag(config, trt.BuilderFlag.VERSION_COMPATIBLE, True)
    if options.hardware_compatibility != "none":
        level = _compatibility_level(options.hardware_compatibility, trt)
        config.hardware_compatibility_level = level
    for index, batches in enumerate(options.profiles):
        profile = parsed.builder.create_optimization_profile()
        profile.set_shape(INPUT_NAME, *((batch, *parsed.input_shape) for batch in batches))
        if not bool(profile) or config.add_optimization_profile(profile) != index:
            raise EngineError(f"TensorRT refuses the batch sizes {batches}: {messages.reason()}")
    return config


def _set_flag(config: Any, flag: Any, wanted: bool) -> None:
    (config.set_flag if wanted else config.clear_flag)(flag)
    if config.get_flag(flag) is not wanted:
        raise EngineError(f"TensorRT does not {'set' if wanted else 'clear'} its flag {flag.name}")


# -- Parsing the ONNX file, and checking that it is one of ours

_FLOATS = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


class Parsed(NamedTuple):
    """A parsed network with its owners, none of which may be freed before the build ends."""

    builder: Any
    network: Any
    parser: Any  # owns the memory of the network's weights

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape `[C, H, W]` of one image."""
        _, channels, height, width = tuple(self.network.get_input(0).shape)
        return int(channels), int(height), int(width)


def parse(model: bytes, trt: Any) -> Parsed:
    """Parse an ONNX file exported by `eps-deploy`.

    Raises EngineError when TensorRT rejects it, with TensorRT's reason, or it is another network.
    """
    with collect_messages(trt) as messages:
        builder = trt.Builder(logger_of(trt))
        # TensorRT 11 is always strongly typed, 10 has to be asked. The member is the number of a
        # bit: passed as it is, it would be taken for another flag.
        strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(strongly_typed)
        if network is None:
            raise EngineError(f"TensorRT makes no network: {messages.reason()}")
        parser = trt.OnnxParser(network, logger_of(trt))
        if not parser.parse(model):
            reason = messages.reason()
            if parser.num_errors:
                # The first error, and of its text the cause: the rest is what followed from it.
                error = parser.get_error(0)
                lines = [line.strip() for line in str(error.desc()).splitlines() if line.strip()]
                node = " ".join(filter(None, (error.node_operator(), error.node_name())))
                reason = " ".join(lines[:2]) or reason
                reason += f" (at {node})" if node else ""
            raise EngineError(f"TensorRT does not understand the ONNX file: {reason}")

    ports = [network.get_input(index) for index in range(network.num_inputs)]
    ports += [network.get_output(index) for index in range(network.num_outputs)]
    kinds = [(port.name, port.dtype.name, len(tuple(port.shape))) for port in ports]
    found = [f"{name} {kind} of {rank} dimensions" for name, kind, rank in kinds]
    if found != [f"{INPUT_NAME} UINT8 of 4 dimensions", f"{OUTPUT_NAME} FLOAT of 2 dimensions"]:
        raise EngineError(
            "the ONNX file is not of a network exported by eps-deploy: its inputs and outputs are"
            f" {', '.join(found) or 'none'}"
        )
    batch, *sizes = tuple(ports[0].shape)
    if batch != -1 or min(sizes) < 1:
        raise EngineError(
            f"the ONNX file takes images of the shape {[batch, *sizes]}; the batch size must be"
            " free and all else fixed"
        )
    return Parsed(builder, network, parser)


def network_types(parsed: Parsed, precision: Precision, trt: Any) -> dict[str, str]:
    """Type that each convolution and linear layer computes in, by name, for `check_layer_types`.

    `int8` for a layer with a dequantised input whose output has the float type of `precision`.
    """
    layers = [parsed.network.get_layer(index) for index in range(parsed.network.num_layers)]
    made_by = {
        layer.get_output(index).name: layer.type
        for layer in layers
        for index in range(layer.num_outputs)
    }
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    types = {}
    for layer in layers:
        if layer.type in kinds:
            dtype = layer.get_output(0).dtype.name
            found = _FLOATS.get(dtype, dtype.lower())
            dequantized = made_by.get(layer.get_input(0).name) == trt.LayerType.DEQUANTIZE
            types[layer.name] = "int8" if dequantized and found == precision.float else found
    return types


# -- Timing caches: kernel times that earlier builds measured


def timing_cache_path(folder: Path, host: Host) -> Path:
    """The file of a timing cache: times apply to one version of TensorRT and one model of GPU."""
    parts = (host.flavour, host.tensorrt, f"sm{host.compute_capability}", host.device)
    return folder / (re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(parts)).strip("-") + ".timing")


@contextmanager
def timing_cache(config: Any, folder: Path | None, host: Host, log: Log) -> Iterator[None]:
    """Use the timing cache in `folder` for a build in the block, and store the build's times there.

    A cache that cannot be read or written is logged, and the build goes on without it.
    """
    if folder is None:
        yield
        return
    path = timing_cache_path(folder, host)
    before: bytes | None = None
    try:
        before = path.read_bytes() if path.exists() else b""
        if not _set_timing_cache(config, before):
            log(f"{path}: TensorRT refuses this timing cache; building with an empty one")
            before = b"" if _set_timing_cache(config, b"") else None
    except OSError as error:
        log(f"{path}: {error.strerror or error}; building without a timing cache")
    yield
    if before is None:
        return
    try:
        with files.held(folder, f"{folder}: another build is writing its times just now"):
            cache = config.get_timing_cache()
            if cache is None:
                log(f"{path}: TensorRT has no timing cache to keep")
                return
            now = path.read_bytes() if path.exists() else b""
            if now not in (b"", before):
                theirs = config.create_timing_cache(now)
                if theirs is None or not cache.combine(theirs, False):
                    log(f"{path}: the times that another build wrote do not fit; replacing them")
            serialized = cache.serialize()
            if serialized is None:
                log(f"{path}: TensorRT does not serialize its timing cache; it is not kept")
                return
            replace_file(path, bytes(serialized))
    except (OSError, EpsError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        log(f"{path}: the timing cache is not kept: {reason}")


def _set_timing_cache(config: Any, content: bytes) -> bool:
    cache = config.create_timing_cache(content)
    return cache is not None and bool(config.set_timing_cache(cache, False))


# -- Running the build on another thread, so that Ctrl-C and progress reach the user
#
# TensorRT reports progress from the building thread, and asks at every step whether to continue.
# That thread only queues calls; the thread that waits for the result makes them.

Result = TypeVar("Result")


class _Worker(Generic[Result]):
    """Runs a function on a thread of its own, which should end when `cancelled` is set."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()

    def call(self, function: Callable[[], object]) -> None:
        """Have the thread that waits in `run` call `function`."""
        self._calls.put(function)

    def run(self, work: Callable[[], Result]) -> Result:
        """Return or raise what `work` does, and make the queued calls meanwhile.

        When a call raises, or on Ctrl-C, the work is cancelled and waited for, and the exception
        is raised again; a second Ctrl-C does not wait.
        """
        outcome: Future[Result] = Future()

        def target() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)
            finally:
                self._calls.put(None)

        thread = threading.Thread(target=target, name="tensorrt-build", daemon=True)
        try:
            thread.start()
            for function in iter(self._calls.get, None):
                function()
        except BaseException:
            self.cancelled.set()
            if thread.is_alive():
                thread.join()
            raise
        thread.join()
        return outcome.result()


def _progress_monitor(
    trt: Any, worker: _Worker[Any], report: Callable[[str, int, int], None]
) -> Any:
    """An `IProgressMonitor` that has `worker` report every step, and stops once it is cancelled."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # the bindings insist on this form
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            worker.call(partial(report, phase_name, 0, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps = self._steps.get(phase_name, step + 1)
            worker.call(partial(report, phase_name, step + 1, steps))
            return not worker.cancelled.is_set()  # anything but True ends the build

        def phase_finish(self, phase_name: str) -> None:
            steps = self._steps.pop(phase_name, 0)
            worker.call(partial(report, phase_name, steps, steps))

    return Monitor()


# -- The types that the built engine computes in, from TensorRT's inspector
#
# A strongly typed network fixes the types of its tensors; only the inspector tells which kernels
# TensorRT chose. TensorRT 10 writes type and layout in one field, 11 in two.

# In this order: "UInt8" contains "int8", and "BFloat16" contains "float16".
_TYPE_PATTERNS = {
    "int64": r"u?int64|\bi64",
    "int32": r"u?int32|\bi32",
    "uint8": "uint8",
    "int8": "int8",
    "int4": "int4",
    "fp8": "fp8|float8",
    "fp4": "fp4|float4",
    "bf16": "bf16|bfloat16?",
    "fp16": "fp16|half|float16",
    "fp32": "fp32|float",
    "bool": "bool",
}
OTHER = "other"


def _inspect(plan: bytes, options: BuildOptions, trt: Any, log: Log) -> tuple[str, dict[str, int]]:
    """Load the plan as an engine does: the inspector's JSON, and the layers by type.

    Both are empty when the inspector's JSON cannot be used: the plan runs all the same.
    """
    with collect_messages(trt) as messages:
        runtime = trt.Runtime(logger_of(trt))
        if options.version_compatible:
            runtime.engine_host_code_allowed = True  # the plan was built here just now
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(
                f"TensorRT does not load the plan that it just built: {messages.reason()}"
            )
        try:
            inspector = engine.create_engine_inspector()
            if inspector is None:
                raise EngineError("TensorRT gives no inspector for this engine")
            text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
            return text, count_layer_types(text)
        except EngineError as error:
            log(f"the plan is built; which types its layers have is not known: {error}")
            return "", {}


def count_layer_types(inspection: str) -> dict[str, int]:
    """Number of layers that compute in each type, from the inspector's JSON.

    A layer computes in the type of its weights, or of its first input if it has none; `other` when
    the JSON does not tell. Raises EngineError when it is not the inspector's JSON.
    """
    try:
        # TensorRT has put control characters into names.
        layers = json.loads(inspection, strict=False)["Layers"]
        return dict(Counter(_layer_type(layer) for layer in layers))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise EngineError(
            f"TensorRT's inspector gave no usable JSON ({type(error).__name__}: {error})"
        ) from error


def _layer_type(layer: Any) -> str:
    if isinstance(layer, str):
        return OTHER  # a name: the engine was built without details
    weights = layer.get("Weights")
    if isinstance(weights, dict) and weights.get("Type"):
        return type_in(str(weights["Type"]))
    tensors = layer.get("Inputs") or layer.get("Outputs")
    if not tensors:
        return OTHER
    keys = ("Datatype", "DataType", "Format/Datatype", "Format")
    return type_in(next((str(tensors[0][key]) for key in keys if key in tensors[0]), ""))


def type_in(text: str) -> str:
    """The type in `Half`, `FP16` or `Row major linear INT8 format`; else `other`."""
    lowered = text.lower()
    found = (kind for kind, pattern in _TYPE_PATTERNS.items() if re.search(pattern, lowered))
    return next(found, OTHER)
