"""The entries of `report.json`: checks with their outcome, measurements, and the environment.

`eps_deploy.report.schema` declares the format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from eps_core.checks import Check, Parity
from eps_core.machine import machine
from eps_deploy.bench.accuracy import METHOD, Drop
from eps_deploy.bench.latency import CALL, DEVICE, END_TO_END, LatencyResult
from eps_deploy.export.mixed_precision import Repair
from eps_deploy.export.types import FLOAT16_MAX, Peak
from eps_deploy.precision import Precision
from eps_deploy.report.schema import SCHEMA as SCHEMA
from eps_deploy.report.schema import parse

_PACKAGES = (
    "eps-resnet",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "pycuda",
    "cuda-bindings",
    "numpy",
)


def check_entry(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "passed": check.passed,
        "value": check.value,
        "limit": check.limit,
        "text": check.detail,
        "conclusive": check.conclusive,
    }


def parity_check(parity: Parity) -> Check | None:
    """A stage's logits against those of the stage before; value and limit are relative.

    None for a stage without a limit: it is told in the report and not judged.
    """
    limit = parity.limit
    if limit is None:
        return None
    if parity.relative is None:
        text = "some logits are not finite"
    elif limit == 0:
        text = "equal to the last bit" if parity.passed else f"differ by {parity.max_abs:.3g}"
    else:
        text = f"largest difference {parity.relative:.2g} of the largest logit, limit {limit:g}"
    return Check(
        name=f"parity-{parity.stage}",
        passed=bool(parity.passed),
        value=parity.relative,
        limit=limit,
        detail=text,
    )


def agreement_check(share: float, limit: float, samples: int) -> Check:
    """How often the engine names the class that the compact network names in torch."""
    return Check(
        name="agreement",
        passed=share >= limit,
        value=share,
        limit=limit,
        detail=(
            f"the class of the compact network on {100 * share:.2f} % of {samples:,} images,"
            f" limit {100 * limit:g} %"
        ),
    )


def headroom_check(peak: Peak, samples: int) -> Check:
    """The largest activation of the float16 part against the largest number that float16 has."""
    finite = math.isfinite(peak.value)
    text = f"{peak.value:,.5g}" if finite else "not finite"
    return Check(
        name="headroom",
        passed=peak.value <= FLOAT16_MAX,
        value=peak.value if finite else None,
        limit=FLOAT16_MAX,
        detail=(
            f"largest activation {text} at {peak.node}, on {samples:,} test images; float16 ends at"
            f" {FLOAT16_MAX:g}"
        ),
    )


def accuracy_check(drop: Drop) -> Check:
    """The engine's accuracy against the trained baseline's, in percentage points."""
    points = drop.points
    text = (
        f"{_change(points.value)} the baseline on {drop.samples:,} images"
        f" (95 % interval of the drop {_signed(points.low)} to {_signed(points.high)} points),"
        f" limit {drop.limit:g}"
    )
    if not drop.conclusive:
        text += "; too few images to tell"
    return Check(
        name="accuracy",
        passed=drop.passed,
        value=points.value,
        limit=drop.limit,
        detail=text,
        conclusive=drop.conclusive,
    )


def speedup_check(latency: LatencyResult, limit: float) -> Check:
    """The speed-up of whole calls; its whole interval must reach the limit."""
    speedup = latency.times[CALL][1].speedup
    assert speedup is not None, "of the compact engine"
    # Then even the ratio is wrong: long calls are interrupted and short ones are not.
    starved = latency.conditions.starved
    return Check(
        name="speedup",
        passed=speedup.low >= limit,
        value=speedup.low,
        limit=limit,
        detail=(
            f"{speedup.value:.2f} times as fast at batch {latency.batch} (95 % interval"
            f" {speedup.low:.2f} to {speedup.high:.2f}), limit {limit:g} for its lower end"
            + ("; the machine was too busy to be sure" if starved else "")
        ),
        conclusive=not starved and not speedup.low < limit <= speedup.high,
    )


def parity_entry(parity: Parity) -> dict[str, Any]:
    entry = {**asdict(parity), "batches": list(parity.batches), "passed": parity.passed}
    del entry["inputs"]
    return entry


def precision_entry(
    precision: Precision,
    *,
    graph: Mapping[str, int],
    executed: Mapping[str, int] | None,
    calibration: Mapping[str, Any] | None = None,
    kept: Sequence[str] = (),
    repair: Repair | None = None,
) -> dict[str, Any]:
    """Requested precision and the types in which layers compute.

    Args:
        precision: requested precision.
        graph: number of Conv, Gemm and MatMul nodes of model.onnx by type.
        executed: the same as the runtime executes them; None if it does not report it.
        calibration: `samples`, `method` and `sha256`, for int8.
        kept: blocks that `--repair` kept in higher precision.
        repair: result of `--repair`; None without it.
    """
    found = repair and {
        "trials": repair.trials,
        "drop_before": repair.before.value,
        "drop_after": repair.after.value,
        "passed": repair.after.passed,
    }
    return {
        **asdict(precision),
        "graph": dict(graph),
        "executed": None if executed is None else dict(executed),
        "calibration": None if calibration is None else dict(calibration),
        "kept": list(kept),
        "repair": found,
    }


def blocks_entry(
    blocks: Sequence[str], gone: Collection[str], live: Collection[str] = ()
) -> dict[str, Any]:
    """Residual blocks and their states, in the order of computation.

    Args:
        blocks: names of all blocks, each the name of its stage, a dot, and its position there.
        gone: blocks that were removed.
        live: blocks of `gone` whose gate was open, so that removing them was not lossless.
    """
    states = {name: "removed" if name in live else "dead" for name in gone}
    return {
        "baseline": len(blocks),
        "compact": len(blocks) - len(gone),
        "removed": [name for name in blocks if name in gone],
        "map": [
            {
                "name": name,
                "stage": name.rpartition(".")[0],
                "state": states.get(name, "alive"),
            }
            for name in blocks
        ],
    }


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


def latency_entry(latency: LatencyResult) -> dict[str, Any]:
    """Latency of a baseline and a compact engine, in this order."""
    return {
        "batch": latency.batch,
        **(_comparison(latency, CALL) or {}),
        "end_to_end": _comparison(latency, END_TO_END),
        "device": _comparison(latency, DEVICE),
        "blocks": latency.blocks,
        "runs_per_block": latency.runs,
        "p99_reliable": latency.p99_reliable,
        "warm": latency.warm,
        "spread": latency.spread,
        "noise": latency.noise,
        "conditions": asdict(latency.conditions),
    }


def _comparison(latency: LatencyResult, way: str) -> dict[str, Any] | None:
    if way not in latency.times:
        return None
    baseline, compact = latency.times[way]
    speedup = compact.speedup
    return {
        "baseline_ms": baseline.ms,
        "compact_ms": compact.ms,
        "speedup": speedup and {"median": speedup.value, "low": speedup.low, "high": speedup.high},
        "verdict": compact.verdict,
        "throughput": {"baseline": baseline.rate, "compact": compact.rate},
    }


def environment(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, processor and threads; nothing that identifies the machine.

    Args:
        engine: result of `Engine.describe`.
    """
    return {
        "engine": dict(engine),
        "packages": {name: _version(name) for name in _PACKAGES},
        **machine(),
    }


def verdict(checks: Iterable[Check], *, deferred: bool = False) -> bool | None:
    """False if a check failed; None without checks, or if the engine is not built yet."""
    outcomes = [check.passed for check in checks]
    if not all(outcomes):
        return False
    return None if deferred or not outcomes else True


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write `report.json`; raises ValueError if `report` does not follow its format."""
    parse(report)
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _change(drop: float) -> str:
    if drop == 0:
        return "as accurate as"
    return f"{abs(drop):.2f} points {'below' if drop > 0 else 'above'}"


def _signed(points: float) -> str:
    return f"{round(points, 2) + 0.0:+.2f}"  # no minus before 0.00


def _version(package: str) -> str | None:
    try:
        return package_version(package)
    except PackageNotFoundError:
        return None
