"""Reports of schema 2 for tests, put together by the functions that `eps-deploy` uses.

The numbers are those of a Fashion-MNIST network of 27 blocks; what differs is provoked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from eps_core.checks import Parity
from eps_core.machine import Conditions, GpuReading, Range
from eps_core.stats import Interval
from eps_deploy.bench.accuracy import Answers, Classes, Correct
from eps_deploy.bench.latency import LatencyResult, Times
from eps_deploy.precision import PRECISIONS
from eps_deploy.report import report

BLOCKS = [f"stages.{stage}.{index}" for stage in range(3) for index in range(9)]
DEAD = [
    *(f"stages.0.{index}" for index in (3, 4, 5, 7)),
    *(f"stages.1.{index}" for index in (0, 1, 2, 5, 6, 7, 8)),
    *(f"stages.2.{index}" for index in (0, 2, 3, 4, 6)),
]
SHA256 = "2029881f5ffef08d7b79a40b4e3f5577aba545e2b877335dc0f6deec861f68a2"
NO_BASELINE = {
    "what": "accuracy against a trained baseline",
    "why": "no baseline.pt beside the checkpoint: train one with eps-train --with-baseline",
}


def parity(stage: str, relative: float | None = 3.5e-7, limit: float | None = 1e-4) -> Parity:
    return Parity(
        stage=stage,
        max_abs=None if relative is None else 12.3 * relative,
        relative=relative,
        limit=limit,
        top1_agreement=1.0,
        worst_sample=2500,
        worst_batch=2,
        samples=33,
        batches=(1, 2, 16, 32),
    )


def pair(
    baseline: float, ratio: Interval, batch: int = 1, shape: tuple[int, int] = (20, 200)
) -> list[Times]:
    """Times of a baseline and a compact engine, `shape` blocks and runs each."""

    def times(median: float, speedup: Interval | None) -> Times:
        return Times(
            ms={"p50": median, "p90": 1.35 * median, "p95": 1.45 * median, "p99": 1.8 * median},
            rate=1000 * batch / median,
            speedup=speedup,
            samples=np.full(shape, median),
        )

    return [times(baseline, None), times(baseline / ratio.value, ratio)]


def latency(
    batch: int,
    baseline: float,
    ratio: Interval,
    *,
    shape: tuple[int, int] = (20, 200),
    others: dict[str, list[Times]] | None = None,
    **changes: Any,
) -> LatencyResult:
    fields: dict[str, Any] = {
        "batch": batch,
        "times": {"call": pair(baseline, ratio, batch, shape), **(others or {})},
        "warm": True,
        "spread": 0.04,
        "conditions": Conditions(
            seconds=12.5,
            cores=2,
            load=Range(before=0.5, after=0.8, low=0.5, high=0.9),
            others=0.1,
            stolen=0.0,
            waited=0.02,
            cpu_mhz=None,
            governor=None,
            gpu=None,
        ),
    }
    return LatencyResult(**{**fields, **changes})


def on_gpu() -> Conditions:
    steady = Range(before=1980.0, after=1980.0, low=1755.0, high=1980.0)
    return Conditions(
        seconds=31.0,
        cores=16,
        load=None,
        others=None,
        stolen=None,
        waited=None,
        cpu_mhz=steady,
        governor="performance",
        gpu=GpuReading(
            name="A GPU",
            sm_mhz=steady,
            memory_mhz=steady,
            celsius=None,
            watts=None,
            highest_sm_mhz=1980.0,
            throttled=("software power cap",),
            others=0,
        ),
    )


def answered(labels: Classes, correct: Correct, classes: int = 10) -> Answers:
    """Answers that are wrong by one class where they are wrong, and less sure there."""
    return Answers(
        classes=np.where(correct, labels, (labels + 1) % classes),
        ranks=(~correct).astype(np.int64),
        confidence=np.where(correct, 0.95, 0.6),
    )


def make_report(
    *,
    lost: int = 222,
    won: int = 185,
    samples: int = 10_000,
    limit: float = 0.5,
    goal: float = 1.0,
    classes: Sequence[str] = tuple("0123456789"),
    class_limit: float | None = None,
    parities: list[Parity] | None = None,
    timings: list[LatencyResult] | None = None,
    precision: dict[str, Any] | None = None,
    blocks: list[str] = BLOCKS,
    dead: list[str] = DEAD,
    live: tuple[str, ...] = (),
    deferred: bool = False,
    not_run: tuple[dict[str, str], ...] = (),
) -> dict[str, Any]:
    """A whole report, as it comes back from `report.json`."""
    if parities is None:
        parities = [
            parity("gated-compact", limit=1e-5),
            parity("compact-onnx"),
            parity("onnx-engine", 2e-6, None),
            parity("baseline-onnx"),
        ]
    if timings is None:
        timings = [
            latency(1, 0.372, Interval(2.12, 1.63, 2.56)),
            latency(16, 5.078, Interval(2.16, 2.0, 2.57)),
        ]
    baseline = np.arange(samples) < 0.9067 * samples
    engine = baseline.copy()
    engine[:lost] = False
    engine[samples - won :] = True
    accuracy_check, drop = report.accuracy_check(baseline, engine, limit)
    checks = [check for check in map(report.parity_check, parities) if check is not None]
    checks.append(accuracy_check)
    labels = np.arange(samples) % len(classes)
    answers = report.answers_entry(
        labels,
        classes,
        answered(labels, baseline, len(classes)),
        answered(labels, engine, len(classes)),
    )
    if class_limit is not None:
        checks.append(report.class_check(answers, class_limit))
    if timings:
        checks.append(report.speedup_check(timings[0], goal))
    found = {
        "schema": report.SCHEMA,
        "passed": report.verdict(checks, deferred=deferred),
        "lossless": not live,
        "engine": "ort",
        "precision": precision
        or report.precision_entry(
            PRECISIONS["fp32"], graph={"float32": 24}, executed={"float32": 24}
        ),
        "goals": {
            "max_accuracy_drop": limit,
            "max_class_drop": class_limit,
            "min_speedup": goal,
        },
        "checks": [report.check_entry(check) for check in checks],
        "parameters": {"baseline": 214_402, "compact": 89_762},
        "flops": {"baseline": 13_205_440, "compact": 5_549_248},
        "blocks": report.blocks_entry(blocks, dead, live),
        "accuracy": {
            "baseline": float(baseline.mean()),
            "compact": float(engine.mean()),
            "onnx": float(engine.mean()),
            "engine": float(engine.mean()),
            "samples": samples,
            "judged": "engine",
            "agreement": 1.0,
            "drop": msgspec.to_builtins(drop),
        },
        "answers": msgspec.to_builtins(answers),
        "parity": [report.parity_entry(stage) for stage in parities],
        "latency": [report.latency_entry(timing) for timing in timings],
        "latency_baseline": "trained plain network",
        "environment": {
            "engine": {
                "name": "ort",
                "runtime": "onnxruntime",
                "version": "1.31.1",
                "provider": "CPUExecutionProvider",
                "threads": 1,
                "max_batch": 32,
            },
            "packages": {"eps-resnet": "0.1.0", "torch": "2.13.0+cpu", "tensorrt": None},
            "python": "3.11.7",
            "system": "Linux x86_64",
            "processor": "AMD EPYC",
            "cores": 2,
        },
        "resumed": [],
        "command": "eps-deploy --engine ort",
        "not_run": list(not_run),
    }
    loaded: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    return loaded


def without_baseline() -> dict[str, Any]:
    found = make_report(not_run=(NO_BASELINE,))
    found["accuracy"].update(baseline=None, drop=None)
    for entry in found["answers"]["classes"]:
        entry.update(baseline=None, drop=None)
    found["answers"]["confidence"]["baseline"] = None
    found["answers"].update(confusions=None, changed=None)
    found["checks"] = [check for check in found["checks"] if check["name"] != "accuracy"]
    found["latency_baseline"] = "full depth of the ε-network"
    return found


def failed() -> dict[str, Any]:
    """All four kinds of failure: not finite, too far off, too many wrong, too slow."""
    return make_report(
        parities=[
            parity("gated-compact", 0.0, 0.0),
            parity("compact-onnx", None),
            parity("onnx-engine", 0.031, 0.02),
        ],
        lost=700,
        won=20,
        timings=[
            latency(1, 0.372, Interval(0.93, 0.88, 0.97), warm=False, shape=(5, 7), spread=0.31),
            latency(16, 512.0, Interval(1.01, 0.9, 1.4)),
        ],
        goal=1.2,
    )


def deferred() -> dict[str, Any]:
    """A TensorRT bundle whose plan is still to be built."""
    found = make_report(
        parities=[parity("gated-compact", 0.0, 0.0), parity("compact-onnx", 4e-4, 2e-2)],
        timings=[],
        deferred=True,
        precision=report.precision_entry(PRECISIONS["fp16"], graph={"float16": 24}, executed=None),
        not_run=(
            {"what": "TensorRT engine", "why": "--defer-build: this machine has no GPU"},
            {"what": "latency", "why": "there is no engine to measure yet"},
        ),
    )
    found["engine"] = "trt"
    found["accuracy"].update(engine=None, judged="onnx")
    found["environment"]["engine"] = {"name": "trt", "runtime": "tensorrt", "deferred": True}
    found["command"] = "eps-deploy --engine trt --fp16 --defer-build"
    return found


def on_a_gpu() -> dict[str, Any]:
    """int8 on a GPU with repaired blocks: everything that can be measured was."""
    timed = latency(
        1,
        0.21,
        Interval(3.1, 2.9, 3.2),
        others={
            "device": pair(0.15, Interval(4.0, 3.9, 4.05)),
            "end_to_end": pair(0.9, Interval(1.2, 1.15, 1.26)),
        },
        conditions=on_gpu(),
    )
    found = make_report(
        timings=[timed, latency(16, 0.8, Interval(3.3, 3.2, 3.5), conditions=on_gpu())],
        precision=report.precision_entry(
            PRECISIONS["int8-fp16"],
            graph={"int8": 20, "float16": 4},
            executed=None,
            calibration={"samples": 512, "method": "minmax", "sha256": SHA256},
            kept=["stages.0.0", "stages.2.8"],
        ),
        goal=2.0,
    )
    found["engine"] = "trt"
    found["resumed"] = ["export", "calibration"]
    found["environment"]["engine"]["gpu"] = {"name": "A GPU", "driver": "580.1", "memory_gib": 80}
    return found


def thousand() -> dict[str, Any]:
    """A thousand classes, ten images each, judged by class."""
    names = tuple(f"n{index:08d} a class with a rather long name" for index in range(1000))
    return make_report(classes=names, class_limit=20.0)


def deep() -> dict[str, Any]:
    """375 blocks, some of them removed alive."""
    blocks = [f"stages.{stage}.{index}" for stage in range(3) for index in range(125)]
    dead = [name for index, name in enumerate(blocks) if index % 5 in (1, 2, 4)]
    return make_report(blocks=blocks, dead=dead, live=tuple(dead[:7]))


HOSTILE = '<script>alert("1")</script>|`*&\n'


def hostile() -> dict[str, Any]:
    """Names and messages that try to be markup."""
    found = make_report(
        classes=[f"{HOSTILE}{index}" for index in range(12)],
        class_limit=0.0,
        blocks=[f"{HOSTILE}.{index}" for index in range(3)],
        dead=[f"{HOSTILE}.1"],
        not_run=({"what": HOSTILE, "why": HOSTILE},),
        precision=report.precision_entry(
            PRECISIONS["int8"],
            graph={HOSTILE: 1},
            executed=None,
            calibration={"samples": 512, "method": "minmax", "sha256": SHA256},
            kept=[f"{HOSTILE}.0"],
        ),
    )
    found["checks"][0].update(name=f"parity-{HOSTILE}", text=HOSTILE)
    found["parity"][0]["stage"] = HOSTILE
    found["latency"][0]["noise"] = HOSTILE
    found["command"] = f"eps-deploy -o '{HOSTILE}'"
    found["environment"].update(processor=HOSTILE)
    found["environment"]["engine"]["more"] = {HOSTILE: HOSTILE}
    found["environment"]["packages"][HOSTILE] = HOSTILE
    return found


PROVOKED = {
    "plain": make_report,
    "without-baseline": without_baseline,
    "failed": failed,
    "deferred": deferred,
    "gpu": on_a_gpu,
    "deep": deep,
    "thousand": thousand,
    "hostile": hostile,
}
