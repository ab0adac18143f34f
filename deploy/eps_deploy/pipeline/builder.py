"""Build the networks of a deployment in torch, as ONNX files, and as the engines that run them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eps_core.checks import Check
from eps_core.cli import Log
from eps_core.machine import cpus
from eps_deploy.bench.accuracy import Infer
from eps_deploy.engines.base import Engine, EngineError, Images
from eps_deploy.engines.ort import OrtEngine, try_provider
from eps_deploy.engines.trt.build import BuildOptions, build
from eps_deploy.engines.trt.cache import PlanCache
from eps_deploy.engines.trt.plan import Host, Plan, this_platform
from eps_deploy.export import quantize as calibrating
from eps_deploy.export.export import Deployed, export_onnx, in_precision
from eps_deploy.export.mixed_precision import units
from eps_deploy.export.quantize import quantize
from eps_deploy.export.types import round_to_float16
from eps_deploy.pipeline.inputs import Inputs
from eps_deploy.pipeline.options import Options
from eps_train.gating import rewriting
from eps_train.models.spec import cost
from eps_train.training.forward import TrainingPrecision

# -- Networks in torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Networks:
    """The torch networks of a deployment, each of uint8 images, in evaluation mode on the CPU.

    `gated` is the ε-network at the depth of the compact one; `baseline` the trained baseline, or
    the ε-network's full depth when none was trained.
    """

    gated: Deployed
    compact: Deployed
    baseline: Deployed


def build_networks(inputs: Inputs) -> Networks:
    compact, trained = inputs.compact, inputs.baseline
    if trained is None:
        full_depth = rewriting.drop_gates(inputs.checkpoint.build_gated())
    else:
        full_depth = trained.build_gated()
    return Networks(
        gated=Deployed(compact.gated(inputs.checkpoint), compact.data),
        compact=Deployed(compact.build(), compact.data),
        baseline=Deployed(rewriting.drop_taps(full_depth), (trained or compact).data),
    )


@contextmanager
def on_gpu(device: int, *networks: Deployed) -> Iterator[None]:
    """Move networks to the CUDA device `device` during the block, in float32 without TF32.

    Nothing changes when torch has no such device. The test images take minutes to hours on a CPU.
    Logits differ by rounding between the two, so parity is checked on the CPU.
    """
    if device >= torch.cuda.device_count():
        yield
        return
    target = torch.device("cuda", device)
    TrainingPrecision("fp32", target)  # which switches TF32 off
    try:
        for network in networks:
            network.to(target)
        yield
    finally:
        for network in networks:
            network.to("cpu")
        torch.cuda.empty_cache()  # leave the memory to the engine


def size(inputs: Inputs, networks: Networks) -> dict[str, Any]:
    """Parameters and FLOPs of both networks, for `report.json`."""
    shape = inputs.compact.data.input_shape
    baseline = cost(networks.baseline.network, shape)
    compact = cost(networks.compact.network, shape)
    return {
        "parameters": {"baseline": baseline.parameters, "compact": compact.parameters},
        "flops": {"baseline": baseline.flops, "compact": compact.flops},
    }


# -- ONNX files


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The bytes of `model.onnx` and `baseline.onnx`, both in the same precision.

    Attributes:
        calibration: for int8: `samples`, `method` and the `sha256` of the pixels.
        kept: blocks of the compact network that stay in higher precision.
    """

    compact: bytes
    baseline: bytes
    calibration: dict[str, Any] | None = None
    kept: tuple[str, ...] = ()


def export(
    options: Options, inputs: Inputs, networks: Networks, calibration: Images | None
) -> Models:
    """Export both networks in the precision asked for.

    `calibration` are raw training images for int8, uint8 `[N, C, H, W]`.
    """
    digest = (inputs.baseline or inputs.checkpoint).digest
    described = None
    if calibration is not None:
        described = {
            "samples": len(calibration),
            "method": options.calibration_method,
            "sha256": calibrating.digest(calibration),
        }
    return Models(
        compact=export_compact(options, inputs, networks, calibration),
        baseline=_export(options, "baseline.onnx", networks.baseline, digest, calibration),
        calibration=described,
    )


