"""`TrtEngine` on a GPU and a TensorRT made of host memory and ONNX Runtime.

What this cannot show: that a real plan loads, is right, or is fast. That is for `test_gpu.py`.
"""

from __future__ import annotations

import atexit
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eps_core.errors import DataError
from eps_deploy.engines.base import Engine, EngineError
from eps_deploy.engines.trt import engine as engine_module
from eps_deploy.engines.trt.cuda import capture
from eps_deploy.engines.trt.engine import TrtEngine
from tests.deploy.engines.trt.contract import Version
from tests.deploy.engines.trt.machine import (
    CLASSES,
    SHAPE,
    Machine,
    close,
    expected,
    images,
    metadata_of,
    network,
)
from tests.deploy.engines.trt.run_checks import EVERY_CHECK
from tests.deploy.engines.trt.semantic_fake import make_plan


@pytest.mark.parametrize(("check", "version"), EVERY_CHECK)
def test_engine(check: Callable[[Any, Version], None], version: Version) -> None:
    check(TrtEngine, version)


def test_a_deployed_network(deployed: Path) -> None:
    """The real export, at the batch sizes of the chain of proof."""
    model = (deployed / "bundle" / "model.onnx").read_bytes()
    machine = Machine()
    profiles = ((1, 1, 1), (2, 16, 32))
    plan = make_plan(model, profiles=profiles)
    metadata = metadata_of(plan, machine.host, profiles=profiles)
    with machine.engine(TrtEngine, plan, metadata=metadata) as engine:
        pixels = np.random.default_rng(0).integers(
            0, 256, (32, *engine.input_shape), dtype=np.uint8
        )
        for batch in (1, 2, 16, 32, 7):
            assert close(engine.infer(pixels[:batch]), expected(pixels[:batch], model)), batch
    machine.gpu.check_clean()


def test_signature_and_description() -> None:
    machine = Machine()
    engine: Engine
    with machine.engine(TrtEngine) as engine:
        assert engine.input_shape == SHAPE
        assert (engine.classes, engine.max_batch) == (CLASSES, 8)
        engine.infer(images(3))
        told = engine.describe()
    assert (told["name"], told["runtime"], told["version"]) == ("trt", "tensorrt", "11.4.0.106")
    assert (told["device"], told["compute_capability"]) == ("NVIDIA Fake GPU", "9.0")
    assert told["cuda_graphs"] == {
        "used": True,
        "why_not": None,
        "batches": [4],
        "not_captured": {},
    }


@pytest.mark.parametrize(
    ("pixels", "told"),
    [
        (np.zeros((1, *SHAPE), np.float32), "uint8"),
        (np.zeros((9, *SHAPE), np.uint8), "1 to 8 images, not 9"),
        (np.zeros((0, *SHAPE), np.uint8), "1 to 8 images, not 0"),
        (np.zeros((1, 3, 6, 7), np.uint8), r"\[N, 3, 6, 6\]"),
    ],
)
def test_images_that_do_not_fit_are_refused(pixels: Any, told: str) -> None:
    machine = Machine()
    with machine.engine(TrtEngine) as engine:
        for call in (engine.infer, lambda batch: engine.time_on_device(batch, 2)):
            with pytest.raises(DataError, match=told):
                call(pixels)


def test_a_closed_engine_says_so() -> None:
    machine = Machine()
    with machine.engine(TrtEngine) as engine:
        engine.infer(images(1))
    engine.close()
    for call in (engine.infer, lambda batch: engine.time_on_device(batch, 2)):
        with pytest.raises(EngineError, match=r"model\.plan: the engine was closed"):
            call(images(1))
    assert engine.describe()["cuda_graphs"]["batches"] == [1]
    machine.gpu.check_clean()


def test_another_thread_may_close_it() -> None:
    machine = Machine()
    engine = machine.engine(TrtEngine)
    engine.infer(images(2))
    thread = threading.Thread(target=engine.close)
    thread.start()
    thread.join()
    machine.gpu.check_clean()


