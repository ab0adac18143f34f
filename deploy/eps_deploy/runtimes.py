"""The engines of a deployment: how the baseline and the compact network are run, both alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from eps_deploy import plans
from eps_deploy.engines.base import Engine
from eps_deploy.engines.ort import OrtEngine, try_provider
from eps_deploy.exporting.export import Deployed, in_precision
from eps_deploy.exporting.half import rounded
from eps_deploy.measuring.machine import cpus
from eps_deploy.measuring.parity import Infer
from eps_deploy.networks import Models, Networks, on_gpu
from eps_deploy.options import Options
from eps_deploy.stages import Stages

_CASTS = (
    "ONNX Runtime computes {name} on the CPU in float32, with casts around each convolution: its"
    " times say nothing about {name}"
)
_IN_TORCH = {
    "what": "model.onnx on the CPU",
    "why": "no runtime has bfloat16 convolutions there; torch computed them in its place",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the two networks, in all the forms that exist of it.

    Attributes:
        torch: as trained (or compacted), float32.
        reference: what its ONNX file says: int8 with true Q/DQ arithmetic, float16 rounded after
            every operation, both on the CPU; bfloat16 in torch.
        engine: what ships; None when it is built elsewhere.
        same: whether engine and reference are one and the same.
    """

    torch: Deployed
    reference: Infer
    engine: Engine | None
    same: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """Both networks, and the files that come with the engine that ships, by name."""

    compact: Side
    baseline: Side
    files: dict[str, bytes]

    def describe(self, options: Options) -> dict[str, Any]:
        """The engine that ships, for manifest and report."""
        if self.compact.engine is not None:
            return self.compact.engine.describe()
        return {
            "name": options.engine,
            "runtime": "tensorrt",
            "deferred": True,
            "max_batch": options.max_batch,
            **plans.wishes(options),
        }


def require(options: Options) -> None:
    """Raise EngineError, in one line with the remedy, unless this machine has what is asked for."""
    if options.engine == "ort":
        try_provider(options.provider)
    elif not options.defer_build:
        plans.require(options)


def why_no_times(options: Options) -> str | None:
    """Why the engine's times would mean nothing; None: they are measured."""
    half = options.precision.float != "float32"
    if options.engine == "ort" and options.provider == "cpu" and half:
        return _CASTS.format(name=options.precision.name)
    return plans.DEFERRED if options.defer_build else None


def not_run(options: Options) -> list[dict[str, str]]:
    """What of the engines does not run here, and why."""
    return [
        *([_IN_TORCH] if options.precision.float == "bfloat16" else []),
        *([{"what": "TensorRT engine", "why": plans.DEFERRED}] if options.defer_build else []),
    ]


@contextmanager
def opened(
    options: Options, networks: Networks, models: Models, stages: Stages, say: Callable[[str], None]
) -> Iterator[Sides]:
    """Both networks' engines for the length of a block."""
    with ExitStack() as stack:
        opener = _trt if options.engine == "trt" else _ort
        yield opener(options, networks, models, stages, say, stack)


def _ort(
    options: Options,
    networks: Networks,
    models: Models,
    stages: Stages,
    say: Callable[[str], None],
    stack: ExitStack,
) -> Sides:
    def side(torch: Deployed, model: bytes, name: str) -> Side:
        engine = _ort_engine(options, model, name, stack)
        plain = options.precision.float == "float32" and not options.precision.quantized
        if options.provider == "cpu" and plain:
            return Side(torch=torch, reference=engine.infer, engine=engine, same=True)
        held = reference(options, torch, model, name, stack)
        return Side(torch=torch, reference=held, engine=engine)

    return Sides(
        compact=side(networks.compact, models.compact, "model.onnx"),
        baseline=side(networks.baseline, models.baseline, "baseline.onnx"),
        files={},
    )


def _ort_engine(options: Options, model: bytes, name: str, stack: ExitStack) -> OrtEngine:
    """As it is served."""
    return stack.enter_context(
        OrtEngine(
            model,
            name=name,
            provider=options.provider,
            threads=options.threads,
            max_batch=options.max_batch,
            tf32=options.precision.tf32,
        )
    )


def _trt(
    options: Options,
    networks: Networks,
    models: Models,
    stages: Stages,
    say: Callable[[str], None],
    stack: ExitStack,
) -> Sides:
    files: dict[str, bytes] = {}

    def side(torch: Deployed, model: bytes, name: str) -> Side:
        engine: Engine | None = None
        if not options.defer_build:
            plan = plans.build_plan(options, model, name, stages, say)
            engine = stack.enter_context(plan.open(options, f"{name}.plan"))
            if name == "model":
                files.update(plan.files())
        held = reference(options, torch, model, f"{name}.onnx", stack)
        return Side(torch=torch, reference=held, engine=engine)

    return Sides(
        compact=side(networks.compact, models.compact, "model"),
        baseline=side(networks.baseline, models.baseline, "baseline"),
        files=files,
    )


def shipped(options: Options, torch: Deployed, model: bytes, stack: ExitStack) -> list[Infer]:
    """All that an accuracy is judged by: what the ONNX file says, and ONNX Runtime as it serves it.

    A TensorRT plan, which takes minutes to build, is left out.
    """
    held = reference(options, torch, model, "model.onnx", stack)
    if options.engine == "trt":
        return [held]
    return [held, _ort_engine(options, model, "model.onnx", stack).infer]


def reference(
    options: Options, torch: Deployed, model: bytes, name: str, stack: ExitStack
) -> Infer:
    """What the ONNX file says, by ONNX Runtime on all cores, or for bfloat16 by torch."""
    precision = options.precision
    if precision.float == "bfloat16":
        held = in_precision(torch.network, torch.identity, precision)
        stack.enter_context(on_gpu(options.device, held))
        return held.infer
    if precision.float == "float16":
        model = rounded(model)
    engine = OrtEngine(
        model,
        name=name,
        threads=cpus(),  # nobody times it, and it sees every test image
        max_batch=options.max_batch,
        exact_qdq=precision.quantized,
    )
    return stack.enter_context(engine).infer