def export_compact(
    options: Options,
    inputs: Inputs,
    networks: Networks,
    calibration: Images | None,
    kept: Sequence[str] = (),
) -> bytes:
    """Export the compact network, with the blocks `kept` in higher precision."""
    digest, blocks = inputs.compact.digest, inputs.blocks()
    return _export(options, "model.onnx", networks.compact, digest, calibration, kept, blocks)


def _export(
    options: Options,
    name: str,
    network: Deployed,
    digest: str,
    calibration: Images | None,
    kept: Sequence[str] = (),
    blocks: Sequence[str] = (),
) -> bytes:
    precision = options.precision
    with tempfile.TemporaryDirectory(prefix="eps-deploy-") as folder:
        path = Path(folder) / name
        export_onnx(
            network.network,
            network.identity,
            path,
            precision=precision,
            source=digest,
            kept=() if precision.quantized else kept,
        )
        model = path.read_bytes()
    if calibration is None or (kept and set(kept) >= set(units(model, blocks))):
        return model  # with every block kept there is nothing to quantise
    method = options.calibration_method
    return quantize(model, calibration, precision, method=method, kept=kept)


# -- Engines

DEFERRED = "--defer-build: the plan is built by the machine that serves the bundle"
NO_REHEARSAL = {
    "what": "model.onnx through NVIDIA's parser and builder",
    "why": "needs no GPU but the package tensorrt-rtx-cu13, which is not installed",
}
_RTX = "tensorrt_rtx"


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """The compact network or the baseline, in every form that runs.

    Attributes:
        torch: as trained or compacted, in float32.
        reference: the arithmetic of its ONNX file on the CPU: int8 with exact Q/DQ, float16
            rounded after every operation; bfloat16 in torch.
        engine: what ships; None when another machine builds it.
        same: whether the engine is the reference.
    """

    torch: Deployed
    reference: Infer
    engine: Engine | None
    same: bool = False
    plan: Plan | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Variants:
    compact: Variant
    baseline: Variant

    @property
    def plan(self) -> Plan | None:
        """The plan that ships."""
        return self.compact.plan

    def describe(self, options: Options) -> dict[str, Any]:
        """The engine that ships, for manifest and report."""
        engine = self.compact.engine
        return deferred_engine(options) if engine is None else engine.describe()


def deferred_engine(options: Options) -> dict[str, Any]:
    """The manifest's entry about an engine that the serving machine builds, and how to build it."""
    settings = asdict(options.plan)
    del settings["timing_cache"]  # a folder of this machine
    return {
        "name": options.engine,
        "runtime": "tensorrt",
        "deferred": True,
        **settings,
        "precision": options.precision.name,
    }


def require(options: Options) -> None:
    """Raise EngineError with the remedy unless this machine can build and run the engine."""
    if options.engine == "ort":
        try_provider(options.provider)
    elif not options.defer_build:
        try:
            plans = PlanCache(None, log=lambda line: None, device=options.device)
            plans.check_possible(options.precision, options.plan)
        except EngineError as error:
            raise EngineError(
                f"--engine trt: {error}; or add --defer-build to have the plan built by the"
                " machine that serves, or use --engine ort"
            ) from error


def why_no_latency(options: Options) -> str | None:
    """Why the engine's latency would mean nothing; None: it is measured."""
    name = options.precision.name
    if options.gpu is None and options.precision.float != "float32":
        return (
            f"ONNX Runtime computes {name} on the CPU in float32, with casts around each"
            f" convolution: its times say nothing about {name}"
        )
    return DEFERRED if options.defer_build else None


