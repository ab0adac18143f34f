"""Comparing model files, and sweeping batch sizes, with engines that advance a fake clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from eps_deploy.bench.latency import (
    Attempt,
    BenchError,
    LatencyResult,
    ModelFile,
    best,
    choose_batches,
    differences,
    measure,
    require_match,
    sweep_batches,
)
from eps_deploy.bench.model_files import plan_file
from eps_deploy.engines.base import Images, Logits


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeEngine:
    """Takes `seconds(batch)` for a call."""

    classes = 10
    max_batch = 300

    def __init__(
        self,
        clock: Clock,
        seconds: Callable[[int], float],
        input_shape: tuple[int, int, int] = (1, 8, 8),
        **facts: Any,
    ) -> None:
        self._clock, self._seconds, self._facts = clock, seconds, facts
        self.input_shape = input_shape

    def infer(self, images: Images) -> Logits:
        if len(images) > self.max_batch:
            raise BenchError(f"out of memory at batch {len(images)}")
        self._clock.now += self._seconds(len(images))
        return np.zeros((len(images), 10), np.float32)

    def describe(self) -> dict[str, Any]:
        own = {"runtime": "onnxruntime", "version": "1.31.1", "provider": "cpu", "threads": 1}
        return own | self._facts

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def made(
    name: str = "m.onnx",
    seconds: Callable[[int], float] = lambda batch: 1,
    clock: Clock | None = None,
    engine: dict[str, Any] | None = None,
    **changes: Any,
) -> ModelFile:
    """A file whose engine has the facts of `engine`."""
    fake = FakeEngine(clock or Clock(), seconds, **(engine or {}))
    fields: dict[str, Any] = {"precision": "fp32", "gpu": None}
    return ModelFile(name=name, engine=fake, **{**fields, **changes})


def compare(files: list[ModelFile], batch: int, clock: Clock) -> LatencyResult:
    return measure([file.workload(batch) for file in files], budget=5, clock=clock)


def test_each_file_is_compared_with_the_first() -> None:
    clock = Clock()
    times = {"first": 0.004, "half": 0.002, "same": 0.004, "double": 0.008}
    files = [
        made(name, lambda batch, s=s: s, clock)  # type: ignore[misc]
        for name, s in times.items()
    ]
    calls = compare(files, 16, clock).times["call"]
    assert [call.ms["p50"] for call in calls] == pytest.approx([4, 2, 4, 8])
    assert [call.rate for call in calls] == pytest.approx([4000, 8000, 4000, 2000])
    assert calls[0].speedup is None
    assert [c.speedup.value for c in calls[1:] if c.speedup] == pytest.approx([2, 1, 0.5])
    assert [call.verdict for call in calls[1:]] == ["faster", "cannot tell", "slower"]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16])
def test_images_have_the_type_that_the_network_takes(dtype: npt.DTypeLike) -> None:
    images = made(dtype=dtype).workload(5).images
    assert (images.dtype, images.shape) == (dtype, (5, 1, 8, 8))
    assert images.std() > 0.5


def test_facts() -> None:
    assert made().facts == {
        "input": "uint8 [1, 8, 8]",
        "output": "float32 [10]",
        "precision": "fp32",
        "runtime": "onnxruntime 1.31.1",
        "provider": "cpu",
        "threads": 1,
    }


@pytest.mark.parametrize(
    ("fact", "changes", "value"),
    [
        ("input", {"engine": {"input_shape": (3, 8, 8)}}, "uint8 [3, 8, 8]"),
        ("input", {"dtype": np.float16}, "float16 [1, 8, 8]"),
        ("output", {"output": "float32 [100]"}, "float32 [100]"),
        ("precision", {"precision": "fp16"}, "fp16"),
        ("runtime", {"engine": {"runtime": "torch"}}, "torch 1.31.1"),
        ("provider", {"engine": {"provider": "cuda"}}, "cuda"),
        ("threads", {"engine": {"threads": 2}}, "2"),
        ("threads", {"gpu": 0}, "None"),
    ],
)
def test_files_that_do_not_match_are_refused(
    fact: str, changes: dict[str, Any], value: str
) -> None:
    pair = [made(), made("other.onnx", **changes)]
    with pytest.raises(
        BenchError, match=rf"^m.onnx and other.onnx do not match: {fact} .* and .*; add --allow-mis"
    ) as error:
        require_match(pair)
    assert value in str(error.value)
    assert list(differences(pair)) == [fact]


def test_files_that_match() -> None:
    files = [made("a"), made("b", remark="slow"), made("c", batches=(4, 4))]
    require_match(files)
    assert differences(files) == {}


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
    found = [made(batches=limit) for limit in limits]
    assert choose_batches(found, asked) == chosen


@pytest.mark.parametrize(
    ("limits", "asked", "message"),
    [
        ([(4, 4)], [1], "takes batches of exactly 4 images, not 1"),
        ([(1, 8)], [9], "takes batches of 1 to 8 images, not 9"),
        ([(4, 4), (2, 2)], [], "fixed batches of 2 and 4 images"),
        ([(4, 4), (1, 2)], [], "takes batches of 1 to 2 images, not 4"),
    ],
)
def test_batch_sizes_that_a_file_does_not_take(
    limits: list[tuple[int, int | None]], asked: list[int], message: str
) -> None:
    found = [made(batches=limit) for limit in limits]
    with pytest.raises(BenchError, match=message):
        choose_batches(found, asked)


def swept(
    seconds: Callable[[int], float], limit: float, batches: tuple[int, int | None] = (1, None)
) -> tuple[list[int], int | None]:
    clock = Clock()
    attempts = sweep_batches(
        made(seconds=seconds, clock=clock, batches=batches), limit, budget=1.0, clock=clock
    )
    chosen = best(attempts)
    return [each.batch for each in attempts], None if chosen is None else chosen.batch


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
    reported: list[Attempt] = []
    attempts = sweep_batches(
        made(seconds=lambda batch: 0.001 if batch == 1 else 5.0, clock=clock),
        10,
        budget=20,
        clock=clock,
        report=reported.append,
    )
    assert reported == attempts
    entries = [asdict(attempt) for attempt in attempts]
    assert [(e["batch"], e["runs"] > 200, e["passed"]) for e in entries] == [
        (1, True, True),
        (2, False, False),
    ]
    assert [entry["p99_reliable"] for entry in entries] == [True, False]
    assert clock.now - 100 < 22


def test_a_batch_that_did_not_run_has_no_times() -> None:
    clock = Clock()
    file = made(seconds=lambda batch: 0.001, clock=clock)
    attempts = sweep_batches(file, 10, budget=0, clock=clock)
    (failed,) = (asdict(attempt) for attempt in attempts if attempt.batch == 512)
    assert failed == {
        "batch": 512,
        "passed": False,
        "ms": None,
        "rate": None,
        "runs": 0,
        "failure": "out of memory at batch 512",
        "p99_reliable": False,
    }


def test_a_fixed_batch_leaves_nothing_to_choose() -> None:
    with pytest.raises(BenchError, match="exactly 4 images: there is nothing to choose"):
        swept(lambda batch: 0.001, 10, batches=(4, 4))


class Plan:
    """What `eps-bench` uses of a TensorRT engine."""

    input_shape = (1, 8, 8)
    classes = 10
    max_batch = 32

    def infer(self, images: Images) -> Logits:
        return np.zeros((len(images), 10), np.float32)

    def time_on_device(self, images: Images, runs: int) -> npt.NDArray[np.float64]:
        return np.full(runs, 0.25)

    def describe(self) -> dict[str, Any]:
        facts = {"runtime": "tensorrt", "version": "11.4.0", "provider": "TensorRT"}
        return facts | {"threads": 1}

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_plan_is_timed_by_its_own_events_within_its_profile() -> None:
    file = plan_file(Plan(), "model.plan", "int8-fp16")
    found = measure([file.workload(8)] * 2, budget=0)
    assert found.times["device"][1].ms["p50"] == pytest.approx(0.25)
    assert found.times["device"][1].rate == pytest.approx(32_000)
    assert (file.facts["runtime"], file.facts["provider"]) == ("tensorrt 11.4.0", "TensorRT")
    assert (file.facts["precision"], file.facts["threads"], file.gpu) == ("int8-fp16", None, 0)
    assert choose_batches([file], []) == (1, 16)
    with pytest.raises(BenchError, match="takes batches of 1 to 32 images, not 33"):
        choose_batches([file], [33])


def test_the_gpus_own_time_is_measured_where_all_have_it() -> None:
    plan, file = plan_file(Plan(), "model.plan", "fp32"), made(seconds=lambda batch: 0.001)
    assert set(measure([plan.workload(1), file.workload(1)], budget=0).times) == {"call"}
