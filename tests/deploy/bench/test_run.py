"""Comparing and sweeping with subjects that take made-up time on a made-up clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from eps_core.interleave import Block
from eps_deploy.bench.latency import (
    BenchError,
    Facts,
    Subject,
    best,
    choose_batches,
    compare,
    differences,
    refuse_unlike,
    sweep,
)
from eps_deploy.bench.subjects import EngineSubject
from eps_deploy.engines.base import Images, Logits

FACTS = Facts(
    input="uint8 [1, 8, 8]",
    output="float32 [10]",
    precision="fp32",
    runtime="onnxruntime 1.31.1",
    provider="cpu",
    threads=1,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Made:
    """Takes `seconds(batch)` for a call, and half of it on its device if it has one."""

    gpu: int | None = None
    remark: str | None = None

    def __init__(
        self,
        clock: Clock,
        name: str,
        seconds: Callable[[int], float],
        *,
        facts: Facts = FACTS,
        batches: tuple[int, int | None] = (1, None),
        device: bool = False,
    ) -> None:
        self._clock, self._seconds, self._device = clock, seconds, device
        self.name, self.facts, self.batches = name, facts, batches

    def call(self, batch: int) -> Callable[[], object]:
        def run() -> None:
            if batch > 300:
                raise BenchError(f"{self.name}: out of memory at batch {batch}")
            self._clock.now += self._seconds(batch)

        return run

    def on_device(self, batch: int) -> Block | None:
        def block(runs: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
            self._clock.now += runs * self._seconds(batch)
            return np.full(runs, self._seconds(batch) / 2)

        return block if self._device else None

    def end_to_end(self, batch: int) -> Callable[[], object] | None:
        return None

    def close(self) -> None:
        pass


def subjects(*others: Facts) -> list[Subject]:
    clock = Clock()
    return [Made(clock, f"{n}.onnx", lambda b: 1, facts=f) for n, f in enumerate((FACTS, *others))]


def test_each_file_is_compared_with_the_first() -> None:
    clock = Clock()
    times = {"first": 0.004, "half": 0.002, "same": 0.004, "double": 0.008}
    found = compare(
        [Made(clock, name, lambda batch, s=s: s) for name, s in times.items()],  # type: ignore[misc]
        16,
        seconds=5,
        clock=clock,
    )
    calls = [each["call"] for each in found.times]
    assert [call.ms["p50"] for call in calls] == pytest.approx([4, 2, 4, 8])
    assert [call.rate for call in calls] == pytest.approx([4000, 8000, 4000, 2000])
    assert calls[0].speedup is None
    assert [c.speedup.value for c in calls[1:] if c.speedup] == pytest.approx([2, 1, 0.5])
    assert [call.verdict for call in calls[1:]] == ["faster", "cannot tell", "slower"]


def test_the_gpus_own_time_is_told_where_all_have_it() -> None:
    clock = Clock()
    slow = Made(clock, "slow", lambda batch: 0.004, device=True)
    fast = Made(clock, "fast", lambda batch: 0.001, device=True)
    blind = Made(clock, "blind", lambda batch: 0.001)
    both = compare([slow, fast], 1, seconds=3, clock=clock)
    assert both.times[1]["device"].ms["p50"] == pytest.approx(0.5)
    assert set(compare([slow, blind], 1, seconds=3, clock=clock).times[0]) == {"call"}


def test_the_result_is_plain_data_with_every_run_if_wanted() -> None:
    clock = Clock()
    found = compare([Made(clock, "a", lambda batch: 0.001)], 1, seconds=1, clock=clock)
    short, whole = (found.to_dict(["a"], samples=samples) for samples in (False, True))
    json.dumps(whole, allow_nan=False)
    assert "samples" not in short["files"][0]["call"]
    samples = whole["files"][0]["call"]["samples"]
    assert (len(samples), len(samples[0])) == (found.blocks, found.runs)


@pytest.mark.parametrize(
    ("fact", "other"),
    [
        ("input", "uint8 [3, 8, 8]"),
        ("output", "float32 [100]"),
        ("precision", "fp16"),
        ("runtime", "torch 2.13.0 eager"),
        ("provider", "cuda"),
        ("threads", 2),
    ],
)
def test_unlike_things_are_refused_in_words(fact: str, other: object) -> None:
    pair = subjects(replace(FACTS, **{fact: other}))  # type: ignore[arg-type]
    with pytest.raises(
        BenchError, match=rf"unlike: {fact} .* and .*; add --allow-mismatch"
    ) as told:
        refuse_unlike(pair)
    assert str(other) in str(told.value)
    assert list(differences(pair)) == [fact]


def test_like_things_are_not() -> None:
    refuse_unlike(subjects(FACTS, FACTS))
    assert differences(subjects(FACTS, FACTS)) == {}


@pytest.mark.parametrize(
    ("limits", "asked", "chosen"),
    [
        ([(1, None), (1, None)], [], (1, 16)),
        ([(1, None), (1, 8)], [], (1, 8)),
        ([(4, 4), (1, None)], [], (4,)),
        ([(1, None)], [3, 2, 3], (3, 2)),
    ],
)
def test_batch_sizes(
    limits: list[tuple[int, int | None]], asked: list[int], chosen: tuple[int, ...]
) -> None:
    found = [Made(Clock(), "m", lambda batch: 1, batches=limit) for limit in limits]
    assert choose_batches(found, asked) == chosen


@pytest.mark.parametrize(
    ("limits", "asked", "told"),
    [
        ([(4, 4)], [1], "takes batches of exactly 4 images, not 1"),
        ([(1, 8)], [9], "takes batches of 1 to 8 images, not 9"),
        ([(4, 4), (2, 2)], [], "fixed batches of 2 and 4 images"),
        ([(4, 4), (1, 2)], [], "takes batches of 1 to 2 images, not 4"),
    ],
)
def test_batch_sizes_that_a_file_does_not_take(
    limits: list[tuple[int, int | None]], asked: list[int], told: str
) -> None:
    found = [Made(Clock(), "m", lambda batch: 1, batches=limit) for limit in limits]
    with pytest.raises(BenchError, match=told):
        choose_batches(found, asked)


def swept(
    seconds: Callable[[int], float], limit: float, batches: tuple[int, int | None] = (1, None)
) -> tuple[list[int], int | None]:
    clock = Clock()
    tried = sweep(Made(clock, "m", seconds, batches=batches), limit, seconds=1.0, clock=clock)
    chosen = best(tried)
    return [each.batch for each in tried], None if chosen is None else chosen.batch


def test_the_largest_batch_within_the_limit_is_found() -> None:
    """1 ms and 0.1 ms an image: 40 images take 5 ms."""
    tried, chosen = swept(lambda batch: 0.001 + 0.0001 * batch, 5.05)
    assert tried == [1, 2, 4, 8, 16, 32, 64, 48, 40, 44, 42]
    assert chosen == 40


def test_a_smaller_batch_with_more_throughput_is_preferred() -> None:
    """Beyond 8 images, caches overflow, and an image takes three times as long."""
    _, chosen = swept(lambda batch: 0.001 * batch * (1 if batch <= 8 else 3), 100)
    assert chosen in (1, 2, 4, 8)


def test_a_limit_that_nothing_keeps() -> None:
    assert swept(lambda batch: 0.02, 10) == ([1], None)


def test_the_largest_batch_of_a_plan_ends_the_sweep() -> None:
    assert swept(lambda batch: 0.001, 10, batches=(1, 24)) == ([1, 2, 4, 8, 16, 24], 24)


def test_a_batch_that_does_not_fit_into_memory_is_only_too_large() -> None:
    tried, chosen = swept(lambda batch: 0.001, 10)
    assert chosen == 288
    assert 512 in tried


def test_a_batch_far_above_the_limit_costs_three_runs() -> None:
    clock = Clock()
    tried = sweep(
        Made(clock, "m", lambda batch: 0.001 if batch == 1 else 5.0), 10, seconds=20, clock=clock
    )
    assert [(each.batch, each.runs > 200, each.passed) for each in tried] == [
        (1, True, True),
        (2, False, False),
    ]
    assert not tried[1].p99_reliable
    assert clock.now - 100 < 22


def test_a_fixed_batch_leaves_nothing_to_choose() -> None:
    with pytest.raises(BenchError, match="exactly 4 images: there is nothing to choose"):
        swept(lambda batch: 0.001, 10, batches=(4, 4))


class Plan:
    """What `eps-bench` uses of a TensorRT engine."""

    input_shape = (1, 8, 8)
    classes = 10
    max_batch = 32

    def __init__(self) -> None:
        self.closed = False

    def infer(self, images: Images) -> Logits:
        return np.zeros((len(images), 10), np.float32)

    def time_on_device(self, images: Images, runs: int) -> npt.NDArray[np.float64]:
        return np.full(runs, 0.25)

    def describe(self) -> dict[str, Any]:
        return {"runtime": "tensorrt", "version": "11.4.0", "provider": "TensorRT"}

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


def test_a_plan_is_timed_by_its_own_events_within_its_profile() -> None:
    engine = Plan()
    subject = EngineSubject(engine, "model.plan", "int8-fp16")
    found = compare([subject, subject], 8, seconds=0)
    assert found.times[1]["device"].ms["p50"] == pytest.approx(0.25)
    assert found.times[1]["device"].rate == pytest.approx(32_000)
    assert (subject.facts.runtime, subject.facts.provider) == ("tensorrt 11.4.0", "TensorRT")
    assert (subject.facts.precision, subject.facts.threads) == ("int8-fp16", None)
    assert choose_batches([subject], []) == (1, 16)
    with pytest.raises(BenchError, match="takes batches of 1 to 32 images, not 33"):
        choose_batches([subject], [33])
    subject.close()
    assert engine.closed
