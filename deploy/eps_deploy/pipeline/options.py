"""What `eps-deploy` was asked for, checked as a whole before any work begins."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eps_core.errors import ConfigError
from eps_deploy.bundle import NAME, check_name
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.precision import PRECISIONS, Precision

Method = Literal["minmax", "entropy", "percentile"]
Provider = Literal["cpu", "cuda", "tensorrt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `eps-deploy` was asked for.

    Attributes:
        model: the compact network.
        checkpoint, baseline: where they are; None: where they are expected.
        data_root: as `--data-root`.
        output: folder of the bundle.
        name: of the model, for clients and for Triton's repository.
        engine: `ort` or `trt`.
        precision: see `eps_deploy.precision`.
        calibration_samples, calibration_method: for int8.
        repair: keep blocks in higher precision until the accuracy holds.
        plan: batch sizes of both engines, and how TensorRT builds.
        provider, threads: of ONNX Runtime.
        defer_build: build no plan here; whoever serves the bundle does.
        device: index of the GPU.
        max_accuracy_drop: percentage points.
        min_speedup: ratio that the speed-up's interval must reach.
        time_budget: seconds for the latency measurements of a batch size.
        force: replace a bundle at `output`.
        resume: take up what a killed run had finished.
        command: the command line, for the report and `reproduce.sh`.

    Raises:
        ConfigError: a value outside its range, or options that contradict each other.
    """

    model: Path
    checkpoint: Path | None = None
    baseline: Path | None = None
    data_root: Path | None = None
    output: Path = Path("bundle")
    name: str = NAME
    engine: Literal["ort", "trt"] = "ort"
    precision: Precision = PRECISIONS["fp32"]
    calibration_samples: int = 512
    calibration_method: Method = "minmax"
    repair: bool = False
    plan: BuildOptions = field(default_factory=BuildOptions)
    provider: Provider = "cpu"
    threads: int = 1
    defer_build: bool = False
    device: int = 0
    max_accuracy_drop: float = 0.5
    min_speedup: float = 1.0
    time_budget: float = 60.0
    force: bool = False
    resume: bool = False
    command: str = "eps-deploy"

    def __post_init__(self) -> None:
        try:
            check_name(self.name)
        except ConfigError as error:
            raise ConfigError(f"--name: {error}") from None
        for name in ("max_accuracy_drop", "min_speedup", "time_budget"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"--{_flag(name)} {value}: give a number of at least 0")
        if self.repair and self.precision.name in ("fp32", "tf32"):
            raise ConfigError(
                f"--repair: nothing to repair in {self.precision.name};"
                " add --fp16, --bf16 or --int8, or leave it out"
            )
        self._check_precision()

    def _check_precision(self) -> None:
        if self.engine != "ort":
            return
        if self.precision.float == "bfloat16" and self.provider == "cpu":
            raise ConfigError(
                "--bf16: ONNX Runtime has no bfloat16 convolutions on the CPU;"
                " use --fp16, or --engine trt"
            )
        if self.precision.tf32 and self.provider == "cpu":
            raise ConfigError("--tf32: only NVIDIA GPUs have it; use --fp32, or --provider cuda")

    @property
    def max_batch(self) -> int:
        return self.plan.max_batch

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes of the chain of proof; the last batch of most of them is a ragged one."""
        sizes = {1, 2, self.plan.opt_batch, self.plan.max_batch}
        return tuple(sorted(size for size in sizes if size <= self.max_batch))

    @property
    def gpu(self) -> int | None:
        """Index of the GPU that the engine runs on."""
        return None if self.engine == "ort" and self.provider == "cpu" else self.device


def _flag(name: str) -> str:
    return name.replace("_", "-")
