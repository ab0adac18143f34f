"""`TrtEngine` on a GPU and a TensorRT made of host memory and ONNX Runtime.

What this cannot show: that a real plan loads, is right, or is fast. That is for `test_gpu.py`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eps_deploy.engines.base import Engine, EngineError
from eps_deploy.engines.trt import lane, run
from eps_deploy.engines.trt.graphs import capture
from eps_deploy.engines.trt.run import LANES, TrtEngine
from eps_train.errors import DataError

from .contract import Version
from .machine import (
    CLASSES,
    PROFILE,
    SHAPE,
    Machine,
    close,
    expected,
    images,
    network,
    sidecar_of,
)
from .mutation import install, mutated
from .run_checks import EVERY_CHECK, noticed
from .semantic_fake import make_plan


@pytest.mark.parametrize(("check", "version"), EVERY_CHECK)
def test_engine(check: Callable[[Any, Version], None], version: Version) -> None:
    check(TrtEngine, version)


def test_a_deployed_network(deployed: Path) -> None:
    """The real export, at the batch sizes of the chain of proof."""
    model = (deployed / "bundle" / "model.onnx").read_bytes()
    machine = Machine()
    plan = make_plan(model, profile=(1, 16, 32))
    sidecar = sidecar_of(plan, machine.host, profile=(1, 16, 32))
    with machine.engine(TrtEngine, plan, sidecar=sidecar) as engine:
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
        "batches": [3],
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
    send = lane.Lane._send

    def slow(self: lane.Lane, pixels: Any) -> None:
        send(self, pixels)
        inside.set()
        assert go_on.wait(60)

    monkeypatch.setattr(lane.Lane, "_send", slow)
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


def test_so_many_lanes_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    send = lane.Lane._send
    meeting = threading.Barrier(LANES)

    def together(self: lane.Lane, pixels: Any) -> None:
        meeting.wait(60)
        send(self, pixels)

    monkeypatch.setattr(lane.Lane, "_send", together)
    with machine.engine(TrtEngine) as engine:
        threads = [
            threading.Thread(target=engine.infer, args=(images(2),)) for _ in range(2 * LANES)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.describe()["lanes"] == {"made": LANES, "why_no_more": None}
    machine.gpu.check_clean()


def test_one_lane_will_do_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    send = lane.Lane._send
    inside, go_on = threading.Event(), threading.Event()

    def slow(self: lane.Lane, pixels: Any) -> None:
        inside.set()
        assert go_on.wait(60)
        send(self, pixels)

    monkeypatch.setattr(lane.Lane, "_send", slow)
    tried = threading.Event()
    with machine.engine(TrtEngine) as engine:
        add_lane = engine._add_lane

        def refused() -> Any:
            try:
                return add_lane()
            finally:
                tried.set()

        answers: list[Any] = []
        first = threading.Thread(target=lambda: answers.append(engine.infer(images(2))))
        first.start()
        assert inside.wait(60)
        machine.gpu.refuse["mem_alloc"] = 1
        monkeypatch.setattr(engine, "_add_lane", refused)
        second = threading.Thread(target=lambda: answers.append(engine.infer(images(2))))
        second.start()
        assert tried.wait(60)
        go_on.set()
        first.join()
        second.join()
        assert [close(answer, expected(images(2))) for answer in answers] == [True, True]
        told = engine.describe()["lanes"]
    assert told["made"] == 1
    assert "out of memory" in told["why_no_more"]
    machine.gpu.check_clean()


@pytest.mark.parametrize(
    "call", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"]
)
def test_no_graph_is_said_and_made_up_for(call: str) -> None:
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

    monkeypatch.setattr(lane, "capture", refusing)
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


def test_graphs_for_so_many_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further ones share a context, which is told its shape each time."""
    monkeypatch.setattr(lane, "MOST_GRAPHS", 2)
    machine = Machine()
    with machine.engine(TrtEngine) as engine:
        for batch in (1, 2, 7, 3, 7, 1, 8, 2):
            assert close(engine.infer(images(batch)), expected(images(batch)))
        assert engine.describe()["cuda_graphs"]["batches"] == [1, 2]
    machine.gpu.check_clean()


def test_a_graph_is_launched_not_recorded_again() -> None:
    machine = Machine()
    with machine.engine(TrtEngine) as engine:
        engine.infer(images(2))
        before = len(machine.trt.calls)
        assert close(engine.infer(images(2, 1)), expected(images(2, 1)))
        assert len(machine.trt.calls) == before


