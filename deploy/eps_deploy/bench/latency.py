"""Latency of engines measured side by side: warmed up, interleaved, with confidence intervals.

Up to three things are timed: whole calls of `Engine.infer`; for engines that have `time_on_device`,
their work on the GPU alone; and the way from an encoded image to its label. See
:mod:`eps_core.timing` for the method.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eps_core.errors import EpsError
from eps_core.machine import Conditions, MachineMonitor
from eps_core.preprocessing import Preprocessing
from eps_core.stats import Interval, ratio_of_medians
from eps_core.timing import Clock, Runs, TimeRuns, interleave, wall_clock
from eps_deploy.engines.base import Engine, Images, Logits

BATCHES = (1, 16)
CALL, DEVICE, END_TO_END = "call", "device", "end_to_end"
PERCENTILES = (50, 90, 95, 99)
P99_RUNS = 200  # with fewer, the 99th percentile is one or two runs
NOISY_SPREAD = 0.10
# Two loads of one file in one process differ too, by where their memory happens to be: in twelve
# processes by 1.7 % in the median, and by up to 11 %.
LEAST = 0.03

Verdict = Literal["faster", "slower", "cannot tell"]


class BenchError(EpsError):
    """A file that cannot be timed, or files that cannot be compared."""


# -- Measuring


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleImage:
    """The bytes of an image file as a server receives it, and what turns it into a label."""

    content: bytes
    preprocessing: Preprocessing
    labels: Sequence[str]

    def end_to_end(self, infer: Callable[[Images], Logits], batch: int) -> Callable[[], list[str]]:
        """Return a call that takes `batch` copies of the image from its bytes to labels.

        Decoding and preprocessing run one image after another, in memory.
        """
        from PIL import Image

        def call() -> list[str]:
            pixels = []
            for _ in range(batch):
                with Image.open(io.BytesIO(self.content)) as image:
                    pixels.append(self.preprocessing.apply(image))
            best = infer(np.stack(pixels)).argmax(axis=1)
            return [self.labels[index] for index in best.tolist()]

        return call


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is timed: an engine, and one batch for it.

    Attributes:
        images: `[N, C, H, W]`, uint8 unless the engine takes another type.
        example: times the way from its bytes to a label too; None: not timed.
    """

    engine: Engine
    images: npt.NDArray[Any]
    example: ExampleImage | None = None

    def timers(self, clock: Clock) -> dict[str, TimeRuns]:
        """Every way in which the batch can be timed; on the device by the GPU's own events."""
        infer, images = self.engine.infer, self.images
        found = {CALL: wall_clock(lambda: infer(images), clock)}
        milliseconds: Callable[[Images, int], Runs] | None
        milliseconds = getattr(self.engine, "time_on_device", None)
        if milliseconds is not None:
            found[DEVICE] = lambda runs: milliseconds(images, runs) / 1000
        if self.example is not None:
            found[END_TO_END] = wall_clock(self.example.end_to_end(infer, len(images)), clock)
        return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Times:
    """Times of one workload.

    Attributes:
        ms: milliseconds a call, by percentile (`p50`, `p90`, `p95`, `p99`).
        rate: images a second over all runs, slow ones included, one call after another.
        speedup: median of the reference over this median; None for the reference itself.
        samples: milliseconds of every run, float64 `[blocks, runs]`.
    """

    ms: dict[str, float]
    rate: float
    speedup: Interval | None
    samples: Runs

    @classmethod
    def of(cls, samples: Runs, batch: int, reference: Runs | None = None) -> Times:
        values = np.percentile(samples, PERCENTILES)
        return cls(
            ms={f"p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)},
            rate=float(1000 * batch * samples.size / samples.sum()),
            speedup=None if reference is None else ratio_of_medians(reference, samples),
            samples=samples,
        )

    @property
    def verdict(self) -> Verdict | None:
        return None if self.speedup is None else verdict(self.speedup)

    @property
    def p99_reliable(self) -> bool:
        return self.samples.size >= P99_RUNS

    def to_dict(self, *, samples: bool) -> dict[str, Any]:
        return {
            "ms": self.ms,
            "rate": self.rate,
            "speedup": self.speedup and asdict(self.speedup),
            **({"samples": self.samples.round(6).tolist()} if samples else {}),
            "verdict": self.verdict,
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LatencyResult:
    """Times of several workloads of one batch size; the first is the reference.

    Attributes:
        times: one entry a workload for `call`, and where all workloads have it for `device` and
            `end_to_end`.
        warm: whether every warm-up became flat before its share of the budget was spent.
        conditions: what else the machine did meanwhile.
        spread: largest :func:`spread` of whole calls.
    """

    batch: int
    times: dict[str, list[Times]]
    warm: bool
    conditions: Conditions
    spread: float

    @property
    def blocks(self) -> int:
        return len(self.times[CALL][0].samples)

    @property
    def runs(self) -> int:
        """Runs in each block."""
        return int(self.times[CALL][0].samples.shape[1])

    @property
    def p99_reliable(self) -> bool:
        return self.times[CALL][0].p99_reliable

    @property
    def noise(self) -> str:
        return noise(self.conditions, self.spread, alone=len(self.times[CALL]) == 1)

    def to_dict(self, names: Sequence[str], *, samples: bool) -> dict[str, Any]:
        """Plain data for `eps-bench`; `names` are those of the files."""
        return {
            "batch": self.batch,
            "files": [
                {
                    "file": name,
                    **{way: t[index].to_dict(samples=samples) for way, t in self.times.items()},
                }
                for index, name in enumerate(names)
            ],
            "blocks": self.blocks,
            "runs_per_block": self.runs,
            "p99_reliable": self.p99_reliable,
            "warm": self.warm,
            "noise": self.noise,
            "conditions": asdict(self.conditions),
        }


def measure(
    workloads: Sequence[Workload],
    *,
    budget: float,
    gpu: int | None = None,
    clock: Clock = time.perf_counter,
) -> LatencyResult:
    """Time `workloads` in turns.

    Args:
        workloads: at least one, all of the same batch size; the first is the reference.
        budget: seconds to spend at most, warm-up included; a fast network needs far less. Six
            blocks of one run are made in any case.
        gpu: number of the CUDA device that the engines run on, None for none; its clocks are read.
        clock: seconds; a parameter for tests.
    """
    batch = len(workloads[0].images)
    timers = [workload.timers(clock) for workload in workloads]
    ways = [way for way in timers[0] if all(way in each for each in timers)]
    with MachineMonitor(gpu) as monitor:
        monitor.poll()
        timings = interleave(
            [each[way] for way in ways for each in timers],
            budget=budget,
            clock=clock,
            between=monitor.poll,
        )
        conditions = monitor.conditions()
    every = iter(timings.times)
    times = {}
    for way in ways:
        reference, *others = (next(every) for _ in workloads)
        times[way] = [Times.of(reference, batch)]
        times[way] += [Times.of(samples, batch, reference) for samples in others]
    return LatencyResult(
        batch=batch,
        times=times,
        warm=timings.warm,
        conditions=conditions,
        spread=max(spread(found.samples) for found in times[CALL]),
    )


def spread(blocks: Runs) -> float:
    """Width of the central 90 % of the blocks' medians, over their median."""
    low, middle, high = np.percentile(np.median(blocks, axis=1), [5, 50, 95])
    return float((high - low) / middle)


def verdict(speedup: Interval) -> Verdict:
    """Whether a network is faster than the reference.

    "faster" and "slower" only if the whole interval is more than :data:`LEAST` away from 1.
    """
    if speedup.low > 1 + LEAST:
        return "faster"
    return "slower" if speedup.high < 1 / (1 + LEAST) else "cannot tell"


def noise(conditions: Conditions, spread: float, *, alone: bool = False) -> str:
    """One or two sentences on how far times measured in these conditions can be trusted.

    `alone`: nothing else was timed in turns with it, so that there is no ratio to trust instead.
    """
    found = conditions.disturbances()
    blocks = f"the medians of nine blocks in ten differ by up to {100 * spread:.0f} %"
    if spread > NOISY_SPREAD:
        found.append(blocks)
    if not found:
        return f"Quiet: {blocks}."
    if conditions.starved:
        advice = "Long calls suffer more from that than short ones: measure on a quiet machine"
    elif alone:
        advice = "Measure again"
    else:
        advice = "All were affected alike, so trust the ratios first"
    return f"Noisy: {'; '.join(found)}. {advice}."


def save_samples(path: Path, latencies: Sequence[LatencyResult]) -> None:
    """Write every run of a baseline and a compact engine to an `.npz` file.

    Arrays: `batch-N.baseline`, `batch-N.compact`, and the same with `_device` or `_end_to_end`
    behind: milliseconds, float32 `[blocks, runs]`, in the order in which they were measured.
    """
    arrays = {
        f"batch-{latency.batch}.{name}{'' if way == CALL else f'_{way}'}": times.samples
        for latency in latencies
        for way, pair in latency.times.items()
        for name, times in zip(("baseline", "compact"), pair, strict=True)
    }
    in_float32 = {name: samples.astype(np.float32) for name, samples in arrays.items()}
    np.savez_compressed(path, allow_pickle=False, **in_float32)


# -- Model files: what `eps-bench` compares


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile:
    """A model file and the engine that runs it.

    Attributes:
        name: the file, as the user named it.
        precision: what its layers compute in, as in `fp32`.
        gpu: number of the CUDA device that it runs on; None for the CPU.
        batches: smallest and largest batch that it takes; None: no limit of its own.
        dtype: of the images.
        output: type and shape of the output for one image; None: float32 logits.
        remark: what a reader of its times must know.
        example: an image for end-to-end times.
    """

    name: str
    engine: Engine
    precision: str
    gpu: int | None
    batches: tuple[int, int | None] = (1, None)
    dtype: npt.DTypeLike = np.uint8
    output: str | None = None
    remark: str | None = None
    example: ExampleImage | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What must match before two latencies are compared."""
        engine = self.engine.describe()
        return {
            "input": f"{np.dtype(self.dtype)} {list(self.engine.input_shape)}",
            "output": self.output or f"float32 [{self.engine.classes}]",
            "precision": self.precision,
            "runtime": f"{engine['runtime']} {engine['version']}",
            "provider": engine["provider"],
            "threads": engine["threads"] if self.gpu is None else None,
        }

    def workload(self, batch: int) -> Workload:
        """A batch of random images: any pixels as uint8, standard normal numbers as floats."""
        generator = np.random.default_rng(0)
        size = (batch, *self.engine.input_shape)
        images: npt.NDArray[Any]
        if self.dtype is np.uint8:
            images = generator.integers(0, 256, size=size, dtype=np.uint8)
        else:
            images = generator.standard_normal(size=size, dtype=np.float32).astype(self.dtype)
        return Workload(engine=self.engine, images=images, example=self.example)


def differences(files: Sequence[ModelFile]) -> dict[str, list[str]]:
    """Facts in which the files differ, with each file's value."""
    facts = [file.facts for file in files]
    values = {name: [str(each[name]) for each in facts] for name in facts[0]}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def require_match(files: Sequence[ModelFile]) -> None:
    """Raise BenchError unless all facts of all files match."""
    first = files[0]
    for other in files[1:]:
        if found := differences([first, other]):
            facts = "; ".join(f"{name} {a} and {b}" for name, (a, b) in found.items())
            raise BenchError(
                f"{first.name} and {other.name} do not match: {facts};"
                " add --allow-mismatch to compare them all the same"
            )


def choose_batches(files: Sequence[ModelFile], asked: Sequence[int]) -> tuple[int, ...]:
    """Return the batch sizes to time: `asked`, or what all files take.

    Raises BenchError if a file does not take one, or the files have no batch size in common.
    """
    if not asked:
        fixed = sorted({file.batches[0] for file in files if file.batches[0] > 1})
        if len(fixed) > 1:
            sizes = " and ".join(map(str, fixed))
            raise BenchError(f"the files take fixed batches of {sizes} images; bench them apart")
        largest = min((f.batches[1] for f in files if f.batches[1]), default=max(BATCHES))
        asked = fixed or sorted({min(size, largest) for size in BATCHES})
    for file in files:
        smallest, most = file.batches
        for batch in asked:
            if batch < smallest or (most is not None and batch > most):
                takes = f"exactly {smallest}" if smallest == most else f"{smallest} to {most}"
                raise BenchError(f"{file.name}: takes batches of {takes} images, not {batch}")
    return tuple(dict.fromkeys(asked))


# -- `eps-bench --slo-ms`: the batch size with most throughput whose p99 is within a limit

LARGEST_BATCH = 1024
_STEP = 16  # bisection ends at a sixteenth of the batch size
_TRIAL = 3  # runs that rule out a batch that is far too large


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One batch size, and whether its 99th percentile is within the limit.

    `ms` and `rate` are as in :class:`Times`, or None when it did not run; `failure` says why.
    """

    batch: int
    passed: bool = False
    ms: dict[str, float] | None = None
    rate: float | None = None
    runs: int = 0
    failure: str | None = None
    p99_reliable: bool = False


def sweep_batches(
    file: ModelFile,
    limit_ms: float,
    *,
    budget: float,
    clock: Clock = time.perf_counter,
    report: Callable[[Attempt], object] = lambda attempt: None,
) -> list[Attempt]:
    """Try batches of 1, 2, 4, ... until one misses the limit, then bisect between the last two.

    A smaller batch may have more throughput: see :func:`best`.

    Args:
        limit_ms: for the 99th percentile of whole calls, in milliseconds.
        budget: seconds to spend at most on each batch size.
        clock: seconds; a parameter for tests.
        report: called with each attempt.

    Raises:
        BenchError: the file takes one batch size only, or does not run at all.
    """
    smallest, most = file.batches
    if smallest == most:
        raise BenchError(
            f"{file.name}: takes batches of exactly {smallest} images: there is nothing to"
            " choose with --slo-ms; export it with a dynamic batch"
        )
    largest = min(most or LARGEST_BATCH, LARGEST_BATCH)
    found: list[Attempt] = []

    def passes(batch: int) -> bool:
        attempt = _attempt(file, batch, limit_ms, budget, clock)
        if attempt.failure and not found:
            raise BenchError(attempt.failure)
        found.append(attempt)
        report(attempt)
        return attempt.passed

    good, batch = 0, smallest
    while passes(batch):
        good = batch
        if batch == largest:
            return found
        batch = min(2 * batch, largest)
    bad = batch
    while good and bad - good > max(1, good // _STEP):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if passes(middle) else (good, middle)
    return found


def best(attempts: Sequence[Attempt]) -> Attempt | None:
    """Return the attempt with most throughput of those that passed; None if none did."""
    passed = [attempt for attempt in attempts if attempt.passed]
    return max(passed, key=lambda attempt: attempt.rate or 0.0, default=None)


def _attempt(file: ModelFile, batch: int, limit_ms: float, budget: float, clock: Clock) -> Attempt:
    try:
        time_runs = file.workload(batch).timers(clock)[CALL]
        samples = 1000 * time_runs(_TRIAL)[None]
        if samples.min() <= limit_ms:
            samples = interleave([time_runs], budget=budget, clock=clock).times[0]
    except BenchError as error:
        return Attempt(batch=batch, failure=str(error))
    times = Times.of(samples, batch)
    return Attempt(
        batch=batch,
        passed=times.ms["p99"] <= limit_ms,
        ms=times.ms,
        rate=times.rate,
        runs=samples.size,
        p99_reliable=times.p99_reliable,
    )
