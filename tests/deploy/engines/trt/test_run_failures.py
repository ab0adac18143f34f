"""`TrtEngine` when something goes wrong: one line that says what, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.engine import TrtEngine
from tests.deploy.engines.trt.machine import Machine, close, expected, images, network
from tests.deploy.engines.trt.semantic_fake import make_plan


@pytest.mark.parametrize("call", ["memcpy_htod_async", "memcpy_dtoh_async", "cuGraphLaunch"])
def test_after_a_failed_call_it_goes_on(call: str) -> None:
    machine = Machine()
    with machine.engine(TrtEngine, use_graphs=call == "cuGraphLaunch") as engine:
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


def test_too_little_memory_for_a_second_context(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    original, calls = machine.pycuda.mem_alloc, 0

    def fourth_fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            machine.gpu.refuse["mem_alloc"] = 1
        return original(*arguments)

    monkeypatch.setattr(machine.pycuda, "mem_alloc", fourth_fails, raising=False)
    with pytest.raises(EngineError, match=r"CUDA: cannot have .* out of memory"):
        machine.engine(TrtEngine, contexts=2)
    machine.gpu.check_clean()


def test_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    with machine.engine(TrtEngine) as engine:
        machine.gpu.refuse["create_execution_context"] = 1
        with pytest.raises(EngineError, match="makes no execution context: create_execution"):
            engine.infer(images(2))
        assert close(engine.infer(images(2)), expected(images(2)))


def test_other_bytes_than_a_plan_are_refused() -> None:
    machine = Machine()
    with pytest.raises(EngineError, match=r"model\.plan: TensorRT does not load it: .*stdVersion"):
        machine.engine(TrtEngine, b"garbage")
    machine.gpu.check_clean()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"input_type": "FLOAT"}, "not a plan of eps-deploy"),
        ({"profiles": ((1, 4, 8),)}, r"takes batches of \(1, 4, 8\) .* metadata says \(1, 1, 1\)"),
        ({"profiles": ((1, 1, 1), (2, 4, 16))}, "where its metadata says"),
        ({"profiles": ((1, 1, 1), (4, 4, 8))}, "where its metadata says"),
        ({"profiles": ((1, 1, 1), (2, 4, 8), (9, 9, 9))}, "where its metadata says"),
        ({"profiles": ()}, "takes batches of no profile"),
    ],
)
def test_a_foreign_plan_is_refused(changes: dict[str, Any], told: str) -> None:
    machine = Machine()
    plan = make_plan(network(), **changes)
    with pytest.raises(EngineError, match=told):
        machine.engine(TrtEngine, plan)
    machine.gpu.check_clean()
