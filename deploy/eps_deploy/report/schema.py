"""The format of `report.json`: one record for each object, with the unit and meaning of each key.

The JSON schema (2020-12) is generated from the records; `python -m eps_deploy.report.schema` prints
it. `unit` is an annotation: the unit of a number. This module imports only msgspec, because the
server shows the schema in its OpenAPI document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

SCHEMA = 2


def doc(text: str) -> Meta:
    return Meta(description=text)


def unit(name: str, *, ge: float | None = None, le: float | None = None) -> Meta:
    return Meta(extra_json_schema={"unit": name}, ge=ge, le=le)


# -- Types of values, by their unit

Blocks = Annotated[int, unit("blocks", ge=0)]
Cores = Annotated[float, unit("cores", ge=0)]
Images = Annotated[int, unit("images", ge=0)]
ImagesPerSecond = Annotated[float, unit("images per second", ge=0)]
Logit = Annotated[float, unit("logits", ge=0)]
Megahertz = Annotated[float, unit("megahertz")]
Milliseconds = Annotated[float, unit("milliseconds", ge=0)]
Nodes = Annotated[int, unit("nodes", ge=0), doc("Nodes that compute in this type.")]
OfHolder = Annotated[float, unit("that of the key that holds it")]
Points = Annotated[float, unit("percentage points")]
Ratio = Annotated[float, unit("ratio", ge=0)]
Relative = Annotated[float, unit("share of the largest logit", ge=0)]
Runs = Annotated[int, unit("runs", ge=0)]
Share = Annotated[float, unit("share, 0 to 1", ge=0, le=1)]

BlockName = Annotated[str, doc("Name of a block.")]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    pass


# -- Precision and checks


class CalibrationEntry(_Entry):
    """Calibration of int8."""

    samples: Annotated[Images, doc("Training images.")]
    method: Annotated[Literal["minmax", "entropy", "percentile"], doc("Method of the ranges.")]
    sha256: Annotated[str, Meta(description="SHA-256 of the images.", pattern="^[0-9a-f]{64}$")]


class RepairEntry(_Entry):
    """Search of `--repair` for blocks to keep in higher precision."""

    trials: Annotated[int, unit("networks", ge=1), doc("Networks that were built and evaluated.")]
    drop_before: Annotated[Points, doc("Drop in accuracy with no block kept.")]
    drop_after: Annotated[Points, doc("The same with the kept blocks, or with all if that fails.")]
    passed: Annotated[bool, doc("Whether the limit holds with the kept blocks.")]


class PrecisionEntry(_Entry):
    """Requested precision and the types in which layers compute."""

    name: Annotated[
        Literal["fp32", "tf32", "fp16", "bf16", "int8", "int8-fp16"], doc("Requested precision.")
    ]
    float: Annotated[
        Literal["float32", "float16", "bfloat16"], doc("Type of what is not quantized.")
    ]
    quantized: Annotated[bool, doc("Whether convolutions and linear layers take int8.")]
    tf32: Annotated[bool, doc("Whether an NVIDIA GPU may round float32 products to TF32.")]
    graph: Annotated[dict[str, Nodes], doc("Conv, Gemm and MatMul nodes by type.")]
    executed: Annotated[dict[str, Nodes] | None, doc("As executed; null: not reported.")]
    calibration: Annotated[CalibrationEntry | None, doc("Calibration; null without int8.")]
    kept: Annotated[list[BlockName], doc("Blocks that --repair kept in higher precision.")]
    repair: Annotated[RepairEntry | None, doc("Search of --repair; null without it.")]


class GoalsEntry(_Entry):
    """Limits of the checks that the user can set."""

    max_accuracy_drop: Annotated[Points, doc("Largest drop in accuracy that passes.")]
    max_class_drop: Annotated[
        Points | None, doc("Largest drop of a class that passes; null: not judged.")
    ]
    min_speedup: Annotated[Ratio, doc("Smallest lower end of the interval at batch 1.")]


class CheckEntry(_Entry):
    """One check."""

    name: Annotated[
        str,
        doc(
            "`parity-STAGE`, `agreement`, `accuracy`, `class-accuracy` (largest `at_least` of all"
            " classes), `headroom` (largest activation of the float16 part, on up to 512 test"
            " images, against float16's largest number), `speedup` or `builder` (TensorRT's own"
            " parser and builder accept model.onnx)."
        ),
    ]
    passed: Annotated[bool, doc("Whether the value is within the limit.")]
    value: Annotated[
        Annotated[
            float,
            unit(
                "parity: share of the largest logit; agreement: share; accuracy and class-accuracy:"
                " percentage points; headroom: that of activations; speedup: ratio; builder:"
                " rejections"
            ),
        ]
        | None,
        doc("Measured value; null if it is not finite."),
    ]
    limit: Annotated[float, unit("that of value"), doc("Limit of the value.")]
    text: Annotated[str, doc("Value and limit in words.")]
    conclusive: Annotated[bool, doc("False if there is too little data to be sure of `passed`.")]


# -- Networks and accuracy


class SizesEntry(_Entry):
    """A count of both networks."""

    baseline: Annotated[int, unit("that of the key that holds it", ge=0), doc("Unpruned network.")]
    compact: Annotated[int, unit("that of the key that holds it", ge=0), doc("Compact network.")]


class BlockEntry(_Entry):
    """One residual block."""

    name: Annotated[str, doc("Name of the block.")]
    stage: Annotated[str, doc("Part of the name before the last dot.")]
    state: Annotated[
        Literal["alive", "dead", "removed"],
        doc("alive: computed; dead: removed after its gate closed for good; removed: while alive."),
    ]


class BlocksEntry(_Entry):
    """Residual blocks of both networks."""

    baseline: Annotated[Blocks, doc("Unpruned network.")]
    compact: Annotated[Blocks, doc("Compact network.")]
    removed: Annotated[list[BlockName], doc("Removed blocks in the order of computation.")]
    map: Annotated[list[BlockEntry], doc("All blocks in the order of computation.")]


class PairedEntry(_Entry):
    """Drop from the unpruned network to the judged one, paired image by image."""

    points: Annotated[Points, doc("The drop; positive if the unpruned network is better.")]
    low: Annotated[Points, doc("Lower end of its 95 % interval.")]
    high: Annotated[Points, doc("Upper end of its 95 % interval.")]
    only_baseline_right: Annotated[Images, doc("Images only the unpruned one gets right.")]
    only_engine_right: Annotated[Images, doc("Images only the judged one gets right.")]


class DropEntry(PairedEntry):
    """Drop in accuracy, paired image by image."""

    conclusive: Annotated[bool, doc("Whether the whole interval is on one side of the limit.")]
    method: Annotated[str, doc("Method of the interval.")]


class AccuracyEntry(_Entry):
    """Accuracy on the whole test part; null if it was not measured."""

    baseline: Annotated[Share | None, doc("Trained unpruned network in torch; null without one.")]
    compact: Annotated[Share, doc("Compact network in torch.")]
    onnx: Annotated[
        Share | None,
        doc("model.onnx: int8 with exact arithmetic, float16 rounded after every operation."),
    ]
    engine: Annotated[Share | None, doc("Deployed engine; null if it is not built yet.")]
    samples: Annotated[Images, doc("Images of the test part.")]
    judged: Annotated[
        Literal["compact", "onnx", "engine"],
        doc("The network that is judged: the less accurate of model.onnx and the engine."),
    ]
    agreement: Annotated[
        Share,
        doc("Images with the class of the compact network in torch, in `onnx` or `engine`."),
    ]
    drop: Annotated[DropEntry | None, doc("Drop to the judged network; null without a baseline.")]


# -- Answers: what both networks predict for each class and image of the test part

Predicted = Annotated[str | None, doc("Predicted class; null: logits are not finite.")]


class ClassDropEntry(PairedEntry):
    """Drop in the accuracy of one class."""

    at_least: Annotated[
        Points,
        doc("Lower end of the interval when those of all classes hold at once with 95 %."),
    ]


class ClassEntry(_Entry):
    """Accuracy on the test images of one class; null without any."""

    name: Annotated[str, doc("Name of the class.")]
    samples: Annotated[Images, doc("Its test images.")]
    baseline: Annotated[Share | None, doc("Trained unpruned network; null without one too.")]
    judged: Annotated[Share | None, doc("The judged network.")]
    drop: Annotated[ClassDropEntry | None, doc("Drop from the first to the second.")]


class TopFiveEntry(_Entry):
    """Images whose class is among the five highest logits."""

    baseline: Annotated[Share | None, doc("Trained unpruned network; null without one.")]
    judged: Annotated[Share, doc("The judged network.")]
    drop: Annotated[PairedEntry | None, doc("Drop from the first to the second.")]


class ConfidenceEntry(_Entry):
    """Softmax probability of the predicted class, against how often that class is right."""

    mean: Annotated[Share, doc("Mean over all test images.")]
    ece: Annotated[
        Share,
        doc("Expected calibration error: 15 bins of equal width, weighted by their images."),
    ]


class ConfidencesEntry(_Entry):
    """Calibration of both networks."""

    baseline: Annotated[ConfidenceEntry | None, doc("Trained unpruned network.")]
    judged: Annotated[ConfidenceEntry, doc("The judged network.")]


class ConfusionEntry(_Entry):
    """A class that the judged network takes for another more often than the unpruned one."""

    label: Annotated[str, doc("Class of the images.")]
    predicted: Predicted
    baseline: Annotated[Images, doc("Images that the unpruned network confuses.")]
    judged: Annotated[Images, doc("Images that the judged network confuses.")]


class ChangedEntry(_Entry):
    """A test image for which the two networks predict different classes."""

    index: Annotated[int, unit("index in the test part", ge=0), doc("Which image it is.")]
    label: Annotated[str, doc("Its class.")]
    baseline: Annotated[Predicted, doc("Class that the unpruned network predicts.")]
    judged: Annotated[Predicted, doc("Class that the judged network predicts.")]
    baseline_confidence: Annotated[Share, doc("Softmax probability of `baseline`.")]
    judged_confidence: Annotated[Share, doc("Softmax probability of `judged`.")]
    image: Annotated[str | None, doc("Its PNG file in the bundle; null: beyond the gallery.")]


class AnswersEntry(_Entry):
    """Predictions of the trained unpruned network and the judged one, class by class."""

    classes: Annotated[list[ClassEntry], doc("All classes, by index.")]
    top5: Annotated[TopFiveEntry | None, doc("Top-5 accuracy; null with ten classes or fewer.")]
    confidence: Annotated[ConfidencesEntry, doc("Calibration of both networks.")]
    confusions: Annotated[
        list[ConfusionEntry] | None,
        doc("Confusions that became more frequent, by how much; null without a baseline."),
    ]
    changed: Annotated[
        list[ChangedEntry] | None,
        doc(
            "Images whose predicted class differs: only the unpruned network right, only the judged"
            " one right, both wrong; in each, classes take turns, the surest of the judged network"
            " first. Null without a baseline."
        ),
    ]


class ParityEntry(_Entry):
    """One stage of the parity chain."""

    stage: Annotated[
        str, doc("gated-compact, compact-onnx, onnx-engine, baseline-onnx or baseline-engine.")
    ]
    max_abs: Annotated[Logit | None, doc("Largest difference; null if not finite.")]
    relative: Annotated[
        Relative | None, doc("`max_abs` over the largest logit; null if not finite.")
    ]
    limit: Annotated[Relative | None, doc("Limit of `relative`; 0: equal; null: not judged.")]
    top1_agreement: Annotated[Share, doc("Images for which both give the same class.")]
    worst_sample: Annotated[
        int, unit("index in the test part", ge=0), doc("Image with the largest difference.")
    ]
    worst_batch: Annotated[Images, doc("Batch size of the largest difference.")]
    samples: Annotated[Images, doc("Images in each pass.")]
    batches: Annotated[
        list[Annotated[Images, doc("A batch size.")]], doc("Batch sizes of the passes.")
    ]
    passed: Annotated[bool | None, doc("Whether it is within its limit; null without a limit.")]


# -- Latency


class PercentilesEntry(_Entry):
    """Time of a call, by percentile over all runs."""

    p50: Annotated[Milliseconds, doc("50th percentile.")]
    p90: Annotated[Milliseconds, doc("90th percentile.")]
    p95: Annotated[Milliseconds, doc("95th percentile.")]
    p99: Annotated[Milliseconds, doc("99th percentile.")]


class SpeedupEntry(_Entry):
    """Median ratio of two adjacent blocks of runs, with its 95 % interval."""

    median: Annotated[Ratio, doc("The ratio.")]
    low: Annotated[Ratio, doc("Lower end of the interval.")]
    high: Annotated[Ratio, doc("Upper end of the interval.")]


class ThroughputEntry(_Entry):
    """Throughput of both networks."""

    baseline: Annotated[ImagesPerSecond, doc("Unpruned network.")]
    compact: Annotated[ImagesPerSecond, doc("Compact network.")]


class ComparisonEntry(_Entry):
    """Both networks, timed in one way."""

    baseline_ms: Annotated[PercentilesEntry, doc("Unpruned network.")]
    compact_ms: Annotated[PercentilesEntry, doc("Compact network.")]
    speedup: Annotated[SpeedupEntry, doc("Time of the unpruned network over the compact one's.")]
    verdict: Annotated[
        Literal["faster", "slower", "cannot tell"],
        doc('"faster" and "slower" only if the whole interval is 3 % or more from 1.'),
    ]
    throughput: Annotated[
        ThroughputEntry, doc("Images over the time of all timed runs, one call after another.")
    ]


class RangeEntry(_Entry):
    """Readings during a measurement, in the unit of the key that holds them."""

    before: Annotated[OfHolder, doc("First reading.")]
    after: Annotated[OfHolder, doc("Last reading.")]
    low: Annotated[OfHolder, doc("Lowest.")]
    high: Annotated[OfHolder, doc("Highest.")]


class GpuEntry(_Entry):
    """GPU, as NVML reports it."""

    name: Annotated[str, doc("Name of the GPU.")]
    sm_mhz: Annotated[RangeEntry | None, doc("Clock of its processors, in megahertz.")]
    memory_mhz: Annotated[RangeEntry | None, doc("Clock of its memory, in megahertz.")]
    celsius: Annotated[RangeEntry | None, doc("Temperature, in degrees Celsius.")]
    watts: Annotated[RangeEntry | None, doc("Power, in watts.")]
    highest_sm_mhz: Annotated[Megahertz | None, doc("Highest clock of its processors.")]
    throttled: Annotated[
        list[Annotated[str, doc("A reason.")]], doc("Reasons for which its clocks were reduced.")
    ]
    others: Annotated[
        Annotated[int, unit("programs", ge=0)] | None, doc("Other programs that computed on it.")
    ]


class ConditionsEntry(_Entry):
    """Conditions of a measurement, averages over its time; null: could not be read."""

    seconds: Annotated[float, unit("seconds", ge=0), doc("Duration.")]
    cores: Annotated[int, unit("cores", ge=0), doc("Cores of the machine.")]
    load: Annotated[RangeEntry | None, doc("Running programs, averaged over a minute.")]
    others: Annotated[Cores | None, doc("Cores that other programs used.")]
    stolen: Annotated[Cores | None, doc("Cores that a virtual machine's host took away.")]
    waited: Annotated[
        Annotated[float, unit("seconds in each second", ge=0)] | None,
        doc("Time that the threads of this process waited for a core."),
    ]
    cpu_mhz: Annotated[RangeEntry | None, doc("Mean frequency of the cores, in megahertz.")]
    governor: Annotated[str | None, doc("Frequency governor, as Linux names it.")]
    gpu: Annotated[GpuEntry | None, doc("The GPU, if one was measured.")]


class LatencyEntry(ComparisonEntry):
    """Latency at one batch size; the keys that `ComparisonEntry` has too are of whole calls."""

    batch: Annotated[int, unit("images", ge=1), doc("Images in a call.")]
    end_to_end: Annotated[ComparisonEntry | None, doc("Image file to label; null: not measured.")]
    device: Annotated[ComparisonEntry | None, doc("GPU time by its events; null without.")]
    blocks: Annotated[Blocks, doc("Blocks of runs of each network.")]
    runs_per_block: Annotated[Runs, doc("Timed runs in a block.")]
    p99_reliable: Annotated[bool, doc("Whether there were at least 200 runs.")]
    warm: Annotated[bool, doc("Whether the warm-up became steady before its time was over.")]
    spread: Annotated[
        Ratio, doc("Range of the blocks' medians over their median; the larger of both networks.")
    ]
    noise: Annotated[str, doc("How far these times can be trusted, in words.")]
    conditions: Annotated[ConditionsEntry | None, doc("Load of the machine; null: not read.")]


# -- Environment, and the report as a whole


class EnvironmentEntry(msgspec.Struct):
    """Origin of the numbers. More keys may follow."""

    engine: Annotated[dict[str, Any], doc("Name, runtime, version, provider and so on.")]
    packages: Annotated[
        dict[str, Annotated[str | None, doc("A version.")]],
        doc("Version of each package; null: not installed."),
    ]
    python: Annotated[str, doc("Version of Python.")]
    system: Annotated[str, doc("Operating system and architecture.")]
    processor: Annotated[str, doc("Name of the processor.")]
    cores: Annotated[Annotated[int, unit("cores", ge=0)] | None, doc("Logical cores.")]


class NotRunEntry(_Entry):
    """Something that was left out."""

    what: Annotated[str, doc("What was left out.")]
    why: Annotated[str, doc("The reason, and what would change it.")]


class Report(_Entry):
    """What eps-deploy measured and judged. `unit` is an annotation: the unit of a number."""

    version: Annotated[Literal[2], doc("Version of this format.")] = msgspec.field(name="schema")
    passed: Annotated[
        bool | None,
        doc("Whether every check passed; null: no engine built yet, or nothing to judge."),
    ]
    lossless: Annotated[bool, doc("Whether only dead blocks were removed.")]
    engine: Annotated[Literal["ort", "trt"], doc("ONNX Runtime or TensorRT.")]
    precision: Annotated[PrecisionEntry, doc("Requested precision, and how it was realized.")]
    goals: Annotated[GoalsEntry, doc("Requested limits.")]
    checks: Annotated[list[CheckEntry], doc("Each check and its outcome.")]
    parameters: Annotated[SizesEntry, doc("Trainable and fixed numbers in each network.")]
    flops: Annotated[SizesEntry, doc("Floating-point operations for one image.")]
    blocks: Annotated[BlocksEntry, doc("Residual blocks.")]
    accuracy: Annotated[AccuracyEntry, doc("Accuracy on the whole test part.")]
    answers: Annotated[AnswersEntry, doc("Predictions on the whole test part, by class.")]
    parity: Annotated[list[ParityEntry], doc("Logits of each stage against the stage before.")]
    latency: Annotated[
        list[LatencyEntry],
        doc("Both networks in the same engine, interleaved; empty: not measured."),
    ]
    latency_baseline: Annotated[str, doc("The unpruned network of the latency measurements.")]
    environment: Annotated[EnvironmentEntry, doc("Origin of the numbers. More keys may follow.")]
    resumed: Annotated[
        list[Annotated[str, doc("Name of a stage.")]], doc("Stages taken from an earlier run.")
    ]
    command: Annotated[str, doc("The command line.")]
    not_run: Annotated[list[NotRunEntry], doc("What was left out.")]


def parse(report: Mapping[str, Any]) -> Report:
    """Convert the data of `report.json` to its record.

    Raises:
        ValueError: a key, a type or a limit does not follow the format, or a number is NaN.
    """
    return msgspec.json.decode(json.dumps(report, allow_nan=False), type=Report)


def json_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of `report.json`; nested records are in `$defs`."""
    generated = msgspec.json.schema(Report)
    definitions = dict(generated["$defs"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:eps-resnet:report:{SCHEMA}",
        **definitions.pop("Report"),
        "title": "report.json of eps-deploy",
        "$defs": definitions,
    }


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