def not_run(options: Options) -> list[dict[str, str]]:
    """The engines that do not run on this machine, each with the reason."""
    left_out = {}
    if options.precision.float == "bfloat16":
        left_out["model.onnx on the CPU"] = (
            "no runtime has bfloat16 convolutions there; torch computed them in its place"
        )
    if options.defer_build:
        left_out["TensorRT engine"] = DEFERRED
    return [{"what": what, "why": why} for what, why in left_out.items()]


@contextmanager
def opened(options: Options, networks: Networks, models: Models, log: Log) -> Iterator[Variants]:
    """Both networks' engines for the length of a block; plans are built first."""
    trt = options.engine == "trt" and not options.defer_build
    plans = PlanCache(None, log=log, device=options.device) if trt else None
    compact, baseline, kept = models.compact, models.baseline, models.kept
    with ExitStack() as stack:
        yield Variants(
            compact=open_variant(options, networks.compact, compact, stack, plans=plans, kept=kept),
            baseline=open_variant(
                options, networks.baseline, baseline, stack, name="baseline", plans=plans
            ),
        )


def open_variant(
    options: Options,
    torch: Deployed,
    model: bytes,
    stack: ExitStack,
    *,
    name: str = "model",
    plans: PlanCache | None = None,
    kept: tuple[str, ...] = (),
) -> Variant:
    """Open every form of a network until `stack` closes; without `plans` none of TensorRT."""
    engine: Engine | None = None
    plan: Plan | None = None
    if plans is not None:
        file, settings = f"{name}.plan", _with_timing_cache(options)
        plan = plans.plan(model, options.precision, settings, kept=kept, name=file)
        engine = stack.enter_context(plans.open(plan, name=file))
    elif options.engine == "ort":
        served = OrtEngine(
            model,
            name=f"{name}.onnx",
            provider=options.provider,
            threads=options.threads,
            max_batch=options.max_batch,
            precision=options.precision,
        )
        engine = stack.enter_context(served)
        # ONNX Runtime's CPU arithmetic in float32 is that of the file.
        if options.provider == "cpu" and options.precision.name in ("fp32", "tf32"):
            return Variant(torch=torch, reference=engine.infer, engine=engine, same=True)
    infer = _reference(options, torch, model, f"{name}.onnx", stack)
    return Variant(torch=torch, reference=infer, engine=engine, plan=plan)


def _reference(
    options: Options, torch: Deployed, model: bytes, name: str, stack: ExitStack
) -> Infer:
    """The arithmetic of an ONNX file: in ONNX Runtime on all cores, or for bfloat16 in torch."""
    precision = options.precision
    if precision.float == "bfloat16":
        network = in_precision(torch.network, torch.identity, precision)
        stack.enter_context(on_gpu(options.device, network))
        return network.infer
    engine = OrtEngine(
        round_to_float16(model) if precision.float == "float16" else model,
        name=name,
        threads=cpus(),  # it is not timed, and sees every test image
        max_batch=options.max_batch,
        exact_qdq=precision.quantized,
    )
    return stack.enter_context(engine).infer


def _with_timing_cache(options: Options) -> BuildOptions:
    """The build options, with the user's cache folder (XDG Base Directory) unless one is named."""
    if options.plan.timing_cache is not None:
        return options.plan
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:  # a user without a home, as in containers: times are not cached
            return options.plan
    return replace(options.plan, timing_cache=Path(base) / "eps-resnet" / "tensorrt")


def rehearse(options: Options, models: Models) -> Check | None:
    """Whether NVIDIA's parser and builder accept `model.onnx`, on a machine without a GPU.

    Uses TensorRT for RTX, whose builder needs no GPU; None when it is not installed. Its plan is
    of another kind than TensorRT's, and is discarded.
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
    plain = replace(options.plan, version_compatible=False, hardware_compatibility="none")
    try:
        build(models.compact, options.precision, plain, host=host, kept=models.kept, trt=trt)
    except EngineError as error:
        return Check("builder", False, str(error), limit=0.0)
    text = f"TensorRT for RTX {trt.__version__} parses and builds model.onnx without a GPU"
    return Check("builder", True, text, value=0.0, limit=0.0)
