"""Building a plan: from an ONNX file to what TensorRT runs, on the GPU that will run it."""

from __future__ import annotations

import hashlib
import json
import queue
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from eps_core import files
from eps_core.errors import ConfigError, EpsError
from eps_core.files import replace_file
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, EngineError
from eps_deploy.engines.trt.plan import (
    AMPERE,
    HARDWARE_COMPATIBILITY,
    LAYERS,
    PLAN,
    SIDECAR,
    HardwareCompatibility,
    Host,
    Log,
    Message,
    PlanMetadata,
    listening,
    load_tensorrt,
    logger_of,
)
from eps_deploy.precision import Float, Precision

# -- What an engine really computes in: the inspector's JSON, read and counted
#
# A strongly typed network fixes the types of its tensors; which kernels TensorRT then took, the
# inspector alone can tell. TensorRT 10 writes type and layout in one field, 11 in two.

# In this order: "UInt8" holds "int8", and "BFloat16" holds "float16".
_KINDS = (
    (re.compile(r"u?int64|\bi64"), "int64"),
    (re.compile(r"u?int32|\bi32"), "int32"),
    (re.compile(r"uint8"), "uint8"),
    (re.compile(r"int8"), "int8"),
    (re.compile(r"int4"), "int4"),
    (re.compile(r"fp8|float8"), "fp8"),
    (re.compile(r"fp4|float4"), "fp4"),
    (re.compile(r"bf16|bfloat16?"), "bf16"),
    (re.compile(r"fp16|half|float16"), "fp16"),
    (re.compile(r"fp32|float"), "fp32"),
    (re.compile(r"bool"), "bool"),
)
_PRODUCTS = re.compile(r"conv|gemm|matmul|matrix|correlation", re.IGNORECASE)
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of an engine, by the type that they compute in.

    Attributes:
        all: number of layers of each type: `{"fp16": 30, "fp32": 2}`; `other` where it is not told.
        products: the same for those that multiply matrices: convolutions and linear layers.
        by_name: name and type of each of these.
    """

    all: dict[str, int]
    products: dict[str, int]
    by_name: dict[str, str]


def information_of(engine: Any, trt: Any) -> str:
    """The inspector's JSON on an `ICudaEngine`. Raises EngineError when it gives none."""
    inspector = engine.create_engine_inspector()
    if inspector is None:
        raise EngineError("TensorRT gives no inspector for this engine")
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return text


