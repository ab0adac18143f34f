"""Latency of engines that advance a fake clock."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from eps_core.machine import Conditions
from eps_core.preprocessing import Preprocessing
from eps_core.stats import Interval
from eps_deploy.bench import latency
from eps_deploy.engines.base import Images, Logits

IMAGES = np.zeros((4, 1, 8, 8), np.uint8)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeEngine:
    """Takes `seconds(run)` for its n-th run, and appends its name to a shared log."""

    input_shape = (1, 8, 8)
    classes = 10
    max_batch = 256

    def __init__(
        self, clock: Clock, seconds: Callable[[int], float], log: list[str], name: str
    ) -> None:
        self._clock, self._seconds, self._log, self._name = clock, seconds, log, name
        self.runs = 0

    def infer(self, images: Images) -> Logits:
        self._clock.now += self._seconds(self.runs)
        self.runs += 1
        self._log.append(self._name)
        return np.zeros((len(images), 10), np.float32)

    def describe(self) -> dict[str, Any]:
        return {}

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Made:
    """What was measured of two fake engines, after `spent` seconds."""

    def __init__(
        self,
        baseline: Callable[[int], float],
        compact: Callable[[int], float],
        budget: float,
        kind: type[FakeEngine] = FakeEngine,
    ) -> None:
        clock = Clock()
        self.log: list[str] = []
        engines = [
            kind(clock, seconds, self.log, name)
            for name, seconds in (("B", baseline), ("C", compact))
        ]
        self.found = latency.measure(
            [latency.Workload(engine=engine, images=IMAGES) for engine in engines],
            budget=budget,
            clock=clock,
        )
        self.spent = clock.now - 100.0
        self.baseline, self.compact = self.found.times["call"]


def value(times: latency.Times) -> float:
    assert times.speedup is not None
    return times.speedup.value


def test_constant_times_come_out_exactly() -> None:
    made = Made(lambda run: 0.004, lambda run: 0.002, budget=5)
    assert made.found.batch == 4
    assert made.baseline.ms == pytest.approx({"p50": 4, "p90": 4, "p95": 4, "p99": 4})
    assert made.compact.ms == pytest.approx({"p50": 2, "p90": 2, "p95": 2, "p99": 2})
    speedup = made.compact.speedup
    assert speedup is not None
    assert (speedup.low, speedup.value, speedup.high) == pytest.approx((2, 2, 2))
    assert made.baseline.speedup is None
    assert made.found.warm
    assert made.found.p99_reliable


def test_the_budget_is_kept() -> None:
    for budget in (0.5, 2.0, 10.0):
        assert Made(lambda run: 0.004, lambda run: 0.002, budget).spent <= budget * 1.05


def test_a_budget_of_zero_still_makes_six_blocks() -> None:
    made = Made(lambda run: 1.0, lambda run: 0.5, budget=0)
    assert (made.found.blocks, made.found.runs) == (6, 1)
    assert value(made.compact) == pytest.approx(2)
    assert not made.found.p99_reliable


def test_the_two_engines_take_turns() -> None:
    """After the warm-up: BB.. CC.. BB.. CC.., so that what the machine does meets both."""
    made = Made(lambda run: 0.02, lambda run: 0.01, budget=5)
    length = made.found.runs + 2  # two runs at the start of each block are discarded
    timed = made.log[-2 * made.found.blocks * length :]
    blocks = ["".join(sorted(set(timed[at : at + length]))) for at in range(0, len(timed), length)]
    assert "".join(blocks) == "BC" * made.found.blocks


def test_a_steady_drift_of_the_machine_does_not_bias_the_ratio() -> None:
    """Both get slower by half over the measurement; the ratio stays 2."""
    clock = Clock()

    def slowdown() -> float:
        return 1 + 0.1 * (clock.now - 100.0)

    baseline = FakeEngine(clock, lambda run: 0.004 * slowdown(), [], "B")
    compact = FakeEngine(clock, lambda run: 0.002 * slowdown(), [], "C")
    found = latency.measure(
        [latency.Workload(engine=engine, images=IMAGES) for engine in (baseline, compact)],
        budget=5,
        clock=clock,
    )
    assert value(found.times["call"][1]) == pytest.approx(2, rel=0.02)


def test_warm_up_runs_do_not_count() -> None:
    """The first thirty runs are far slower, as after loading a network."""
    made = Made(
        lambda run: 0.03 if run < 30 else 0.004, lambda run: 0.02 if run < 30 else 0.002, budget=10
    )
    assert made.found.warm
    assert made.baseline.ms["p99"] == pytest.approx(4)


def test_times_that_never_settle_are_reported() -> None:
    made = Made(
        lambda run: 0.001 * (1 + run // 5 % 2), lambda run: 0.001 * (1 + run // 5 % 2), budget=1
    )
    assert not made.found.warm


def test_a_slow_network_does_not_spend_the_budget_on_warming_up() -> None:
    """At 1.5 s for a run of both, 60 s are enough for more than six single runs."""
    made = Made(lambda run: 1.0, lambda run: 0.5, budget=60)
    assert made.spent <= 63
    assert made.compact.samples.size > 10
    assert made.found.warm


def test_a_fast_network_needs_far_less_than_the_budget() -> None:
    made = Made(lambda run: 0.0004, lambda run: 0.0002, budget=60)
    assert made.spent < 10
    assert made.found.blocks * made.found.runs == 5000


def test_images_a_second_count_the_slow_runs_too() -> None:
    """Every tenth run takes ten times as long: the median does not know, the throughput does."""
    made = Made(lambda run: 0.004, lambda run: 0.02 if run % 10 == 0 else 0.002, budget=5)
    assert made.compact.ms["p50"] == pytest.approx(2)
    assert made.baseline.rate == pytest.approx(4 / 0.004)
    assert made.compact.rate == pytest.approx(4 / (0.9 * 0.002 + 0.1 * 0.02), rel=0.02)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        (Interval(1.2, 1.04, 1.4), "faster"),
        (Interval(1.2, 1.02, 1.4), "cannot tell"),
        (Interval(1.0, 1.0, 1.0), "cannot tell"),
        (Interval(0.9, 0.8, 0.98), "cannot tell"),
        (Interval(0.9, 0.8, 0.96), "slower"),
    ],
)
def test_faster_only_when_the_whole_interval_is(interval: Interval, verdict: str) -> None:
    assert latency.verdict(interval) == verdict


class Server:
    """An engine that records the images it receives."""

    input_shape = (1, 8, 8)
    classes = 2
    max_batch = 256

    def __init__(self) -> None:
        self.seen: list[Images] = []

    def infer(self, images: Images) -> Logits:
        self.seen.append(images)
        bright = images.reshape(len(images), -1).mean(axis=1) > 100
        return np.stack([~bright, bright], axis=1).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return {}

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def example() -> latency.ExampleImage:
    """A bright grey square of 20x20 pixels, as PNG."""
    file = io.BytesIO()
    Image.new("L", (20, 20), 200).save(file, "png")
    return latency.ExampleImage(
        content=file.getvalue(),
        preprocessing=Preprocessing(resize=(8, 8), crop=(8, 8), color="grey"),
        labels=("dark", "bright"),
    )


def test_the_way_from_an_images_bytes_to_its_label() -> None:
    engine = Server()
    assert example().end_to_end(engine.infer, 3)() == ["bright"] * 3
    (pixels,) = engine.seen
    assert pixels.shape == (3, 1, 8, 8)
    assert pixels.dtype == np.uint8
    assert pixels.min() == 200


def test_end_to_end_is_timed_apart_from_the_engine() -> None:
    workload = latency.Workload(engine=Server(), images=IMAGES, example=example())
    found = latency.measure([workload, workload], budget=0.3)
    assert set(found.times) == {"call", "end_to_end"}
    assert found.times["end_to_end"][0].rate > 0
    blind = latency.Workload(engine=Server(), images=IMAGES)
    assert set(latency.measure([workload, blind], budget=0).times) == {"call"}


class GpuEngine(FakeEngine):
    """Reports that the GPU needs half of what a call takes."""

    def time_on_device(self, images: Images, runs: int) -> npt.NDArray[np.float64]:
        before = self._clock.now
        for _ in range(runs):
            self.infer(images)
        return np.full(runs, 500 * (self._clock.now - before) / runs)


def test_an_engine_with_time_on_device_is_timed_on_its_device_too() -> None:
    made = Made(lambda run: 0.004, lambda run: 0.001, budget=5, kind=GpuEngine)
    baseline, compact = made.found.times["device"]
    assert baseline.ms["p50"] == pytest.approx(2)
    assert compact.ms["p50"] == pytest.approx(0.5)
    assert value(compact) == pytest.approx(4)
    assert compact.verdict == "faster"
    assert made.compact.ms["p50"] == pytest.approx(1)


def test_every_run_is_kept(tmp_path: Path) -> None:
    made = Made(lambda run: 0.004, lambda run: 0.002, budget=1, kind=GpuEngine)
    latency.save_samples(tmp_path / "latency.npz", [made.found])
    with np.load(tmp_path / "latency.npz") as kept:
        assert sorted(kept.files) == [
            "batch-4.baseline",
            "batch-4.baseline_device",
            "batch-4.compact",
            "batch-4.compact_device",
        ]
        assert kept["batch-4.baseline"].shape == (made.found.blocks, made.found.runs)
        assert kept["batch-4.baseline"].dtype == np.float32
        assert np.median(kept["batch-4.compact"]) == pytest.approx(made.compact.ms["p50"])


def test_the_result_is_plain_data_with_every_run_if_wanted() -> None:
    found = Made(lambda run: 0.004, lambda run: 0.002, budget=1).found
    short, whole = (found.to_dict(["a", "b"], samples=samples) for samples in (False, True))
    entry = json.loads(json.dumps(whole, allow_nan=False))
    assert entry["files"][1]["call"]["verdict"] == "faster"
    assert entry["files"][1]["call"]["speedup"] == {
        "value": pytest.approx(2),
        "low": pytest.approx(2),
        "high": pytest.approx(2),
    }
    assert entry["noise"] == found.noise
    assert entry["conditions"]["cores"] >= 1
    assert "samples" not in short["files"][0]["call"]
    samples = entry["files"][0]["call"]["samples"]
    assert (len(samples), len(samples[0])) == (entry["blocks"], entry["runs_per_block"])


def test_the_description_of_noise() -> None:
    quiet = Conditions(
        seconds=1,
        cores=2,
        load=None,
        others=0.0,
        stolen=0.0,
        waited=0.0,
        cpu_mhz=None,
        governor=None,
        gpu=None,
    )
    assert latency.noise(quiet, 0.02).startswith("Quiet: ")
    assert "differ by up to 30 %" in latency.noise(quiet, 0.3)
    assert "trust the ratios first" in latency.noise(quiet, 0.3)
    assert "Measure again" in latency.noise(quiet, 0.3, alone=True)


def test_waiting_for_a_core_makes_ratios_wrong_too() -> None:
    """A call longer than a time slice is nearly always interrupted, a short one hardly ever."""
    starved = Conditions(
        seconds=1,
        cores=2,
        load=None,
        others=1.5,
        stolen=0.0,
        waited=0.4,
        cpu_mhz=None,
        governor=None,
        gpu=None,
    )
    found = latency.noise(starved, 0.02)
    assert "waited 40 % of the time for a core" in found
    assert "trust the ratios" not in found


def test_blocks_that_differ_are_noise() -> None:
    found = Made(lambda run: 0.002 if run < 300 else 0.004, lambda run: 0.002, budget=3).found
    assert found.spread > 0.3
    assert found.noise.startswith("Noisy: ")
