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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eps_compact.interleaving import Block, Clock, Runs, interleave, wall
from eps_compact.intervals import Interval, ratio_of_medians
from eps_deploy.engines.base import Engine, Images, Logits
from eps_deploy.measuring.clocks import Conditions, Watch
from eps_train.preprocess import Preprocessing

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