@pytest.mark.parametrize("call", ["memcpy_htod_async", "memcpy_dtoh_async", "cuGraphLaunch"])
def test_after_a_failed_call_it_goes_on(call: str) -> None:
    machine = Machine()
    with machine.engine(TrtEngine) as engine:
        engine.infer(images(2))
        machine.gpu.refuse[call] = 1
        with pytest.raises(EngineError, match=r"CUDA|cuGraphLaunch"):
            engine.infer(images(2, 1))
        assert close(engine.infer(images(2, 2)), expected(images(2, 2)))
    machine.gpu.check_clean()


def test_a_gpu_that_failed_is_not_used_again() -> None:
    """After an illegal access nothing works in this process; each call says so, and close ends."""
    machine = Machine()
    with machine.engine(TrtEngine) as engine:
        engine.infer(images(2))
        machine.gpu.refuse["synchronize"] = 10
        with pytest.raises(EngineError, match=r"illegal memory access.*start it again"):
            engine.infer(images(2))
        with pytest.raises(EngineError, match="start it again"):
            engine.infer(images(2))
        assert machine.gpu.refuse["synchronize"] == 8  # the second call did not try
    with pytest.raises(EngineError, match="closed"):
        engine.infer(images(2))


@pytest.mark.parametrize(
    ("call", "other_calls"),
    [*(("mem_alloc", n) for n in range(3)), *(("pagelocked_empty", n) for n in range(2))],
)
def test_too_little_memory(call: str, other_calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out when the engine is made, in one line, and what there was of it is freed."""
    machine = Machine()
    original = getattr(machine.pycuda, call)
    calls = 0

    def last_fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > other_calls:
            machine.gpu.refuse[call] = 1
        return original(*arguments)

    monkeypatch.setattr(machine.pycuda, call, last_fails, raising=False)
    with pytest.raises(EngineError, match=r"CUDA: cannot have .* out of memory"):
        machine.engine(TrtEngine)
    machine.gpu.check_clean()


def test_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    with machine.engine(TrtEngine) as engine:
        machine.gpu.refuse["create_execution_context"] = 1
        with pytest.raises(EngineError, match="makes no execution context: create_execution"):
            engine.infer(images(2))
        assert close(engine.infer(images(2)), expected(images(2)))


def test_what_is_no_plan_is_refused() -> None:
    machine = Machine()
    with pytest.raises(EngineError, match=r"model\.plan: TensorRT does not load it: .*stdVersion"):
        machine.engine(TrtEngine, b"garbage")
    machine.gpu.check_clean()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"input_type": "FLOAT"}, "not a plan of eps-deploy"),
        ({"profiles": 2}, "not a plan of eps-deploy"),
        ({"profile": (1, 4, 16)}, "where its sidecar says"),
        ({"profile": (2, 4, 8)}, "where its sidecar says"),
    ],
)
def test_a_stranger_s_plan_is_refused(changes: dict[str, Any], told: str) -> None:
    machine = Machine()
    plan = make_plan(network(), **{"profile": PROFILE, **changes})
    with pytest.raises(EngineError, match=told):
        machine.engine(TrtEngine, plan)
    machine.gpu.check_clean()


def test_host_code_is_allowed_to_version_compatible_plans_alone() -> None:
    for compatible in (True, False):
        machine = Machine()
        plan = make_plan(network(), profile=PROFILE)
        sidecar = sidecar_of(plan, machine.host, version_compatible=compatible)
        with machine.engine(TrtEngine, plan, sidecar=sidecar):
            pass
        assert machine.trt.count("Runtime", "set engine_host_code_allowed") == compatible


def test_two_engines_side_by_side() -> None:
    """As baseline and compact network are measured; each has its own memory and its own answers."""
    machine = Machine()
    other = make_plan(network(1), profile=PROFILE)
    with machine.engine(TrtEngine) as first, machine.engine(TrtEngine, other) as second:
        for batch in (8, 1, 8):
            assert close(first.infer(images(batch)), expected(images(batch)))
            assert close(second.infer(images(batch)), expected(images(batch), network(1)))
    machine.gpu.check_clean()


def test_many_lives_leave_nothing() -> None:
    machine = Machine()
    for _ in range(50):
        with machine.engine(TrtEngine) as engine:
            engine.infer(images(1))
    machine.gpu.check_clean()
    with machine.cuda.current():
        assert machine.cuda.free_memory() == machine.gpu.memory


_SET = """            self._set(self._common, batch, log)
            return _Pass"""
_READ = """            self._stream.synchronize()
            logits"""
_STAGED = "staged = self._host_images.array[: len(images)]"
_OWN = """        self._spare = None
        return own"""

# Each by what breaks: which module, which text in it, what stands there instead.
MUTATIONS: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "addresses swapped": (
        lane,
        [("(INPUT_NAME, self._images), (OUTPUT_NAME", "(OUTPUT_NAME, self._images), (INPUT_NAME")],
    ),
    "shape set for a larger batch alone": (
        lane,
        [
            (
                _SET,
                _SET.replace(
                    "self._set(self._common, batch, log)",
                    "if batch > getattr(self, 'most', 0):"
                    " self._set(self._common, batch, log); self.most = batch",
                ),
            )
        ],
    ),
    "shape set once": (
        lane,
        [
            (
                _SET,
                _SET.replace("self._set", "if not hasattr(self, 'once'): self.once = self._set"),
            )
        ],
    ),
    "not waited for": (lane, [(_READ, "            logits")]),
    "float32 for uint8": (
        lane,
        [
            ("cuda.page_locked(images, np.uint8)", "cuda.page_locked(images, np.float32)"),
            ('casting="no"', 'casting="unsafe"'),
        ],
    ),
    "a refused shape ignored": (lane, [("self._require(accepted,", "self._require(True,")]),
    "a refused address ignored": (lane, [("self._require(taken,", "self._require(True,")]),
    "a refused run ignored": (lane, [("self._require(done,", "self._require(True,")]),
    "unknown shapes ignored": (lane, [("self._require(not unknown,", "self._require(True,")]),
    "images buffer for the optimal batch": (
        lane,
        [("images = (plan.profile[2]", "images = (plan.profile[1]")],
    ),
    "memory of the GPU for the optimal batch": (
        lane,
        [("math.prod(images))", "math.prod(images) // 8 * plan.profile[1])")],
    ),
    "logits buffer for the optimal batch": (
        lane,
        [("logits = (plan.profile[2]", "logits = (plan.profile[1]")],
    ),
    "copied from memory that is not page-locked": (
        lane,
        [(_STAGED, "staged = np.empty(images.shape, np.uint8)")],
    ),
    "copied from memory that is freed early": (
        lane,
        [
            (
                "self._cuda.copy_in(self._images, staged, self._stream)",
                "early = self._cuda.page_locked(images.shape, np.uint8); early.array[:] = images;"
                " self._cuda.copy_in(self._images, early.array, self._stream); early.free()",
            )
        ],
    ),
    "the caller gets the buffer itself": (lane, [("found.copy()", "found")]),
    "recorded without a first run": (
        lane,
        [("self._enqueue(_Pass(context, None), log)  # once", "pass  # once")],
    ),
    "one context for all graphs": (lane, [(_OWN, "        return own")]),
    "sidecar not checked": (run, [("        sidecar.check(plan, self._host, name=name)\n", "")]),
    "memory freed before the contexts": (
        run,
        [
            ("steps.callback(lane.free)", "steps.callback(lane.release)"),
            (
                "                steps.callback(lane.release)\n\n    @",
                "                steps.callback(lane.free)\n\n    @",
            ),
        ],
    ),
    "plan freed before the contexts": (
        run,
        [
            ("            steps.callback(self._plan.free)\n", ""),
            (
                "steps.callback(lane.release)",
                "steps.callback(lane.release)\n            steps.callback(self._plan.free)",
            ),
        ],
    ),
    "one lane for all threads": (
        run,
        [
            ("return self._idle.pop()", "return self._lanes[0]"),
            ("self._idle.append(lane)", "pass"),
        ],
    ),
    "no context in the thread": (
        run,
        [("with self._cuda.current():\n            lane", "if True:\n            lane")],
    ),
    "nothing freed": (run, [("            self._free()\n", "            pass\n")]),
    "default stream": (
        lane,
        [("self._stream.handle)\n            self._require", "0)\n            self._require")],
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_engine_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, edits = MUTATIONS[name]
    broken = mutated(module, *edits)
    if module is lane:
        install(monkeypatch, run, lane, broken)
        kind = run.TrtEngine
    else:
        kind = broken.TrtEngine
    assert noticed(kind), f"{name}: no check fails"


def test_the_engine_as_it_is_is_not() -> None:
    """Or the test above would prove nothing."""
    assert not noticed(TrtEngine)
