"""`report.json`: everything that was measured, every check, and what was not run and why."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from eps_compact.intervals import Interval
from eps_deploy.accuracy import METHOD, Drop
from eps_deploy.engines.base import Engine
from eps_deploy.latency import Latency
from eps_deploy.parity import Parity

SCHEMA = 1
_PACKAGES = ("eps-resnet", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One promise and whether it was kept.

    Attributes:
        name: `parity-STAGE`, `accuracy` or `speedup`.
        passed: whether it holds.
        value: what was measured; None when it was no finite number.
        limit: what `value` is held to.
        text: the same in words.
        conclusive: False when there is too little data to be sure of `passed`.
    """

    name: str
    passed: bool
    value: float | None
    limit: float
    text: str
    conclusive: bool = True


def parity_check(parity: Parity) -> Check:
    """A stage's logits against those of the stage before; value and limit are relative."""
    if parity.relative is None:
        text = "some logits are not finite"
    elif parity.limit == 0:
        text = "equal to the last bit" if parity.passed else f"differ by {parity.max_abs:.3g}"
    else:
        text = (
            f"largest difference {parity.relative:.2g} of the largest logit, limit {parity.limit:g}"
        )
    return Check(
        name=f"parity-{parity.stage}",
        passed=parity.passed,
        value=parity.relative,
        limit=parity.limit,
        text=text,
    )


def accuracy_check(drop: Drop) -> Check:
    """The engine's accuracy against the trained baseline's, in percentage points."""
    points = drop.points
    text = (
        f"{_change(points.value)} the baseline on {drop.samples} images"
        f" (95 % interval of the drop {points.low:+.2f} to {points.high:+.2f} points),"
        f" limit {drop.limit:g}"
    )
    if not drop.conclusive:
        text += "; too few images to tell"
    return Check(
        name="accuracy",
        passed=drop.passed,
        value=points.value,
        limit=drop.limit,
        text=text,
        conclusive=drop.conclusive,
    )


def speedup_check(latency: Latency, limit: float) -> Check:
    """The speed-up at batch 1; its whole interval must reach the limit."""
    speedup = latency.speedup
    return Check(
        name="speedup",
        passed=speedup.low >= limit,
        value=speedup.low,
        limit=limit,
        text=(
            f"{speedup.value:.2f} times as fast at batch {latency.batch} (95 % interval"
            f" {speedup.low:.2f} to {speedup.high:.2f}), limit {limit:g} for its lower end"
        ),
        conclusive=not speedup.low < limit <= speedup.high,
    )


def check_entry(check: Check) -> dict[str, Any]:
    return asdict(check)


def parity_entry(parity: Parity) -> dict[str, Any]:
    return {**asdict(parity), "batches": list(parity.batches), "passed": parity.passed}


def drop_entry(drop: Drop) -> dict[str, Any]:
    return {
        "points": drop.points.value,
        "low": drop.points.low,
        "high": drop.points.high,
        "only_baseline_right": drop.only_baseline,
        "only_engine_right": drop.only_engine,
        "conclusive": drop.conclusive,
        "method": METHOD,
    }


def latency_entry(latency: Latency) -> dict[str, Any]:
    return {
        "batch": latency.batch,
        "baseline_ms": latency.baseline_ms,
        "compact_ms": latency.compact_ms,
        "speedup": _interval(latency.speedup, "median"),
        "blocks": latency.blocks,
        "runs_per_block": latency.runs,
        "p99_reliable": latency.p99_reliable,
        "warm": latency.warm,
    }


def environment(engine: Engine) -> dict[str, Any]:
    """Where the numbers come from: versions, processor, threads. Nothing that names the machine."""
    return {
        "engine": engine.describe(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def verdict(checks: Iterable[Check]) -> bool:
    return all(check.passed for check in checks)


def write_json(path: Path, report: dict[str, Any]) -> None:
    # NaN is no JSON: other programs could not read the file.
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _change(drop: float) -> str:
    if drop == 0:
        return "as accurate as"
    return f"{abs(drop):.2f} points {'below' if drop > 0 else 'above'}"


def _interval(interval: Interval, name: str) -> dict[str, float]:
    return {name: interval.value, "low": interval.low, "high": interval.high}


def _version(package: str) -> str | None:
    try:
        return package_version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
