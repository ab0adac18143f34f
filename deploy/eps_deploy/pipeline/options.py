"""The options of `eps-deploy`, validated together before any work begins."""

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
    """The options of `eps-deploy`.

    Attributes:
        model: the compact network.
        checkpoint, baseline: files; None: the default places (see `find_inputs`).
        data_root: folder of the data set.
        output: folder of the bundle.
        name: name of the model for clients and in Triton's repository.
        engine: `ort` or `trt`.
        precision: see `eps_deploy.precision`.
        calibration_samples, calibration_method: calibration of int8.
        repair: keep blocks in higher precision until the accuracy check passes.
        plan: batch sizes of both engines, and TensorRT's build options.
        provider, threads: execution provider and threads of ONNX Runtime.
        defer_build: leave building the plan to the machine that serves the bundle.
        device: index of the GPU.
        max_accuracy_drop: limit of the accuracy check in percentage points.
        min_speedup: ratio that the lower end of the speed-up's interval must reach.
        time_budget: seconds for the latency measurements of a batch size.
        force: replace a bundle at `output`.
        command: the command line, for the report and `reproduce.sh`.

    Raises:
        ConfigError: a value is outside its range, or options contradict each other.
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
    command: str = "eps-deploy"

    def __post_init__(self) -> None:
        try:
            check_name(self.name)
        except ConfigError as error:
            raise ConfigError(f"--name: {error}") from None
        for name in ("max_accuracy_drop", "min_speedup", "time_budget"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {value}: give a number of at least 0")
        if self.repair and self.precision.name in ("fp32", "tf32"):
            raise ConfigError(
                f"--repair: nothing to repair in {self.precision.name};"
                " add --fp16, --bf16 or --int8, or leave it out"
            )
        on_cpu = self.engine == "ort" and self.provider == "cpu"
        if on_cpu and self.precision.float == "bfloat16":
            raise ConfigError(
                "--bf16: ONNX Runtime has no bfloat16 convolutions on the CPU;"
                " use --fp16, or --engine trt"
            )
        if on_cpu and self.precision.tf32:
            raise ConfigError("--tf32: only NVIDIA GPUs have it; use --fp32, or --provider cuda")

    @property
    def max_batch(self) -> int:
        return self.plan.max_batch

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes of the parity checks."""
        sizes = {1, 2, self.plan.opt_batch, self.plan.max_batch}
        return tuple(sorted(size for size in sizes if size <= self.max_batch))

    @property
    def gpu(self) -> int | None:
        """Index of the GPU that the engine runs on; None on the CPU."""
        return None if self.engine == "ort" and self.provider == "cpu" else self.device