def test_close_waits_for_a_call_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    engine = machine.engine(TrtEngine)
    inside, go_on = threading.Event(), threading.Event()
    stage = engine_module.ExecutionContext._stage

    def slow(self: engine_module.ExecutionContext, pixels: Any) -> int:
        inside.set()
        assert go_on.wait(60)
        return stage(self, pixels)

    monkeypatch.setattr(engine_module.ExecutionContext, "_stage", slow)
    answers: list[Any] = []
    call = threading.Thread(target=lambda: answers.append(engine.infer(images(2))))
    call.start()
    assert inside.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    with engine._changed:
        engine._changed.wait_for(lambda: engine._closing, 60)
    assert not machine.gpu.order  # nothing was freed yet
    go_on.set()
    call.join()
    closing.join()
    assert close(answers[0], expected(images(2)))
    machine.gpu.check_clean()


@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_as_many_calls_in_flight_as_contexts(
    contexts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one plan; further calls wait until one is free."""
    machine = Machine()
    stage = engine_module.ExecutionContext._stage
    meeting, lock = threading.Barrier(contexts), threading.Lock()
    running: list[int] = [0]
    most: list[int] = []

    def together(self: engine_module.ExecutionContext, pixels: Any) -> int:
        with lock:
            running[0] += 1
            most.append(running[0])
        meeting.wait(60)
        with lock:
            running[0] -= 1
        return stage(self, pixels)

    monkeypatch.setattr(engine_module.ExecutionContext, "_stage", together)
    with machine.engine(TrtEngine, contexts=contexts) as engine:
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda: answers.append(engine.infer(images(2))))
            for _ in range(2 * contexts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(most) == contexts
        assert [close(answer, expected(images(2))) for answer in answers] == [True] * 2 * contexts
        assert engine.describe()["contexts"] == contexts
    assert machine.trt.count("Runtime", "deserialize_cuda_engine") == 1
    machine.gpu.check_clean()


@pytest.mark.parametrize(
    "call", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"]
)
def test_a_failed_capture_is_described_and_launches_go_on(call: str) -> None:
    machine = Machine()
    machine.gpu.refuse[call] = 1
    with machine.engine(TrtEngine) as engine:
        for batch in (2, 2, 8):
            assert close(engine.infer(images(batch)), expected(images(batch)))
        told = engine.describe()["cuda_graphs"]
    assert told["batches"] == [8]
    assert list(told["not_captured"]) == ["2"]
    assert call in told["not_captured"]["2"]
    machine.gpu.check_clean()


def test_a_network_that_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT refuses to queue it while the stream records; the stream must come out of that."""
    machine = Machine()

    def refusing(*arguments: Any) -> Any:
        machine.gpu.refuse["execute_async_v3"] = 1
        return capture(*arguments)

    monkeypatch.setattr(engine_module, "capture", refusing)
    with machine.engine(TrtEngine) as engine:
        assert close(engine.infer(images(2)), expected(images(2)))
        assert "cannot queue" in engine.describe()["cuda_graphs"]["not_captured"]["2"]
    machine.gpu.check_clean()


def test_without_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    machine.cuda._bindings = None
    with machine.engine(TrtEngine) as engine:
        assert close(engine.infer(images(2)), expected(images(2)))
        told = engine.describe()["cuda_graphs"]
    assert not told["used"]
    assert "eps-resnet[trt]" in told["why_not"]


def test_a_copy_that_cannot_be_recorded() -> None:
    machine = Machine()
    machine.gpu.refuse["memcpy_dtoh_async"] = 1
    with machine.engine(TrtEngine) as engine:
        assert close(engine.infer(images(2)), expected(images(2)))
        told = engine.describe()["cuda_graphs"]
    assert "cannot copy from the GPU" in told["not_captured"]["2"]
    machine.gpu.check_clean()


def test_each_padded_size_has_one_context_of_the_right_profile() -> None:
    machine = Machine()
    with machine.engine(TrtEngine) as engine:
        for batch in (1, 2, 7, 3, 7, 1, 8, 2, 4, 5):
            engine.infer(images(batch))
        assert engine.describe()["cuda_graphs"]["batches"] == [1, 2, 4, 8]
        selected = [
            call.arguments[0]
            for call in machine.trt.calls
            if call.name == "set_optimization_profile_async"
        ]
        assert selected == [0, 1, 1, 1]
    assert machine.trt.count("ICudaEngine", "create_execution_context") == 4
    machine.gpu.check_clean()


def test_a_graph_is_launched_not_recorded_again() -> None:
    machine = Machine()
    with machine.engine(TrtEngine) as engine:
        engine.infer(images(2))
        before = len(machine.trt.calls)
        assert close(engine.infer(images(2, 1)), expected(images(2, 1)))
        assert len(machine.trt.calls) == before


def test_host_code_is_allowed_to_version_compatible_plans_alone() -> None:
    for compatible in (True, False):
        machine = Machine()
        plan = make_plan(network())
        metadata = metadata_of(plan, machine.host, version_compatible=compatible)
        with machine.engine(TrtEngine, plan, metadata=metadata):
            pass
        assert machine.trt.count("Runtime", "set engine_host_code_allowed") == compatible


def test_a_plan_for_one_image_alone() -> None:
    """TensorRT fixes the batch in its signature then."""
    machine = Machine()
    one = ((1, 1, 1),)
    plan = make_plan(network(), profiles=one)
    with machine.engine(
        TrtEngine, plan, metadata=metadata_of(plan, machine.host, profiles=one)
    ) as engine:
        assert engine.max_batch == 1
        assert close(engine.infer(images(1)), expected(images(1)))
        with pytest.raises(DataError, match="1 to 1 images, not 2"):
            engine.infer(images(2))
    machine.gpu.check_clean()


def test_two_engines_side_by_side() -> None:
    """As baseline and compact network are measured; each has its own memory and its own answers."""
    machine = Machine()
    other = make_plan(network(1))
    with machine.engine(TrtEngine) as first, machine.engine(TrtEngine, other) as second:
        for batch in (8, 1, 8):
            assert close(first.infer(images(batch)), expected(images(batch)))
            assert close(second.infer(images(batch)), expected(images(batch), network(1)))
    machine.gpu.check_clean()


_UNCLOSED = """
import atexit, sys
from eps_deploy.engines.trt.engine import TrtEngine
from tests.deploy.engines.trt.machine import Machine, images

gpus = []
def tell():  # the last of all that happens at exit, as the first to be registered
    for gpu in gpus:
        print(gpu.leaks, {kind: count for kind, count in gpu.live.items() if count})
atexit.register(tell)
machine = Machine()
gpus.append(machine.gpu)
engines = [machine.engine(TrtEngine) for _ in range(2)]
for engine in engines:
    engine.infer(images(2))
if sys.argv[1] == "close":
    engines[0].close()
"""


@pytest.mark.parametrize("end", ["close", "no close"])
def test_a_process_that_ends_frees_its_engines_and_then_the_context(end: str) -> None:
    """TensorRT's objects that die after their context do so with complaints, or a crash."""
    done = subprocess.run(
        [sys.executable, "-c", _UNCLOSED, end],
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] {}\n", "")


def test_a_closed_engine_is_garbage_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the engine nor what would close it stays until the end of the process."""
    machine = Machine()
    at_exit: list[Any] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(atexit, "unregister", at_exit.remove)
    with machine.engine(TrtEngine) as engine:
        left = weakref.ref(engine)
        assert len(at_exit) == 1
    del engine
    gc.collect()
    assert left() is None
    assert not at_exit


def test_many_engines_leave_nothing_behind() -> None:
    machine = Machine()
    for _ in range(50):
        with machine.engine(TrtEngine) as engine:
            engine.infer(images(1))
    machine.gpu.check_clean()
    with machine.cuda.current():
        assert machine.cuda.free_memory() == machine.gpu.memory
