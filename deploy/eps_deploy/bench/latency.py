"""Latency of two engines measured against each other: warmed up, interleaved, with an interval.

See :mod:`eps_compact.interleaving` for how. Three things are timed apart: whole calls of
`Engine.infer`; the way from a picture's bytes to a label; and, for an engine that has
`time_on_device`, its work on the GPU alone.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from eps_core.errors import EpsError
from eps_core.interleave import Block, Clock, Runs, interleave, wall
from eps_core.preprocessing import Preprocessing
from eps_core.stats import Interval, ratio_of_medians
from eps_deploy.bench.machine import Conditions, Watch
from eps_deploy.engines.base import Engine, Images, Logits

BATCHES = (1, 16)
P99_RUNS = 200  # below this the 99th percentile is one or two runs
PERCENTILES = (50, 90, 95, 99)
SPREAD = 0.10  # of the blocks' medians, above which a measurement is called noisy
# Two loads of one file in one process differ as well, by where their memory happens to lie: in
# twelve processes by 1.7 % in the median, and by up to 11 %.
LEAST = 0.03

Verdict = Literal["faster", "slower", "cannot tell"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One way of timing both engines: milliseconds a call by percentile name (`p50`, ...).

    Attributes:
        baseline_ms, compact_ms: percentiles over all blocks.
        speedup: how many times as long the baseline took; see `intervals.ratio_of_medians`.
        baseline_rate, compact_rate: images a second over all timed runs, one call after another.
    """

    baseline_ms: dict[str, float]
    compact_ms: dict[str, float]
    speedup: Interval
    baseline_rate: float
    compact_rate: float

    @property
    def verdict(self) -> Verdict:
        """Of the compact network."""
        return verdict(self.speedup)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Times of one batch size. The first five attributes are of whole calls of `Engine.infer`.

    Attributes:
        batch: images in a call.
        baseline_ms, compact_ms, speedup, baseline_rate, compact_rate: as in :class:`Comparison`.
        blocks, runs: blocks of each engine, and runs in each block.
        warm: whether every warm-up became flat before its time was over.
        end_to_end: from a picture's bytes to a label; None when no picture was given.
        device: the GPU's own time by its events; None when an engine cannot tell.
        conditions: what else the machine did meanwhile; None when nobody looked.
        spread: of the blocks' medians of either engine, whichever is more; see :func:`spread`.
        samples: milliseconds of every run, float64 `[blocks, runs]`, by `baseline`, `compact`,
            `baseline_end_to_end`, `compact_end_to_end`, `baseline_device`, `compact_device`.
    """

    batch: int
    baseline_ms: dict[str, float]
    compact_ms: dict[str, float]
    speedup: Interval
    blocks: int
    runs: int
    warm: bool
    baseline_rate: float = 0.0
    compact_rate: float = 0.0
    end_to_end: Comparison | None = None
    device: Comparison | None = None
    conditions: Conditions | None = None
    spread: float = 0.0
    samples: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict, compare=False)

    @property
    def p99_reliable(self) -> bool:
        return self.blocks * self.runs >= P99_RUNS

    @property
    def verdict(self) -> Verdict:
        """Of the compact network."""
        return verdict(self.speedup)

    @property
    def noise(self) -> str:
        """A plain sentence on how far these times can be trusted."""
        return noise(self.conditions, self.spread)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the samples."""
        entry = {
            name: getattr(self, name)
            for name in ("batch", "baseline_ms", "compact_ms", "blocks", "runs", "warm", "spread")
        }
        return entry | {
            "speedup": asdict(self.speedup),
            "baseline_rate": self.baseline_rate,
            "compact_rate": self.compact_rate,
            "verdict": self.verdict,
            "p99_reliable": self.p99_reliable,
            "end_to_end": _comparison_dict(self.end_to_end),
            "device": _comparison_dict(self.device),
            "conditions": None if self.conditions is None else self.conditions.to_dict(),
            "noise": self.noise,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """What a server gets, and what it needs to answer with a label.

    Attributes:
        content: bytes of an image file.
        preprocessing: from that to the network's input.
        labels: names of the classes.
    """

    content: bytes
    preprocessing: Preprocessing
    labels: Sequence[str]

    def end_to_end(self, infer: Callable[[Images], Logits], batch: int) -> Callable[[], list[str]]:
        """A call that takes the picture `batch` times from its bytes to a label.

        Everything is in memory; decoding and preprocessing run one picture after another.
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


def measure(
    baseline: Engine,
    compact: Engine,
    images: Images,
    *,
    budget: float,
    picture: Picture | None = None,
    gpu: int | None = None,
    clock: Clock = time.perf_counter,
) -> Latency:
    """Time both engines on `images` (uint8 `[N, C, H, W]`), the whole batch in each call.

    Args:
        baseline, compact: the engines, with the same settings.
        images: one batch.
        budget: seconds to spend at most, warm-up included; a fast network needs far less. Six
            blocks of one run are made in any case.
        picture: time the way from its bytes to its label too.
        gpu: number of the CUDA device that the engines run on, None for none; its clocks are read.
        clock: seconds; a test passes its own.
    """
    engines = {"baseline": baseline, "compact": compact}
    sides = {name: wall(_infer(engine, images), clock) for name, engine in engines.items()}
    if picture is not None:
        for name, engine in engines.items():
            sides[f"{name}_end_to_end"] = wall(picture.end_to_end(engine.infer, len(images)), clock)
    on_device = {name: on_gpu(engine, images) for name, engine in engines.items()}
    if all(on_device.values()):
        sides |= {f"{name}_device": side for name, side in on_device.items() if side}
    with Watch(gpu) as watch:
        watch.look()
        turns = interleave(list(sides.values()), budget=budget, clock=clock, between=watch.look)
        conditions = watch.conditions()
    times = dict(zip(sides, turns.times, strict=True))
    whole = _compare(times, "", len(images))
    return Latency(
        batch=len(images),
        **{name: getattr(whole, name) for name in Comparison.__slots__},
        blocks=turns.blocks,
        runs=turns.runs,
        warm=all(turns.warm),
        end_to_end=_compare(times, "_end_to_end", len(images)) if picture else None,
        device=_compare(times, "_device", len(images)) if "baseline_device" in times else None,
        conditions=conditions,
        spread=max(spread(times["baseline"]), spread(times["compact"])),
        samples={name: np.stack(blocks) * 1000 for name, blocks in times.items()},
    )


def on_gpu(engine: object, images: Images) -> Block | None:
    """A block of runs timed by the GPU's own events, for an engine that has `time_on_device`."""
    timed = getattr(engine, "time_on_device", None)
    if timed is None:
        return None

    def block(runs: int) -> Runs:
        milliseconds: Runs = timed(images, runs)
        return milliseconds / 1000

    return block


def percentiles(blocks: Sequence[Runs]) -> dict[str, float]:
    """Of seconds, in milliseconds: `p50`, `p90`, `p95`, `p99`."""
    values = np.percentile(np.concatenate(blocks) * 1000, PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}


def rate(blocks: Sequence[Runs], batch: int) -> float:
    """Images a second: all images over the time of all runs, slow ones included."""
    times = np.concatenate(blocks)
    return float(batch * len(times) / times.sum())


def spread(blocks: Sequence[Runs]) -> float:
    """How far apart the medians of nine blocks in ten lie, over the median of them all."""
    low, middle, high = np.percentile([np.median(block) for block in blocks], [5, 50, 95])
    return float((high - low) / middle)


def verdict(speedup: Interval) -> Verdict:
    """What the ratio of the reference's median to a network's own says of that network.

    "faster" and "slower" only when the whole interval lies more than :data:`LEAST` away from 1.
    """
    if speedup.low > 1 + LEAST:
        return "faster"
    return "slower" if speedup.high < 1 / (1 + LEAST) else "cannot tell"


def noise(conditions: Conditions | None, spread: float, *, alone: bool = False) -> str:
    """A plain sentence on how far times can be trusted that were measured in these conditions.

    `alone`: nothing else was timed in turns with it, so there is no ratio to fall back upon.
    """
    found = [] if conditions is None else conditions.disturbances()
    if spread > SPREAD:
        found.append(f"the medians of nine blocks in ten differ by up to {100 * spread:.0f} %")
    if not found:
        blocks = f"the medians of nine blocks in ten lie within {100 * spread:.0f} %"
        return f"Quiet: {blocks} of each other."
    if conditions is not None and conditions.starved:
        advice = "long calls suffer more from that than short ones: measure on a quiet machine"
    elif alone:
        advice = "measure again"
    else:
        advice = "all sides met the same, so trust the ratios first"
    return f"Noisy: {'; '.join(found)}. {advice.capitalize()}."


def save_samples(path: Path, timings: Sequence[Latency]) -> None:
    """Write every run of `timings` to an `.npz` file.

    Arrays: `batch-N.baseline` and so on, for each of `Latency.samples`: milliseconds, float32
    `[blocks, runs]`, in the order in which they were measured.
    """
    arrays = {
        f"batch-{timing.batch}.{name}": values.astype(np.float32)
        for timing in timings
        for name, values in timing.samples.items()
    }
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _infer(engine: Engine, images: Images) -> Callable[[], object]:
    return lambda: engine.infer(images)


def _compare(times: Mapping[str, list[Runs]], suffix: str, batch: int) -> Comparison:
    baseline, compact = times[f"baseline{suffix}"], times[f"compact{suffix}"]
    return Comparison(
        baseline_ms=percentiles(baseline),
        compact_ms=percentiles(compact),
        speedup=ratio_of_medians(baseline, compact),
        baseline_rate=rate(baseline, batch),
        compact_rate=rate(compact, batch),
    )


def _comparison_dict(found: Comparison | None) -> dict[str, Any] | None:
    return None if found is None else {**asdict(found), "verdict": found.verdict}


# -- What `eps-bench` times: any model file, as something that can be called with a batch size


class BenchError(EpsError):
    """A file that cannot be timed, or files that cannot be compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What must be alike for two latencies to be compared.

    Attributes:
        input: type and shape of one image, as in `uint8 [3, 32, 32]`.
        output: as in `float32 [10]`.
        precision: what its layers compute in, as in `fp32`.
        runtime: with its version.
        provider: what runs it.
        threads: on the processor; None for what runs on a GPU.
    """

    input: str
    output: str
    precision: str
    runtime: str
    provider: str
    threads: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Subject(Protocol):
    """A loaded model.

    Attributes:
        name: its file, as the user named it.
        facts: see :class:`Facts`.
        batches: smallest and largest batch that it takes; None: no limit of its own.
        remark: what a reader of its times must know; None when there is nothing.
        gpu: number of the CUDA device that it runs on, None for none.
    """

    @property
    def name(self) -> str: ...

    @property
    def facts(self) -> Facts: ...

    @property
    def batches(self) -> tuple[int, int | None]: ...

    @property
    def remark(self) -> str | None: ...

    @property
    def gpu(self) -> int | None: ...

    def call(self, batch: int) -> Callable[[], object]:
        """A call that computes one batch, made-up images in, results in memory out.

        Raises BenchError when it fails, for want of memory for instance.
        """

    def on_device(self, batch: int) -> Block | None:
        """The same, timed by the device's own events; None when it cannot tell."""

    def end_to_end(self, batch: int) -> Callable[[], object] | None:
        """From a picture's bytes to a label, `batch` times; None when no picture is known."""

    def close(self) -> None: ...


def differences(subjects: list[Subject]) -> dict[str, list[str]]:
    """In what the subjects differ: the name of a fact, and what each of them has there."""
    each = [subject.facts.to_dict() for subject in subjects]
    return {
        name: [str(facts[name]) for facts in each]
        for name in each[0]
        if len({facts[name] for facts in each}) > 1
    }


def refuse_unlike(subjects: list[Subject]) -> None:
    """Raise BenchError, in one line, unless all that matters is alike."""
    for other in subjects[1:]:
        unlike = differences([subjects[0], other])
        if unlike:
            told = "; ".join(f"{name} {a} and {b}" for name, (a, b) in unlike.items())
            raise BenchError(
                f"{subjects[0].name} and {other.name} are unlike: {told};"
                " add --allow-mismatch to compare them all the same"
            )


def refuse_batch(subject: Subject, batch: int) -> None:
    """Raise BenchError for a batch that the model does not take."""
    smallest, largest = subject.batches
    if batch < smallest or (largest is not None and batch > largest):
        takes = f"exactly {smallest}" if smallest == largest else f"{smallest} to {largest}"
        raise BenchError(f"{subject.name}: takes batches of {takes} images, not {batch}")


# -- The latency of model files against each other: the work behind `eps-bench`
#
# The first file is the reference. All are loaded in one process and timed in turns; see
# :mod:`eps_core.interleave`.

SCHEMA = 1
WHOLE, DEVICE, END_TO_END = "call", "device", "end_to_end"


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """One way of timing one file at one batch size.

    Attributes:
        ms: milliseconds a call, by percentile name (`p50`, ...).
        rate: images a second over all timed runs, one call after another.
        speedup: median of the reference over the median of this file; None for the reference.
        samples: milliseconds of every run, by block.
    """

    ms: dict[str, float]
    rate: float
    speedup: Interval | None
    samples: list[list[float]]

    @property
    def verdict(self) -> Verdict | None:
        """Of this file against the reference."""
        return None if self.speedup is None else verdict(self.speedup)

    def to_dict(self, *, samples: bool) -> dict[str, Any]:
        found = asdict(self)
        if not samples:
            del found["samples"]
        return {**found, "verdict": self.verdict}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """All files at one batch size.

    Attributes:
        batch: images in a call.
        times: for each file, in order, what was timed: whole calls (`call`), and where it can be
            had for all of them the GPU's own time (`device`) and the way from a picture to a label
            (`end_to_end`).
        blocks, runs: blocks of each, and runs in each block.
        warm: whether every warm-up became flat before its time was over.
        conditions: what else the machine did.
        spread: as `latency.Latency.spread`, of all files.
    """

    batch: int
    times: list[dict[str, Times]]
    blocks: int
    runs: int
    warm: bool
    conditions: Conditions
    spread: float

    @property
    def p99_reliable(self) -> bool:
        return self.blocks * self.runs >= P99_RUNS

    @property
    def noise(self) -> str:
        return noise(self.conditions, self.spread, alone=len(self.times) == 1)

    def to_dict(self, names: Sequence[str], *, samples: bool) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "files": [
                {"file": name, **{way: t.to_dict(samples=samples) for way, t in each.items()}}
                for name, each in zip(names, self.times, strict=True)
            ],
            "blocks": self.blocks,
            "runs_per_block": self.runs,
            "p99_reliable": self.p99_reliable,
            "warm": self.warm,
            "noise": self.noise,
            "conditions": self.conditions.to_dict(),
        }


