from __future__ import annotations

import threading
from functools import partial

import pytest

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt import build as module
from eps_deploy.engines.trt.build import _Worker
from tests.deploy.engines.trt.builder import Builder
from tests.deploy.engines.trt.checks import run
from tests.deploy.engines.trt.contract import VERSIONS, Version

both = pytest.mark.parametrize("version", VERSIONS)


@both
def test_progress_is_reported_on_the_callers_thread(version: Version) -> None:
    seen = []

    def progress(phase: str, done: int, steps: int) -> bool:
        seen.append((phase, done, steps, threading.current_thread()))
        return True

    run(module, Builder(version), progress=progress)
    here = threading.current_thread()
    assert seen == [
        *(("Building engine", done, 3, here) for done in range(4)),
        ("Building engine", 3, 3, here),
    ]


def test_progress_can_cancel_the_build() -> None:
    with pytest.raises(EngineError, match="cancelled"):
        run(module, Builder(steps=1000), progress=lambda phase, done, steps: False)


def test_exceptions_of_the_callers_functions_are_raised() -> None:
    def log(text: str) -> None:
        raise LookupError(text)

    with pytest.raises(LookupError, match="warning: a slow kernel"):
        run(module, Builder(), log=log)


def test_the_result_comes_after_all_queued_calls() -> None:
    worker: _Worker[int] = _Worker()
    heard: list[object] = []

    def work() -> int:
        worker.call(partial(heard.append, "one"))
        worker.call(partial(heard.append, None))
        return 7

    assert worker.run(work) == 7
    assert heard == ["one", None]


def test_exceptions_of_the_work_are_raised() -> None:
    worker: _Worker[None] = _Worker()

    def work() -> None:
        raise LookupError("there")

    with pytest.raises(LookupError, match="there"):
        worker.run(work)
