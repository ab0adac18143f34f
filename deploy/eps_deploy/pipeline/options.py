"""The options of `eps-deploy`, each declared once, validated together before any work begins."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eps_core.errors import ConfigError
from eps_deploy.bundle import NAME, check_name
from eps_deploy.engines.trt.build import BuildOptions, option
from eps_deploy.precision import PRECISIONS, Precision


def _declared(default: Any, *described: Any, **limits: Any) -> Any:
    return field(default=default, metadata=option(*described, **limits))


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options of `eps-deploy`, in the order of `--help`.

    `model` is the compact network, `plan` has the batch sizes of both engines and TensorRT's build
    options, and `command` is the command line for the report and `reproduce.sh`. The metadata of
    every other field holds the description, limits and placeholder of its option.

    Raises:
        ConfigError: a value is outside its range, or options contradict each other.
    """

    model: Path
    engine: Literal["ort", "trt"] = _declared("ort", "ONNX Runtime or TensorRT.")
    precision: Precision = PRECISIONS["fp32"]
    calibration_samples: int = _declared(
        512, "Number of training images for int8 calibration.", "N", limits=(1, None)
    )
    calibration_method: Literal["minmax", "entropy", "percentile"] = _declared(
        "minmax", "int8 calibration method."
    )
    repair: bool = _declared(
        False, "If the accuracy check fails, keep the most sensitive blocks in higher precision."
    )
    baseline: Path | None = _declared(
        None,
        "Baseline checkpoint to compare with.  [default: baseline.pt beside MODEL or its"
        " checkpoint]",
        "CKPT",
    )
    checkpoint: Path | None = _declared(
        None, "Checkpoint that MODEL was made from, if it has moved.", "CKPT"
    )
    data_root: Path | None = _declared(None, "Data set folder.", "DIR")
    output: Path = _declared(Path("bundle"), "Bundle folder to write.", "DIR")
    name: str = _declared(
        NAME, "Model name for clients, and folder name in the Triton repository.", "NAME"
    )
    max_accuracy_drop: float = _declared(
        0.5,
        "Accuracy check: largest drop from the baseline, in percentage points.",
        "POINTS",
    )
    max_class_drop: float | None = _declared(
        None,
        "Class accuracy check: largest drop of any class, in percentage points, judged by the"
        " lower end of its interval.  [default: not checked]",
        "POINTS",
    )
    min_speedup: float = _declared(
        1.0,
        "Latency check: smallest lower end of the speed-up's 95 % interval at batch 1.",
        "X",
    )
    time_budget: float = _declared(
        60.0, "Time limit of the latency measurement at each batch size.", "SECONDS"
    )
    plan: BuildOptions = field(default_factory=BuildOptions)
    provider: Literal["cpu", "cuda", "tensorrt"] = _declared(
        "cpu", "ONNX Runtime execution provider."
    )
    threads: int = _declared(1, "ONNX Runtime intra-operator threads.", "N", limits=(1, None))
    defer_build: bool = _declared(
        False, "With --engine trt: leave building the plan to the machine that serves the bundle."
    )
    device: int = _declared(0, "GPU index for --engine trt.", "INDEX", limits=(0, None))
    force: bool = _declared(False, "Replace an existing bundle.")
    command: str = "eps-deploy"

    def __post_init__(self) -> None:
        try:
            check_name(self.name)
        except ConfigError as error:
            raise ConfigError(f"--name: {error}") from None
        for name in ("max_accuracy_drop", "max_class_drop", "min_speedup", "time_budget"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
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