def summarize(information: str) -> Layers:
    """Count the layers in the inspector's JSON, as TensorRT 10 or 11 writes it.

    A layer computes in the type of its weights, or of its first input when it has none.

    Raises:
        EngineError: not the inspector's JSON.
    """
    try:
        # TensorRT has put control characters into names.
        layers = json.loads(information, strict=False)["Layers"]
        kinds = [(_name(layer), _is_product(layer), _kind_of(layer)) for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise EngineError(
            f"TensorRT's inspector gave no usable JSON ({type(error).__name__}: {error})"
        ) from error
    return Layers(
        all=dict(Counter(kind for _, _, kind in kinds)),
        products=dict(Counter(kind for _, product, kind in kinds if product)),
        by_name={name: kind for name, product, kind in kinds if product},
    )


def kind_of(text: str) -> str:
    """The type in `Half`, `FP16`, `Row major linear INT8 format` and the like; else `other`."""
    lowered = text.lower()
    return next((kind for pattern, kind in _KINDS if pattern.search(lowered)), OTHER)


def _name(layer: Any) -> str:
    return str(layer if isinstance(layer, str) else layer["Name"])  # names alone: no details built


def _is_product(layer: Any) -> bool:
    if isinstance(layer, str):
        return bool(_PRODUCTS.search(layer))
    # Fused layers have names of all their parts, and a type of their own ("kgen", "fusion").
    words = (layer.get("LayerType", ""), layer.get("ParameterType", ""), layer.get("TacticName"))
    if "reformat" in str(words[0]).lower():
        return False
    return any(_PRODUCTS.search(str(word)) for word in words)


def _kind_of(layer: Any) -> str:
    if isinstance(layer, str):
        return OTHER
    weights = layer.get("Weights")
    if isinstance(weights, dict) and weights.get("Type"):
        return kind_of(str(weights["Type"]))
    inputs = layer.get("Inputs") or layer.get("Outputs") or []
    return kind_of(_type_of(inputs[0])) if inputs else OTHER


def _type_of(tensor: dict[str, Any]) -> str:
    for key in ("Datatype", "DataType", "Format/Datatype"):
        if key in tensor:
            return str(tensor[key])
    return str(tensor.get("Format", ""))


# -- From ONNX to a TensorRT network, and whether it is the network that was asked for

_FLOATS: dict[Float, str] = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class Parsed:
    """A network and what it lives on: none of these may be freed before the build is over.

    Attributes:
        builder, network: as TensorRT has them.
        parser: owns the memory of the network's weights.
    """

    builder: Any
    network: Any
    parser: Any

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape `[C, H, W]` of one image."""
        _, channels, height, width = tuple(self.network.get_input(0).shape)
        return int(channels), int(height), int(width)


@dataclass(frozen=True, slots=True)
class Products:
    """The layers that multiply: convolutions and linear ones.

    Attributes:
        total: how many there are.
        quantized: how many of them take int8.
    """

    total: int
    quantized: int


def parse(model: bytes, trt: Any) -> Parsed:
    """The network of an ONNX file as `eps-deploy` exports it.

    Raises:
        EngineError: TensorRT does not understand it, in its own words, or it is another network.
    """
    with listening(trt) as log:
        builder = trt.Builder(logger_of(trt))
        # TensorRT 11 has strong typing alone, 10 has to be asked. The member stands for a bit,
        # and passing it as it is would be taken for another flag.
        strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = _given(builder.create_network(strongly_typed), "makes no network", log)
        parser = trt.OnnxParser(network, logger_of(trt))
        if not parser.parse(model):
            raise EngineError(f"TensorRT does not understand the ONNX file: {_errors(parser, log)}")
        parsed = Parsed(builder, network, parser)
        _check_ports(network, trt)
        return parsed


def check_types(parsed: Parsed, precision: Precision, trt: Any) -> Products:
    """Whether each convolution and each linear layer computes as `precision` has it.

    Raises:
        EngineError: one that does not, by its name.
    """
    wanted = _FLOATS[precision.float]
    layers = [parsed.network.get_layer(index) for index in range(parsed.network.num_layers)]
    made_by = {
        layer.get_output(index).name: layer.type
        for layer in layers
        for index in range(layer.num_outputs)
    }
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    products = [layer for layer in layers if layer.type in kinds]
    quantized = 0
    for layer in products:
        found = layer.get_output(0).dtype.name
        if found != wanted:
            raise EngineError(
                f"layer {layer.name} computes in {found}, not in {wanted}: this ONNX file is not"
                f" of precision {precision.name}; export it again"
            )
        quantized += made_by.get(layer.get_input(0).name) == trt.LayerType.DEQUANTIZE
    if precision.quantized and not quantized:
        raise EngineError(
            f"none of the {len(products)} convolutions and linear layers takes int8: this ONNX file"
            f" is not of precision {precision.name}; export it again"
        )
    if quantized and not precision.quantized:
        raise EngineError(
            f"{quantized} of the {len(products)} convolutions and linear layers take int8: this"
            f" ONNX file is not of precision {precision.name}; export it again"
        )
    return Products(len(products), quantized)


def _check_ports(network: Any, trt: Any) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    found = [(port.name, port.dtype.name, len(tuple(port.shape))) for port in (*inputs, *outputs)]
    if found != [(INPUT_NAME, "UINT8", 4), (OUTPUT_NAME, "FLOAT", 2)]:
        ports = [f"{name} {kind} of {rank} dimensions" for name, kind, rank in found]
        raise EngineError(
            "the ONNX file is not of a network exported by eps-deploy: its inputs and outputs are"
            f" {', '.join(ports) or 'none'}"
        )
    batch, *sizes = tuple(inputs[0].shape)
    if batch != -1 or min(sizes) < 1:
        raise EngineError(
            f"the ONNX file takes images of the shape {[batch, *sizes]}; the batch size must be"
            " free and all else fixed"
        )


def _errors(parser: Any, log: Log) -> str:
    """The parser's first complaint, with the node that it is about."""
    if not parser.num_errors:
        return log.why()
    error = parser.get_error(0)
    lines = [line.strip() for line in str(error.desc()).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or log.why()  # what comes after is what came of it
    where = " ".join(part for part in (error.node_operator(), error.node_name()) if part)
    return f"{text} (at {where})" if where else text


def _given(value: Any, failure: str, log: Log) -> Any:
    if value is None:
        raise EngineError(f"TensorRT {failure}: {log.why()}")
    return value


# -- What earlier builds measured of kernels, so that a build does not start from nothing
#
# A help and no more: whatever goes wrong with the cache is said, and the build goes on without.

Say = Callable[[str], None]


def cache_file(folder: Path, host: Host) -> Path:
    """Its place: times hold for one version of TensorRT and one model of GPU."""
    parts = (host.flavour, host.tensorrt, f"sm{host.compute_capability}", host.device)
    return folder / (re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(parts)).strip("-") + ".timing")


def take(config: Any, folder: Path, host: Host, say: Say) -> bytes | None:
    """Give what the cache holds to a build, whose own measurements will be added to it.

    Returns what was read, for :func:`keep`; None when there can be no cache.
    """
    path = cache_file(folder, host)
    try:
        content = path.read_bytes() if path.exists() else b""
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):
            say(f"{path}: TensorRT refuses this timing cache; building with an empty one")
            content, cache = b"", config.create_timing_cache(b"")
            if cache is None or not config.set_timing_cache(cache, False):
                return None
    except OSError as error:
        say(f"{path}: {error.strerror or error}; building without a timing cache")
        return None
    return content