def choose_batches(subjects: Sequence[Subject], asked: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes to time: those that were asked for, or what all subjects take.

    Raises BenchError when a file does not take what was asked for, or the files have no batch size
    in common.
    """
    if not asked:
        only = {subject.batches for subject in subjects if subject.batches[0] > 1}
        fixed = sorted({smallest for smallest, _ in only})
        if len(fixed) > 1:
            sizes = " and ".join(str(size) for size in fixed)
            raise BenchError(f"the files take fixed batches of {sizes} images; bench them apart")
        largest = min((s.batches[1] for s in subjects if s.batches[1]), default=max(BATCHES))
        asked = fixed or sorted({min(size, largest) for size in BATCHES})
    for subject in subjects:
        for batch in asked:
            refuse_batch(subject, batch)
    return tuple(dict.fromkeys(asked))


def compare(
    subjects: Sequence[Subject],
    batch: int,
    *,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> Bench:
    """Time all subjects in turns at one batch size; the first is the reference.

    Args:
        subjects: at least one.
        batch: images in a call, one that all take.
        seconds: to spend at most; six blocks of one run are made in any case.
        clock: seconds; a test passes its own.
    """
    ways = _ways(subjects, batch, clock)
    keys = [(way, index) for way in ways for index in range(len(subjects))]
    gpu = next((subject.gpu for subject in subjects if subject.gpu is not None), None)
    with Watch(gpu) as watch:
        watch.look()
        turns = interleave(
            [ways[way][index] for way, index in keys],
            budget=seconds,
            clock=clock,
            between=watch.look,
        )
        conditions = watch.conditions()
    blocks = dict(zip(keys, turns.times, strict=True))
    times = [
        {way: _times(blocks[way, 0], blocks[way, index], index, batch) for way in ways}
        for index in range(len(subjects))
    ]
    return Bench(
        batch=batch,
        times=times,
        blocks=turns.blocks,
        runs=turns.runs,
        warm=all(turns.warm),
        conditions=conditions,
        spread=max(spread(blocks[WHOLE, index]) for index in range(len(subjects))),
    )


def _ways(
    subjects: Sequence[Subject], batch: int, clock: Clock
) -> dict[str, list[Callable[[int], Runs]]]:
    """What can be timed of all of them."""
    ways: dict[str, list[Callable[[int], Runs]]] = {
        WHOLE: [wall(subject.call(batch), clock) for subject in subjects]
    }
    device = [side for side in (s.on_device(batch) for s in subjects) if side is not None]
    if len(device) == len(subjects):
        ways[DEVICE] = device
    calls = [call for call in (s.end_to_end(batch) for s in subjects) if call is not None]
    if len(calls) == len(subjects):
        ways[END_TO_END] = [wall(call, clock) for call in calls]
    return ways


def _times(reference: list[Runs], own: list[Runs], index: int, batch: int) -> Times:
    return Times(
        ms=percentiles(own),
        rate=rate(own, batch),
        speedup=ratio_of_medians(reference, own) if index else None,
        samples=[(1000 * block).round(6).tolist() for block in own],
    )


# -- `eps-bench --slo-ms`: the batch size with most throughput whose p99 keeps a limit

LARGEST = 1024  # images in a batch
_STEP = 16  # bisection ends at a sixteenth of the batch size
_TRIAL = 3  # runs that tell at once of a batch that is far too large


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """One batch size.

    Attributes:
        batch: images in a call.
        passed: whether the 99th percentile is within the limit.
        ms: percentiles; None when it did not run at all.
        rate: images a second; None likewise.
        runs: that were timed; below 200 the 99th percentile is unreliable.
        failure: why it did not run.
    """

    batch: int
    passed: bool
    ms: dict[str, float] | None
    rate: float | None
    runs: int
    failure: str | None = None

    @property
    def p99_reliable(self) -> bool:
        return self.runs >= P99_RUNS

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "p99_reliable": self.p99_reliable}


def sweep(
    subject: Subject,
    limit_ms: float,
    *,
    seconds: float,
    clock: Clock = time.perf_counter,
    report: Callable[[Tried], object] = lambda tried: None,
) -> list[Tried]:
    """Try batches of 1, 2, 4, ... until one misses the limit, then between the last two.

    A smaller batch may well have more throughput: :func:`best` looks at all that passed.

    Args:
        subject: what is timed.
        limit_ms: for the 99th percentile of whole calls, in milliseconds.
        seconds: to spend at most on each batch size.
        clock: seconds; a test passes its own.
        report: is told of each batch size.

    Raises:
        BenchError: the file takes one batch size only, or does not run at all.
    """
    smallest, most = subject.batches
    if smallest == most:
        raise BenchError(
            f"{subject.name}: takes batches of exactly {smallest} images: there is nothing to"
            " choose with --slo-ms; export it with a dynamic batch"
        )
    largest = min(most or LARGEST, LARGEST)
    found: list[Tried] = []

    def attempt(batch: int) -> bool:
        tried = _try(subject, batch, limit_ms, seconds, clock)
        if tried.failure and not found:
            raise BenchError(tried.failure)
        found.append(tried)
        report(tried)
        return tried.passed

    good, batch = 0, smallest
    while attempt(batch):
        good = batch
        if batch == largest:
            return found
        batch = min(2 * batch, largest)
    bad = batch
    while good and bad - good > max(1, good // _STEP):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if attempt(middle) else (good, middle)
    return found


def best(tried: Sequence[Tried]) -> Tried | None:
    """The one with most throughput of those that passed; None when none did."""
    return max((each for each in tried if each.passed), key=lambda t: t.rate or 0, default=None)


def _try(subject: Subject, batch: int, limit_ms: float, seconds: float, clock: Clock) -> Tried:
    try:
        side = wall(subject.call(batch), clock)
        times = [side(_TRIAL)]
        if 1000 * float(times[0].min()) <= limit_ms:
            times = interleave([side], budget=seconds, clock=clock).times[0]
    except BenchError as error:
        return Tried(batch=batch, passed=False, ms=None, rate=None, runs=0, failure=str(error))
    ms = percentiles(times)
    return Tried(
        batch=batch,
        passed=ms["p99"] <= limit_ms,
        ms=ms,
        rate=rate(times, batch),
        runs=sum(len(block) for block in times),
    )