def keep(config: Any, folder: Path, host: Host, before: bytes | None, say: Say) -> None:
    """Write the cache back after a build, together with what others wrote meanwhile.

    Args:
        before: what :func:`take` returned.
    """
    if before is None:
        return
    path = cache_file(folder, host)
    try:
        with files.held(folder, f"{folder}: another build is writing its times just now"):
            cache = config.get_timing_cache()
            if cache is None:
                say(f"{path}: TensorRT has no timing cache to keep")
                return
            now = path.read_bytes() if path.exists() else b""
            if now not in (b"", before):
                theirs = config.create_timing_cache(now)
                if theirs is None or not cache.combine(theirs, False):
                    say(f"{path}: what another build wrote does not fit; replacing it")
            serialized = cache.serialize()
            if serialized is None:
                say(f"{path}: TensorRT does not give its timing cache away; it is not kept")
                return
            replace_file(path, bytes(serialized))
    except (OSError, EpsError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        say(f"{path}: the timing cache is not kept: {reason}")


# -- A long call into TensorRT on a thread of its own, so that Ctrl-C and progress reach the user
#
# TensorRT reports progress from the thread that builds, and asks at every step whether to go on.
# Here that thread only leaves messages; whoever waits for the result handles them, on their own
# thread.

Result = TypeVar("Result")
Progress = Callable[[str, int, int], bool]


@dataclass(frozen=True, slots=True)
class Step:
    """`done` of `steps` steps of `phase` are over."""

    phase: str
    done: int
    steps: int


class Worker(Generic[Result]):
    """One piece of work that can be called off.

    Attributes:
        cancelled: set when it was.
    """

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outcome: list[Result | BaseException] = []

    def tell(self, event: object) -> None:
        """Leave something for `handle`, from any thread."""
        self._events.put((event,))

    def run(self, work: Callable[[], Result], handle: Callable[[Any], None]) -> Result:
        """What `work` returns or raises, with `handle` called here for all that is told meanwhile.

        When `handle` raises, or Ctrl-C comes, the work is called off and waited for, and the
        exception goes on; a second Ctrl-C does not wait.
        """

        def target() -> None:
            try:
                self._outcome.append(work())
            except BaseException as error:
                self._outcome.append(error)
            finally:
                self._events.put(None)

        thread = threading.Thread(target=target, name="tensorrt-build", daemon=True)
        try:
            thread.start()
            for event in iter(self._events.get, None):
                handle(event[0])
        except BaseException:
            self.cancelled.set()
            if thread.is_alive():
                thread.join()
            raise
        thread.join()
        outcome = self._outcome[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def monitor_of(trt: Any, worker: Worker[Any]) -> Any:
    """An `IProgressMonitor` that tells `worker` of every step and stops once it is cancelled."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # the bindings insist on this form
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            worker.tell(Step(phase_name, 0, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            worker.tell(Step(phase_name, step + 1, self._steps.get(phase_name, step + 1)))
            return not worker.cancelled.is_set()  # anything but True ends the build

        def phase_finish(self, phase_name: str) -> None:
            steps = self._steps.pop(phase_name, 0)
            worker.tell(Step(phase_name, steps, steps))

    return Monitor()


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
        facts: all that :class:`PlanMetadata` holds but the host, and `information`, the inspector's
            JSON (empty when the plan was not loaded, or the inspector gave none).
    """

    plan: bytes
    facts: dict[str, Any]

    def sidecar(self, host: Host) -> PlanMetadata:
        facts = {key: value for key, value in self.facts.items() if key != "information"}
        return PlanMetadata(host=host, **facts)


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


def write_plan(folder: Path, built: Built, host: Host) -> PlanMetadata:
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
        before = take(config, folder, host, worker.tell)
    serialized = parsed.builder.build_serialized_network(parsed.network, config)
    if worker.cancelled.is_set():
        raise EngineError("the build was called off")
    if serialized is None:
        raise EngineError(f"TensorRT cannot build the engine: {log.why()}")
    plan = bytes(serialized)
    seconds = time.perf_counter() - start
    if folder is not None:
        keep(config, folder, host, before, worker.tell)
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
